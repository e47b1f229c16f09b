//! Convolutions whose products take bf16 operands, summed in f32. Maps and weights come and go in
//! f32, and are rounded where they are laid out for the products.
//!
//! With three terms, a value is the sum of two bf16 (its rounding, and what that leaves), and a
//! product that of the terms but for the least: about 16 bits.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::bf16::{DEPTH, PANEL, Product, ROWS, Step, Unit, place, product, rest, round};
use super::conv::Workspace;
use super::patches::{PARTS, Patches, Scale};
use super::simd::{Isa, simd_fn};
use super::strips::{Chunk, Side, Strips, round_pixels, strip_width, turn};
use super::values::{first_line, sized, sized_by_lines};
use super::winograd::Epilogue;

/// How many bf16 products stand for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terms {
    One,
    Three,
}

impl Terms {
    /// For each product, which part of the left and of the right factor it takes: 0 for the rounding,
    /// 1 for what that leaves.
    fn products(self) -> &'static [(usize, usize)] {
        match self {
            Self::One => &[(0, 0)],
            Self::Three => &[(0, 0), (0, 1), (1, 0)],
        }
    }

    /// Parts of a value.
    fn parts(self) -> usize {
        match self {
            Self::One => 1,
            Self::Three => 2,
        }
    }
}

/// The places of both parts of `len` values, the second one empty where there is none.
fn parts_of(values: &mut [u16], len: usize) -> [&mut [u16]; 2] {
    let (first, second) = values.split_at_mut(len);
    [first, second]
}

/// Such a convolution.
#[derive(Debug, Clone, Copy)]
pub(super) struct HalfConvolution {
    pub isa: Isa,
    pub unit: Unit,
    pub terms: Terms,
    pub sizes: Patches,
}

/// Weights, rounded and packed: panels of output channels, each (parts, kernel, strip, [`PANEL`]).
pub(crate) struct PackedHalf {
    values: Vec<u16>,
    /// Where they begin.
    first: usize,
    unit: Unit,
    terms: Terms,
}

/// Bytes of a chunk's operands and sums, about: within a usual second-level cache. Tests need small
/// maps to be cut, too.
const CHUNK_BYTES: usize = if cfg!(test) { 12 << 10 } else { 640 << 10 };

/// The most memory that sums of parts take, unless one part alone needs more.
const SUMS_BYTES: usize = if cfg!(test) { 64 << 10 } else { 8 << 20 };

/// Steps of a product of tiles at a time: what they take of a panel stays in a first-level cache while
/// all rows go by. A multiple of [`Terms`]' products.
const RUN: usize = 12;

/// Channels that a task of the weights' gradient takes: of the input, and of the output.
const GROUP: (usize, usize) = if cfg!(test) { (16, 24) } else { (64, 128) };

thread_local! {
    /// Layouts and products, reused from call to call. Nothing may wait for other threads while it is
    /// borrowed: this one could be given work that borrows it again.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    strips: Vec<u16>,
    line: Vec<u16>,
    left: Vec<u16>,
    rounded: Vec<u16>,
    sums: Vec<f32>,
    shift: Vec<f32>,
}

impl PackedHalf {
    /// The convolution of these sizes that the weights were packed for.
    pub(super) fn convolution(&self, isa: Isa, sizes: Patches) -> HalfConvolution {
        HalfConvolution { isa, unit: self.unit, terms: self.terms, sizes }
    }

    pub fn into_memory(self) -> Vec<u16> {
        self.values
    }
}

impl HalfConvolution {
    /// Weights (out, in, k, k). `memory` is used where it is large enough.
    pub fn pack(&self, weight: &[f32], memory: Vec<u16>) -> PackedHalf {
        let Patches { c_in, kernel, .. } = self.sizes;
        let area = kernel * kernel;
        self.pack_kernels(|o, i| &weight[(o * c_in + i) * area..][..area], false, memory)
    }

