use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Mat, contiguous, gemm, on_cpu_in_f32, with_values};

/// A convolution with zero padding of half the kernel, so that stride 1 keeps the size.
///
/// `x` (batch, height, width, in); `weight` (out, in, k, k) with odd k; `bias` (out); the result
/// is (batch, ceil(height / stride), ceil(width / stride), out).
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    if on_cpu_in_f32(x) {
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Conv2d { stride })
    } else {
        composed(x, weight, bias, stride)
    }
}

/// As one product of all patches. Not candle's own `conv2d`, whose gradient is a naive loop, and
/// wrong in shape for maps that are not square at stride 2.
fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let (b, h, w, _) = x.dims4()?;
    let (c_out, c_in, kernel, _) = weight.dims4()?;
    let (h_out, w_out) = (h.div_ceil(stride), w.div_ceil(stride));
    let pad = kernel / 2;
    let padded = x.pad_with_zeros(1, pad, pad)?.pad_with_zeros(2, pad, pad)?;
    // Every `stride`-th row or column from `offset`.
    let pick = |x: &Tensor, dim: usize, offset: usize, count: usize| {
        if stride == 1 {
            return x.narrow(dim, offset, count);
        }
        let places: Vec<u32> = (0..count).map(|i| (i * stride + offset) as u32).collect();
        x.index_select(&Tensor::new(places, x.device())?, dim)
    };
    let mut patches = Vec::with_capacity(kernel * kernel);
    for ky in 0..kernel {
        let rows = pick(&padded, 1, ky, h_out)?;
        for kx in 0..kernel {
            patches.push(pick(&rows, 2, kx, w_out)?);
        }
    }
    let patches = Tensor::cat(&patches, 3)?.reshape((b * h_out * w_out, kernel * kernel * c_in))?;
    let weight = weight.permute((2, 3, 1, 0))?.reshape((kernel * kernel * c_in, c_out))?;
    patches.matmul(&weight)?.broadcast_add(bias)?.reshape((b, h_out, w_out, c_out))
}

/// On the CPU: a few rows of an image at a time are laid out as patches, small enough to stay in
/// the cache, and multiplied with the weights. The patches are made again for the backward pass,
/// not kept.
struct Conv2d {
    stride: usize,
}

impl CustomOp3 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let g = Geometry::new(x_layout.shape(), weight_layout.shape(), self.stride)?;
        let x = contiguous(x, x_layout)?;
        let weight = g.weight_matrix(contiguous(weight, weight_layout)?);
        let bias = contiguous(bias, bias_layout)?;
        let weight = Mat::new(&weight, g.patch(), g.c_out);

        let mut y = vec![0f32; g.batch * g.y_len()];
        y.par_chunks_mut(g.y_len()).zip(x.par_chunks(g.x_len())).for_each(|(y, x)| {
            y.par_chunks_mut(g.chunk_rows() * g.w_out * g.c_out).enumerate().for_each(|(i, y)| {
                let rows = g.chunk(i);
                y.chunks_mut(g.c_out).for_each(|pixel| pixel.copy_from_slice(bias));
                g.with_patches(x, rows, |patches| gemm(y, patches, weight, true));
            });
        });
        Ok((CpuStorage::F32(y), Shape::from((g.batch, g.h_out, g.w_out, g.c_out))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = Geometry::new(x.shape(), weight.shape(), self.stride)?;
        let dy = dy.contiguous()?;
        // An image at the network's edge needs no gradient.
        let wants_dx = x.track_op();
        let (dx, dweight, dbias) = with_values([x, weight, &dy], |[x, weight, dy]| {
            Ok(g.backward(x, &g.weight_matrix(weight), dy, wants_dx))
        })?;
        let device = x.device();
        Ok((
            dx.map(|dx| Tensor::from_vec(dx, x.shape(), device)).transpose()?,
            Some(Tensor::from_vec(dweight, weight.shape(), device)?),
            Some(Tensor::from_vec(dbias, g.c_out, device)?),
        ))
    }
}

/// Into how many parts a batch is cut whose sums over images are then added in order. Fixed, so
/// that results do not depend on the number of threads.
const PARTS: usize = 16;

/// How many pixels' patches are laid out at a time, about.
const CHUNK_PIXELS: usize = 192;

