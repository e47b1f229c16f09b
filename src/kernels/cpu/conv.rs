use std::fmt;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::bf16::Unit;
use super::gemm::Panels;
use super::half_conv::{HalfConvolution, PackedHalf, Terms};
use super::patches::{Patches, Scale};
use super::simd::Isa;
use super::values::{contiguous, on_cpu_in_f32, with_values, zeros};
use super::winograd::{self, Epilogue, Maps, Packed};
use crate::Precision;

/// A convolution with zero padding of half the kernel, so that stride 1 keeps the size.
///
/// `x` (batch, height, width, in); `weight` (out, in, k, k) with odd k; `bias` (out); the result
/// is (batch, ceil(height / stride), ceil(width / stride), out), or twice the height and width
/// where `x` is upsampled.
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, scale: Scale) -> Result<Tensor> {
    if on_cpu_in_f32(x) {
        let op = Conv2d { isa: Isa::detect(), scale };
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
    } else {
        composed(x, weight, bias, scale)
    }
}

/// As one product of all patches. Not candle's own `conv2d`, whose gradient is a naive loop, and
/// wrong in shape for maps that are not square at stride 2.
pub(super) fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor, scale: Scale) -> Result<Tensor> {
    let (x, stride) = match scale {
        Scale::Stride(stride) => (x, stride),
        Scale::Upsample => (&upsample_nearest_2x(x)?, 1),
    };
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

/// Each pixel doubled in both directions: (batch, h, w, channels) to (batch, 2 h, 2 w, channels).
fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    // Not candle's `upsample_nearest2d`, whose backward overwrites gradients already there.
    x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?.reshape((b, 2 * h, 2 * w, c))
}

/// A convolution's sizes, and how it is computed on the CPU: in f32, 3x3 at stride 1 by Winograd's
/// method, the others from patches; with bf16 products from strips.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Convolution {
    isa: Isa,
    sizes: Patches,
    half: Option<HalfConvolution>,
}

/// Channels below which transforming tiles costs more than it saves.
const MIN_WINOGRAD_CHANNELS: usize = 8;

impl Convolution {
    /// Of `x` (batch, height, width, in) with `weight` (out, in, k, k).
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn new(isa: Isa, x: [usize; 4], weight: &Shape, scale: Scale) -> Result<Self> {
        Ok(Self { isa, sizes: Patches::new(x, weight, scale)?, half: None })
    }

    /// With products of this precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        let terms = match precision {
            // Without a look at the machine's units: AMX is not asked for where it is not used.
            Precision::Highest => return self,
            Precision::High => Terms::Three,
            // Networks refuse F16 on the CPU.
            Precision::BF16 | Precision::F16 => Terms::One,
        };
        let (isa, sizes, unit) = (self.isa, self.sizes, Unit::detect(self.isa));
        // Only tiles are fast enough to make up for three products where f32 takes one. Tests must not
        // depend on them.
        let pays = terms == Terms::One || unit.has_tiles() || cfg!(test);
        Self { half: pays.then_some(HalfConvolution { isa, unit, terms, sizes }), ..self }
    }

    /// (batch, height, width, out)
    pub fn output(&self) -> [usize; 4] {
        let Patches { batch, h_out, w_out, c_out, .. } = self.sizes;
        [batch, h_out, w_out, c_out]
    }

    fn by_winograd(&self) -> bool {
        let Patches { c_in, c_out, kernel, .. } = self.sizes;
        kernel == 3 && self.sizes.stride() == 1 && c_in.min(c_out) >= MIN_WINOGRAD_CHANNELS
    }

    fn maps(&self) -> Maps {
        let Patches { batch, h, w, .. } = self.sizes;
        Maps { batch, h, w, doubled: self.sizes.upsamples() }
    }

    /// The weights as [`forward`](Self::forward) wants them, for now: [`Workspace::unpack`] takes their
    /// memory back.
    pub fn pack_for_now(&self, weight: &[f32], workspace: &mut Workspace) -> Weights {
        let Patches { c_in, c_out, .. } = self.sizes;
        if let Some(half) = self.half {
            Weights::Half(half.pack(weight, std::mem::take(&mut workspace.half)))
        } else if self.by_winograd() {
            let (sizes, memory) = ((c_out, c_in), std::mem::take(&mut workspace.packed));
            Weights::Winograd(Packed::forward(self.isa, self.maps(), weight, sizes, memory))
        } else {
            Weights::Patches(self.sizes.pack(weight, std::mem::take(&mut workspace.packed)))
        }
    }

    /// The weights as [`forward`](Self::forward) wants them.
    pub fn pack(&self, weight: &[f32]) -> Weights {
        self.pack_for_now(weight, &mut Workspace::default())
    }

    /// `y` from `x`.
    pub fn forward(&self, x: &[f32], weights: &Weights, epilogue: Epilogue, y: &mut [f32]) {
        match weights {
            Weights::Winograd(packed) => {
                winograd::convolve(self.isa, self.maps(), x, packed, epilogue, y);
            }
            Weights::Patches(packed) => self.sizes.forward(self.isa, x, packed, epilogue, y),
            Weights::Half(packed) => {
                packed.convolution(self.isa, self.sizes).forward(x, packed, epilogue, y);
            }
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
        let Patches { c_in, c_out, .. } = self.sizes;
        if let Some(half) = self.half {
            half.input_gradient(dy, weight, dx, accumulate, workspace);
        } else if self.by_winograd() {
            let memory = std::mem::take(&mut workspace.packed);
            let packed = Packed::backward(self.isa, self.maps(), weight, (c_out, c_in), memory);
            winograd::input_gradient(self.isa, self.maps(), dy, &packed, dx, accumulate);
            workspace.packed = packed.into_memory();
        } else {
            let packed = &mut workspace.packed;
            self.sizes.input_gradient(self.isa, dy, weight, dx, accumulate, packed);
        }
    }

    /// The gradient of the weights, (out, in, k, k), to `dweight`.
    pub fn weight_gradient(
        &self,
        x: &[f32],
        dy: &[f32],
        dweight: &mut [f32],
        workspace: &mut Workspace,
    ) {
        if let Some(half) = self.half {
            half.weight_gradient(x, dy, dweight, &mut workspace.sums);
        } else if self.by_winograd() {
            let sums = &mut workspace.sums;
            winograd::weight_gradient(self.isa, self.maps(), x, dy, dweight, sums);
        } else {
            self.sizes.weight_gradient(self.isa, x, dy, dweight, &mut workspace.sums);
        }
    }
}

