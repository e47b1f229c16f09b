//! Convolutions of any kernel and stride as products of patches (im2col).
//!
//! The patches of a few rows of an image, which fit in the cache, are multiplied by the weights at a time.
//! The backward pass lays out the patches again.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::algorithm::{Algorithm, Packed, Workspace};
use super::epilogue::Epilogue;
use crate::kernels::cpu::gemm::pack::{Mat, Panels, pack};
use crate::kernels::cpu::gemm::{gemm, gemm_packed};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::sized;
use crate::kernels::cpu::reduce::PARTS;
use crate::kernels::op::conv::{ConvShape, Scale};

/// Approximate number of pixels whose patches are laid out at a time.
const CHUNK_PIXELS: usize = 192;

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

    /// Packs the weights (out, in, k, k) for products with patches: one row per value of a patch, one
    /// column per output channel.
    fn pack_patches(&self, weight: &[f32], memory: &mut Vec<f32>) {
        let (patch, c_out) = (self.shape.patch(), self.shape.c_out);
        pack(weight, (patch, c_out), |k| self.tap(k), |o| o * patch, memory);
    }

    /// Packs the transpose of [`pack_patches`](Self::pack_patches).
    fn pack_transposed(&self, weight: &[f32], memory: &mut Vec<f32>) {
        let (patch, c_out) = (self.shape.patch(), self.shape.c_out);
        pack(weight, (c_out, patch), |o| o * patch, |k| self.tap(k), memory);
    }

    /// Returns the position, in the weights (in, k, k) of an output channel, of the weight of a value of a
    /// patch.
    fn tap(&self, value: usize) -> usize {
        let (tap, channel) = (value / self.shape.c_in, value % self.shape.c_in);
        channel * self.shape.taps() + tap
    }

    /// Returns the spans of the patches of output row `oy` that lie within the image. Each has a position
    /// in the patches of the row, a position in the image, and a length.
    fn spans(&self, oy: usize) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let g = self.shape;
        let ([h, w], pad, patch) = (g.map(), g.padding(), g.patch());
        (0..g.w_out).flat_map(move |ox| {
            let left = (ox * g.stride()) as isize - pad as isize;
            let skip = (-left).max(0) as usize;
            let first = (left + skip as isize) as usize;
            let last = (left + g.kernel as isize).min(w as isize) as usize;
            (0..g.kernel)
                .filter_map(move |ky| {
                    let y = (oy * g.stride() + ky).checked_sub(pad).filter(|&y| y < h)?;
                    Some((ox * patch + (ky * g.kernel + skip) * g.c_in, y))
                })
                .flat_map(move |(place, y)| {
                    // Neighbours in the patch are neighbours in the image, unless it is upsampled.
                    let step = if g.upsamples() { 1 } else { last - first };
                    (first..last).step_by(step).map(move |x| {
                        let pixel = match g.scale {
                            Scale::Stride(_) | Scale::StrideFromEdge(_) => y * w + x,
                            Scale::Upsample => y / 2 * (w / 2) + x / 2,
                        };
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
            patches.fill(0.0);
            for (row, oy) in patches.chunks_mut(w_out * patch).zip(rows) {
                for (place, image, len) in self.spans(oy) {
                    row[place..][..len].copy_from_slice(&x[image..][..len]);
                }
            }
            f(Mat::new(patches, pixels, patch));
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
        self.pack_patches(weight, &mut memory);
        Packed::F32(memory)
    }

    fn forward(&self, x: &[f32], weight: &Packed, epilogue: Epilogue<'_>, y: &mut [f32]) {
        let ConvShape { batch, h_out, w_out, c_out, .. } = self.shape;
        let weight = Panels::new(weight.f32(), self.shape.patch(), c_out);
        let (line, y_len) = (w_out * c_out, self.shape.output_len());
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
                for pixel in y.chunks_mut(c_out) {
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
                self.with_patches(x, rows, |patches| {
                    gemm_packed(self.isa, (y, c_out), patches, weight, true);
                });
            });
        });
    }

    fn input_gradient(
        &self,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        workspace: &mut Workspace,
    ) {
        self.pack_transposed(weight, &mut workspace.values);
        let weight = Panels::new(&workspace.values, self.shape.c_out, self.shape.patch());
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

    /// Sums over each part of the batch, then adds the parts in order.
    fn weight_gradient(
        &self,
        x: &[f32],
        dy: &[f32],
        dweight: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let ConvShape { batch, c_in, c_out, .. } = self.shape;
        let (patch, x_len, y_len) =
            (self.shape.patch(), self.shape.input_len(), self.shape.output_len());
        let images = batch.div_ceil(PARTS);
        let part_len = c_out * patch;
        let sums = sized(&mut workspace.values, batch.div_ceil(images) * part_len);
        let parts = x.par_chunks(images * x_len).zip(dy.par_chunks(images * y_len));
        sums.par_chunks_mut(part_len).zip(parts).for_each(|(sums, (x, dy))| {
            sums.fill(0.0);
            for (x, dy) in x.chunks(x_len).zip(dy.chunks(y_len)) {
                for rows in self.chunks() {
                    let dy = self.gradient_rows(dy, &rows).transposed();
                    self.with_patches(x, rows, |patches| {
                        gemm(self.isa, (&mut *sums, patch), dy, patches, true);
                    });
                }
            }
        });
        // Each output channel, from (k, k, in) to (in, k, k).
        dweight.par_chunks_mut(patch).enumerate().for_each(|(o, dweight)| {
            dweight.fill(0.0);
            for sums in sums.chunks(part_len) {
                for (tap, sums) in sums[o * patch..][..patch].chunks(c_in).enumerate() {
                    let dweight = dweight[tap..].iter_mut().step_by(self.shape.taps());
                    dweight.zip(sums).for_each(|(d, sum)| *d += sum);
                }
            }
        });
    }
}
