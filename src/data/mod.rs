//! Where training images come from.

use crate::Result;

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
    fn read(&self, index: usize, pixels: &mut [f32]) -> Result<()>;
}
