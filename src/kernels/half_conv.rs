//! Convolutions whose products take bf16 operands, summed in f32. Maps and weights come and go in
//! f32, and are rounded where they are laid out for the products.
//!
//! With three terms, a value is the sum of two bf16 (its rounding, and what that leaves), and a
//! product that of the terms but for the least: about 16 bits.

use std::cell::RefCell;

use rayon::prelude::*;

use super::bf16::{DEPTH, PANEL, Unit, place, product, round, round_all};
use super::patches::{PARTS, Patches, Scale};
use super::simd::Isa;
use super::values::sized;
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
    fn parts(self) -> &'static [(usize, usize)] {
        match self {
            Self::One => &[(0, 0)],
            Self::Three => &[(0, 0), (0, 1), (1, 0)],
        }
    }

    fn count(self) -> usize {
        self.parts().len()
    }

    /// The parts of values: as many as there are.
    fn split(self, isa: Isa, values: &[f32]) -> Vec<Vec<u16>> {
        let mut rounded = vec![0u16; values.len()];
        let cut = |(to, from): (&mut [u16], &[f32])| round_all(isa, from, to);
        rounded.par_chunks_mut(1 << 14).zip(values.par_chunks(1 << 14)).for_each(cut);
        if self == Self::One {
            return vec![rounded];
        }
        let mut left = vec![0u16; values.len()];
        left.par_iter_mut().zip(values).zip(&rounded).for_each(|((left, &x), &rounded)| {
            *left = round(rest(x, rounded));
        });
        vec![rounded, left]
    }
}

/// One image of `len` values, in each of its parts.
fn image(parts: &[Vec<u16>], k: usize, len: usize) -> Vec<&[u16]> {
    parts.iter().map(|part| &part[k * len..][..len]).collect()
}

fn rest(x: f32, rounded: u16) -> f32 {
    x - f32::from_bits(u32::from(rounded) << 16)
}

/// Such a convolution.
#[derive(Debug, Clone, Copy)]
pub(super) struct HalfConvolution {
    pub isa: Isa,
    pub unit: Unit,
    pub terms: Terms,
    pub sizes: Patches,
}

/// Weights, rounded and packed: panels of output channels, each (terms, depth, [`PANEL`]).
#[derive(Debug, Clone)]
pub(crate) struct PackedHalf {
    values: Vec<u16>,
    unit: Unit,
    terms: Terms,
}

thread_local! {
    /// Patches and products, reused from call to call. Nothing may wait for other threads while it is
    /// borrowed: this one could be given work that borrows it again.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    patches: Vec<u16>,
    left: Vec<u16>,
    right: Vec<u16>,
    sums: Vec<f32>,
}

impl PackedHalf {
    /// The convolution of these sizes that the weights were packed for.
    pub(super) fn convolution(&self, isa: Isa, sizes: Patches) -> HalfConvolution {
        HalfConvolution { isa, unit: self.unit, terms: self.terms, sizes }
    }
}

impl HalfConvolution {
    /// The values of a patch, up to the next multiple of [`DEPTH`].
    fn depth(&self) -> usize {
        self.sizes.patch().next_multiple_of(DEPTH)
    }

    /// Weights (out, in, k, k).
    pub fn pack(&self, weight: &[f32]) -> PackedHalf {
        let Patches { c_in, kernel, .. } = self.sizes;
        let area = kernel * kernel;
        self.pack_by(|o, i, tap| weight[(o * c_in + i) * area + tap])
    }

    fn pack_by(&self, weight: impl Fn(usize, usize, usize) -> f32 + Sync) -> PackedHalf {
        let Patches { c_in, c_out, kernel, .. } = self.sizes;
        let panel_len = self.terms.count() * self.depth() * PANEL;
        let mut packed = vec![0u16; c_out.div_ceil(PANEL) * panel_len];
        packed.par_chunks_mut(panel_len).enumerate().for_each(|(panel, packed)| {
            for column in 0..PANEL.min(c_out - panel * PANEL) {
                for tap in 0..kernel * kernel {
                    for i in 0..c_in {
                        let value = weight(panel * PANEL + column, i, tap);
                        let first = round(value);
                        let parts = [first, round(rest(value, first))];
                        for (term, (_, part)) in self.terms.parts().iter().enumerate() {
                            let k = term * self.depth() + tap * c_in + i;
                            packed[place(k, column)] = parts[*part];
                        }
                    }
                }
            }
        });
        PackedHalf { values: packed, unit: self.unit, terms: self.terms }
    }

