//! Layers: their weights and shapes. Engines compute them.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::error::{Error, Result};
use crate::kernels::cpu::conv::plan::PackedOnce;
use crate::kernels::op::activation::Activation;
use crate::kernels::op::conv::Scale;
use crate::kernels::op::norm::NormConfig;

/// The largest number of channels or vector elements of a layer.
pub(crate) const MAX_CHANNELS: usize = 1 << 16;

/// The initial distribution of weights and biases in PyTorch's convolutions and linear layers.
fn uniform(fan_in: usize) -> Init {
    let bound = 1.0 / (fan_in as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// Returns a weight for a layer. A trainable weight is shared with its trainer. Any other weight is copied, so that no
/// other code can change it.
pub(crate) fn weight(vb: &VarBuilder, shape: &[usize], name: &str, init: Init) -> Result<Tensor> {
    weights_dtype(vb)?;
    let tensor = vb.get_with_hints(shape, name, init)?;
    Ok(if tensor.track_op() { tensor.contiguous()? } else { tensor.copy()?.contiguous()? })
}

/// Returns the dtype of the weights that come from `vb`.
///
/// # Errors
/// Returns an error if the dtype is neither f32 nor f64. In half precision, candle's sums on the CPU stay in half
/// precision, in which the sum of 300 ones is 256.
pub(crate) fn weights_dtype(vb: &VarBuilder) -> Result<DType> {
    match vb.dtype() {
        dtype @ (DType::F32 | DType::F64) => Ok(dtype),
        dtype => Err(Error::config("dtype", dtype.as_str(), "f32 or f64")),
    }
}

fn check_length(field: &'static str, value: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(Error::config(field, value, format!("from 1 to {most}")))
}

/// A two-dimensional convolution of feature maps, padded with zeros. The output has the size of the input, unless the
/// convolution has a stride or upsamples. Weights have PyTorch's layout (output, input, kernel, kernel) and names
/// (`weight`, `bias`).
#[derive(Debug, Clone)]
pub struct Conv2d {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) scale: Scale,
    /// The weights packed for the CPU kernels, if they do not change.
    pub(crate) packed: Arc<PackedOnce>,
}

impl Conv2d {
    /// Creates a convolution from `input` to `output` channels with a square kernel.
    ///
    /// # Errors
    /// Returns an error if a number of channels is not from 1 to 65,536, if `kernel` is even or not from 1 to 31, if
    /// the dtype of `vb` is neither f32 nor f64, or if `vb` cannot supply a weight.
    pub fn new(input: usize, output: usize, kernel: usize, vb: VarBuilder) -> Result<Self> {
        let weights = square(input, output, kernel, &vb)?;
        let init = uniform(input * kernel * kernel);
        Ok(Self::with_weights(weights, weight(&vb, &[output], "bias", init)?))
    }

    /// Creates a convolution, as [`new`](Self::new) does, whose bias is zero and takes no gradient.
    pub(crate) fn without_bias(
        input: usize,
        output: usize,
        kernel: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weights = square(input, output, kernel, &vb)?;
        let bias = Tensor::zeros(output, weights.dtype(), weights.device())?;
        Ok(Self::with_weights(weights, bias))
    }

    /// Creates a linear layer that is applied to each pixel: a convolution with a kernel of size 1, whose weight has
    /// the shape (output, input) of PyTorch's `Linear`.
    ///
    /// # Errors
    /// Returns an error if a number of channels is not from 1 to 65,536, if the dtype of `vb` is neither f32 nor f64,
    /// or if `vb` cannot supply a weight.
    pub fn pointwise(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        check_length("input channels", input, MAX_CHANNELS)?;
        check_length("output channels", output, MAX_CHANNELS)?;
        let init = uniform(input);
        let weights = weight(&vb, &[output, input], "weight", init)?;
        Ok(Self::with_weights(weights, weight(&vb, &[output], "bias", init)?))
    }

    /// Creates a convolution of stride 1 with these weights: (out, in, k, k), or (out, in) for k = 1.
    pub(crate) fn with_weights(weight: Tensor, bias: Tensor) -> Self {
        Self { weight, bias, scale: Scale::Stride(1), packed: Arc::default() }
    }

    /// Halves the height and width of the output, rounded up: a stride of 2.
    #[must_use]
    pub fn downsampling(self) -> Self {
        Self { scale: Scale::Stride(2), ..self }
    }

    /// Halves the height and width of the output, rounded up, like [`downsampling`](Self::downsampling). The first
    /// position of the kernel begins at the first pixel, so zeros are read only beyond the right and the bottom edge.
    /// For even sizes this equals padding by `kernel - 2` zeros there, and a convolution of stride 2 without padding.
    #[must_use]
    pub fn downsampling_from_edge(self) -> Self {
        Self { scale: Scale::StrideFromEdge(2), ..self }
    }

    /// Doubles the height and width of the output: each pixel of the input is repeated in both directions before the
    /// convolution.
    #[must_use]
    pub fn upsampling(self) -> Self {
        Self { scale: Scale::Upsample, ..self }
    }

    /// The number of channels of the input.
    pub(crate) fn input(&self) -> usize {
        self.weight.dims()[1]
    }

    /// The number of channels of the output.
    pub(crate) fn output(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Returns the height and width of the output for an input of height `h` and width `w`.
    pub(crate) fn output_size(&self, [h, w]: [usize; 2]) -> [usize; 2] {
        let [height, width] = match *self.weight.dims() {
            [_, _, height, width] => [height, width],
            _ => [1, 1],
        };
        [self.scale.output(h, height), self.scale.output(w, width)]
    }
}

/// The dtype of the phases of sinusoids on a device. In half precision they would be wrong by 0.1 rad. Metal has no f64,
/// not even to cast from.
pub(crate) fn phase_dtype(device: &Device) -> DType {
    if device.is_metal() { DType::F32 } else { DType::F64 }
}

/// Returns the weight of a convolution with a square kernel.
fn square(input: usize, output: usize, kernel: usize, vb: &VarBuilder) -> Result<Tensor> {
    check_length("input channels", input, MAX_CHANNELS)?;
    check_length("output channels", output, MAX_CHANNELS)?;
    if kernel.is_multiple_of(2) || kernel > 31 {
        return Err(Error::config("kernel", kernel, "odd, from 1 to 31"));
    }
    let shape = [output, input, kernel, kernel];
    weight(vb, &shape, "weight", uniform(input * kernel * kernel))
}

/// A linear layer `x W^T + b` of vectors. Weights have PyTorch's layout (output, input) and names (`weight`, `bias`).
#[derive(Debug, Clone)]
pub struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
}

impl Linear {
    /// Creates a layer from vectors of `input` elements to vectors of `output` elements.
    ///
    /// # Errors
    /// Returns an error if a length is not from 1 to 262,144, if the dtype of `vb` is neither f32 nor f64, or if `vb`
    /// cannot supply a weight.
    pub fn new(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        const MAX: usize = 4 * MAX_CHANNELS;
        check_length("input length", input, MAX)?;
        check_length("output length", output, MAX)?;
        let init = uniform(input);
        Ok(Self {
            weight: weight(&vb, &[output, input], "weight", init)?,
            bias: weight(&vb, &[output], "bias", init)?,
        })
    }

    /// The length of the input.
    pub(crate) fn input(&self) -> usize {
        self.weight.dims()[1]
    }
}

/// A table of vectors, one for each class, and perhaps a last one for images without a class. The weight has PyTorch's
/// layout (vectors, length) and name (`weight`).
#[derive(Debug, Clone)]
pub struct Embedding {
    pub(crate) weight: Tensor,
    classes: Classes,
}

/// The classes of an [`Embedding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Classes {
    pub count: usize,
    /// True if there is a vector for images without a class. Its number is `count`.
    pub has_none: bool,
}

