//! Depthwise convolutions of maps, in vectors of channels.

use rayon::prelude::*;

use super::isa::Isa;
use super::simd::{Simd, for_channels, simd_fn};
use crate::kernels::op::activation::Rectifier;
use crate::kernels::op::depthwise::DepthwiseShape;
use crate::kernels::op::place::Place;

/// A depthwise convolution.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Depthwise<'a> {
    pub isa: Isa,
    pub shape: DepthwiseShape,
    /// (kernel, kernel, channels), as [`pack`] returns them.
    pub weight: &'a [f32],
    /// (channels)
    pub bias: &'a [f32],
    pub rectifier: Rectifier,
}

/// Returns weights (channels, 1, kernel, kernel) as (kernel, kernel, channels).
pub(crate) fn pack(weight: &[f32], channels: usize) -> Vec<f32> {
    let taps = weight.len().checked_div(channels).unwrap_or_default();
    (0..taps).flat_map(|tap| weight.iter().skip(tap).step_by(taps).copied()).collect()
}

impl Depthwise<'_> {
    /// Writes the convolution of `x` to some channels of the map `y`.
    pub(crate) fn forward(self, x: &[f32], place: Place, y: &mut [f32]) {
        let shape = self.shape;
        let image = shape.h * shape.w * shape.channels;
        y.par_chunks_mut(shape.w_out * place.of).enumerate().for_each(|(row, y)| {
            let x = &x[row / shape.h_out * image..][..image];
            depthwise_row(self.isa, self, x, row % shape.h_out, place, y);
        });
    }
}

simd_fn! {
    /// Writes row `oy` of the output of an image. The products are added to the bias in the order of the kernel's
    /// pixels.
    fn depthwise_row<S>(of: Depthwise<'_>, x: &[f32], oy: usize, place: Place, y: &mut [f32]) {
        let DepthwiseShape { h, w, channels, w_out, kernel, .. } = of.shape;
        assert!(x.len() == h * w * channels && y.len() == w_out * place.of);
        assert!(of.weight.len() == kernel * kernel * channels && of.bias.len() == channels);
        assert!(place.first + channels <= place.of);
        let (rows, top) = of.shape.under(oy, h);
        assert!(!rows.is_empty() && rows.end <= h && top + rows.len() <= kernel);
        for (ox, y) in y.chunks_exact_mut(place.of).enumerate() {
            let (columns, left) = of.shape.under(ox, w);
            assert!(!columns.is_empty() && columns.end <= w && left + columns.len() <= kernel);
            let window = Window {
                x: x[(rows.start * w + columns.start) * channels..].as_ptr(),
                weight: of.weight[(top * kernel + left) * channels..].as_ptr(),
                bias: of.bias.as_ptr(),
                lines: [w * channels, kernel * channels],
                channels,
                size: [rows.len(), columns.len()],
                highest: of.rectifier.highest(),
            };
            let y = y[place.first..].as_mut_ptr();
            // SAFETY: by the assertions, the rows and columns of the window are within `x` and within the kernel, and
            // the channels of the pixel within `y`. No vector goes beyond the last channel.
            unsafe {
                match window.size {
                    [3, 3] => {
                        for_channels!(c in channels, filter_full::<S, 3>(window, y.add(c), c));
                    }
                    [5, 5] => {
                        for_channels!(c in channels, filter_full::<S, 5>(window, y.add(c), c));
                    }
                    _ => {
                        for_channels!(c in channels, filter::<S>(window, y.add(c), c));
                    }
                }
            }
        }
    }
}

/// The pixels under a kernel, and the part of the kernel over the map.
#[derive(Clone, Copy)]
struct Window {
    x: *const f32,
    weight: *const f32,
    bias: *const f32,
    /// The distances between two rows of the map, and of the kernel.
    lines: [usize; 2],
    channels: usize,
    /// Rows and columns.
    size: [usize; 2],
    /// The greatest value, if the least is 0.
    highest: Option<f32>,
}

/// Filters a window of this height and width, whose loops the compiler unrolls.
///
/// # Safety
/// The requirements of [`filter`] apply.
#[inline(always)]
unsafe fn filter_full<S: Simd, const SIZE: usize>(window: Window, y: *mut f32, c: usize) {
    // SAFETY: the caller guarantees the requirements.
    unsafe { filter::<S>(Window { size: [SIZE; 2], ..window }, y, c) }
}

/// # Safety
/// Every pixel of the window, its weights and the bias must be readable, and `y` writable, for a vector that begins
/// with channel `c`.
#[inline(always)]
unsafe fn filter<S: Simd>(window: Window, y: *mut f32, c: usize) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let (x, weight) = (window.x.add(c), window.weight.add(c));
        let mut sum = S::load(window.bias.add(c));
        for row in 0..window.size[0] {
            let [x, weight] = [x.add(row * window.lines[0]), weight.add(row * window.lines[1])];
            for column in 0..window.size[1] {
                let at = column * window.channels;
                sum = S::load(x.add(at)).mul_add(S::load(weight.add(at)), sum);
            }
        }
        if let Some(highest) = window.highest {
            sum = sum.at_least(S::splat(0.0)).at_most(S::splat(highest));
        }
        sum.store(y);
    }
}
