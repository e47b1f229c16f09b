use std::fmt;

use crate::{Error, ImageSource, Result};

/// Images in memory, a byte a pixel, each perhaps with a label.
///
/// As an [`ImageSource`] it maps a pixel `p` to `p / 127.5 - 1`, so 0 to -1 and 255 to 1.
///
/// ```
/// use ddpm::{ImageSource, Images};
///
/// // Two grey images of 1 x 2 pixels.
/// let images = Images::new(vec![0, 255, 51, 204], (1, 1, 2))?;
/// let mut pixels = [0.0; 2];
/// images.read(0, &mut pixels)?;
/// assert_eq!(pixels, [-1.0, 1.0]);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Images {
    pixels: Vec<u8>,
    labels: Option<Vec<u8>>,
    shape: (usize, usize, usize),
    /// Pixels of one image: the product of `shape`, at least 1.
    size: usize,
}

impl Images {
    /// Images of `shape` (channels, height, width), one after the other in `pixels`, each channel
    /// by channel and row by row.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if a dimension is 0, or if the length of `pixels` is not a multiple of
    /// channels x height x width.
    pub fn new(pixels: Vec<u8>, shape: (usize, usize, usize)) -> Result<Self> {
        let (channels, height, width) = shape;
        let size = channels
            .checked_mul(height)
            .and_then(|plane| plane.checked_mul(width))
            .filter(|&size| size > 0)
            .ok_or_else(|| {
                let expected = "three dimensions of at least 1, whose product fits in memory";
                Error::config("shape", format!("{shape:?}"), expected)
            })?;
        if !pixels.len().is_multiple_of(size) {
            return Err(Error::config(
                "pixels.len()",
                pixels.len(),
                format!("a multiple of {size}, the pixels of an image of shape {shape:?}"),
            ));
        }
        Ok(Self { pixels, labels: None, shape, size })
    }

    /// The same images, with one label each.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if there are not as many labels as images.
    pub fn with_labels(mut self, labels: Vec<u8>) -> Result<Self> {
        if labels.len() != self.len() {
            let expected = format!("{}, one for each image", self.len());
            return Err(Error::config("labels.len()", labels.len(), expected));
        }
        self.labels = Some(labels);
        Ok(self)
    }

    /// Keeps the first `len` images, or all of them where there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.pixels.truncate(len.saturating_mul(self.size));
        if let Some(labels) = &mut self.labels {
            labels.truncate(len);
        }
    }

    /// The pixels of image `index`, channel by channel, row by row; `None` past the last image.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let start = index.checked_mul(self.size)?;
        self.pixels.get(start..start.checked_add(self.size)?)
    }

    /// The pixels of all images, one image after the other.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The label of each image, where they have labels.
    pub fn labels(&self) -> Option<&[u8]> {
        self.labels.as_deref()
    }
}

impl ImageSource for Images {
    fn len(&self) -> usize {
        self.pixels.len() / self.size
    }

    fn shape(&self) -> (usize, usize, usize) {
        self.shape
    }

    /// # Errors
    ///
    /// [`Error::Config`] if there is no image `index`, or if `pixels` has not an image's length.
    fn read(&self, index: usize, pixels: &mut [f32]) -> Result<()> {
        let image = self.get(index).ok_or_else(|| {
            Error::config("index", index, format!("less than {}, the number of images", self.len()))
        })?;
        if pixels.len() != image.len() {
            let expected = format!("{}, the pixels of an image", image.len());
            return Err(Error::config("pixels.len()", pixels.len(), expected));
        }
        for (to, &from) in pixels.iter_mut().zip(image) {
            *to = f32::from(from) / 127.5 - 1.0;
        }
        Ok(())
    }
}

// Derived, it would print every pixel.
impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images")
            .field("len", &self.len())
            .field("shape", &self.shape)
            .field("labelled", &self.labels.is_some())
            .finish_non_exhaustive()
    }
}