impl Classes {
    /// The number of vectors.
    pub fn vectors(self) -> usize {
        self.count + usize::from(self.has_none)
    }
}

impl Embedding {
    /// Creates `classes + 1` vectors of `dim` elements. The last one is for images without a class. Initial values are
    /// standard normals, as in PyTorch.
    ///
    /// # Errors
    /// Returns an error if `classes` or `dim` is not from 1 to 65,536, if the dtype of `vb` is neither f32 nor f64, or
    /// if `vb` cannot supply the weight.
    pub fn new(classes: usize, dim: usize, vb: VarBuilder) -> Result<Self> {
        Self::of(Classes { count: classes, has_none: true }, dim, vb)
    }

    /// Creates `classes` vectors of `dim` elements. Every image has a class: a pass of the network without classes is
    /// an error.
    ///
    /// # Errors
    /// Returns the errors of [`new`](Self::new).
    pub fn of_classes_only(classes: usize, dim: usize, vb: VarBuilder) -> Result<Self> {
        Self::of(Classes { count: classes, has_none: false }, dim, vb)
    }

    fn of(classes: Classes, dim: usize, vb: VarBuilder) -> Result<Self> {
        check_length("classes", classes.count, MAX_CHANNELS)?;
        check_length("length of a class's vector", dim, MAX_CHANNELS)?;
        let init = Init::Randn { mean: 0.0, stdev: 1.0 };
        Ok(Self { weight: weight(&vb, &[classes.vectors(), dim], "weight", init)?, classes })
    }

    pub(crate) fn classes(&self) -> Classes {
        self.classes
    }

    /// The length of a vector.
    pub(crate) fn dim(&self) -> usize {
        self.weight.dims()[1]
    }
}

/// GroupNorm (Wu and He 2018) of feature maps, followed by an activation. Names of weights are PyTorch's (`weight`,
/// `bias`).
#[derive(Debug, Clone)]
pub struct GroupNorm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) config: NormConfig,
}