    /// Lays out the patches of some output rows of an image, given by its parts: a row of all terms
    /// for each pixel.
    fn lay_out(&self, image: &[&[u16]], rows: std::ops::Range<usize>, patches: &mut [u16]) {
        let row_len = self.terms.count() * self.depth();
        patches.fill(0);
        for (row, oy) in patches.chunks_mut(self.sizes.w_out * row_len).zip(rows) {
            for (patch, at, len) in self.sizes.spans(oy, row_len) {
                for (term, (part, _)) in self.terms.parts().iter().enumerate() {
                    row[patch + term * self.depth()..][..len]
                        .copy_from_slice(&image[*part][at..][..len]);
                }
            }
        }
    }

    /// `y` from `x`.
    pub fn forward(&self, x: &[f32], weights: &PackedHalf, epilogue: Epilogue, y: &mut [f32]) {
        let g = &self.sizes;
        let parts = self.terms.split(self.isa, x);
        let (line, depth) = (g.w_out * g.c_out, self.terms.count() * self.depth());
        let panels = g.c_out.div_ceil(PANEL);
        y.par_chunks_mut(g.y_len()).enumerate().for_each(|(k, y)| {
            let image = image(&parts, k, g.x_len());
            let mut shift = vec![0f32; g.c_out];
            epilogue.shift(k, &mut shift);
            let residual = epilogue.residual.map(|r| &r[k * g.y_len()..][..g.y_len()]);
            y.par_chunks_mut(g.chunk_rows() * line).enumerate().for_each(|(i, y)| {
                let rows = g.chunk(i);
                let pixels = rows.len() * g.w_out;
                let residual = residual.map(|r| &r[rows.start * line..rows.end * line]);
                SCRATCH.with_borrow_mut(|Scratch { patches, sums, .. }| {
                    let patches = sized(patches, pixels * depth);
                    self.lay_out(&image, rows, patches);
                    let sums = sized(sums, pixels * panels * PANEL);
                    for (panel, b) in weights.values.chunks(depth * PANEL).enumerate() {
                        let c = (&mut sums[panel * PANEL..], panels * PANEL);
                        product(self.unit, c, pixels, (patches, depth), b, depth, false);
                    }
                    for (pixel, y) in y.chunks_mut(g.c_out).enumerate() {
                        let sums = &sums[pixel * panels * PANEL..];
                        let residual = residual.map(|r| &r[pixel * g.c_out..]);
                        for (o, y) in y.iter_mut().enumerate() {
                            let value = sums[o] + shift[o] + residual.map_or(0.0, |r| r[o]);
                            *y = if epilogue.accumulate { *y + value } else { value };
                        }
                    }
                });
            });
        });
    }

    /// The gradient of `x`, written or added to `dx`.
    pub fn input_gradient(&self, dy: &[f32], weight: &[f32], dx: &mut [f32], accumulate: bool) {
        let g = self.sizes;
        let area = g.kernel * g.kernel;
        if g.stride() > 1 {
            // The two of a network that halve a map: with f32 products of the rounded values.
            let value = |x: &f32| f32::from_bits(u32::from(round(*x)) << 16);
            let rounded = |x: &[f32]| match self.terms {
                Terms::One => x.iter().map(value).collect(),
                Terms::Three => x.to_vec(),
            };
            return g.input_gradient(self.isa, &rounded(dy), &rounded(weight), dx, accumulate);
        }
        // A convolution with the kernel turned round.
        let sizes = Patches { c_in: g.c_out, c_out: g.c_in, scale: Scale::Stride(1), ..g };
        let turned = Self { sizes, ..*self };
        let weights = turned.pack_by(|i, o, tap| weight[(o * g.c_in + i) * area + area - 1 - tap]);
        if !g.upsamples() {
            let epilogue = Epilogue { accumulate, ..Epilogue::default() };
            return turned.forward(dy, &weights, epilogue, dx);
        }
        let mut doubled = vec![0f32; 4 * dx.len()];
        turned.forward(dy, &weights, Epilogue::default(), &mut doubled);
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
    }

