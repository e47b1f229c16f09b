//! The weights, rounded and packed: panels of output channels, each (parts, kernel height, strip,
//! [`PANEL`]).

use rayon::prelude::*;

use super::rounding::{Terms, parts_of};
use super::strips::strip_width;
use crate::kernels::cpu::bf16::operands::{place, rest, round};
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::sized;
use crate::kernels::cpu::simd::simd_fn;
use crate::kernels::op::conv::ConvShape;

/// Packs the kernels of a convolution to `memory`, which grows if necessary: `kernels(o, i)` is the kernel
/// of an output and an input channel. If `rotated`, kernels are rotated by 180 degrees.
pub(super) fn pack_kernels<'a>(
    isa: Isa,
    shape: &ConvShape,
    terms: Terms,
    kernels: impl Fn(usize, usize) -> &'a [f32] + Sync,
    rotated: bool,
    memory: &mut Vec<u16>,
) {
    let ConvShape { c_in, c_out, kernel, .. } = *shape;
    let width = strip_width(shape, c_in);
    let [height, across] = kernel;
    let part_len = height * width * PANEL;
    let panel_len = terms.parts() * part_len;
    let panels = sized(memory, c_out.div_ceil(PANEL) * panel_len);
    panels.par_chunks_mut(panel_len).enumerate().for_each(|(panel, packed)| {
        let count = PANEL.min(c_out - panel * PANEL);
        if count < PANEL || width > across * c_in {
            packed.fill(0);
        }
        let [first, second] = parts_of(packed, part_len);
        // The places of the taps of a channel, in the order of the kernels, and their values by columns.
        let mut places = vec![0; shape.taps()];
        let mut taps = vec![0f32; shape.taps() * PANEL];
        for i in 0..c_in {
            for (tap, at) in places.iter_mut().enumerate() {
                let tap = if rotated { shape.taps() - 1 - tap } else { tap };
                *at = place(tap / across * width + tap % across * c_in + i, 0);
            }
            for column in 0..count {
                let weights = kernels(panel * PANEL + column, i);
                let taps = taps[column..].iter_mut().step_by(PANEL);
                taps.zip(weights).for_each(|(to, weight)| *to = *weight);
            }
            pack_taps(isa, &taps, &places, first, second);
        }
    });
}

simd_fn! {
    /// Rounds rows of [`PANEL`] columns. Writes them to every other value from their places on, and the
    /// errors to `second`, unless it is empty.
    fn pack_taps<S>(rows: &[f32], places: &[usize], first: &mut [u16], second: &mut [u16]) {
        for (row, &at) in rows.chunks_exact(PANEL).zip(places) {
            let (mut rounded, mut left) = ([0u16; PANEL], [0u16; PANEL]);
            for (rounded, &x) in rounded.iter_mut().zip(row) {
                *rounded = round(x);
            }
            for ((left, &x), &rounded) in left.iter_mut().zip(row).zip(&rounded) {
                *left = round(rest(x, rounded));
            }
            for (to, values) in [(&mut *first, &rounded), (&mut *second, &left)] {
                if to.is_empty() {
                    continue;
                }
                let pairs = to[at & !1..][..2 * PANEL].chunks_exact_mut(2).zip(values);
                if at % 2 == 0 {
                    pairs.for_each(|(pair, &value)| (pair[0], pair[1]) = (value, pair[1]));
                } else {
                    pairs.for_each(|(pair, &value)| (pair[0], pair[1]) = (pair[0], value));
                }
            }
        }
    }
}
