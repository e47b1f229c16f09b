//! Convolutions by products of bf16 operands, summed in f32. Maps and weights are f32 in memory. They
//! are rounded when they are laid out for the products.
//!
//! With three terms, a value is the sum of two bf16 parts: its rounded value, and the rounded error. A
//! product is the sum of the products of the parts, except the product of the errors. It is accurate to
//! about 16 bits.

mod chunks;
mod pack;
mod rounding;
mod strips;
mod weight_gradient;

use rayon::prelude::*;

pub(super) use self::chunks::Bf16;
use self::chunks::{SCRATCH, Scratch};
use self::pack::pack_kernels;
use self::rounding::{Terms, parts_of};
use self::strips::{Chunk, Side, Strips, strip_width};
use super::algorithm::{Algorithm, Input, Math, Packed, Workspace};
use super::epilogue::Epilogue;
use super::im2col::Im2col;
use crate::kernels::cpu::bf16::operands::{DEPTH, Product, ROWS, Step, round};
use crate::kernels::cpu::bf16::unit::Unit;
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::{from_line, sized};
use crate::kernels::cpu::simd::simd_fn;
use crate::kernels::op::conv::ConvShape;
use crate::kernels::op::place::Place;

impl Bf16 {
    /// Returns the algorithm if `math` uses bf16 products.
    pub(super) fn suits(isa: Isa, shape: &ConvShape, math: Math) -> Option<Self> {
        let terms = match math {
            // Returned before the units are detected: AMX is not requested from the system if it is not
            // used.
            Math::F32 | Math::F32Large => return None,
            Math::Bf16x3 => Terms::Three,
            Math::Bf16 => Terms::One,
        };
        Some(Self { isa, unit: Unit::detect(isa), terms, shape: *shape })
    }

    /// Returns the same algorithm on another unit.
    #[cfg(test)]
    pub(super) fn with_unit(self, unit: Unit) -> Self {
        Self { unit, ..self }
    }

