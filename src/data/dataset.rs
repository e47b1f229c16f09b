use crate::error::Result;

/// The shape of every image of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImageShape {
    /// Number of channels: 1 for grey images, 3 for colour.
    pub channels: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

impl ImageShape {
    /// The number of values of an image, or `None` if it exceeds `usize`.
    pub fn values(&self) -> Option<usize> {
        self.channels.checked_mul(self.height)?.checked_mul(self.width)
    }
}

impl From<(usize, usize, usize)> for ImageShape {
    /// Converts from (channels, height, width).
    fn from((channels, height, width): (usize, usize, usize)) -> Self {
        Self { channels, height, width }
    }
}

impl From<ImageShape> for (usize, usize, usize) {
    /// Converts to (channels, height, width).
    fn from(ImageShape { channels, height, width }: ImageShape) -> Self {
        (channels, height, width)
    }
}

/// Images to train on, all of the same shape and accessed by index. They may have classes.
///
/// A data set only reads one image at a time. The [`Trainer`](crate::Trainer) shuffles, batches and flips the images.
/// It maps a byte `p` to `p / 127.5 - 1` by [`normalized`], so 0 to -1 and 255 to 1.
///
/// ```
/// use ddpm::data::{Dataset, ImageShape};
/// use ddpm::Result;
///
/// /// White discs of eight sizes on black: one channel, 16 x 16 pixels.
/// struct Discs;
///
/// impl Dataset for Discs {
///     fn len(&self) -> usize {
///         8
///     }
///
///     fn shape(&self) -> ImageShape {
///         ImageShape { channels: 1, height: 16, width: 16 }
///     }
///
///     fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
///         for (i, pixel) in pixels.iter_mut().enumerate() {
///             let (y, x) = ((i / 16) as f32 - 7.5, (i % 16) as f32 - 7.5);
///             *pixel = if x.hypot(y) < index as f32 { 255 } else { 0 };
///         }
///         Ok(None)
///     }
/// }
///
/// let mut pixels = [0; 256];
/// Discs.read(7, &mut pixels)?;
/// assert_eq!((pixels[0], pixels[8 * 16 + 8]), (0, 255));
/// # Ok::<(), ddpm::Error>(())
/// ```
///
/// [`Trainer::fit`](crate::Trainer::fit) calls [`read_augmented`](Self::read_augmented), whose default calls
/// [`read`](Self::read), on a separate thread, for one image after the other. It reads the next batch while the network
/// is trained with the present one. If reading a batch takes longer than an update, read on several
/// [`threads`](Self::threads), or decode all images once, into [`Images`](crate::data::Images):
///
/// ```
/// use ddpm::data::Images;
///
/// # let decoded = vec![vec![0; 3 * 32 * 32]; 2];
/// // Most decoders return red, green and blue of each pixel together, here in pictures of
/// // 32 x 32 pixels. `Images` expects all of red first, then all of green, then all of blue.
/// let mut pixels = Vec::new();
/// for picture in &decoded {
///     for channel in 0..3 {
///         pixels.extend(picture.iter().skip(channel).step_by(3));
///     }
/// }
/// let images = Images::new(pixels, (3, 32, 32))?;
/// # assert_eq!(images.pixels().len(), 2 * 3 * 32 * 32);
/// # Ok::<(), ddpm::Error>(())
/// ```
pub trait Dataset: Send + Sync {
    /// The number of images.
    fn len(&self) -> usize;

    /// Returns whether there are no images.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of every image.
    fn shape(&self) -> ImageShape;

    /// The number of classes, or 0 if the images have none. The default is 0.
    fn classes(&self) -> usize {
        0
    }

    /// Writes image `index` into `pixels`, channel by channel, row by row. Returns its class, which is less than
    /// [`classes`](Self::classes), or `None` if the images have no classes.
    ///
    /// The length of `pixels` is `channels * height * width`, and `index` is less than [`len`](Self::len). `pixels`
    /// initially holds another image, so every value must be written. The same index must always give the same image.
    /// Otherwise a run cannot be resumed exactly.
    ///
    /// # Errors
    ///
    /// Returns an error if the image cannot be read, which ends training. [`Error::external`](crate::Error::external)
    /// wraps errors of other libraries.
    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>>;

    /// Writes image `index` as [`read`](Self::read) does, but changed at random, for example by a random crop. Training
    /// calls this method. The default calls [`read`](Self::read).
    ///
    /// `random` is uniformly distributed. It is a function of the run's seed, the update, and the position of the image
    /// in the batch of the update. The same `index` and `random` must always give the same image. Otherwise a run
    /// cannot be resumed exactly.
    ///
    /// # Errors
    ///
    /// Returns an error if the image cannot be read, which ends training.
    fn read_augmented(&self, index: usize, random: u64, pixels: &mut [u8]) -> Result<Option<u32>> {
        let _ = random;
        self.read(index, pixels)
    }

    /// The number of threads that read the images of a batch at the same time. The default is 1. Batches do not depend
    /// on it.
    fn threads(&self) -> usize {
        1
    }
}

/// The value in [-1, 1] that stands for a byte in training: `pixel / 127.5 - 1`.
pub fn normalized(pixel: u8) -> f32 {
    f32::from(pixel) / 127.5 - 1.0
}
