use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use candle_core::{DType, Tensor, TensorId};

use super::ops::{Maps, Norm};
use super::pool::Pool;
use crate::error::{Error, Result};
use crate::kernels::cuda::{
    self, Added, Attention, Convolution, Element, Gpu, LinearLayer, Memory, NormStatistics,
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
    /// The weights packed for matrix products, during this pass.
    packed: RefCell<HashMap<TensorId, Rc<Memory>>>,
}

impl<'p> Cuda<'p> {
    pub fn new(gpu: Rc<Gpu>, pool: &'p Pool, precision: Precision) -> Self {
        Self { gpu, precision, pool, packed: RefCell::default() }
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

    fn packed(&self, convolution: &Convolution, weight: &Tensor) -> Result<Rc<Memory>> {
        if let Some(packed) = self.packed.borrow().get(&weight.id()) {
            return Ok(packed.clone());
        }
        let packed = Rc::new(convolution.pack(&self.gpu, weight)?);
        self.packed.borrow_mut().insert(weight.id(), packed.clone());
        Ok(packed)
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
        let packed = self.packed(&convolution, &conv.weight)?;
        let Add { per_image, residual } = add;
        let added = Added { bias: &conv.bias, per_image, residual };
        Ok((convolution.output(), convolution.forward(&self.gpu, x, &packed, &added)?))
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
        convolution.weight_gradient(&self.gpu, x, dy, &weight)?;
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
        let packed = self.packed(&convolution, &conv.weight)?;
        Ok(convolution.input_gradient(&self.gpu, dy, &packed, dx, accumulate)?)
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
