use std::rc::Rc;

use candle_core::{DType, Tensor};

use super::ops::{Maps, Norm};
use super::place::Place;
use super::pool::Pool;
use crate::error::{Error, Result};
use crate::kernels::cuda::{
    self, Added, Attention, Convolution, Element, Gpu, LinearLayer, Memory, NormStatistics,
    PassWeights,
};
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::attention::AttentionShape;
use crate::kernels::op::conv::{Add, ConvShape};
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear, Sinusoids};
use crate::precision::Precision;
use crate::random::{Dropout, Purpose};

/// The kernels of CUDA devices as a backend of networks.
pub(crate) struct Cuda<'p> {
    gpu: Rc<Gpu>,
    precision: Precision,
    /// The pool from which only gradients are taken.
    pool: &'p Pool,
    weights: PassWeights,
}

impl<'p> Cuda<'p> {
    /// # Errors
    /// Returns an error if the weights cannot be packed.
    pub fn new(gpu: Rc<Gpu>, pool: &'p Pool, place: &Place<'_>) -> Result<Self> {
        let &Place { precision, fixed, repack, .. } = place;
        let (element, keeps) = (Element::of(precision), fixed && !repack);
        let weights = PassWeights::begin(gpu.clone(), &pool.network, element, keeps)?;
        Ok(Self { gpu, precision, pool, weights })
    }

    fn element(&self) -> Element {
        Element::of(self.precision)
    }

    fn convolution(&self, conv: &Conv2d, x: [usize; 4]) -> Result<Convolution> {
        let shape = ConvShape::new(x, conv.weight.dims(), conv.scale)?;
        let [height, width] = shape.kernel;
        if height != width {
            let found = format!("{height} x {width}");
            return Err(Error::config("kernel", found, "square on a CUDA device"));
        }
        Ok(Convolution::new(self.precision, shape))
    }

    fn norm<'a>(&self, norm: &Norm<'a, Memory>, dims: [usize; 4]) -> cuda::Norm<'a> {
        let GroupNorm { weight, bias, config } = norm.layer;
        cuda::Norm { element: self.element(), dims, config: *config, weight, bias, by: norm.by }
    }

    fn layer<'a>(&self, f: VectorActivation, linear: &'a Linear, batch: usize) -> LinearLayer<'a> {
        let Linear { weight, bias } = linear;
        let activation = match f {
            VectorActivation::None => 0,
            VectorActivation::Silu => 1,
            VectorActivation::Gelu => 2,
        };
        LinearLayer { precision: self.precision, batch, weight, bias, activation }
    }

    /// Allocates memory for the gradient of a weight.
    fn gradient(&self, weight: &Tensor) -> Result<Tensor> {
        let gradient = self.pool.gradient(weight)?;
        self.gpu.keep(&gradient);
        Ok(gradient)
    }

    /// Allocates memory for the gradients of weights.
    fn gradients(&self, weights: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        Ok([self.gradient(weights[0])?, self.gradient(weights[1])?])
    }

    fn attention_of(&self, batch: usize, shape: AttentionShape) -> Attention {
        Attention { precision: self.precision, batch, shape }
    }
}