    /// The gradient of the weights, (out, in, k, k), to `dweight`.
    pub fn weight_gradient(&self, x: &[f32], dy: &[f32], dweight: &mut [f32]) {
        let g = &self.sizes;
        let (xs, dys) = (self.terms.split(self.isa, x), self.terms.split(self.isa, dy));
        let images = g.batch.div_ceil(PARTS);
        let panels = g.patch().div_ceil(PANEL);
        let sums: Vec<Vec<f32>> = (0..g.batch.div_ceil(images))
            .into_par_iter()
            .map(|part| {
                // (panels, out, PANEL)
                let mut sums = vec![0f32; panels * g.c_out * PANEL];
                for k in part * images..((part + 1) * images).min(g.batch) {
                    let (x, dy) = (image(&xs, k, g.x_len()), image(&dys, k, g.y_len()));
                    for i in 0..g.h_out.div_ceil(g.chunk_rows()) {
                        self.add_weight_gradient(&x, &dy, g.chunk(i), &mut sums);
                    }
                }
                sums
            })
            .collect();
        let area = g.kernel * g.kernel;
        dweight.par_chunks_mut(g.patch()).enumerate().for_each(|(o, dweight)| {
            for tap in 0..area {
                for i in 0..g.c_in {
                    let entry = tap * g.c_in + i;
                    let at = (entry / PANEL * g.c_out + o) * PANEL + entry % PANEL;
                    dweight[i * area + tap] = sums.iter().map(|sums| sums[at]).sum();
                }
            }
        });
    }

