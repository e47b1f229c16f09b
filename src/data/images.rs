use std::fmt;

use super::dataset::{Dataset, ImageShape};
use crate::error::{Error, Result};

/// Images in memory, with one byte per value, and perhaps a label for each image.
///
/// ```
/// use ddpm::data::{Dataset, Images};
///
/// // Two grey images of 1 x 2 pixels, of classes 0 and 1.
/// let images = Images::new(vec![0, 255, 51, 204], (1, 1, 2))?.with_labels(vec![0, 1])?;
/// let mut pixels = [0; 2];
/// assert_eq!(images.read(1, &mut pixels)?, Some(1));
/// assert_eq!((pixels, images.classes()), ([51, 204], 2));
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Images {
    pixels: Vec<u8>,
    labels: Option<Vec<u8>>,
    /// 0 without labels.
    classes: usize,
    shape: ImageShape,
    /// Values of one image: the product of `shape`, at least 1.
    size: usize,
}

impl Images {
    /// Creates images of `shape` (channels, height, width) from `pixels`: one image after the other, each channel by
    /// channel and row by row.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Config`] if a dimension is 0, or if the length of `pixels` is not a multiple of
    /// channels x height x width.
    pub fn new(pixels: Vec<u8>, shape: impl Into<ImageShape>) -> Result<Self> {
        let shape = shape.into();
        let size = shape.values().filter(|&size| size > 0).ok_or_else(|| {
            let expected = "three dimensions of at least 1, whose product fits in memory";
            Error::config("shape", tuple(shape), expected)
        })?;
        if !pixels.len().is_multiple_of(size) {
            return Err(Error::config(
                "pixels.len()",
                pixels.len(),
                format!("a multiple of {size}, the pixels of an image of shape {}", tuple(shape)),
            ));
        }
        Ok(Self { pixels, labels: None, classes: 0, shape, size })
    }

    /// Adds one label per image. The number of [classes](Dataset::classes) is the greatest label plus one.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Config`] if the numbers of labels and images differ.
    pub fn with_labels(mut self, labels: Vec<u8>) -> Result<Self> {
        if labels.len() != self.len() {
            let expected = format!("{}, one for each image", self.len());
            return Err(Error::config("labels.len()", labels.len(), expected));
        }
        self.classes = labels.iter().max().map_or(0, |&label| usize::from(label) + 1);
        self.labels = Some(labels);
        Ok(self)
    }

    /// Sets the number of classes, for sets in which the last classes have no images.
    pub(super) fn with_classes(self, classes: usize) -> Self {
        Self { classes, ..self }
    }

    /// Keeps the first `len` images, or all of them if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.pixels.truncate(len.saturating_mul(self.size));
        if let Some(labels) = &mut self.labels {
            labels.truncate(len);
        }
    }

    /// Returns the pixels of image `index`, channel by channel, row by row. Returns `None` past the last image.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let start = index.checked_mul(self.size)?;
        self.pixels.get(start..start.checked_add(self.size)?)
    }

    /// The pixels of all images, one image after the other.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The label of each image, if the images have labels.
    pub fn labels(&self) -> Option<&[u8]> {
        self.labels.as_deref()
    }
}

impl Dataset for Images {
    fn len(&self) -> usize {
        self.pixels.len() / self.size
    }

    fn shape(&self) -> ImageShape {
        self.shape
    }

    fn classes(&self) -> usize {
        self.classes
    }

    /// # Errors
    ///
    /// Returns [`Error::Config`] if there is no image `index`, or if `pixels` does not have the length of an image.
    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        let image = self.get(index).ok_or_else(|| {
            Error::config("index", index, format!("less than {}, the number of images", self.len()))
        })?;
        if pixels.len() != image.len() {
            let expected = format!("{}, the pixels of an image", image.len());
            return Err(Error::config("pixels.len()", pixels.len(), expected));
        }
        pixels.copy_from_slice(image);
        Ok(self.labels.as_ref().and_then(|labels| labels.get(index)).map(|&label| label.into()))
    }
}

fn tuple(shape: ImageShape) -> String {
    format!("{:?}", (shape.channels, shape.height, shape.width))
}

// A derived `Debug` would print every pixel.
impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images")
            .field("len", &self.len())
            .field("shape", &format_args!("{}", tuple(self.shape)))
            .field("labelled", &self.labels.is_some())
            .finish_non_exhaustive()
    }
}
