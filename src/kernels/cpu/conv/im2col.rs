//! Convolutions of any kernel and stride as products of patches (im2col), or as dot products if there are few output
//! channels.
//!
//! The patches of a few rows of an image fit in the cache, and are multiplied by the weights at once. The patch of a
//! pixel consists of parts of a few lines, and overlaps that of the next pixel. If lines are long enough, the product
//! reads patches where they are. Only the zeros around the image need a copy of its lines. Otherwise patches are laid out.
//! The gradient of the input lays out the gradients of patches, except for a convolution to a few channels, where it is a
//! forward convolution. The gradient of the weights copies a few values of each patch at a time.

mod weight_gradient;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use self::weight_gradient::weight_gradient;
use super::algorithm::{Algorithm, Input, Packed, Workspace};
use super::epilogue::Epilogue;
use crate::kernels::cpu::gemm::pack::{Mat, Panels, pack};
use crate::kernels::cpu::gemm::{NARROW, Patches, gemm_packed, gemm_patches, narrow_patches};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::{from_line, sized};
use crate::kernels::op::conv::{ConvShape, Scale};
use crate::kernels::op::place::Place;

/// Approximate number of pixels whose patches are laid out at a time.
const CHUNK_PIXELS: usize = 192;

/// The least number of pixels of a line of which products read patches in place. Lines of 8 pixels, about half of the
/// rows of the largest tiles, were 9% slower than patches that are laid out.
const MIN_LINE: usize = 12;

/// The least number of input channels of a convolution to few channels that is computed by dot products.
const MIN_NARROW: usize = 16;