    /// Adds what some output rows of an image give: the product over their pixels of `dy`,
    /// transposed, and the patches.
    fn add_weight_gradient(
        &self,
        x: &[&[u16]],
        dy: &[&[u16]],
        rows: std::ops::Range<usize>,
        sums: &mut [f32],
    ) {
        let g = &self.sizes;
        let pixels = rows.len() * g.w_out;
        let padded = pixels.next_multiple_of(DEPTH);
        let depth = self.terms.count() * padded;
        let origin = rows.start * g.w_out * g.c_out;
        SCRATCH.with_borrow_mut(|Scratch { left, right, patches, .. }| {
            let left = sized(left, g.c_out * depth);
            left.fill(0);
            for (term, (part, _)) in self.terms.parts().iter().enumerate() {
                let dy = dy[*part][origin..][..pixels * g.c_out].chunks(g.c_out);
                for (pixel, dy) in dy.enumerate() {
                    for (o, d) in dy.iter().enumerate() {
                        left[o * depth + term * padded + pixel] = *d;
                    }
                }
            }
            let panel_len = depth * PANEL;
            let panels = g.patch().div_ceil(PANEL);
            let right = sized(right, panels * panel_len);
            // Patches of whole panels, two pixels of which then make a row of pairs.
            let row_len = panels * PANEL;
            let patches = sized(patches, padded * row_len);
            for (term, (_, part)) in self.terms.parts().iter().enumerate() {
                patches.fill(0);
                let lines = patches.chunks_mut(g.w_out * row_len);
                for (line, oy) in lines.zip(rows.clone()) {
                    for (patch, at, len) in g.spans(oy, row_len) {
                        line[patch..][..len].copy_from_slice(&x[*part][at..][..len]);
                    }
                }
                for (pair, rows) in patches.chunks_exact(2 * row_len).enumerate() {
                    let (even, odd) = rows.split_at(row_len);
                    let values = even.chunks_exact(PANEL).zip(odd.chunks_exact(PANEL));
                    for (panel, (even, odd)) in values.enumerate() {
                        let at = panel * panel_len + place(term * padded + 2 * pair, 0);
                        let pairs = right[at..][..2 * PANEL].chunks_exact_mut(2);
                        for ((pair, even), odd) in pairs.zip(even).zip(odd) {
                            (pair[0], pair[1]) = (*even, *odd);
                        }
                    }
                }
            }
            let panels = sums.chunks_mut(g.c_out * PANEL).zip(right.chunks(panel_len));
            for (sums, b) in panels {
                product(self.unit, (sums, PANEL), g.c_out, (left, depth), b, depth, true);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Shape;
    use proptest::prelude::*;

    use super::*;
    use crate::noise::{Noise, Purpose};

    fn normal(k: u32, len: usize) -> Vec<f32> {
        let mut values = vec![0f32; len];
        Noise::new(3).stream(Purpose::Prior, 0, k).fill_normal(&mut values);
        values
    }

    /// The root of the mean square of the difference, over that of what is expected.
    fn error(found: &[f32], expected: &[f32]) -> f64 {
        let square = |x: f32| f64::from(x) * f64::from(x);
        let off: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
        (off / expected.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Against the f32 kernels. With operands of 8 bits, the products' errors are each within
        /// 2^-8, about 0.3% in the mean square; with three products of 8 bits, within 2^-16.
        #[test]
        fn every_unit_convolves(
            (batch, h, w) in (1usize..10, 1usize..9, 1usize..20),
            (c_in, c_out) in (1usize..40, 1usize..40),
            kernel in prop_oneof![Just(1usize), Just(3), Just(5)],
            scale in prop_oneof![(1usize..3).prop_map(Scale::Stride), Just(Scale::Upsample)],
            accumulate: bool,
        ) {
            let shape = Shape::from((c_out, c_in, kernel, kernel));
            let sizes = Patches::new([batch, h, w, c_in], &shape, scale).unwrap();
            let (x, dy) = (normal(0, batch * sizes.x_len()), normal(1, batch * sizes.y_len()));
            let (weight, bias) = (normal(2, shape.elem_count()), normal(3, c_out));
            let (per_image, residual) = (normal(4, batch * c_out), normal(5, dy.len()));
            let epilogue = Epilogue {
                bias: Some(&bias),
                per_image: Some(&per_image),
                residual: Some(&residual),
                accumulate,
            };
            let (mut y, mut dx) = (normal(6, dy.len()), normal(7, x.len()));
            let (y_before, dx_before) = (y.clone(), dx.clone());
            let isa = Isa::detect();
            sizes.forward(isa, &x, &sizes.pack(&weight), epilogue, &mut y);
            sizes.input_gradient(isa, &dy, &weight, &mut dx, accumulate);
            let mut dweight = vec![f32::NAN; weight.len()];
            sizes.weight_gradient(isa, &x, &dy, &mut dweight);
            for unit in Unit::available() {
                for (terms, limit) in [(Terms::One, 8e-3), (Terms::Three, 4e-5)] {
                    let half = HalfConvolution { isa, unit, terms, sizes };
                    let (mut y_half, mut dx_half) = (y_before.clone(), dx_before.clone());
                    half.forward(&x, &half.pack(&weight), epilogue, &mut y_half);
                    half.input_gradient(&dy, &weight, &mut dx_half, accumulate);
                    let mut dweight_half = vec![f32::NAN; weight.len()];
                    half.weight_gradient(&x, &dy, &mut dweight_half);
                    for (what, found, expected) in
                        [("y", &y_half, &y), ("dx", &dx_half, &dx), ("dw", &dweight_half, &dweight)]
                    {
                        let off = error(found, expected);
                        prop_assert!(off < limit, "{unit:?}, {terms:?}: {what} off by {off}");
                        // It would be no bf16 if it were exact.
                        if terms == Terms::One && what == "dw" && dy.len() > 50 {
                            prop_assert!(off > 1e-4, "{unit:?}: {what} off by {off} only");
                        }
                    }
                }
            }
        }
    }
}
