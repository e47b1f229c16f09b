#[cfg(test)]
mod tests;
mod values;

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::{DType, Tensor};

use super::ops::{Maps, Norm};
use super::place::Place;
use super::pool::Pool;
use crate::error::{Error, Result};
use crate::kernels::cuda::{
    self, Attention, AttentionResults, ColumnSums, Convolution, Element, Gpu, InputGradient,
    LinearLayer, Memory, NormGradients, NormStatistics, PassWeights, WeightGradient,
};
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::attention::AttentionShape;
use crate::kernels::op::conv::{Add, ConvShape};
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear, Sinusoids};
use crate::precision::Precision;
use crate::random::{Dropout, Purpose};
use values::{Addends, DeviceMap, On};

/// The kernels of CUDA devices as a backend of networks.
pub(crate) struct Cuda<'p> {
    gpu: Rc<Gpu>,
    precision: Precision,
    /// The pool from which only gradients are taken.
    pool: &'p Pool,
    weights: PassWeights,
    /// The sums over the batch that [`finish`](Maps::finish) computes: gradients of biases, and of normalisations'
    /// weights.
    sums: ColumnSums,
    /// The gradients of linear layers that `finish` computes, and the batch.
    linear: RefCell<(usize, Vec<WeightGradient>)>,
}

impl<'p> Cuda<'p> {
    /// # Errors
    /// Returns an error if the weights cannot be packed.
    pub fn new(gpu: Rc<Gpu>, pool: &'p Pool, place: &Place<'_>) -> Result<Self> {
        let &Place { precision, fixed, repack, .. } = place;
        let (element, keeps) = (Element::of(precision), fixed && !repack);
        let weights = PassWeights::begin(gpu.clone(), &pool.network, element, keeps)?;
        let (sums, linear) = Default::default();
        Ok(Self { gpu, precision, pool, weights, sums, linear })
    }

    fn element(&self) -> Element {
        Element::of(self.precision)
    }