thread_local! {
    /// Patches, reused from call to call. Nothing may wait for other threads while they are borrowed: this
    /// thread could be given work that borrows them again.
    static PATCHES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Convolutions of any kernel and stride.
#[derive(Debug, Clone, Copy)]
pub(super) struct Im2col {
    pub isa: Isa,
    pub shape: ConvShape,
}

impl Im2col {
    fn chunk_rows(&self) -> usize {
        CHUNK_PIXELS.div_ceil(self.shape.w_out).min(self.shape.h_out)
    }

    /// Divides the output rows of an image into chunks.
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, end) = (self.chunk_rows(), self.shape.h_out);
        (0..end).step_by(rows).map(move |first| first..(first + rows).min(end))
    }

    /// Packs the weights (out, in, height, width) for products with patches: one row per value of a patch, one
    /// column per output channel.
    fn pack_patches(&self, weight: &[f32], memory: &mut Vec<f32>) {
        let (patch, c_out) = (self.shape.patch(), self.shape.c_out);
        pack(weight, (patch, c_out), |k| self.tap(k), |o| o * patch, memory);
    }

    /// Packs the weights of a convolution to [few channels](Self::is_narrow): for each output channel, the weights of
    /// the values of a patch.
    fn pack_columns(&self, weight: &[f32], memory: &mut Vec<f32>) {
        let patch = self.shape.patch();
        let columns = sized(memory, weight.len()).chunks_exact_mut(patch);
        for (column, weight) in columns.zip(weight.chunks_exact(patch)) {
            column.iter_mut().enumerate().for_each(|(k, value)| *value = weight[self.tap(k)]);
        }
    }

    /// Packs the weights for the [transposed](ConvShape::transposed) convolution, whose kernels are rotated.
    fn pack_rotated(&self, weight: &[f32], memory: &mut Vec<f32>) {
        let ConvShape { c_in, c_out, .. } = self.shape;
        let (taps, patch) = (self.shape.taps(), self.shape.patch());
        let row_at = |k| k % c_out * patch + (taps - 1 - k / c_out);
        pack(weight, (taps * c_out, c_in), row_at, |i| i * taps, memory);
    }

    /// Packs the transpose of [`pack_patches`](Self::pack_patches).
    fn pack_transposed(&self, weight: &[f32], memory: &mut Vec<f32>) {
        let (patch, c_out) = (self.shape.patch(), self.shape.c_out);
        pack(weight, (c_out, patch), |o| o * patch, |k| self.tap(k), memory);
    }

    /// Returns the position, in the weights (in, height, width) of an output channel, of the weight of a value of a
    /// patch.
    fn tap(&self, value: usize) -> usize {
        let (tap, channel) = (value / self.shape.c_in, value % self.shape.c_in);
        channel * self.shape.taps() + tap
    }

    /// Returns the spans of the patches of output row `oy` that lie within the image. Each has a position
    /// in the patches of the row, a position in the image, and a length.
    fn spans(&self, oy: usize) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let g = self.shape;
        let ([h, w], [above, before], patch) = (g.map(), g.padding(), g.patch());
        let [height, width] = g.kernel;
        (0..g.w_out).flat_map(move |ox| {
            let left = (ox * g.stride()) as isize - before as isize;
            let skip = (-left).max(0) as usize;
            let first = (left + skip as isize) as usize;
            let last = (left + width as isize).min(w as isize) as usize;
            (0..height)
                .filter_map(move |ky| {
                    let y = (oy * g.stride() + ky).checked_sub(above).filter(|&y| y < h)?;
                    Some((ox * patch + (ky * width + skip) * g.c_in, y))
                })
                .flat_map(move |(place, y)| {
                    // Neighbours in the patch are neighbours in the image, unless it is upsampled.
                    let step = if g.upsamples() { 1 } else { last - first };
                    (first..last).step_by(step).map(move |x| {
                        let pixel = if g.upsamples() { y / 2 * (w / 2) + x / 2 } else { y * w + x };
                        (place + (x - first) * g.c_in, pixel * g.c_in, step * g.c_in)
                    })
                })
        })
    }

    /// Calls `f` with the patches of these output rows of an image, one row per pixel.
    fn with_patches(&self, x: &[f32], rows: Range<usize>, f: impl FnOnce(Mat)) {
        let ConvShape { w, c_in, w_out, .. } = self.shape;
        let (pixels, patch) = (rows.len() * w_out, self.shape.patch());
        if self.shape.is_pointwise() {
            let x = &x[rows.start * w * c_in..][..pixels * c_in];
            return f(Mat::new(x, pixels, c_in));
        }
        PATCHES.with_borrow_mut(|patches| {
            let patches = sized(patches, pixels * patch);
            if !self.shape.stays_within() {
                patches.fill(0.0);
            }
            for (row, oy) in patches.chunks_mut(w_out * patch).zip(rows) {
                for (place, image, len) in self.spans(oy) {
                    row[place..][..len].copy_from_slice(&x[image..][..len]);
                }
            }
            f(Mat::new(patches, pixels, patch));
        });
    }

    /// Calls `f` with the rows of an image under the kernel at these output rows, and the zeros around them, and with
    /// the distance from one row to the next.
    fn with_lines(&self, x: &[f32], rows: Range<usize>, f: impl FnOnce(&[f32], usize)) {
        let (g, [above, before]) = (self.shape, self.shape.padding());
        let (first, row) = (rows.start * g.stride(), g.w * g.c_in);
        if g.stays_within() {
            return f(&x[first * row..], row);
        }
        let under = |count: usize, kernel: usize| (count - 1) * g.stride() + kernel;
        let [lines, columns] = [under(rows.len(), g.kernel[0]), under(g.w_out, g.kernel[1])];
        let (line, left) = (columns * g.c_in, before * g.c_in);
        let inside = left..left + row.min(line - left);
        PATCHES.with_borrow_mut(|memory| {
            let memory = sized(memory, lines * line);
            for (y, to) in (first..).zip(memory.chunks_exact_mut(line)) {
                let Some(y) = y.checked_sub(above).filter(|&y| y < g.h) else {
                    to.fill(0.0);
                    continue;
                };
                to[..left].fill(0.0);
                to[inside.clone()].copy_from_slice(&x[y * row..][..inside.len()]);
                to[inside.end..].fill(0.0);
            }
            f(memory, line);
        });
    }

    /// Returns whether the output has so few channels that a panel of them would be mostly empty, and patches are long
    /// enough for vectors.
    fn is_narrow(&self) -> bool {
        self.shape.c_out <= NARROW && self.shape.c_in >= MIN_NARROW
    }

    /// Returns the convolution from few channels whose output is the gradient of the input, if there is one.
    fn transposed(&self) -> Option<Self> {
        let suits = self.is_narrow() && self.shape.scale == Scale::Stride(1);
        suits.then(|| Self { shape: self.shape.transposed(), ..*self })
    }

    /// Returns whether products read patches in place. Each line of the output is then a product of its own, which
    /// needs enough pixels to fill tiles.
    fn reads_in_place(&self) -> bool {
        let shape = self.shape;
        !shape.is_pointwise() && !shape.upsamples() && shape.w_out >= MIN_LINE
    }

    /// Computes the convolution of `x` to `y`, with packed weights.
    fn convolve(&self, x: &[f32], weight: &[f32], epilogue: Epilogue<'_>, y: &mut [f32]) {
        let ConvShape { batch, h_out, w_out, c_out, .. } = self.shape;
        let Place { first, of } = epilogue.place(c_out);
        let patch = self.shape.patch();
        let product = |to: (&mut [f32], usize), lines, patches: Patches<'_>| {
            if self.is_narrow() {
                narrow_patches(self.isa, to, lines, patches, (&weight[..c_out * patch], patch));
            } else {
                gemm_patches(self.isa, to, lines, patches, Panels::new(weight, patch, c_out));
            }
        };
        let (line, y_len) = (w_out * of, h_out * w_out * of);
        // Small batches leave work for every thread.
        let share = (batch * h_out).div_ceil(rayon::current_num_threads());
        let chunk_rows = self.chunk_rows().min(share);
        let images = y.par_chunks_mut(y_len).zip(x.par_chunks(self.shape.input_len())).enumerate();
        images.for_each(|(k, (y, x))| {
            let mut shift = vec![0f32; c_out];
            epilogue.shift(k, &mut shift);
            let residual = epilogue.add.residual.map(|r| &r[k * y_len..][..y_len]);
            let chunks = y.par_chunks_mut(chunk_rows * line).enumerate();
            chunks.for_each(|(i, y)| {
                let rows = i * chunk_rows..i * chunk_rows + y.len() / line;
                for pixel in y.chunks_mut(of) {
                    let pixel = &mut pixel[first..][..c_out];
                    if epilogue.accumulate {
                        pixel.iter_mut().zip(&shift).for_each(|(y, shift)| *y += shift);
                    } else {
                        pixel.copy_from_slice(&shift);
                    }
                }
                if let Some(residual) = residual {
                    let residual = &residual[rows.start * line..];
                    y.iter_mut().zip(residual).for_each(|(y, residual)| *y += residual);
                }
                let to = (&mut y[first..], of);
                let lines = rows.len();
                if self.reads_in_place() {
                    let stride = self.shape.stride();
                    self.with_lines(x, rows, |data, line| {
                        let patches = Patches {
                            data,
                            line: stride * line,
                            pixels: w_out,
                            pixel: stride * self.shape.c_in,
                            run: self.shape.kernel[1] * self.shape.c_in,
                            jump: line,
                        };
                        product(to, lines, patches);
                    });
                } else {
                    self.with_patches(x, rows, |patches| {
                        product(to, lines, Patches::laid_out(patches, w_out));
                    });
                }
                epilogue.rectify(y, c_out);
            });
        });
    }

    /// Adds the contribution of these output rows of `dy` to the gradient of an image. The weights are
    /// transposed: one row per output channel.
    fn add_input_gradient(&self, dx: &mut [f32], dy: Mat, weight: Panels, rows: Range<usize>) {
        let ConvShape { w, c_in, w_out, .. } = self.shape;
        let (pixels, patch) = (rows.len() * w_out, self.shape.patch());
        if self.shape.is_pointwise() {
            let dx = &mut dx[rows.start * w * c_in..][..pixels * c_in];
            return gemm_packed(self.isa, (dx, c_in), dy, weight, true);
        }
        PATCHES.with_borrow_mut(|patches| {
            let patches = sized(patches, pixels * patch);
            gemm_packed(self.isa, (&mut *patches, patch), dy, weight, false);
            for (row, oy) in patches.chunks(w_out * patch).zip(rows) {
                for (place, image, len) in self.spans(oy) {
                    let (dx, values) = (&mut dx[image..][..len], &row[place..][..len]);
                    dx.iter_mut().zip(values).for_each(|(dx, value)| *dx += value);
                }
            }
        });
    }

    /// Returns these output rows of the output gradient of an image.
    fn gradient_rows<'a>(&self, dy: &'a [f32], rows: &Range<usize>) -> Mat<'a> {
        let line = self.shape.w_out * self.shape.c_out;
        let dy = &dy[rows.start * line..rows.end * line];
        Mat::new(dy, rows.len() * self.shape.w_out, self.shape.c_out)
    }
}