/// Memory that convolutions use again from call to call.
#[derive(Default)]
pub(crate) struct Workspace {
    /// Weights for f32 products.
    pub(super) packed: Vec<f32>,
    /// Weights for bf16 ones.
    pub(super) half: Vec<u16>,
    pub(super) sums: Vec<f32>,
}

impl Workspace {
    /// Takes back the memory of weights that are no longer needed.
    pub fn unpack(&mut self, weights: Weights) {
        match weights {
            Weights::Winograd(packed) => self.packed = packed.into_memory(),
            Weights::Half(packed) => self.half = packed.into_memory(),
            Weights::Patches(packed) => self.packed = packed.into_memory(),
        }
    }
}

/// A convolution's weights, laid out for the way it is computed.
pub(crate) enum Weights {
    Winograd(Packed),
    Patches(Panels),
    Half(PackedHalf),
}

impl fmt::Debug for Weights {
    /// Without the values, of which there may be millions.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights").finish_non_exhaustive()
    }
}

/// Sums over each image's pixels: (batch, channels).
pub(crate) fn sums_by_image(maps: &[f32], batch: usize, channels: usize) -> Vec<f64> {
    use rayon::prelude::*;
    let image = maps.len() / batch;
    let mut sums = vec![0f64; batch * channels];
    sums.par_chunks_mut(channels).zip(maps.par_chunks(image)).for_each(|(sums, image)| {
        let mut run = vec![0f32; channels];
        // Short runs in f32, which vectorise, then f64.
        for pixels in image.chunks(32 * channels) {
            run.fill(0.0);
            for pixel in pixels.chunks(channels) {
                run.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value);
            }
            sums.iter_mut().zip(&run).for_each(|(sum, run)| *sum += f64::from(*run));
        }
    });
    sums
}

/// Sums over the batch of (batch, channels), to `sums` (channels).
pub(crate) fn sum_over_batch<T: Copy + Into<f64>>(values: &[T], sums: &mut [f32]) {
    let channels = sums.len();
    for (i, sum) in sums.iter_mut().enumerate() {
        let column = values.iter().skip(i).step_by(channels);
        *sum = column.map(|&value| value.into()).sum::<f64>() as f32;
    }
}