    /// Writes `y` from `x`, with the weights packed.
    fn run_forward(&self, x: &[f32], weights: &[u16], epilogue: Epilogue<'_>, y: &mut [f32]) {
        let g = &self.shape;
        let padded = g.c_out.next_multiple_of(PANEL);
        let strip = self.terms.parts() * strip_width(g, g.c_in);
        let bytes = strip * size_of::<u16>() + padded * size_of::<f32>();
        // Small batches leave work for every thread.
        let threads = rayon::current_num_threads();
        let (images, rows) = self.chunk_size(bytes, g.batch.div_ceil(threads));
        let rows = rows.min((g.batch * g.h_out).div_ceil(threads));
        let mut chunks = Vec::new();
        let mut left = y;
        for chunk in self.chunks(0..g.batch, (images, rows)) {
            let len = chunk.images.len() * chunk.rows.len() * g.w_out * epilogue.place(g.c_out).of;
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

    /// Computes a chunk.
    fn convolve(
        &self,
        x: &[f32],
        chunk: Chunk,
        weights: &[u16],
        epilogue: Epilogue<'_>,
        y: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let g = &self.shape;
        let Scratch { strips: layout, line, sums, shift, .. } = scratch;
        let strips = Strips { shape: *g, channels: 0..g.c_in, chunk, side: Side::Left };
        let a = sized(layout, self.terms.parts() * strips.len());
        strips.fill(self.isa, x, parts_of(a, strips.len()), line);
        let width = strips.width();
        let part_len = g.kernel[0] * width * PANEL;
        let mut steps = Vec::new();
        for ky in 0..g.kernel[0] {
            for k in (0..width).step_by(DEPTH) {
                let (a, b) = (strips.origin(ky) + k, (ky * width + k) * PANEL);
                let step =
                    |&(left, right)| Step { a: left * strips.len() + a, b: right * part_len + b };
                steps.extend(self.terms.products().iter().map(step));
            }
        }
        let rows = strips.pixels();
        let c_row = g.c_out.next_multiple_of(PANEL);
        let sums = sized(sums, rows.next_multiple_of(ROWS) * c_row);
        let panels = weights.chunks_exact(self.terms.parts() * part_len);
        for (panel, b) in panels.take(c_row / PANEL).enumerate() {
            for (i, steps) in steps.chunks(self.run()).enumerate() {
                let (c, a) = (&mut sums[panel * PANEL..], &*a);
                let (a_row, b_row, accumulate) = (width, 2 * PANEL, i > 0);
                let product = Product { c, c_row, rows, a, a_row, b, b_row, steps, accumulate };
                self.unit.multiply(product);
            }
        }
        let Chunk { images, rows } = strips.chunk;
        let shift = sized(shift, g.c_out);
        let place = epilogue.place(g.c_out);
        let line = g.w_out * place.of;
        let lines = y.chunks_exact_mut(line).enumerate();
        for (at, y) in lines {
            let (j, i) = (at / rows.len(), at % rows.len());
            if i == 0 {
                epilogue.shift(images.start + j, shift);
            }
            let sums = &sums[(i * images.len() + j) * g.w_out * c_row..][..g.w_out * c_row];
            let sums = (sums, c_row);
            let row = (images.start + j) * g.h_out + rows.start + i;
            let residual = epilogue.add.residual.map_or(&[][..], |r| &r[row * line..][..line]);
            finish(self.isa, (&mut *y, place), sums, shift, residual, epilogue.accumulate);
            epilogue.rectify(y, g.c_out);
        }
    }

    /// Computes the gradient of `x` for strides greater than 1, and for kernels that begin at the edge, by f32 products
    /// of the rounded values. Few convolutions of a network are of these kinds.
    fn strided_input_gradient(
        &self,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        workspace: &mut Workspace,
    ) {
        let im2col = Im2col { isa: self.isa, shape: self.shape };
        if self.terms == Terms::Three {
            return im2col.input_gradient(dy, weight, dx, accumulate, workspace);
        }
        let mut memory = std::mem::take(&mut workspace.values);
        let rounded = sized(&mut memory, dy.len() + weight.len());
        let values = rounded.par_iter_mut().zip(dy.par_iter().chain(weight));
        values.for_each(|(to, x)| *to = f32::from_bits(u32::from(round(*x)) << 16));
        let (dy, weight) = rounded.split_at(dy.len());
        im2col.input_gradient(dy, weight, dx, accumulate, workspace);
        workspace.values = memory;
    }
}

impl Algorithm for Bf16 {
    fn pack(&self, weight: &[f32], workspace: &mut Workspace) -> Packed {
        let ConvShape { c_in, .. } = self.shape;
        let area = self.shape.taps();
        let kernels = |o, i| &weight[(o * c_in + i) * area..][..area];
        let mut memory = std::mem::take(&mut workspace.packed_bf16);
        pack_kernels(self.isa, &self.shape, self.terms, kernels, false, &mut memory);
        Packed::Bf16(memory)
    }

    fn forward(&self, x: Input<'_>, weight: &Packed, epilogue: Epilogue<'_>, y: &mut [f32]) {
        self.run_forward(x.map, weight.bf16(), epilogue, y);
    }

    fn input_gradient(
        &self,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        workspace: &mut Workspace,
    ) {
        let g = self.shape;
        if g.stride() > 1 || g.begins_at_edge() {
            return self.strided_input_gradient(dy, weight, dx, accumulate, workspace);
        }
        let area = g.taps();
        let Workspace { packed_bf16: packed, values: sums } = workspace;
        let transposed = Self { shape: g.transposed(), ..*self };
        let kernels = |i, o| &weight[(o * g.c_in + i) * area..][..area];
        pack_kernels(self.isa, &transposed.shape, self.terms, kernels, true, packed);
        let packed = from_line(packed);
        if g.upsamples() {
            let doubled = sized(sums, 4 * dx.len());
            transposed.run_forward(dy, packed, Epilogue::default(), doubled);
            let (line, c) = (2 * g.w * g.c_in, g.c_in);
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
            transposed.run_forward(dy, packed, epilogue, dx);
        }
    }

    fn weight_gradient(
        &self,
        x: Input<'_>,
        dy: &[f32],
        dweight: &mut [f32],
        workspace: &mut Workspace,
    ) {
        self.sum_weight_gradient(x.map, dy, dweight, &mut workspace.values);
    }
}

simd_fn! {
    /// Writes a row of the output, some channels of `y`, from the sums of its pixels, which are `c_row` apart.
    fn finish<S>(
        row: (&mut [f32], Place),
        sums: (&[f32], usize),
        shift: &[f32],
        residual: &[f32],
        accumulate: bool,
    ) {
        let ((y, place), (sums, c_row), channels) = (row, sums, shift.len());
        for (i, (y, sums)) in y.chunks_exact_mut(place.of).zip(sums.chunks_exact(c_row)).enumerate() {
            let y = &mut y[place.first..][..channels];
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