thread_local! {
    /// Patches, reused from call to call: fresh memory would cost a page fault every 4 KiB.
    static PATCHES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[derive(Clone, Copy)]
struct Geometry {
    batch: usize,
    h: usize,
    w: usize,
    c_in: usize,
    h_out: usize,
    w_out: usize,
    c_out: usize,
    kernel: usize,
    stride: usize,
}

impl Geometry {
    fn new(x: &Shape, weight: &Shape, stride: usize) -> Result<Self> {
        let (batch, h, w, c_in) = x.dims4()?;
        let (c_out, weight_in, kernel, kernel_w) = weight.dims4()?;
        if weight_in != c_in || kernel != kernel_w || kernel.is_multiple_of(2) {
            candle_core::bail!("conv2d of {x:?} (channels last) with a weight of {weight:?}")
        }
        let (h_out, w_out) = (h.div_ceil(stride), w.div_ceil(stride));
        Ok(Self { batch, h, w, c_in, h_out, w_out, c_out, kernel, stride })
    }

    fn x_len(&self) -> usize {
        self.h * self.w * self.c_in
    }

    fn y_len(&self) -> usize {
        self.h_out * self.w_out * self.c_out
    }

    /// Values that an output pixel is computed from.
    fn patch(&self) -> usize {
        self.kernel * self.kernel * self.c_in
    }

    fn chunk_rows(&self) -> usize {
        CHUNK_PIXELS.div_ceil(self.w_out).min(self.h_out)
    }

    /// The output rows of chunk `i`.
    fn chunk(&self, i: usize) -> Range<usize> {
        let first = i * self.chunk_rows();
        first..(first + self.chunk_rows()).min(self.h_out)
    }

    /// (out, in, k, k) to (k, k, in, out): a row for each value of a patch.
    fn weight_matrix(&self, weight: &[f32]) -> Vec<f32> {
        let (area, mut matrix) = (self.kernel * self.kernel, vec![0f32; weight.len()]);
        for o in 0..self.c_out {
            for i in 0..self.c_in {
                for k in 0..area {
                    matrix[(k * self.c_in + i) * self.c_out + o] =
                        weight[(o * self.c_in + i) * area + k];
                }
            }
        }
        matrix
    }

    /// What [`backward`](Self::backward) sums, (out, k, k, in), to (out, in, k, k).
    fn weight_layout(&self, matrix: &[f32]) -> Vec<f32> {
        let (area, mut weight) = (self.kernel * self.kernel, vec![0f32; matrix.len()]);
        for o in 0..self.c_out {
            for k in 0..area {
                for i in 0..self.c_in {
                    weight[(o * self.c_in + i) * area + k] = matrix[(o * area + k) * self.c_in + i];
                }
            }
        }
        weight
    }

    /// The parts of the patches of output row `oy` that lie within the image: for each, where it
    /// begins in the row's patches, where in the image, and its length.
    fn spans(&self, oy: usize) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let g = *self;
        let pad = g.kernel / 2;
        (0..g.w_out).flat_map(move |ox| {
            let left = (ox * g.stride) as isize - pad as isize;
            let skip = (-left).max(0) as usize;
            let first = (left + skip as isize) as usize;
            let last = (left + g.kernel as isize).min(g.w as isize) as usize;
            (0..g.kernel).filter_map(move |ky| {
                let y = (oy * g.stride + ky).checked_sub(pad).filter(|&y| y < g.h)?;
                let patch = ox * g.patch() + (ky * g.kernel + skip) * g.c_in;
                Some((patch, (y * g.w + first) * g.c_in, (last - first) * g.c_in))
            })
        })
    }

    /// Calls `f` with the patches of these output rows of an image: a row for each pixel.
    fn with_patches(&self, x: &[f32], rows: Range<usize>, f: impl FnOnce(Mat)) {
        let pixels = rows.len() * self.w_out;
        if self.kernel == 1 && self.stride == 1 {
            let x = &x[rows.start * self.w * self.c_in..][..pixels * self.c_in];
            return f(Mat::new(x, pixels, self.c_in));
        }
        PATCHES.with_borrow_mut(|patches| {
            let len = pixels * self.patch();
            patches.resize(patches.len().max(len), 0.0);
            let patches = &mut patches[..len];
            patches.fill(0.0);
            for (row, oy) in patches.chunks_mut(self.w_out * self.patch()).zip(rows) {
                for (patch, image, len) in self.spans(oy) {
                    row[patch..][..len].copy_from_slice(&x[image..][..len]);
                }
            }
            f(Mat::new(patches, pixels, self.patch()));
        });
    }

    /// Adds to an image's gradient what these output rows of `dy` give.
    fn add_input_gradient(&self, dx: &mut [f32], dy: Mat, weight: Mat, rows: Range<usize>) {
        let pixels = rows.len() * self.w_out;
        if self.kernel == 1 && self.stride == 1 {
            let dx = &mut dx[rows.start * self.w * self.c_in..][..pixels * self.c_in];
            return gemm(dx, dy, weight.transposed(), false);
        }
        PATCHES.with_borrow_mut(|patches| {
            let len = pixels * self.patch();
            patches.resize(patches.len().max(len), 0.0);
            let patches = &mut patches[..len];
            gemm(patches, dy, weight.transposed(), false);
            for (row, oy) in patches.chunks(self.w_out * self.patch()).zip(rows) {
                for (patch, image, len) in self.spans(oy) {
                    let (dx, patch) = (&mut dx[image..][..len], &row[patch..][..len]);
                    dx.iter_mut().zip(patch).for_each(|(dx, p)| *dx += p);
                }
            }
        });
    }

    /// Gradients of the input (where asked for), the weight and the bias.
    fn backward(
        &self,
        x: &[f32],
        weight: &[f32],
        dy: &[f32],
        wants_dx: bool,
    ) -> (Option<Vec<f32>>, Vec<f32>, Vec<f32>) {
        let weight = Mat::new(weight, self.patch(), self.c_out);
        let images = self.batch.div_ceil(PARTS);
        let part = |x: &[f32], dy: &[f32], mut dx: Option<&mut [f32]>| {
            let mut dweight = vec![0f32; self.c_out * self.patch()];
            let mut dbias = vec![0f32; self.c_out];
            for (k, (x, dy)) in x.chunks(self.x_len()).zip(dy.chunks(self.y_len())).enumerate() {
                for i in 0..self.h_out.div_ceil(self.chunk_rows()) {
                    let rows = self.chunk(i);
                    let line = self.w_out * self.c_out;
                    let dy = &dy[rows.start * line..rows.end * line];
                    for pixel in dy.chunks(self.c_out) {
                        dbias.iter_mut().zip(pixel).for_each(|(sum, d)| *sum += d);
                    }
                    let dy = Mat::new(dy, rows.len() * self.w_out, self.c_out);
                    self.with_patches(x, rows.clone(), |patches| {
                        gemm(&mut dweight, dy.transposed(), patches, true);
                    });
                    if let Some(dx) = &mut dx {
                        let dx = &mut dx[k * self.x_len()..][..self.x_len()];
                        self.add_input_gradient(dx, dy, weight, rows);
                    }
                }
            }
            (dweight, dbias)
        };
        let parts = x.par_chunks(images * self.x_len()).zip(dy.par_chunks(images * self.y_len()));
        let mut dx = wants_dx.then(|| vec![0f32; x.len()]);
        let sums: Vec<_> = match &mut dx {
            Some(dx) => parts
                .zip(dx.par_chunks_mut(images * self.x_len()))
                .map(|((x, dy), dx)| part(x, dy, Some(dx)))
                .collect(),
            None => parts.map(|(x, dy)| part(x, dy, None)).collect(),
        };
        let mut dweight = vec![0f32; self.c_out * self.patch()];
        let mut dbias = vec![0f32; self.c_out];
        for (weight, bias) in sums {
            dweight.iter_mut().zip(weight).for_each(|(sum, d)| *sum += d);
            dbias.iter_mut().zip(bias).for_each(|(sum, d)| *sum += d);
        }
        (dx, self.weight_layout(&dweight), dbias)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::agrees;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn kernel_agrees_with_its_composition(
            (batch, h, w) in (1usize..20, 1usize..12, 1usize..25),
            (c_in, c_out) in (1usize..20, 1usize..20),
            kernel in prop_oneof![Just(1usize), Just(3), Just(5)],
            stride in 1usize..4,
        ) {
            let shapes = [
                vec![batch, h, w, c_in], vec![c_out, c_in, kernel, kernel], vec![c_out],
            ];
            agrees(
                &shapes,
                |v| conv2d(&v[0], &v[1], &v[2], stride),
                |v| composed(&v[0], &v[1], &v[2], stride),
            );
        }
    }
}
