//! Sources of training images.
//!
//! [`Images`] holds a data set in memory, with one byte per value. [`mnist`] and [`cifar10`] read the files in which
//! those data sets are distributed. For other data, implement [`ImageSource`].

mod cifar;
mod file;
mod idx;
mod images;

use crate::Result;

pub use cifar::cifar10;
pub use idx::{mnist, read_idx_images, read_idx_labels};
pub use images::Images;

/// The part of a data set to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// The images to train on.
    Train,
    /// The images held back for evaluation.
    Test,
}

/// Images to train on, all of the same shape, accessed by index.
///
/// A source only reads one image at a time. The [`Trainer`](crate::Trainer) shuffles, batches and flips the images.
///
/// ```
/// use ddpm::{ImageSource, Result};
///
/// /// White discs of eight sizes on black: one channel, 16 x 16 pixels.
/// struct Discs;
///
/// impl ImageSource for Discs {
///     fn len(&self) -> usize {
///         8
///     }
///
///     fn shape(&self) -> (usize, usize, usize) {
///         (1, 16, 16)
///     }
///
///     fn read(&self, index: usize, pixels: &mut [f32]) -> Result<()> {
///         for (i, pixel) in pixels.iter_mut().enumerate() {
///             let (y, x) = ((i / 16) as f32 - 7.5, (i % 16) as f32 - 7.5);
///             *pixel = if x.hypot(y) < index as f32 { 1.0 } else { -1.0 };
///         }
///         Ok(())
///     }
/// }
///
/// let mut pixels = [0.0; 256];
/// Discs.read(7, &mut pixels)?;
/// assert_eq!((pixels[0], pixels[8 * 16 + 8]), (-1.0, 1.0));
/// # Ok::<(), ddpm::Error>(())
/// ```
///
/// [`Trainer::fit`](crate::Trainer::fit) calls [`read`](Self::read) for one image after the other, in the thread that
/// called `fit`. A step waits until the images of its batch are read. If reading is slow, decode all images once, into
/// [`Images`]:
///
/// ```
/// use ddpm::Images;
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
pub trait ImageSource {
    /// The number of images.
    fn len(&self) -> usize;

    /// Returns whether there are no images.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of channels, the height and the width of every image.
    fn shape(&self) -> (usize, usize, usize);

    /// Writes image `index` into `pixels`, channel by channel, row by row, in [-1, 1].
    ///
    /// The length of `pixels` is `channels * height * width`, and `index` is less than [`len`](Self::len). The same
    /// index must always give the same image. Otherwise a run cannot be resumed exactly.
    ///
    /// The trainer refuses a batch with values outside [-1, 1]. It accepts values from 0 to 1, which other libraries
    /// use, because it cannot distinguish them from bright images. `2.0 * value - 1.0` converts them.
    ///
    /// # Errors
    ///
    /// Returns an error if the image cannot be read, which ends training. [`Error::external`](crate::Error::external)
    /// wraps errors of other libraries.
    fn read(&self, index: usize, pixels: &mut [f32]) -> Result<()>;
}