struct Conv2d {
    isa: Isa,
    scale: Scale,
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
        let dims = x_layout.shape().dims4()?.into();
        let conv = Convolution::new(self.isa, dims, weight_layout.shape(), self.scale)?;
        let bias = Some(contiguous(bias, bias_layout)?);
        let mut y = zeros(conv.output().iter().product())?;
        let weights = conv.pack(contiguous(weight, weight_layout)?);
        let epilogue = Epilogue { bias, ..Epilogue::default() };
        conv.forward(contiguous(x, x_layout)?, &weights, epilogue, &mut y);
        Ok((CpuStorage::F32(y), Shape::from(conv.output().to_vec())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let conv = Convolution::new(self.isa, x.dims4()?.into(), weight.shape(), self.scale)?;
        let dy = dy.contiguous()?;
        let (batch, _, _, c_out) = dy.dims4()?;
        // An image at the network's edge needs no gradient.
        let wants_dx = x.track_op();
        let (dx, dweight, dbias) = with_values([x, weight, &dy], |[x, weight, dy]| {
            let mut workspace = Workspace::default();
            let mut dx = None;
            if wants_dx {
                let dx = dx.insert(zeros(x.len())?);
                conv.input_gradient(dy, weight, dx, false, &mut workspace);
            }
            let mut dweight = vec![0f32; weight.len()];
            conv.weight_gradient(x, dy, &mut dweight, &mut workspace);
            let mut dbias = vec![0f32; c_out];
            sum_over_batch(&sums_by_image(dy, batch, c_out), &mut dbias);
            Ok((dx, dweight, dbias))
        })?;
        let device = x.device();
        Ok((
            dx.map(|dx| Tensor::from_vec(dx, x.shape(), device)).transpose()?,
            Some(Tensor::from_vec(dweight, weight.shape(), device)?),
            Some(Tensor::from_vec(dbias, c_out, device)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{F32, Normals, Sums, agrees, check};
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use crate::random_inputs::inputs;

    /// The magnitudes of what a convolution adds up, as its composition.
    ///
    /// Winograd's method multiplies sums: in each direction the tap a meets the pixel under the tap i by
    /// sum_k |A_kp| |G_ka| |B_ki|, for either pixel p of a tile at most the entry (a, i) below. So its
    /// magnitudes are those of a convolution with the kernels P^T |w| P, and so are those of its
    /// gradients. They go through four transforms at most, of 2 roundings a direction each, and the
    /// sum of at most 16 parts.
    fn magnitudes(v: &[Tensor], scale: Scale, by_winograd: bool) -> Result<Tensor> {
        if !by_winograd {
            return composed(&v[0], &v[1], &v[2], scale);
        }
        let spread =
            Tensor::new(&[[1f64, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0]], v[1].device())?;
        let lines = |t: Tensor| t.reshape(((), 3))?.matmul(&spread)?.reshape(v[1].shape());
        let turned = lines(v[1].clone())?.transpose(2, 3)?.contiguous()?;
        let weight = lines(turned)?.transpose(2, 3)?;
        composed(&v[0], &weight, &v[2], scale)
    }

    /// Roundings of Winograd's transforms, see [`magnitudes`].
    fn transforms(by_winograd: bool) -> f64 {
        if by_winograd { 4.0 * 4.0 + 16.0 } else { 0.0 }
    }

    fn by_winograd(x: [usize; 4], weight: &[usize], scale: Scale) -> bool {
        Convolution::new(Isa::detect(), x, &Shape::from(weight), scale).unwrap().by_winograd()
    }

    proptest! {
        #![proptest_config(inputs(96))]

        #[test]
        fn kernel_agrees_with_its_composition(
            (batch, h, w) in (1usize..20, 1usize..12, 1usize..25),
            (c_in, c_out) in (1usize..40, 1usize..40),
            kernel in prop_oneof![Just(1usize), Just(3), Just(3), Just(5)],
            scale in prop_oneof![
                (1usize..4).prop_map(Scale::Stride), Just(Scale::Stride(1)), Just(Scale::Upsample),
            ],
            seed: u64,
        ) {
            // The map that the kernel moves over is no larger for being upsampled.
            let (h, w) = match scale {
                Scale::Stride(_) => (h, w),
                Scale::Upsample => (h.div_ceil(2), w.div_ceil(2)),
            };
            let shapes = [
                vec![batch, h, w, c_in], vec![c_out, c_in, kernel, kernel], vec![c_out],
            ];
            let by_winograd = by_winograd([batch, h, w, c_in], &shapes[1], scale);
            agrees(
                Normals(seed),
                &shapes,
                |isa, v| v[0].apply_op3(&v[1], &v[2], Conv2d { isa, scale }),
                |v| composed(&v[0], &v[1], &v[2], scale),
                |v| magnitudes(v, scale, by_winograd),
                transforms(by_winograd),
            );
        }
    }

    fn sizes() -> impl Strategy<Value = (usize, usize, usize)> {
        prop_oneof![
            // Tiles and patches that are mostly beyond the edge.
            (Just(1usize), 1usize..4, 1usize..4),
            (1usize..4, 1usize..12, 1usize..12),
            // Enough tiles for sums in several parts.
            (2usize..4, 24usize..34, 24usize..34),
        ]
    }

    proptest! {
        #![proptest_config(inputs(96))]

        /// What the networks' tape asks for beyond candle's operation: more in the output than the
        /// convolution, gradients added to what is there, memory that holds something else.
        #[test]
        fn outputs_and_gradients_go_where_the_tape_wants_them(
            (batch, h, w) in sizes(),
            // Both ways of computing; and panels that are full, nearly so, and nearly empty.
            (c_in, c_out) in prop_oneof![(1usize..71, 1usize..71), (8usize..71, 8usize..71)],
            (kernel, scale) in prop_oneof![
                Just((3usize, Scale::Stride(1))), Just((3, Scale::Stride(1))),
                Just((3, Scale::Upsample)), Just((5, Scale::Upsample)),
                Just((3, Scale::Stride(2))), Just((1, Scale::Stride(1))), Just((5, Scale::Stride(3))),
            ],
            (bias, per_image, residual, accumulate) in any::<(bool, bool, bool, bool)>(),
            seed: u64,
        ) {
            let normal = |k, shape: &[usize]| Normals(seed).tensor(k, shape);
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let x = normal(0, &[batch, h, w, c_in]);
            let weight = normal(1, &[c_out, c_in, kernel, kernel]);
            let scaled = |size: usize| match scale {
                Scale::Stride(stride) => size.div_ceil(stride),
                Scale::Upsample => 2 * size,
            };
            let y_shape = [batch, scaled(h), scaled(w), c_out];
            let dy = normal(2, &y_shape);
            let (y_there, dx_there) = (normal(3, &y_shape), normal(4, x.dims()));
            let added = [
                bias.then(|| normal(5, &[1, 1, 1, c_out])),
                per_image.then(|| normal(6, &[batch, 1, 1, c_out])),
                residual.then(|| normal(7, &y_shape)),
            ];

            let by_winograd = by_winograd([batch, h, w, c_in], weight.dims(), scale);
            let nothing = Tensor::zeros(c_out, DType::F64, &Device::Cpu).unwrap();
            let with_nothing = |v: &[Tensor]| [v[0].clone(), v[1].clone(), nothing.clone()];
            let sums = Sums::of(
                &[x.clone(), weight.clone()],
                |_| dy.clone(),
                |v| composed(&v[0], &v[1], &nothing, scale),
                |v| magnitudes(&with_nothing(v), scale, by_winograd),
            );
            let [mut y, mut dx, dweight] = sums.unwrap().try_into().ok().unwrap();
            for added in added.iter().flatten().chain(accumulate.then_some(&y_there)) {
                y = y.plus(added).unwrap();
            }
            if accumulate {
                dx = dx.plus(&dx_there).unwrap();
            }
            let [y, dx, dweight] = [y, dx, dweight].map(|sums| {
                let bound = sums.bound(F32, transforms(by_winograd), 0.0).unwrap();
                (sums.exact, bound)
            });
            let near = |what: &str, isa: Isa, found: Vec<f32>, (exact, bound): &(Tensor, Tensor)| {
                let found = Tensor::from_vec(found, exact.shape(), &Device::Cpu).unwrap();
                check(&format!("{what}, {isa:?}"), &found, exact, bound);
            };

            let there = |t: &Tensor| match accumulate {
                true => values(t),
                false => vec![f32::NAN; t.elem_count()],
            };
            let added = added.each_ref().map(|t| t.as_ref().map(values));
            for isa in Isa::available() {
                let dims = [batch, h, w, c_in];
                let conv = Convolution::new(isa, dims, weight.shape(), scale).unwrap();
                prop_assert_eq!(conv.output(), y_shape);
                let epilogue = Epilogue {
                    bias: added[0].as_deref(),
                    per_image: added[1].as_deref(),
                    residual: added[2].as_deref(),
                    accumulate,
                };
                // Memory of which more is asked than it has, and less.
                let dirt = || vec![f32::NAN; c_in * c_out * 20];
                let mut workspace = Workspace { packed: dirt(), half: Vec::new(), sums: dirt() };
                let packed = conv.pack_for_now(&values(&weight), &mut workspace);
                let mut found = there(&y_there);
                conv.forward(&values(&x), &packed, epilogue, &mut found);
                workspace.unpack(packed);
                near("output", isa, found, &y);
                let mut found = there(&dx_there);
                let (dy, weight) = (values(&dy), values(&weight));
                conv.input_gradient(&dy, &weight, &mut found, accumulate, &mut workspace);
                near("gradient of x", isa, found, &dx);
                let mut found = vec![f32::NAN; weight.len()];
                conv.weight_gradient(&values(&x), &dy, &mut found, &mut workspace);
                near("gradient of weight", isa, found, &dweight);
            }
        }
    }
}
