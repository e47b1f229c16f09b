//! The last steps of a convolution: the values that are added to its output, its limits, and its place.

use crate::kernels::op::activation::Rectifier;
use crate::kernels::op::conv::Addends;
use crate::kernels::op::place::Place;

/// The values that are added to the products, and the steps after that.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// Values added to each pixel: (channels).
    pub bias: Option<&'a [f32]>,
    /// Maps or vectors added to the output.
    pub add: Addends<Option<&'a [f32]>>,
    /// Whether the output is added to the present values.
    pub accumulate: bool,
    /// The limits of the output, after all additions.
    pub rectifier: Rectifier,
    /// The channels of a wider map to which the output is written. Without a place, the output is the whole map. With a
    /// place, there is no residual.
    pub place: Option<Place>,
}

impl Epilogue<'_> {
    /// The place of an output of `channels` channels.
    pub(crate) fn place(&self, channels: usize) -> Place {
        self.place.unwrap_or(Place::whole(channels))
    }

    /// Writes the sum of the values that are added to each pixel of an image.
    pub(crate) fn shift(&self, image: usize, shift: &mut [f32]) {
        self.shift_of(image, shift.len(), 0, shift);
    }

    /// Writes the same for the channels of an output of `channels` channels from `first` on.
    pub(crate) fn shift_of(&self, image: usize, channels: usize, first: usize, shift: &mut [f32]) {
        match self.bias {
            Some(bias) => shift.copy_from_slice(&bias[first..][..shift.len()]),
            None => shift.fill(0.0),
        }
        if let Some(values) = self.add.per_image {
            let values = &values[image * channels + first..][..shift.len()];
            shift.iter_mut().zip(values).for_each(|(shift, value)| *shift += value);
        }
    }

    /// Limits the output of `channels` channels in some pixels of a map.
    pub(crate) fn rectify(&self, pixels: &mut [f32], channels: usize) {
        let Place { first, of } = self.place(channels);
        if let Some(highest) = self.rectifier.highest() {
            for pixel in pixels.chunks_exact_mut(of) {
                // Keeps NaN, which `f32::max` would replace.
                pixel[first..][..channels].iter_mut().for_each(|y| *y = y.clamp(0.0, highest));
            }
        }
    }
}
