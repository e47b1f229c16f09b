//! Pooling of maps.

use rayon::prelude::*;

use super::isa::Isa;
use super::simd::{Simd, for_channels, simd_fn};
use crate::kernels::op::place::Place;
use crate::kernels::op::pool::{PoolShape, Pooling};

/// Writes the pooling of `x` to some channels of the map `y`.
pub(crate) fn pool(
    isa: Isa,
    pooling: Pooling,
    shape: &PoolShape,
    x: &[f32],
    place: Place,
    y: &mut [f32],
) {
    let image = shape.h * shape.w * shape.channels;
    y.par_chunks_mut(shape.w_out * place.of).enumerate().for_each(|(row, y)| {
        let x = &x[row / shape.h_out * image..][..image];
        pool_row(isa, (pooling, shape), x, row % shape.h_out, place, y);
    });
}

simd_fn! {
    /// Writes row `oy` of the pooling of an image. The values of a window are added in the order of its pixels.
    fn pool_row<S>(how: (Pooling, &PoolShape), x: &[f32], oy: usize, place: Place, y: &mut [f32]) {
        let (pooling, shape) = how;
        let channels = shape.channels;
        assert!(x.len() == shape.h * shape.w * channels && y.len() == shape.w_out * place.of);
        assert!(place.first + channels <= place.of);
        let rows = shape.under(oy, shape.h);
        assert!(!rows.is_empty() && rows.end <= shape.h);
        for (ox, y) in y.chunks_exact_mut(place.of).enumerate() {
            let columns = shape.under(ox, shape.w);
            assert!(!columns.is_empty() && columns.end <= shape.w);
            let window = Window {
                first: x[(rows.start * shape.w + columns.start) * channels..].as_ptr(),
                line: shape.w * channels,
                channels,
                rows: rows.len(),
                columns: columns.len(),
            };
            let y = y[place.first..].as_mut_ptr();
            // SAFETY: by the assertions, the rows and columns of the window are within `x`, and the channels of the
            // pixel within `y`. No vector goes beyond the last channel.
            unsafe {
                if (window.rows, window.columns) == (3, 3) {
                    for_channels!(c in channels, pool_full::<S>(pooling, window, y.add(c), c));
                } else {
                    for_channels!(c in channels, pool_window::<S>(pooling, window, y.add(c), c));
                }
            }
        }
    }
}

/// The pixels under a window.
#[derive(Clone, Copy)]
struct Window {
    first: *const f32,
    /// The distance between two rows.
    line: usize,
    channels: usize,
    rows: usize,
    columns: usize,
}

/// Pools a window of 3 x 3 pixels, whose loops the compiler unrolls.
///
/// # Safety
/// The requirements of [`pool_window`] apply.
#[inline(always)]
unsafe fn pool_full<S: Simd>(pooling: Pooling, window: Window, y: *mut f32, c: usize) {
    // SAFETY: the caller guarantees the requirements.
    unsafe { pool_window::<S>(pooling, Window { rows: 3, columns: 3, ..window }, y, c) }
}

/// # Safety
/// Every pixel of the window must be readable, and `y` writable, for a vector that begins with channel `c`.
#[inline(always)]
unsafe fn pool_window<S: Simd>(pooling: Pooling, window: Window, y: *mut f32, c: usize) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let first = window.first.add(c);
        let mut all = match pooling {
            Pooling::Max => S::load(first),
            Pooling::Average => S::splat(0.0),
        };
        for row in 0..window.rows {
            for column in 0..window.columns {
                let value = S::load(first.add(row * window.line + column * window.channels));
                all = match pooling {
                    Pooling::Max => all.at_least(value),
                    Pooling::Average => all.add(value),
                };
            }
        }
        if pooling == Pooling::Average {
            all = all.mul(S::splat(1.0 / (window.rows * window.columns) as f32));
        }
        all.store(y);
    }
}