impl Algorithm for Im2col {
    fn pack(&self, weight: &[f32], workspace: &mut Workspace) -> Packed {
        let mut memory = std::mem::take(&mut workspace.values);
        if self.is_narrow() {
            self.pack_columns(weight, &mut memory);
        } else {
            self.pack_patches(weight, &mut memory);
        }
        Packed::F32(memory)
    }

    fn forward(&self, x: Input<'_>, weight: &Packed, epilogue: Epilogue<'_>, y: &mut [f32]) {
        self.convolve(x.map, weight.f32(), epilogue, y);
    }

    fn input_gradient(
        &self,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        workspace: &mut Workspace,
    ) {
        if let Some(transposed) = self.transposed() {
            self.pack_rotated(weight, &mut workspace.values);
            let epilogue = Epilogue { accumulate, ..Epilogue::default() };
            return transposed.convolve(dy, from_line(&workspace.values), epilogue, dx);
        }
        self.pack_transposed(weight, &mut workspace.values);
        let weight =
            Panels::new(from_line(&workspace.values), self.shape.c_out, self.shape.patch());
        let dx = dx.par_chunks_mut(self.shape.input_len());
        dx.zip(dy.par_chunks(self.shape.output_len())).for_each(|(dx, dy)| {
            if !accumulate {
                dx.fill(0.0);
            }
            for rows in self.chunks() {
                self.add_input_gradient(dx, self.gradient_rows(dy, &rows), weight, rows);
            }
        });
    }

    fn weight_gradient(
        &self,
        x: Input<'_>,
        dy: &[f32],
        dweight: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let (x, ConvShape { c_in, c_out, .. }) = (x.map, self.shape);
        if let Some(transposed) = self.transposed() {
            // Patches of the output have few values, and fit in a panel.
            let taps = self.shape.taps();
            let mut turned = vec![0f32; dweight.len()];
            transposed.weight_gradient(dy.into(), x, &mut turned, workspace);
            for (at, d) in dweight.iter_mut().enumerate() {
                let (o, i, tap) = (at / (c_in * taps), at / taps % c_in, at % taps);
                *d = turned[(i * c_out + o) * taps + taps - 1 - tap];
            }
            return;
        }
        weight_gradient(self.isa, &self.shape, x, dy, dweight, &mut workspace.values);
    }
}
