//! The transforms of kernels, and of the gradients of kernels.

use super::super::places::each;
use super::super::tiles::{Size, kernel_stride};
use super::super::transform_kernels::{KERNELS, Taps};
use super::columns::{kernel_column, kernel_gradient_column, with_height};
use super::lines::{kernel_gradient_line, kernel_line};
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::simd::{Simd, simd_fn};
use crate::kernels::cpu::transpose::transpose_in;
use crate::kernels::op::place::Place;

simd_fn! {
    /// Computes `G w G^T` of a panel's kernels for one input channel.
    pub(in super::super) fn transform_kernels<S>(
        values: &mut [f32],
        rows: usize,
        row: usize,
        taps: &[[f32; PANEL]; 9],
        size: Size,
    ) {
        assert!(values.len() >= size.count() * kernel_stride(rows) && row < rows);
        for j in (0..PANEL).step_by(S::WIDTH) {
            // SAFETY: `j` and the vector after it are within PANEL. By the assertion, places are within `values`.
            unsafe {
                let values = values.as_mut_ptr().add(row * PANEL + j);
                with_height!(size, kernel_tile::<S>(values, kernel_stride(rows), taps, j));
            }
        }
    }
}

/// # Safety
/// Each place must be writable for a vector, and `taps` readable for one at `j`.
#[inline(always)]
unsafe fn kernel_tile<S: Simd, const TALL: bool>(
    values: *mut f32,
    stride: usize,
    taps: &[[f32; PANEL]; 9],
    j: usize,
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let columns = each!(X in 0 1 2 => {
            kernel_column::<S, TALL>(each!(Y in 0 1 2 => S::load(taps[3 * Y + X].as_ptr().add(j))))
        });
        each!(Y in 0 1 2 3 4 5 => if TALL || Y < 4 {
            let line = kernel_line(each!(X in 0 1 2 => columns[X][Y]));
            each!(X in 0 1 2 3 4 5 => line[X].store(values.add((6 * Y + X) * stride)));
        });
    }
}

simd_fn! {
    /// Computes `G^T u G` for a panel of output channels. `u` (places, in, PANEL) is the sum of `parts.0` arrays, which
    /// are `parts.1` values apart. Writes to `dweight` (out, all input channels, 9).
    pub(in super::super) fn kernel_gradient<S>(
        dweight: &mut [f32],
        u: &[f32],
        parts: (usize, usize),
        c_in: usize,
        place: Place,
        size: Size,
    ) {
        assert!((parts.0 - 1) * parts.1 + size.count() * kernel_stride(c_in) <= u.len());
        let Place { first: channel, of } = place;
        let count = dweight.len() / (of * 9);
        assert!(count <= PANEL && channel + c_in <= of);
        let mut taps: Taps = [[[0f32; PANEL]; 9]; KERNELS];
        for first in (0..c_in).step_by(KERNELS) {
            let taps = &mut taps[..KERNELS.min(c_in - first)];
            for (i, taps) in taps.iter_mut().enumerate() {
                for j in (0..PANEL).step_by(S::WIDTH) {
                    // SAFETY: `j` and the vector after it are within PANEL. By the assertion, every place is within `u`.
                    unsafe {
                        let u = u.as_ptr().add((first + i) * PANEL + j);
                        with_height!(size, kernel_gradient_tile::<S>(taps, j, u, kernel_stride(c_in), parts));
                    }
                }
            }
            let (from, size) = (taps.as_flattened().as_flattened(), (9 * taps.len(), count));
            transpose_in::<S>(from, PANEL, &mut dweight[(channel + first) * 9..], of * 9, size);
        }
    }
}

/// # Safety
/// Each place of each part must be readable, and `taps` writable at `j`, for a vector.
#[inline(always)]
unsafe fn kernel_gradient_tile<S: Simd, const TALL: bool>(
    taps: &mut [[f32; PANEL]; 9],
    j: usize,
    u: *const f32,
    stride: usize,
    (parts, part_len): (usize, usize),
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let columns = each!(X in 0 1 2 3 4 5 => {
            kernel_gradient_column::<S, TALL>(each!(Y in 0 1 2 3 4 5 => if TALL || Y < 4 {
                let u = u.add((6 * Y + X) * stride);
                let mut sum = S::load(u);
                for part in 1..parts {
                    sum = sum.add(S::load(u.add(part * part_len)));
                }
                sum
            } else {
                S::splat(0.0)
            }))
        });
        each!(Y in 0 1 2 => {
            let line = kernel_gradient_line(each!(X in 0 1 2 3 4 5 => columns[X][Y]));
            each!(X in 0 1 2 => line[X].store(taps[3 * Y + X].as_mut_ptr().add(j)));
        });
    }
}
