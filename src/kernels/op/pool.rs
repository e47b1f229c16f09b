//! Pooling of channels-last maps.

use std::ops::Range;

use super::conv::Scale;
use crate::error::{Error, Result};

/// The value that replaces the pixels under a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// The greatest value.
    Max,
    /// The mean. Pixels beyond the edge of the map do not count.
    Average,
}

/// The sizes of a pooling with a square window.
///
/// The input is (batch, h, w, channels), the output (batch, h_out, w_out, channels).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PoolShape {
    pub batch: usize,
    pub h: usize,
    pub w: usize,
    pub channels: usize,
    pub h_out: usize,
    pub w_out: usize,
    /// Height and width of the window.
    pub window: usize,
    pub scale: Scale,
}

impl PoolShape {
    /// The pooling of `x` (batch, height, width, channels). Its output has the height and width of that of a
    /// convolution with a kernel of the size of the window.
    ///
    /// # Errors
    /// Returns an error if the window is empty or larger than the map, or if its centre is not a pixel although the
    /// window extends beyond the edge. Returns an error if the stride is 0, or if the scale is neither `Stride` nor
    /// `StrideWithin`.
    pub(crate) fn new(x: [usize; 4], window: usize, scale: Scale) -> Result<Self> {
        let [batch, h, w, channels] = x;
        let fits = match scale {
            Scale::Stride(stride) => stride > 0 && !window.is_multiple_of(2),
            Scale::StrideWithin(stride) => stride > 0,
            Scale::StrideFromEdge(_) | Scale::Upsample => false,
        };
        if !fits || window == 0 || window > h.min(w) {
            let expected = format!("one that a window of {window} fits with {scale:?}");
            return Err(Error::shape("the input of a pooling", x, expected));
        }
        let [h_out, w_out] = [h, w].map(|size| scale.output(size, window));
        Ok(Self { batch, h, w, channels, h_out, w_out, window, scale })
    }

    /// The rows, or columns, under the window of output row, or column, `at` in a map of height, or width, `size`.
    pub(crate) fn under(&self, at: usize, size: usize) -> Range<usize> {
        let before = if matches!(self.scale, Scale::Stride(_)) { self.window / 2 } else { 0 };
        let first = at * self.scale.stride();
        first.saturating_sub(before)..(first + self.window - before).min(size)
    }

    /// The dimensions of the output.
    pub(crate) fn output(&self) -> [usize; 4] {
        [self.batch, self.h_out, self.w_out, self.channels]
    }
}
