//! The gradient of the weights.
//!
//! The division of the batch into parts and of the channels into groups depends only on their numbers. The order
//! of sums is therefore the same for any number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::chunks::{Bf16, SCRATCH, Scratch};
use super::rounding::{parts_of, round_pixels, transpose};
use super::strips::{Chunk, Side, Strips, strip_width};
use crate::kernels::cpu::bf16::operands::{DEPTH, Product, ROWS, Step};
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::memory::sized;

/// Maximum memory for the sums of parts. One part alone may need more.
const SUMS_BYTES: usize = if cfg!(test) { 64 << 10 } else { 8 << 20 };

/// Maximum number of parts. It is fixed, so that results do not depend on the number of threads.
const MAX_PARTS: usize = 8;

/// Channels of the input and of the output per task.
const GROUP: (usize, usize) = if cfg!(test) { (16, 24) } else { (64, 128) };

/// Rows of channels, for both parts of the values.
struct Rows<'a> {
    values: &'a mut [u16],
    /// Distance between two rows.
    pitch: usize,
    /// Pixels in a row, up to the next multiple of [`DEPTH`].
    depth: usize,
}

impl Bf16 {
    /// Writes the gradient of the weights, (out, in, height, width). If a value of `x` is not finite, additional values
    /// of the gradient may be NaN, because only one side is padded with zeros.
    pub(super) fn sum_weight_gradient(
        &self,
        x: &[f32],
        dy: &[f32],
        dweight: &mut [f32],
        sums: &mut Vec<f32>,
    ) {
        let g = &self.shape;
        let (inputs, outputs) = (g.c_in.min(GROUP.0), g.c_out.min(GROUP.1));
        let c_row = g.kernel[0] * strip_width(g, inputs);
        let group_len = outputs.next_multiple_of(ROWS) * c_row;
        let (in_groups, out_groups) = (g.c_in.div_ceil(inputs), g.c_out.div_ceil(outputs));
        let groups = in_groups * out_groups;
        let most = (SUMS_BYTES / (groups * group_len * size_of::<f32>())).clamp(1, MAX_PARTS);
        let images = g.batch.div_ceil(most.min(g.batch));
        let parts = g.batch.div_ceil(images);
        let sums = sized(sums, parts * groups * group_len);
        sums.par_chunks_mut(group_len).enumerate().for_each(|(task, sums)| {
            let (part, group) = (task / groups, task % groups);
            let (input, output) = (group % in_groups * inputs, group / in_groups * outputs);
            let channels =
                [input..(input + inputs).min(g.c_in), output..(output + outputs).min(g.c_out)];
            let images = part * images..((part + 1) * images).min(g.batch);
            self.sum_group(x, dy, images, channels, (sums, c_row));
        });
        let sums = &*sums;
        let area = g.taps();
        dweight.par_chunks_mut(g.patch()).enumerate().for_each(|(o, dweight)| {
            SCRATCH.with_borrow_mut(|Scratch { shift: total, .. }| {
                for input in 0..in_groups {
                    let count = inputs.min(g.c_in - input * inputs);
                    let group = o / outputs * in_groups + input;
                    let total = sized(total, c_row);
                    total.fill(0.0);
                    for part in 0..parts {
                        let first = (part * groups + group) * group_len + o % outputs * c_row;
                        let sums = &sums[first..][..c_row];
                        total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
                    }
                    let width = strip_width(g, count);
                    let across = g.kernel[1];
                    let dweight = &mut dweight[input * inputs * area..][..count * area];
                    for tap in 0..area {
                        let total = &total[tap / across * width + tap % across * count..];
                        for (dweight, total) in dweight[tap..].iter_mut().step_by(area).zip(total) {
                            *dweight = *total;
                        }
                    }
                }
            });
        });
    }

    /// Computes the contribution of some images to the gradient of the weights from some input channels to some
    /// output channels, (out, kernel height, strip). It is the product of the transposed `dy` and the strips, summed
    /// over pixels.
    fn sum_group(
        &self,
        x: &[f32],
        dy: &[f32],
        images: Range<usize>,
        [inputs, outputs]: [Range<usize>; 2],
        (sums, c_row): (&mut [f32], usize),
    ) {
        let g = &self.shape;
        let parts = self.terms.parts();
        let values = parts * (strip_width(g, inputs.len()) + outputs.len());
        let size = self.chunk_size(values * size_of::<u16>(), images.len());
        for (i, chunk) in self.chunks(images, size).enumerate() {
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { strips: layout, line, left, rounded, .. } = scratch;
                let channels = inputs.clone();
                let strips = Strips { shape: *g, channels, chunk, side: Side::Right };
                let b = sized(layout, parts * strips.len());
                strips.fill(self.isa, x, parts_of(b, strips.len()), line);
                let depth = strips.pixels().next_multiple_of(DEPTH);
                // An odd number of cache lines, so that rows do not all fall into the same few sets of the cache.
                let a_row = ((depth / DEPTH) | 1) * DEPTH;
                let a_len = outputs.len().next_multiple_of(ROWS) * a_row;
                let a = sized(left, parts * a_len);
                let rows = Rows { values: a, pitch: a_row, depth };
                self.transpose_gradient(dy, &strips, outputs.clone(), rows, rounded);
                let width = strips.width();
                let mut steps = Vec::new();
                for k in (0..depth).step_by(DEPTH) {
                    let step = |&(left, right)| Step {
                        a: left * a_len + k,
                        b: right * strips.len() + k * width,
                    };
                    steps.extend(self.terms.products().iter().map(step));
                }
                for ky in 0..g.kernel[0] {
                    for column in (0..width).step_by(PANEL) {
                        for (j, steps) in steps.chunks(self.run()).enumerate() {
                            self.unit.multiply(Product {
                                c: &mut sums[ky * width + column..],
                                c_row,
                                rows: outputs.len(),
                                a: &*a,
                                a_row,
                                b: &b[strips.origin(ky) + 2 * column..],
                                b_row: 2 * width,
                                steps,
                                accumulate: i + j > 0,
                            });
                        }
                    }
                }
            });
        }
    }

    /// Rounds and transposes some channels of `dy`: one row per channel, with the pixels of the chunk in the
    /// order of its strips, followed by zeros.
    fn transpose_gradient(
        &self,
        dy: &[f32],
        strips: &Strips,
        channels: Range<usize>,
        to: Rows<'_>,
        rounded: &mut Vec<u16>,
    ) {
        let Rows { values: a, pitch: a_row, depth } = to;
        let g = &self.shape;
        let count = channels.len();
        let Chunk { images, rows } = &strips.chunk;
        let parts = self.terms.parts();
        let rounded = sized(rounded, parts * depth * count);
        let image_pitch = strips.pitch() / images.len();
        if image_pitch > g.w_out || depth > strips.pixels() {
            rounded.fill(0);
        }
        for (i, row) in rows.clone().enumerate() {
            for (j, image) in images.clone().enumerate() {
                let first = (i * strips.pitch() + j * image_pitch) * count;
                let line = g.w_out * g.c_out;
                let dy = &dy[(image * g.h_out + row) * line..][..line];
                let [to, left] = parts_of(rounded, depth * count);
                let place = first..first + g.w_out * count;
                let left = if left.is_empty() { left } else { &mut left[place.clone()] };
                round_pixels(self.isa, dy, g.c_out, channels.clone(), &mut to[place], left);
            }
        }
        let a_len = a.len() / parts;
        for (a, rounded) in a.chunks_exact_mut(a_len).zip(rounded.chunks_exact(depth * count)) {
            transpose(rounded, count, a, a_row);
        }
    }
}
