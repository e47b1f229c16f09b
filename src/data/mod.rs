//! Where training images come from.
//!
//! [`Images`] holds a set in memory, a byte a pixel; [`mnist`] and [`cifar10`] read one from the
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
    /// # Errors
    ///
    /// Whatever reading fails with; those of other libraries are wrapped by
    /// [`Error::external`](crate::Error::external). They end training.
    fn read(&self, index: usize, pixels: &mut [f32]) -> Result<()>;
}