impl Maps for Cuda<'_> {
    type Buffer = Memory;
    type Statistics = NormStatistics;

    fn images(&self, x: &Tensor) -> Result<Memory> {
        Ok(cuda::images_to_map(&self.gpu, &x.to_dtype(DType::F32)?, self.element())?)
    }

    fn to_images(&self, dims: [usize; 4], map: &Memory) -> Result<Tensor> {
        Ok(cuda::map_to_images(&self.gpu, map, dims, self.element())?)
    }

    fn sinusoids(&self, sinusoids: &Sinusoids, t: &Tensor) -> Result<Memory> {
        let dtype = if t.dtype().is_int() { DType::U32 } else { DType::F32 };
        let t = t.to_dtype(dtype)?.contiguous()?;
        let Sinusoids { decay, scale, cosines_first, .. } = *sinusoids;
        let (half, by) = (sinusoids.dim() / 2, [decay, scale]);
        Ok(cuda::sinusoids(&self.gpu, &t, half, by, cosines_first, self.element())?)
    }

    fn finish(&self) -> Result<()> {
        Ok(self.weights.finish()?)
    }

    fn take(&self, len: usize) -> Result<Memory> {
        Ok(self.gpu.take_for(len, self.element())?)
    }

    fn add(&self, sum: &mut Memory, more: &Memory, len: usize) -> Result<()> {
        Ok(cuda::add(&self.gpu, sum, more, len, self.element())?)
    }

    fn convolve(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Memory,
        add: Add<'_, Memory>,
    ) -> Result<([usize; 4], Memory)> {
        let convolution = self.convolution(conv, dims)?;
        let packed = self.weights.of_convolution(&convolution, &conv.weight)?;
        let Add { per_image, residual } = add;
        let added = Added { bias: &conv.bias, per_image, residual };
        Ok((convolution.output(), convolution.forward(&self.gpu, x, packed, &added)?))
    }

    fn convolve_weight_gradients(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Memory,
        dy: &Memory,
        per_image: bool,
    ) -> Result<([Tensor; 2], Option<Memory>)> {
        let convolution = self.convolution(conv, dims)?;
        let [weight, bias] = self.gradients([&conv.weight, &conv.bias])?;
        self.weights.gradient(&convolution, [x, dy], (&conv.weight, &weight))?;
        let of_images = convolution.bias_gradient(&self.gpu, dy, &bias, per_image)?;
        Ok(([weight, bias], of_images))
    }

    fn convolve_input_gradient(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        dy: &Memory,
        dx: &mut Memory,
        accumulate: bool,
    ) -> Result<()> {
        let convolution = self.convolution(conv, dims)?;
        let packed = self.weights.of_convolution(&convolution, &conv.weight)?;
        Ok(convolution.input_gradient(&self.gpu, dy, packed, dx, accumulate)?)
    }

    fn normalize(
        &self,
        norm: Norm<'_, Memory>,
        dims: [usize; 4],
        x: &Memory,
    ) -> Result<(Memory, NormStatistics)> {
        Ok(self.norm(&norm, dims).forward(&self.gpu, x)?)
    }

    fn normalize_again(
        &self,
        norm: Norm<'_, Memory>,
        dims: [usize; 4],
        x: &Memory,
        statistics: &NormStatistics,
    ) -> Result<Memory> {
        Ok(self.norm(&norm, dims).again(&self.gpu, x, statistics)?)
    }

    fn normalize_backward(
        &self,
        norm: Norm<'_, Memory>,
        dims: [usize; 4],
        x: &Memory,
        statistics: &NormStatistics,
        d: &mut Memory,
        more: Option<&Memory>,
    ) -> Result<([Tensor; 2], Option<Memory>)> {
        let [weight, bias] = self.gradients([&norm.layer.weight, &norm.layer.bias])?;
        let gradients = [&weight, &bias];
        let own = self.norm(&norm, dims);
        let by = own.backward(&self.gpu, x, statistics, d, more, gradients)?;
        Ok(([weight, bias], by))
    }

    fn linear(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &Memory,
    ) -> Result<Memory> {
        Ok(self.layer(f, linear, batch).forward(&self.gpu, x)?)
    }

    fn linear_backward(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &Memory,
        dy: &Memory,
    ) -> Result<(Memory, [Tensor; 2])> {
        let [weight, bias] = self.gradients([&linear.weight, &linear.bias])?;
        let layer = self.layer(f, linear, batch);
        let dx = layer.backward(&self.gpu, x, dy, [&weight, &bias])?;
        Ok((dx, [weight, bias]))
    }

    fn add_class(&self, embedding: &Embedding, classes: &Tensor, x: &Memory) -> Result<Memory> {
        let (table, classes) = (&embedding.weight, classes.contiguous()?);
        Ok(cuda::add_class(&self.gpu, table, &classes, x, self.element())?)
    }

    fn add_class_backward(
        &self,
        embedding: &Embedding,
        classes: &Tensor,
        dy: &Memory,
    ) -> Result<Tensor> {
        let gradient = self.gradient(&embedding.weight)?;
        cuda::sums_by_class(&self.gpu, &classes.contiguous()?, dy, &gradient, self.element())?;
        Ok(gradient)
    }

    fn mask(&self, dropout: &Dropout, layer: u16, dims: [usize; 4], p: f64) -> Result<Memory> {
        let address = dropout.noise.address(Purpose::Dropout, layer, dropout.step);
        let (first, sizes) = (dropout.first_sample, (dims[0], dims[3]));
        Ok(cuda::dropout_mask(&self.gpu, address, first, sizes, p, self.element())?)
    }

    fn scale_maps(&self, dims: [usize; 4], x: &Memory, mask: &Memory) -> Result<Memory> {
        Ok(cuda::scale_maps(&self.gpu, x, mask, dims, self.element())?)
    }

    fn drop_values(
        &self,
        [batch, h, w, channels]: [usize; 4],
        x: &mut Memory,
        dropout: &Dropout,
        layer: u16,
        p: f64,
    ) -> Result<()> {
        // Each value is a map of one pixel.
        let dims = [batch, 1, 1, h * w * channels];
        let mask = self.mask(dropout, layer, dims, p)?;
        *x = self.scale_maps(dims, x, &mask)?;
        Ok(())
    }

    fn repeat_pixels(&self, dims: [usize; 4], x: &Memory, factor: f32) -> Result<Memory> {
        Ok(cuda::repeat_pixels(&self.gpu, x, dims, factor, self.element())?)
    }

    fn sum_pixels(&self, dims: [usize; 4], x: &Memory, factor: f32) -> Result<Memory> {
        Ok(cuda::sum_pixels(&self.gpu, x, dims, factor, self.element())?)
    }

    fn concatenate(
        &self,
        pixels: usize,
        channels: [usize; 2],
        maps: [&Memory; 2],
    ) -> Result<Memory> {
        Ok(cuda::concatenate(&self.gpu, maps, channels, pixels, self.element())?)
    }

    fn split(&self, pixels: usize, channels: [usize; 2], map: &Memory) -> Result<[Memory; 2]> {
        Ok(cuda::split(&self.gpu, map, channels, pixels, self.element())?)
    }

    fn attention(&self, batch: usize, shape: AttentionShape, qkv: &Memory) -> Result<Memory> {
        Ok(self.attention_of(batch, shape).forward(&self.gpu, qkv)?)
    }

    fn attention_backward(
        &self,
        batch: usize,
        shape: AttentionShape,
        qkv: &Memory,
        dy: &Memory,
    ) -> Result<Memory> {
        Ok(self.attention_of(batch, shape).backward(&self.gpu, qkv, dy)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use candle_core::Device;

    use super::*;
    use crate::denoiser::{Condition, Denoiser, Trainable};
    use crate::engine::Model;
    use crate::model::{Parameters, UNet, UNetConfig};
    use crate::process::Diffusion;
    use crate::sample::{Sampler, Solver};

    fn config() -> UNetConfig {
        UNetConfig {
            image_size: 8.into(),
            hidden_dims: vec![8, 16],
            time_dim: 12,
            attention_levels: vec![0],
            classes: Some(2),
            ..UNetConfig::mnist()
        }
    }

    fn precisions() -> Vec<Precision> {
        let halves = [Precision::BF16, Precision::F16];
        [Precision::Highest]
            .into_iter()
            .chain(halves.into_iter().filter(|_| cfg!(feature = "f16")))
            .collect()
    }

    /// Copies these weights to a network that does not change.
    fn fixed(
        parameters: &Parameters,
        precision: Precision,
        device: &Device,
    ) -> Result<Model<UNet>> {
        let weights: BTreeMap<_, _> =
            parameters.vars().into_iter().map(|(k, v)| (k, v.as_detached_tensor())).collect();
        let weights = Parameters::frozen(Path::new("weights"), weights, DType::F32, device);
        weights.build(&config())?.with_precision(precision)
    }

    fn bits(x: &Tensor) -> Result<Vec<u32>> {
        Ok(x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    }

    #[test]
    fn captured_sampling_is_sampling_without_graphs() -> Result<()> {
        let device = Device::new_cuda(0)?;
        for precision in precisions() {
            let parameters = Parameters::new(7, DType::F32, &device);
            let _: Model<UNet> = parameters.build(&config())?;
            let graphs = fixed(&parameters, precision, &device)?;
            let mut plain = fixed(&parameters, precision, &device)?;
            plain.set_recompute(true)?;
            let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 14)?.clip_denoised(true);
            // The third run begins with the graph of the first.
            for (seed, batch) in [(0, 3), (1, 2), (2, 3)] {
                let sample = |model: &Model<UNet>| -> Result<Vec<u32>> {
                    bits(&sampler.sample(model, (batch, 1, 8, 8), seed, &device)?)
                };
                assert!(sample(&graphs)? == sample(&plain)?, "{precision}, seed {seed}");
            }
            assert!(cuda::is_captured(&graphs.pool().network));
            assert!(!cuda::is_captured(&plain.pool().network));
        }
        Ok(())
    }

    /// A pass of a network that was used before equals the first pass of a new network with the same weights.
    #[test]
    fn passes_use_the_weights_as_they_are() -> Result<()> {
        let device = Device::new_cuda(0)?;
        for precision in precisions() {
            let parameters = Parameters::new(7, DType::F32, &device);
            let model: Model<UNet> = parameters.build(&config())?.with_precision(precision)?;
            let x = Sampler::prior((2, 1, 8, 8), 1, &device)?;
            let t = Tensor::new(&[3u32, 700], &device)?;
            let pass = |model: &Model<UNet>| -> Result<Vec<u32>> {
                let (dropout, mut output) = (Dropout::new(0, 0), None);
                let condition = Condition::classes(vec![1, 0])?;
                let gradients = model.gradients(&x, &t, &condition, &dropout, &mut |y| {
                    output = Some(y.clone());
                    Ok(y.clone())
                })?;
                let output = output.ok_or_else(|| Error::config("outputs", 0, "1"))?;
                drop(gradients);
                bits(&output.prediction)
            };
            let new = || -> Result<Vec<u32>> {
                let condition = Condition::classes(vec![1, 0])?;
                let fixed = fixed(&parameters, precision, &device)?;
                bits(&fixed.denoise(&x, &t, &condition)?.prediction)
            };
            let mut before = Vec::new();
            for route in 0..3 {
                for (name, var) in parameters.vars() {
                    if !name.ends_with("weight") {
                        continue;
                    }
                    let (weight, same) = (var.as_detached_tensor(), var.copy()?);
                    match route {
                        0 => {}
                        1 => {
                            var.set(&(same.to_device(&Device::Cpu)? * 1.25)?.to_device(&device)?)?
                        }
                        // In place, as the updates and averages of the device.
                        _ => cuda::add_to(&weight, &same)?,
                    }
                }
                let expected = new()?;
                assert!(expected != before, "{precision}, route {route}: nothing has changed");
                for k in 0..3 {
                    assert!(pass(&model)? == expected, "{precision}, route {route}, pass {k}");
                }
                before = expected;
            }
        }
        Ok(())
    }
}