    /// From the kernels of an output and an input channel, `turned` to be read from their ends.
    fn pack_kernels<'a>(
        &self,
        kernels: impl Fn(usize, usize) -> &'a [f32] + Sync,
        turned: bool,
        memory: Vec<u16>,
    ) -> PackedHalf {
        let Patches { c_in, c_out, kernel, .. } = self.sizes;
        let width = strip_width(&self.sizes, c_in);
        let part_len = kernel * width * PANEL;
        let panel_len = self.terms.parts() * part_len;
        let mut values = memory;
        let len = c_out.div_ceil(PANEL) * panel_len;
        let first = first_line(&mut values, len);
        let panels = &mut values[first..first + len];
        panels.par_chunks_mut(panel_len).enumerate().for_each(|(panel, packed)| {
            let count = PANEL.min(c_out - panel * PANEL);
            if count < PANEL || width > kernel * c_in {
                packed.fill(0);
            }
            let [first, second] = parts_of(packed, part_len);
            // Where the taps of a channel stand, in the order of the kernels, and their values by columns.
            let mut places = vec![0; kernel * kernel];
            let mut taps = vec![0f32; kernel * kernel * PANEL];
            for i in 0..c_in {
                for (tap, at) in places.iter_mut().enumerate() {
                    let tap = if turned { kernel * kernel - 1 - tap } else { tap };
                    *at = place(tap / kernel * width + tap % kernel * c_in + i, 0);
                }
                for column in 0..count {
                    let weights = kernels(panel * PANEL + column, i);
                    let taps = taps[column..].iter_mut().step_by(PANEL);
                    taps.zip(weights).for_each(|(to, weight)| *to = *weight);
                }
                pack_taps(self.isa, &taps, &places, first, second);
            }
        });
        PackedHalf { values, first, unit: self.unit, terms: self.terms }
    }

    /// Steps of a product at a time.
    fn run(&self) -> usize {
        // Tiles take a panel faster than a second-level cache gives it. Vectors do not, and to load and
        // store their sums costs more.
        if self.unit.has_tiles() { RUN } else { usize::MAX }
    }

    /// How many images are worked on at a time, and how many of their output rows, where a pixel takes
    /// so many bytes.
    fn chunk_size(&self, bytes: usize, images: usize) -> (usize, usize) {
        let Patches { h_out, w_out, .. } = self.sizes;
        let pixels = CHUNK_BYTES / bytes;
        let count = (pixels / (h_out * w_out)).min(images);
        if count > 0 { (count, h_out) } else { (1, (pixels / w_out).clamp(1, h_out)) }
    }

    /// The chunks of these images.
    fn chunks(&self, images: Range<usize>, size: (usize, usize)) -> impl Iterator<Item = Chunk> {
        let h_out = self.sizes.h_out;
        let end = images.end;
        images.step_by(size.0).flat_map(move |first| {
            (0..h_out).step_by(size.1).map(move |row| Chunk {
                images: first..(first + size.0).min(end),
                rows: row..(row + size.1).min(h_out),
            })
        })
    }

    /// `y` from `x`.
    pub fn forward(&self, x: &[f32], weights: &PackedHalf, epilogue: Epilogue, y: &mut [f32]) {
        let g = &self.sizes;
        let padded = g.c_out.next_multiple_of(PANEL);
        let strip = self.terms.parts() * strip_width(g, g.c_in);
        let bytes = strip * size_of::<u16>() + padded * size_of::<f32>();
        // Small batches leave something for every thread.
        let threads = rayon::current_num_threads();
        let (images, rows) = self.chunk_size(bytes, g.batch.div_ceil(threads));
        let rows = rows.min((g.batch * g.h_out).div_ceil(threads));
        let mut chunks = Vec::new();
        let mut left = y;
        for chunk in self.chunks(0..g.batch, (images, rows)) {
            let len = chunk.images.len() * chunk.rows.len() * g.w_out * g.c_out;
            let (y, others) = left.split_at_mut(len);
            chunks.push((chunk, y));
            left = others;
        }
        chunks.into_par_iter().for_each(|(chunk, y)| {
            SCRATCH.with_borrow_mut(|scratch| {
                self.convolve(x, chunk, weights, epilogue, y, scratch);
            });
        });
    }

    fn convolve(
        &self,
        x: &[f32],
        chunk: Chunk,
        weights: &PackedHalf,
        epilogue: Epilogue,
        y: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let g = &self.sizes;
        let Scratch { strips: layout, line, sums, shift, .. } = scratch;
        let strips = Strips { sizes: *g, channels: 0..g.c_in, chunk, side: Side::Left };
        let a = sized_by_lines(layout, self.terms.parts() * strips.len());
        strips.fill(self.isa, x, parts_of(a, strips.len()), line);
        let width = strips.width();
        let part_len = g.kernel * width * PANEL;
        let mut steps = Vec::new();
        for ky in 0..g.kernel {
            for k in (0..width).step_by(DEPTH) {
                let (a, b) = (strips.origin(ky) + k, (ky * width + k) * PANEL);
                let step =
                    |&(left, right)| Step { a: left * strips.len() + a, b: right * part_len + b };
                steps.extend(self.terms.products().iter().map(step));
            }
        }
        let rows = strips.pixels();
        let c_row = g.c_out.next_multiple_of(PANEL);
        let sums = sized_by_lines(sums, rows.next_multiple_of(ROWS) * c_row);
        let panels = weights.values[weights.first..].chunks_exact(self.terms.parts() * part_len);
        for (panel, b) in panels.take(c_row / PANEL).enumerate() {
            for (i, steps) in steps.chunks(self.run()).enumerate() {
                let c = &mut sums[panel * PANEL..];
                let (a_row, b_row, accumulate) = (width, 2 * PANEL, i > 0);
                let operands = Product { c, c_row, rows, a, a_row, b, b_row, steps, accumulate };
                product(self.unit, operands);
            }
        }
        let Chunk { images, rows } = strips.chunk;
        let shift = sized(shift, g.c_out);
        let line = g.w_out * g.c_out;
        let lines = y.chunks_exact_mut(line).enumerate();
        for (at, y) in lines {
            let (j, i) = (at / rows.len(), at % rows.len());
            if i == 0 {
                epilogue.shift(images.start + j, shift);
            }
            let sums = &sums[(i * images.len() + j) * g.w_out * c_row..][..g.w_out * c_row];
            let row = (images.start + j) * g.h_out + rows.start + i;
            let residual = epilogue.residual.map_or(&[][..], |r| &r[row * line..][..line]);
            finish(self.isa, y, sums, c_row, shift, residual, epilogue.accumulate);
        }
    }

    /// The gradient of `x`, written or added to `dx`.
    pub fn input_gradient(
        &self,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        workspace: &mut Workspace,
    ) {
        let g = self.sizes;
        let area = g.kernel * g.kernel;
        let Workspace { packed, half, sums } = workspace;
        if g.stride() > 1 {
            // Those of a network that halve a map: with f32 products of the rounded values.
            if self.terms == Terms::Three {
                return g.input_gradient(self.isa, dy, weight, dx, accumulate, packed);
            }
            let rounded = sized(sums, dy.len() + weight.len());
            let values = rounded.par_iter_mut().zip(dy.par_iter().chain(weight));
            values.for_each(|(to, x)| *to = f32::from_bits(u32::from(round(*x)) << 16));
            let (dy, weight) = rounded.split_at(dy.len());
            return g.input_gradient(self.isa, dy, weight, dx, accumulate, packed);
        }
        // A convolution with the kernel turned round.
        let sizes = Patches { c_in: g.c_out, c_out: g.c_in, scale: Scale::Stride(1), ..g };
        let turned = Self { sizes, ..*self };
        let kernels = |i, o| &weight[(o * g.c_in + i) * area..][..area];
        let weights = turned.pack_kernels(kernels, true, std::mem::take(half));
        if g.upsamples() {
            let doubled = sized(sums, 4 * dx.len());
            turned.forward(dy, &weights, Epilogue::default(), doubled);
            let (line, c) = (g.w * g.c_in, g.c_in);
            dx.par_chunks_mut(line / 2).zip(doubled.par_chunks(2 * line)).for_each(|(dx, rows)| {
                let (top, bottom) = rows.split_at(line);
                let pairs = top.chunks_exact(2 * c).zip(bottom.chunks_exact(2 * c));
                for (dx, (top, bottom)) in dx.chunks_exact_mut(c).zip(pairs) {
                    for (i, dx) in dx.iter_mut().enumerate() {
                        let sum = (top[i] + top[c + i]) + (bottom[i] + bottom[c + i]);
                        *dx = if accumulate { *dx + sum } else { sum };
                    }
                }
            });
        } else {
            let epilogue = Epilogue { accumulate, ..Epilogue::default() };
            turned.forward(dy, &weights, epilogue, dx);
        }
        *half = weights.into_memory();
    }

    /// The gradient of the weights, (out, in, k, k), to `dweight`. Where a value of `x` is not finite,
    /// more of it may be NaN than the sums' own terms would make so: what fills the depth up is zeros on
    /// one side only.
    ///
    /// The batch is cut into parts, and the channels into groups, by their numbers alone: so the order
    /// of sums does not depend on the number of threads.
    pub fn weight_gradient(&self, x: &[f32], dy: &[f32], dweight: &mut [f32], sums: &mut Vec<f32>) {
        let g = &self.sizes;
        let (inputs, outputs) = (g.c_in.min(GROUP.0), g.c_out.min(GROUP.1));
        let c_row = g.kernel * strip_width(g, inputs);
        let group_len = outputs.next_multiple_of(ROWS) * c_row;
        let (in_groups, out_groups) = (g.c_in.div_ceil(inputs), g.c_out.div_ceil(outputs));
        let groups = in_groups * out_groups;
        let most = (SUMS_BYTES / (groups * group_len * size_of::<f32>())).clamp(1, PARTS);
        let images = g.batch.div_ceil(most.min(g.batch));
        let parts = g.batch.div_ceil(images);
        let sums = sized_by_lines(sums, parts * groups * group_len);
        sums.par_chunks_mut(group_len).enumerate().for_each(|(task, sums)| {
            let (part, group) = (task / groups, task % groups);
            let (input, output) = (group % in_groups * inputs, group / in_groups * outputs);
            let channels =
                [input..(input + inputs).min(g.c_in), output..(output + outputs).min(g.c_out)];
            let images = part * images..((part + 1) * images).min(g.batch);
            self.sum_weight_gradient(x, dy, images, channels, (sums, c_row));
        });
        let sums = &*sums;
        let area = g.kernel * g.kernel;
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
                    let dweight = &mut dweight[input * inputs * area..][..count * area];
                    for tap in 0..area {
                        let total = &total[tap / g.kernel * width + tap % g.kernel * count..];
                        for (dweight, total) in dweight[tap..].iter_mut().step_by(area).zip(total) {
                            *dweight = *total;
                        }
                    }
                }
            });
        });
    }

    /// What these images give to the gradient of the weights from some input channels to some output
    /// ones, (out, kernel, strip): the product over their pixels of `dy`, turned, and the strips.
    fn sum_weight_gradient(
        &self,
        x: &[f32],
        dy: &[f32],
        images: Range<usize>,
        [inputs, outputs]: [Range<usize>; 2],
        (sums, c_row): (&mut [f32], usize),
    ) {
        let g = &self.sizes;
        let parts = self.terms.parts();
        let values = parts * (strip_width(g, inputs.len()) + outputs.len());
        let size = self.chunk_size(values * size_of::<u16>(), images.len());
        for (i, chunk) in self.chunks(images, size).enumerate() {
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { strips: layout, line, left, rounded, .. } = scratch;
                let channels = inputs.clone();
                let strips = Strips { sizes: *g, channels, chunk, side: Side::Right };
                let b = sized_by_lines(layout, parts * strips.len());
                strips.fill(self.isa, x, parts_of(b, strips.len()), line);
                let depth = strips.pixels().next_multiple_of(DEPTH);
                // An odd number of cache lines, so that rows do not all fall into the same few sets.
                let a_row = ((depth / DEPTH) | 1) * DEPTH;
                let a_len = outputs.len().next_multiple_of(ROWS) * a_row;
                let a = sized_by_lines(left, parts * a_len);
                self.turn_gradient(dy, &strips, outputs.clone(), depth, a, a_row, rounded);
                let width = strips.width();
                let mut steps = Vec::new();
                for k in (0..depth).step_by(DEPTH) {
                    let step = |&(left, right)| Step {
                        a: left * a_len + k,
                        b: right * strips.len() + k * width,
                    };
                    steps.extend(self.terms.products().iter().map(step));
                }
                for ky in 0..g.kernel {
                    for column in (0..width).step_by(PANEL) {
                        for (j, steps) in steps.chunks(self.run()).enumerate() {
                            product(
                                self.unit,
                                Product {
                                    c: &mut sums[ky * width + column..],
                                    c_row,
                                    rows: outputs.len(),
                                    a,
                                    a_row,
                                    b: &b[strips.origin(ky) + 2 * column..],
                                    b_row: 2 * width,
                                    steps,
                                    accumulate: i + j > 0,
                                },
                            );
                        }
                    }
                }
            });
        }
    }

    /// Some channels of `dy`, rounded, and turned: a row for each, of the chunk's pixels as its strips
    /// stand, and zeros.
    #[allow(clippy::too_many_arguments)]
    fn turn_gradient(
        &self,
        dy: &[f32],
        strips: &Strips,
        channels: Range<usize>,
        depth: usize,
        a: &mut [u16],
        a_row: usize,
        rounded: &mut Vec<u16>,
    ) {
        let g = &self.sizes;
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
            turn(rounded, count, a, a_row);
        }
    }
}