impl GroupNorm {
    /// Creates a normalisation of maps with this number of channels, in 8 groups. 1e-5 is added to the variance.
    ///
    /// # Errors
    /// Returns an error if `channels` is not a multiple of 8 from 8 to 65,536, if the dtype of `vb` is neither f32 nor
    /// f64, or if `vb` cannot supply a weight.
    pub fn new(channels: usize, activation: Activation, vb: VarBuilder) -> Result<Self> {
        Self::with_config(channels, NormConfig::new(activation), vb)
    }

    /// Creates a normalisation in `groups` groups. `eps` is added to the variance.
    ///
    /// # Errors
    /// Returns an error if `groups` is 0, if `channels` is not a multiple of `groups` from `groups` to 65,536, or if
    /// `eps` is not positive and finite. Also returns the errors of [`new`](Self::new) for `vb`.
    pub fn grouped(
        channels: usize,
        groups: usize,
        eps: f64,
        activation: Activation,
        vb: VarBuilder,
    ) -> Result<Self> {
        check_length("groups", groups, MAX_CHANNELS)?;
        if !(eps > 0.0 && eps.is_finite()) {
            return Err(Error::config("eps", eps, "positive and finite"));
        }
        Self::with_config(channels, NormConfig { groups, eps, activation }, vb)
    }

    fn with_config(channels: usize, config: NormConfig, vb: VarBuilder) -> Result<Self> {
        let groups = config.groups;
        if !(groups..=MAX_CHANNELS).contains(&channels) || !channels.is_multiple_of(groups) {
            let expected = format!("a multiple of {groups}, from {groups} to {MAX_CHANNELS}");
            return Err(Error::config("channels", channels, expected));
        }
        Ok(Self {
            weight: weight(&vb, &[channels], "weight", Init::Const(1.0))?,
            bias: weight(&vb, &[channels], "bias", Init::Const(0.0))?,
            config,
        })
    }

    /// The number of channels.
    pub(crate) fn channels(&self) -> usize {
        self.weight.elem_count()
    }
}

/// The sines and cosines of a timestep at geometrically decreasing frequencies, of which the first is 1. Vaswani et al.
/// 2017.
#[derive(Debug, Clone)]
pub struct Sinusoids {
    half: usize,
    /// The k-th frequency is `scale * exp(-decay * k)`.
    pub(crate) decay: f64,
    /// The first frequency.
    pub(crate) scale: f64,
    /// Whether the cosines precede the sines.
    pub(crate) cosines_first: bool,
}

impl Sinusoids {
    /// Creates `half` sines, followed by `half` cosines; `half` is at least 2. The last frequency is 1 / 10000, as in
    /// the code of Ho et al. 2020.
    pub(crate) fn new(half: usize) -> Self {
        Self::with_divisor(half, half - 1)
    }

    /// Creates `half` sines, followed by `half` cosines. The `divisor`-th frequency is 1 / 10000; `divisor` is
    /// positive.
    pub(crate) fn with_divisor(half: usize, divisor: usize) -> Self {
        let decay = libm::log(10000.0) / divisor as f64;
        Self { half, decay, scale: 1.0, cosines_first: false }
    }

    /// Creates `half` sines, followed by `half` cosines; `half` is at least 2. The last frequency is `1 / theta`;
    /// `theta` is positive.
    pub(crate) fn with_theta(half: usize, theta: f64) -> Self {
        Self { decay: libm::log(theta) / (half - 1) as f64, ..Self::new(half) }
    }

    /// Exchanges sines and cosines if `flip` is true.
    pub(crate) fn cosines_first(self, flip: bool) -> Self {
        Self { cosines_first: flip, ..self }
    }

    /// Multiplies all frequencies by `scale`, which is positive.
    pub(crate) fn scaled(self, scale: f64) -> Self {
        Self { scale: self.scale * scale, ..self }
    }

    /// The number of values of a timestep.
    pub(crate) fn dim(&self) -> usize {
        2 * self.half
    }

    /// Computes `[sin | cos]`, or `[cos | sin]`, of `t` times each frequency: (batch, dim), in `dtype`.
    pub(crate) fn values(&self, t: &Tensor, dtype: DType) -> Result<Tensor> {
        let exact = phase_dtype(t.device());
        let frequency = |k| self.scale * libm::exp(-self.decay * k as f64);
        let frequencies = (0..self.half).map(frequency).collect();
        let frequencies = Tensor::from_vec(frequencies, self.half, &Device::Cpu)?
            .to_dtype(exact)?
            .to_device(t.device())?;
        let angles = t.to_dtype(exact)?.unsqueeze(1)?.broadcast_mul(&frequencies.unsqueeze(0)?)?;
        let mut parts = [angles.sin()?, angles.cos()?];
        if self.cosines_first {
            parts.reverse();
        }
        Ok(Tensor::cat(&parts, 1)?.to_dtype(dtype)?)
    }
}
