//! The values that are added to the output of a convolution.

use crate::kernels::op::conv::Addends;

/// The values that are added to the products.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// Values added to each pixel: (channels).
    pub bias: Option<&'a [f32]>,
    /// Maps or vectors added to the output.
    pub add: Addends<Option<&'a [f32]>>,
    /// Whether the output is added to the present values.
    pub accumulate: bool,
}

impl Epilogue<'_> {
    /// Writes the sum of the values that are added to each pixel of an image.
    pub(crate) fn shift(&self, image: usize, shift: &mut [f32]) {
        let channels = shift.len();
        match self.bias {
            Some(bias) => shift.copy_from_slice(bias),
            None => shift.fill(0.0),
        }
        if let Some(values) = self.add.per_image {
            let values = &values[image * channels..][..channels];
            shift.iter_mut().zip(values).for_each(|(shift, value)| *shift += value);
        }
    }
}