    fn on(&self) -> On<'_> {
        On { gpu: &self.gpu, element: self.element() }
    }

    /// Returns the values of a map.
    fn ready(&self, map: &DeviceMap) -> Result<Rc<Memory>> {
        map.ready(self.on())
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

    /// Computes the gradients of the linear layers so far.
    fn linear_gradients(&self) -> Result<()> {
        let (batch, layers) = self.linear.take();
        Ok(cuda::weight_gradients(&self.gpu, batch, &layers, self.element())?)
    }

    /// Calls `f` with a normalisation of maps of dimensions `dims`.
    fn with_norm<R>(
        &self,
        norm: &Norm<'_, DeviceMap>,
        dims: [usize; 4],
        f: impl FnOnce(cuda::Norm<'_>) -> candle_core::Result<R>,
    ) -> Result<R> {
        let GroupNorm { weight, bias, config } = norm.layer;
        let by = norm.by.map(|by| self.ready(by)).transpose()?;
        let (element, by) = (self.element(), by.as_deref());
        Ok(f(cuda::Norm { element, dims, config: *config, weight, bias, by })?)
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
    type Buffer = DeviceMap;
    type Statistics = NormStatistics;
    type AttentionResults = AttentionResults;

    fn images(&self, x: &Tensor) -> Result<DeviceMap> {
        Ok(cuda::images_to_map(&self.gpu, &x.to_dtype(DType::F32)?, self.element())?.into())
    }

    fn to_images(&self, dims: [usize; 4], map: &DeviceMap) -> Result<Tensor> {
        Ok(cuda::map_to_images(&self.gpu, &*self.ready(map)?, dims, self.element())?)
    }

    fn sinusoids(&self, sinusoids: &Sinusoids, t: &Tensor) -> Result<DeviceMap> {
        let dtype = if t.dtype().is_int() { DType::U32 } else { DType::F32 };
        let t = t.to_dtype(dtype)?.contiguous()?;
        let Sinusoids { decay, scale, cosines_first, .. } = *sinusoids;
        let (half, by) = (sinusoids.dim() / 2, [decay, scale]);
        Ok(cuda::sinusoids(&self.gpu, &t, half, by, cosines_first, self.element())?.into())
    }

    fn take(&self, len: usize) -> Result<DeviceMap> {
        Ok(self.on().take(len)?.into())
    }

    fn add(&self, sum: &mut DeviceMap, more: &DeviceMap, len: usize) -> Result<()> {
        if sum.join(more) {
            return Ok(());
        }
        let more = self.ready(more)?;
        let sum = sum.writable(self.on(), len)?;
        Ok(cuda::add(&self.gpu, &sum, &more, len, self.element())?)
    }

    fn finish(&self) -> Result<()> {
        self.sums.compute(&self.gpu)?;
        self.linear_gradients()?;
        Ok(self.weights.finish()?)
    }

    fn convolve(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &DeviceMap,
        add: Add<'_, DeviceMap>,
    ) -> Result<([usize; 4], DeviceMap)> {
        let convolution = self.convolution(conv, dims)?;
        let packed = self.weights.of_convolution(&convolution, &conv.weight)?;
        let y = convolution.forward(&self.gpu, &*self.ready(x)?, packed)?;
        let [batch, h, w, channels] = convolution.output();
        let added = add.map(|map| map.map(|map| self.ready(map)).transpose());
        let addends = Addends {
            dims: [batch, h * w, channels],
            bias: Some(conv.bias.clone()),
            per_image: added.per_image?,
            residual: added.residual?,
            mask: None,
        };
        Ok((convolution.output(), DeviceMap::adding(y, addends)))
    }

    fn convolve_weight_gradients(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &DeviceMap,
        dy: &DeviceMap,
        per_image: bool,
    ) -> Result<([Tensor; 2], Option<DeviceMap>)> {
        let convolution = self.convolution(conv, dims)?;
        let [weight, bias] = self.gradients([&conv.weight, &conv.bias])?;
        let [batch, h, w, channels] = convolution.output();
        let sums = dy.image_sums(self.on(), [batch, h * w, channels])?;
        self.sums.add(&self.gpu, sums.sums.clone(), batch, &bias)?;
        let maps = [&*self.ready(x)?, &*self.ready(dy)?];
        if !convolution.weight_gradient_of_few(&self.gpu, maps, &self.sums, &weight)? {
            self.weights.gradient(&convolution, maps, (&conv.weight, &weight))?;
        }
        Ok(([weight, bias], per_image.then(|| sums.of_maps.clone().into())))
    }

    fn convolve_input_gradient(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        dy: &DeviceMap,
        dx: &mut DeviceMap,
        accumulate: bool,
    ) -> Result<()> {
        let convolution = self.convolution(conv, dims)?;
        let packed = self.weights.of_convolution(&convolution, &conv.weight)?;
        let (dy, dx) = (self.ready(dy)?, dx.writable(self.on(), dims.iter().product())?);
        Ok(convolution.input_gradient(&self.gpu, &dy, packed, &dx, accumulate)?)
    }

    fn normalize(
        &self,
        norm: Norm<'_, DeviceMap>,
        dims: [usize; 4],
        x: &DeviceMap,
    ) -> Result<(DeviceMap, NormStatistics)> {
        let [batch, h, w, channels] = dims;
        let (y, statistics) = x.with_addends(self.on(), [batch, h * w, channels], |x, added| {
            self.with_norm(&norm, dims, |norm| norm.forward(&self.gpu, x, added))
        })?;
        Ok((y.into(), statistics))
    }

    fn normalize_again(
        &self,
        norm: Norm<'_, DeviceMap>,
        dims: [usize; 4],
        x: &DeviceMap,
        statistics: &NormStatistics,
    ) -> Result<DeviceMap> {
        let x = self.ready(x)?;
        Ok(self.with_norm(&norm, dims, |norm| norm.again(&self.gpu, &x, statistics))?.into())
    }

    fn normalize_backward(
        &self,
        norm: Norm<'_, DeviceMap>,
        dims: [usize; 4],
        x: &DeviceMap,
        statistics: &NormStatistics,
        d: &mut DeviceMap,
        more: Option<&DeviceMap>,
    ) -> Result<([Tensor; 2], Option<DeviceMap>)> {
        let gradients = self.gradients([&norm.layer.weight, &norm.layer.bias])?;
        let more = more.map(|more| self.ready(more)).transpose()?;
        let (x, to) = (self.ready(x)?, d.writable(self.on(), dims.iter().product())?);
        let NormGradients { of_vectors, by, sums } = self.with_norm(&norm, dims, |norm| {
            norm.backward(&self.gpu, (&x, statistics), &to, more.as_deref())
        })?;
        d.set_sums(Rc::new(sums));
        for (of_images, gradient) in of_vectors.into_iter().zip(&gradients) {
            self.sums.add(&self.gpu, Rc::new(of_images), dims[0], gradient)?;
        }
        Ok((gradients, by.map(DeviceMap::from)))
    }

    fn linear(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &DeviceMap,
    ) -> Result<DeviceMap> {
        let (Linear { weight, bias }, activation) = (linear, number_of(f));
        let layer = LinearLayer { element: self.element(), batch, weight, bias, activation };
        Ok(layer.forward(&self.gpu, &*self.ready(x)?)?.into())
    }

    fn linear_backward(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &DeviceMap,
        dy: &DeviceMap,
    ) -> Result<(DeviceMap, [Tensor; 2])> {
        let gradients = self.gradients([&linear.weight, &linear.bias])?;
        let (x, dy, activation) = (self.ready(x)?, self.ready(dy)?, number_of(f));
        let [weight, bias] = gradients.clone();
        let own = WeightGradient { x: x.clone(), dy: dy.clone(), activation, weight, bias };
        if self.linear.borrow().0 != batch {
            self.linear_gradients()?;
            self.linear.borrow_mut().0 = batch;
        }
        self.linear.borrow_mut().1.push(own);
        let (input, layers) = (linear.weight.dim(1)?, vec![(dy, linear.weight.clone())]);
        let dx = InputGradient { x, batch, input, activation, layers };
        Ok((DeviceMap::linear(dx), gradients))
    }

    fn add_class(
        &self,
        embedding: &Embedding,
        classes: &Tensor,
        x: &DeviceMap,
    ) -> Result<DeviceMap> {
        let (table, classes) = (&embedding.weight, classes.contiguous()?);
        Ok(cuda::add_class(&self.gpu, table, &classes, &*self.ready(x)?, self.element())?.into())
    }

    fn add_class_backward(
        &self,
        embedding: &Embedding,
        classes: &Tensor,
        dy: &DeviceMap,
    ) -> Result<Tensor> {
        let gradient = self.gradient(&embedding.weight)?;
        let (classes, dy) = (classes.contiguous()?, self.ready(dy)?);
        cuda::sums_by_class(&self.gpu, &classes, &dy, &gradient, self.element())?;
        Ok(gradient)
    }

    fn mask(&self, dropout: &Dropout, layer: u16, dims: [usize; 4], p: f64) -> Result<DeviceMap> {
        let address = dropout.noise.address(Purpose::Dropout, layer, dropout.step);
        let (first, sizes) = (dropout.first_sample, (dims[0], dims[3]));
        Ok(cuda::dropout_mask(&self.gpu, address, first, sizes, p, self.element())?.into())
    }

    fn scale_maps(&self, dims: [usize; 4], x: &DeviceMap, mask: &DeviceMap) -> Result<DeviceMap> {
        let [batch, h, w, channels] = dims;
        x.masked(self.on(), [batch, h * w, channels], self.ready(mask)?)
    }

    fn drop_values(
        &self,
        [batch, h, w, channels]: [usize; 4],
        x: &mut DeviceMap,
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

    fn repeat_pixels(&self, dims: [usize; 4], x: &DeviceMap, factor: f32) -> Result<DeviceMap> {
        Ok(cuda::repeat_pixels(&self.gpu, &*self.ready(x)?, dims, factor, self.element())?.into())
    }

    fn sum_pixels(&self, dims: [usize; 4], x: &DeviceMap, factor: f32) -> Result<DeviceMap> {
        Ok(cuda::sum_pixels(&self.gpu, &*self.ready(x)?, dims, factor, self.element())?.into())
    }

    fn concatenate(
        &self,
        pixels: usize,
        channels: [usize; 2],
        maps: [&DeviceMap; 2],
    ) -> Result<DeviceMap> {
        let [a, b] = [self.ready(maps[0])?, self.ready(maps[1])?];
        Ok(cuda::concatenate(&self.gpu, [&a, &b], channels, pixels, self.element())?.into())
    }

    fn split(
        &self,
        pixels: usize,
        channels: [usize; 2],
        map: &DeviceMap,
    ) -> Result<[DeviceMap; 2]> {
        let map = self.ready(map)?;
        let parts = cuda::split(&self.gpu, &map, channels, pixels, self.element())?;
        Ok(parts.map(DeviceMap::from))
    }

    fn attention(
        &self,
        batch: usize,
        shape: AttentionShape,
        qkv: &DeviceMap,
    ) -> Result<(DeviceMap, AttentionResults)> {
        let qkv = self.ready(qkv)?;
        let (y, results) = self.attention_of(batch, shape).forward(&self.gpu, &qkv)?;
        Ok((y.into(), results))
    }

    fn attention_backward(
        &self,
        batch: usize,
        shape: AttentionShape,
        qkv: &DeviceMap,
        results: &AttentionResults,
        dy: &DeviceMap,
    ) -> Result<DeviceMap> {
        let (qkv, dy) = (self.ready(qkv)?, self.ready(dy)?);
        Ok(self.attention_of(batch, shape).backward(&self.gpu, &qkv, results, &dy)?.into())
    }
}

/// The number of an activation in the kernels.
fn number_of(f: VectorActivation) -> i32 {
    match f {
        VectorActivation::None => 0,
        VectorActivation::Silu => 1,
        VectorActivation::Gelu => 2,
    }
}
