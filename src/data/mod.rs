//! Where training images come from.
//!
//! [`Images`] holds a set in memory, one byte per value; [`mnist`] and [`cifar10`] read one from the
//! files in which those sets are distributed. Anything else is an [`ImageSource`] of your own.

mod cifar;
mod file;
mod idx;
mod images;

use crate::Result;

pub use cifar::cifar10;
pub use idx::{mnist, read_idx_images, read_idx_labels};
pub use images::Images;

/// Which part of a data set to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// The images to train on.
    Train,
    /// The images held back for evaluation.
    Test,
}

/// Images to train on, each of the same shape, found by index.
///
/// A source only has to deliver one image at a time; shuffling, batching and flips are the
/// [`Trainer`](crate::Trainer)'s.
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
/// [`Trainer::fit`](crate::Trainer::fit) calls [`read`](Self::read) in its own thread, one image after the other, and a
/// step waits for the images of its batch. Where reading takes long, decode once, into [`Images`]:
///
/// ```
/// use ddpm::Images;
///
/// # let decoded = vec![vec![0; 3 * 32 * 32]; 2];
/// // Pictures of 32 x 32 pixels as most decoders give them: red, green and blue of each pixel
/// // together. In `Images` all red comes first, then all green, then all blue.
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
    /// How many images there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Channels, height and width of every image.
    fn shape(&self) -> (usize, usize, usize);

    /// Writes image `index` into `pixels`, channel by channel, row by row, in [-1, 1].
    ///
    /// `pixels` has `channels * height * width` places; `index` is less than [`len`](Self::len).
    /// The same index must give the same image, or a run cannot be resumed exactly.
    ///
    /// The trainer refuses a batch with values outside of [-1, 1]. It cannot see that values from 0 to 1, which
    /// other libraries have, are a mistake: images that never fall below 0 likely are one, and `2.0 * value - 1.0`
    /// brings them into range.
    ///
    /// # Errors
    ///
    /// Whatever reading fails with; those of other libraries are wrapped by
    /// [`Error::external`](crate::Error::external). They end training.
    fn read(&self, index: usize, pixels: &mut [f32]) -> Result<()>;
}