simd_fn! {
    /// Rounds rows of [`PANEL`] columns to every other value from their places on, and what that leaves
    /// to `second` unless it is empty.
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

simd_fn! {
    /// A row of the output from the sums of its pixels, `c_row` apart.
    fn finish<S>(
        y: &mut [f32],
        sums: &[f32],
        c_row: usize,
        shift: &[f32],
        residual: &[f32],
        accumulate: bool,
    ) {
        let channels = shift.len();
        for (i, (y, sums)) in y.chunks_exact_mut(channels).zip(sums.chunks_exact(c_row)).enumerate() {
            let sums = sums.iter().zip(shift).map(|(sum, shift)| sum + shift);
            match (accumulate, residual.is_empty()) {
                (false, true) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum),
                (true, true) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
                (_, false) => {
                    let residual = &residual[i * channels..][..channels];
                    for ((y, sum), residual) in y.iter_mut().zip(sums).zip(residual) {
                        let value = sum + residual;
                        *y = if accumulate { *y + value } else { value };
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor};
    use proptest::prelude::*;

    use super::super::conv::composed;
    use super::*;
    use crate::kernels::tests::{BF16, F32, Normals, Sums, check};
    use crate::random_inputs::inputs;

    /// A convolution, of a map (height, width) before it is upsampled.
    #[derive(Debug, Clone, Copy)]
    struct Case {
        batch: usize,
        map: (usize, usize),
        channels: (usize, usize),
        kernel: usize,
        scale: Scale,
        accumulate: bool,
        normals: Normals,
    }

    /// The part of each value that enters a product.
    fn operand(terms: Terms, x: &Tensor) -> Tensor {
        match terms {
            Terms::One => x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap(),
            Terms::Three => x.clone(),
        }
    }

    impl Case {
        /// Asserts that each unit's sums are within rounding of the exact ones.
        ///
        /// One product is exact of rounded operands. Three leave out the product of what rounding leaves,
        /// and what rounding that leaves of either: three times 2^-16 of the exact operands' product.
        fn agrees(self) -> Result<()> {
            let Self {
                batch, map: (h, w), channels: (c_in, c_out), kernel, scale, accumulate, ..
            } = self;
            let normal = |k, shape: &[usize]| self.normals.tensor(k, shape);
            let weight = normal(2, &[c_out, c_in, kernel, kernel]);
            let x_dims = [batch, h, w, c_in];
            let sizes = Patches::new(x_dims, weight.shape(), scale)?;
            let y_dims = [batch, sizes.h_out, sizes.w_out, c_out];
            let (x, dy) = (normal(0, &x_dims), normal(1, &y_dims));
            let bias = normal(3, &[c_out]);
            let (per_image, residual) = (normal(4, &[batch, 1, 1, c_out]), normal(5, &y_dims));
            let (y_before, dx_before) = (normal(6, &y_dims), normal(7, &x_dims));
            let before = [y_before.clone(), dx_before.clone(), (&weight * f64::NAN)?];
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let [weights, xs, dys] = [&weight, &x, &dy].map(values);
            let [biases, per, more] = [&bias, &per_image, &residual].map(values);
            let epilogue = Epilogue {
                bias: Some(&biases),
                per_image: Some(&per),
                residual: Some(&more),
                accumulate,
            };
            let nothing = Tensor::zeros(c_out, DType::F64, &Device::Cpu)?;
            let f = |v: &[Tensor]| composed(&v[0], &v[1], &nothing, scale);
            for (terms, products, operands) in
                [(Terms::One, 1.0, 0.0), (Terms::Three, 3.0, 3.0 * BF16 * BF16)]
            {
                let [x, weight, dy] = [&x, &weight, &dy].map(|t| operand(terms, t));
                let sums = Sums::of(&[x, weight], |_| dy.clone(), f, f)?;
                let Ok([mut y, mut dx, dweight]) = <[Sums; 3]>::try_from(sums) else {
                    unreachable!()
                };
                for added in [&bias, &per_image, &residual] {
                    y = y.plus(added)?;
                }
                if accumulate {
                    (y, dx) = (y.plus(&y_before)?, dx.plus(&dx_before)?);
                }
                let bounds =
                    [&y, &dx, &dweight].map(|sums| sums.bound(products * F32, 0.0, operands));
                for unit in Unit::available() {
                    let isa = unit.isa().unwrap_or(Isa::detect());
                    let half = HalfConvolution { isa, unit, terms, sizes };
                    let mut dirt = Workspace {
                        packed: vec![f32::NAN; 999],
                        half: vec![u16::MAX; 999],
                        sums: vec![f32::NAN; 999],
                    };
                    let mut found = before.each_ref().map(values);
                    let packed = half.pack(&weights, std::mem::take(&mut dirt.half));
                    half.forward(&xs, &packed, epilogue, &mut found[0]);
                    half.input_gradient(&dys, &weights, &mut found[1], accumulate, &mut dirt);
                    half.weight_gradient(&xs, &dys, &mut found[2], &mut dirt.sums);
                    let names = ["y", "gradient of x", "gradient of weight"];
                    for (i, sums) in [&y, &dx, &dweight].into_iter().enumerate() {
                        let found =
                            Tensor::from_slice(&found[i], sums.exact.shape(), &Device::Cpu)?;
                        let name = format!("{self:?}, {unit:?}, {terms:?}: {}", names[i]);
                        check(&name, &found, &sums.exact, bounds[i].as_ref().unwrap());
                    }
                }
            }
            Ok(())
        }
    }

    /// The weight's gradient is one sum of 13 products that nearly cancel: with operands of 8 bits, it
    /// is off by more than 1% of itself.
    #[test]
    fn a_gradient_that_nearly_cancels_agrees() {
        for accumulate in [false, true] {
            let case = Case {
                batch: 13,
                map: (2, 1),
                channels: (1, 1),
                kernel: 1,
                scale: Scale::Stride(2),
                accumulate,
                normals: Normals(3),
            };
            case.agrees().unwrap();
        }
    }

    proptest! {
        #![proptest_config(inputs(48))]

        #[test]
        fn every_unit_convolves(
            (batch, h, w) in prop_oneof![
                (1usize..10, 1usize..9, 1usize..20),
                // Several images a chunk.
                (6usize..24, 1usize..4, 1usize..4),
            ],
            channels in (1usize..40, 1usize..40),
            kernel in prop_oneof![Just(1usize), Just(3), Just(5)],
            scale in prop_oneof![(1usize..4).prop_map(Scale::Stride), Just(Scale::Upsample)],
            accumulate: bool,
            seed: u64,
        ) {
            Case { batch, map: (h, w), channels, kernel, scale, accumulate, normals: Normals(seed) }.agrees().unwrap();
        }
    }
}
