//! Convolutions of any kernel and stride: a few rows of an image at a time are laid out as patches,
//! small enough to stay in the cache, and multiplied with the weights. The patches are made again
//! for the backward pass, not kept.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{Result, Shape};
use rayon::prelude::*;

use super::gemm::{Mat, Panels, gemm, gemm_packed};
use super::simd::Isa;
use super::values::sized;
use super::winograd::Epilogue;

/// Into how many parts a batch is cut whose sums over images are then added in order. Fixed, so
/// that results do not depend on the number of threads.
pub(super) const PARTS: usize = 8;

/// How many pixels' patches are laid out at a time, about.
const CHUNK_PIXELS: usize = 192;

thread_local! {
    /// Patches, reused from call to call. Nothing may wait for other threads while it is borrowed: this
    /// one could be given work that borrows it again.
    static PATCHES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What a convolution does to a map's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From one output pixel to the next are so many of the input's. 1 keeps the size.
    Stride(usize),
    /// Each pixel is doubled in both directions before the convolution, whose stride is 1.
    Upsample,
}

/// A convolution's sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patches {
    pub batch: usize,
    /// Of the map that the kernel moves over, which is the input unless that is upsampled.
    pub h: usize,
    pub w: usize,
    pub c_in: usize,
    pub h_out: usize,
    pub w_out: usize,
    pub c_out: usize,
    pub kernel: usize,
    pub scale: Scale,
}

impl Patches {
    pub fn new(x: [usize; 4], weight: &Shape, scale: Scale) -> Result<Self> {
        let [batch, h, w, c_in] = x;
        let (c_out, weight_in, kernel, kernel_w) = weight.dims4()?;
        if weight_in != c_in || kernel != kernel_w || kernel.is_multiple_of(2) {
            candle_core::bail!("conv2d of {x:?} (channels last) with a weight of {weight:?}")
        }
        let (h, w) = match scale {
            Scale::Stride(_) => (h, w),
            Scale::Upsample => (2 * h, 2 * w),
        };
        let mut sizes = Self { batch, h, w, c_in, h_out: h, w_out: w, c_out, kernel, scale };
        sizes.h_out = h.div_ceil(sizes.stride());
        sizes.w_out = w.div_ceil(sizes.stride());
        Ok(sizes)
    }

    pub fn stride(&self) -> usize {
        match self.scale {
            Scale::Stride(stride) => stride,
            Scale::Upsample => 1,
        }
    }

    pub fn upsamples(&self) -> bool {
        self.scale == Scale::Upsample
    }

    pub fn x_len(&self) -> usize {
        let len = self.h * self.w * self.c_in;
        if self.upsamples() { len / 4 } else { len }
    }

    /// Whether patches are the image's pixels as they are.
    fn is_pointwise(&self) -> bool {
        self.kernel == 1 && self.scale == Scale::Stride(1)
    }

    pub fn y_len(&self) -> usize {
        self.h_out * self.w_out * self.c_out
    }

    /// Values that an output pixel is computed from.
    pub fn patch(&self) -> usize {
        self.kernel * self.kernel * self.c_in
    }

    pub fn chunk_rows(&self) -> usize {
        CHUNK_PIXELS.div_ceil(self.w_out).min(self.h_out)
    }

    /// The output rows of chunk `i`.
    pub fn chunk(&self, i: usize) -> Range<usize> {
        let first = i * self.chunk_rows();
        first..(first + self.chunk_rows()).min(self.h_out)
    }

    /// The weights (out, in, k, k), packed as [`forward`](Self::forward) multiplies patches with them:
    /// a row for each value of a patch, a column for each output channel. `memory` is used where it is
    /// large enough.
    pub fn pack(&self, weight: &[f32], memory: Vec<f32>) -> Panels {
        let kernels = |o| o * self.c_in * self.kernel * self.kernel;
        Panels::gather(weight, (self.patch(), self.c_out), |k| self.tap(k), kernels, memory)
    }

