//! Depthwise convolutions of channels-last maps: each channel is filtered by a kernel of its own.

use std::ops::Range;

use crate::error::{Error, Result};

/// The sizes of a depthwise convolution with a square kernel.
///
/// The input is (batch, h, w, channels), the weight (channels, 1, kernel, kernel), the output (batch, h_out, w_out,
/// channels). The map is continued by zeros as TensorFlow's padding "same" does: by as few as an output of
/// ceil(size / stride) needs, half of them before the map. If their number is odd, one more follows the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DepthwiseShape {
    pub batch: usize,
    pub h: usize,
    pub w: usize,
    pub channels: usize,
    pub h_out: usize,
    pub w_out: usize,
    /// Height and width of the kernels.
    pub kernel: usize,
    pub stride: usize,
}

impl DepthwiseShape {
    /// The depthwise convolution of `x` (batch, height, width, channels) with `weight` (channels, 1, kernel, kernel).
    ///
    /// # Errors
    /// Returns an error if the weight has another shape or no values, or if the stride is 0.
    pub(crate) fn new(x: [usize; 4], weight: [usize; 4], stride: usize) -> Result<Self> {
        let [batch, h, w, channels] = x;
        let kernel = weight[3];
        if kernel == 0 || weight != [channels, 1, kernel, kernel] {
            let expected = format!("({channels}, 1, kernel, kernel) for an input of {x:?}");
            return Err(Error::shape("the weight of a depthwise convolution", weight, expected));
        }
        if stride == 0 {
            return Err(Error::config("the stride of a depthwise convolution", 0, "at least 1"));
        }
        let [h_out, w_out] = [h, w].map(|size| size.div_ceil(stride));
        Ok(Self { batch, h, w, channels, h_out, w_out, kernel, stride })
    }

    /// The rows, or columns, of zeros before and after a map of height, or width, `size`.
    pub(crate) fn padding(&self, size: usize) -> [usize; 2] {
        let last = size.div_ceil(self.stride).saturating_sub(1) * self.stride;
        let zeros = (last + self.kernel).saturating_sub(size);
        [zeros / 2, zeros - zeros / 2]
    }

    /// The rows, or columns, of a map of height, or width, `size` under the kernel of output row, or column, `at`. The
    /// second number is the row, or column, of the kernel that lies over the first of them.
    pub(crate) fn under(&self, at: usize, size: usize) -> (Range<usize>, usize) {
        let [before, _] = self.padding(size);
        // The first and the end, both counted from the first row of zeros.
        let first = at * self.stride;
        let skipped = before.saturating_sub(first);
        (first.saturating_sub(before)..(first + self.kernel - before).min(size), skipped)
    }

    /// The dimensions of the output.
    pub(crate) fn output(&self) -> [usize; 4] {
        [self.batch, self.h_out, self.w_out, self.channels]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(size: usize, kernel: usize, stride: usize) -> DepthwiseShape {
        DepthwiseShape::new([1, size, size, 2], [2, 1, kernel, kernel], stride).unwrap()
    }

    #[test]
    fn zeros_are_divided_as_in_tensorflow() {
        // Size, kernel and stride; zeros before and after.
        for ([size, kernel, stride], zeros) in [
            ([7, 3, 1], [1, 1]),
            ([7, 5, 1], [2, 2]),
            ([8, 3, 2], [0, 1]),
            ([7, 3, 2], [1, 1]),
            ([8, 5, 2], [1, 2]),
            ([7, 5, 2], [2, 2]),
            ([6, 3, 3], [0, 0]),
            ([5, 2, 4], [0, 1]),
            ([1, 5, 2], [2, 2]),
        ] {
            assert_eq!(
                shape(size, kernel, stride).padding(size),
                zeros,
                "{size} {kernel} {stride}"
            );
        }
    }

    #[test]
    fn a_kernel_beyond_the_edge_is_cut() {
        let shape = shape(8, 5, 2);
        assert_eq!(shape.output(), [1, 4, 4, 2]);
        assert_eq!(shape.under(0, 8), (0..4, 1));
        assert_eq!(shape.under(1, 8), (1..6, 0));
        assert_eq!(shape.under(3, 8), (5..8, 0));
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let error = |weight, stride| {
            DepthwiseShape::new([2, 5, 8, 3], weight, stride).unwrap_err().to_string()
        };
        for weight in [[4, 1, 3, 3], [3, 3, 3, 3], [3, 1, 3, 5], [3, 1, 0, 0]] {
            assert_eq!(
                error(weight, 1),
                format!(
                    "the weight of a depthwise convolution has shape {weight:?}; it must be (3, 1, kernel, kernel) \
                     for an input of [2, 5, 8, 3]"
                )
            );
        }
        let message = "the stride of a depthwise convolution is 0; it must be at least 1";
        assert_eq!(error([3, 1, 3, 3], 0), message);
    }
}