    /// As [`pack`](Self::pack), with rows and columns exchanged.
    fn pack_turned(&self, weight: &[f32], memory: Vec<f32>) -> Panels {
        let kernels = |o| o * self.c_in * self.kernel * self.kernel;
        Panels::gather(weight, (self.c_out, self.patch()), kernels, |k| self.tap(k), memory)
    }

    /// Where in the weights (in, k, k) of an output channel that of a patch's value stands.
    fn tap(&self, value: usize) -> usize {
        let (tap, channel) = (value / self.c_in, value % self.c_in);
        channel * self.kernel * self.kernel + tap
    }

    /// The parts of the patches of output row `oy` that lie within the image: for each, where it
    /// begins in the row's patches, which are `stride` values apart, where in the image, and its
    /// length.
    pub fn spans(
        &self,
        oy: usize,
        stride: usize,
    ) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let g = *self;
        let pad = g.kernel / 2;
        (0..g.w_out).flat_map(move |ox| {
            let left = (ox * g.stride()) as isize - pad as isize;
            let skip = (-left).max(0) as usize;
            let first = (left + skip as isize) as usize;
            let last = (left + g.kernel as isize).min(g.w as isize) as usize;
            (0..g.kernel)
                .filter_map(move |ky| {
                    let y = (oy * g.stride() + ky).checked_sub(pad).filter(|&y| y < g.h)?;
                    Some((ox * stride + (ky * g.kernel + skip) * g.c_in, y))
                })
                .flat_map(move |(patch, y)| {
                    // Neighbours in the patch are neighbours in the image, unless that is upsampled.
                    let step = if g.upsamples() { 1 } else { last - first };
                    (first..last).step_by(step).map(move |x| {
                        let pixel = match g.scale {
                            Scale::Stride(_) => y * g.w + x,
                            Scale::Upsample => y / 2 * (g.w / 2) + x / 2,
                        };
                        (patch + (x - first) * g.c_in, pixel * g.c_in, step * g.c_in)
                    })
                })
        })
    }

    /// Calls `f` with the patches of these output rows of an image: a row for each pixel.
    fn with_patches(&self, x: &[f32], rows: Range<usize>, f: impl FnOnce(Mat)) {
        let pixels = rows.len() * self.w_out;
        if self.is_pointwise() {
            let x = &x[rows.start * self.w * self.c_in..][..pixels * self.c_in];
            return f(Mat::new(x, pixels, self.c_in));
        }
        PATCHES.with_borrow_mut(|patches| {
            let patches = sized(patches, pixels * self.patch());
            patches.fill(0.0);
            for (row, oy) in patches.chunks_mut(self.w_out * self.patch()).zip(rows) {
                for (patch, image, len) in self.spans(oy, self.patch()) {
                    row[patch..][..len].copy_from_slice(&x[image..][..len]);
                }
            }
            f(Mat::new(patches, pixels, self.patch()));
        });
    }

    /// Adds to an image's gradient what these output rows of `dy` give, with the weights turned: a row
    /// for each output channel.
    fn add_input_gradient(
        &self,
        isa: Isa,
        dx: &mut [f32],
        dy: Mat,
        turned: &Panels,
        rows: Range<usize>,
    ) {
        let pixels = rows.len() * self.w_out;
        if self.is_pointwise() {
            let dx = &mut dx[rows.start * self.w * self.c_in..][..pixels * self.c_in];
            return gemm_packed(isa, (dx, self.c_in), dy, turned, true);
        }
        PATCHES.with_borrow_mut(|patches| {
            let patches = sized(patches, pixels * self.patch());
            gemm_packed(isa, (patches, self.patch()), dy, turned, false);
            for (row, oy) in patches.chunks(self.w_out * self.patch()).zip(rows) {
                for (patch, image, len) in self.spans(oy, self.patch()) {
                    let (dx, patch) = (&mut dx[image..][..len], &row[patch..][..len]);
                    dx.iter_mut().zip(patch).for_each(|(dx, p)| *dx += p);
                }
            }
        });
    }

    /// `y` from `x`, with the weights [packed](Self::pack).
    pub fn forward(&self, isa: Isa, x: &[f32], weight: &Panels, epilogue: Epilogue, y: &mut [f32]) {
        let line = self.w_out * self.c_out;
        // Small batches leave something for every thread.
        let share = (self.batch * self.h_out).div_ceil(rayon::current_num_threads());
        let chunk_rows = self.chunk_rows().min(share);
        let images = y.par_chunks_mut(self.y_len()).zip(x.par_chunks(self.x_len())).enumerate();
        images.for_each(|(k, (y, x))| {
            let mut shift = vec![0f32; self.c_out];
            epilogue.shift(k, &mut shift);
            let residual = epilogue.residual.map(|r| &r[k * self.y_len()..][..self.y_len()]);
            let chunks = y.par_chunks_mut(chunk_rows * line).enumerate();
            chunks.for_each(|(i, y)| {
                let rows = i * chunk_rows..i * chunk_rows + y.len() / line;
                for pixel in y.chunks_mut(self.c_out) {
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
                    gemm_packed(isa, (y, self.c_out), patches, weight, true);
                });
            });
        });
    }

    /// The gradient of `x`, written or added to `dx`. Packs the weights to `packed`.
    pub fn input_gradient(
        &self,
        isa: Isa,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        packed: &mut Vec<f32>,
    ) {
        let turned = self.pack_turned(weight, std::mem::take(packed));
        let line = self.w_out * self.c_out;
        let images = dx.par_chunks_mut(self.x_len()).zip(dy.par_chunks(self.y_len()));
        images.for_each(|(dx, dy)| {
            if !accumulate {
                dx.fill(0.0);
            }
            for i in 0..self.h_out.div_ceil(self.chunk_rows()) {
                let rows = self.chunk(i);
                let dy = &dy[rows.start * line..rows.end * line];
                let dy = Mat::new(dy, rows.len() * self.w_out, self.c_out);
                self.add_input_gradient(isa, dx, dy, &turned, rows);
            }
        });
        *packed = turned.into_memory();
    }

    /// The gradient of the weights, (out, in, k, k), to `dweight`, by sums of parts of the batch in `sums`.
    pub fn weight_gradient(
        &self,
        isa: Isa,
        x: &[f32],
        dy: &[f32],
        dweight: &mut [f32],
        sums: &mut Vec<f32>,
    ) {
        let images = self.batch.div_ceil(PARTS);
        let (line, patch) = (self.w_out * self.c_out, self.patch());
        let part_len = self.c_out * patch;
        let sums = sized(sums, self.batch.div_ceil(images) * part_len);
        let parts = x.par_chunks(images * self.x_len()).zip(dy.par_chunks(images * self.y_len()));
        sums.par_chunks_mut(part_len).zip(parts).for_each(|(sums, (x, dy))| {
            sums.fill(0.0);
            for (x, dy) in x.chunks(self.x_len()).zip(dy.chunks(self.y_len())) {
                for i in 0..self.h_out.div_ceil(self.chunk_rows()) {
                    let rows = self.chunk(i);
                    let dy = &dy[rows.start * line..rows.end * line];
                    let dy = Mat::new(dy, rows.len() * self.w_out, self.c_out);
                    self.with_patches(x, rows, |patches| {
                        gemm(isa, (&mut *sums, patch), dy.transposed(), patches, true);
                    });
                }
            }
        });
        // Each output channel's, from (k, k, in) to (in, k, k).
        let area = self.kernel * self.kernel;
        dweight.par_chunks_mut(patch).enumerate().for_each(|(o, dweight)| {
            dweight.fill(0.0);
            for sums in sums.chunks(part_len) {
                for (tap, sums) in sums[o * patch..][..patch].chunks(self.c_in).enumerate() {
                    let dweight = dweight[tap..].iter_mut().step_by(area);
                    dweight.zip(sums).for_each(|(d, sum)| *d += sum);
                }
            }
        });
    }
}
