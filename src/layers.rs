//! Layers: their weights and shapes. Engines compute them.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::error::{Error, Result};
use crate::kernels::cpu::conv::plan::PackedOnce;
use crate::kernels::op::activation::Activation;
use crate::kernels::op::conv::Scale;
use crate::kernels::op::norm::GROUPS;

/// The largest number of channels or vector elements of a layer.
pub(crate) const MAX_CHANNELS: usize = 1 << 16;

/// The initial distribution of weights and biases in PyTorch's convolutions and linear layers.
fn uniform(fan_in: usize) -> Init {
    let bound = 1.0 / (fan_in as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// Returns a weight for a layer. A trainable weight is shared with its trainer. Any other weight is copied, so that no
/// other code can change it.
fn weight(vb: &VarBuilder, shape: &[usize], name: &str, init: Init) -> Result<Tensor> {
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
        check_length("input channels", input, MAX_CHANNELS)?;
        check_length("output channels", output, MAX_CHANNELS)?;
        if kernel.is_multiple_of(2) || kernel > 31 {
            return Err(Error::config("kernel", kernel, "odd, from 1 to 31"));
        }
        let init = uniform(input * kernel * kernel);
        let shape = [output, input, kernel, kernel];
        Ok(Self {
            weight: weight(&vb, &shape, "weight", init)?,
            bias: weight(&vb, &[output], "bias", init)?,
            scale: Scale::Stride(1),
            packed: Arc::default(),
        })
    }

    /// Halves the height and width of the output, rounded up: a stride of 2.
    #[must_use]
    pub fn downsampling(self) -> Self {
        Self { scale: Scale::Stride(2), ..self }
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
        match self.scale {
            Scale::Stride(stride) => [h.div_ceil(stride), w.div_ceil(stride)],
            Scale::Upsample => [2 * h, 2 * w],
        }
    }
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

/// A table of vectors, one for each class, and a last one for images without a class. The weight has PyTorch's layout
/// (vectors, length) and name (`weight`).
#[derive(Debug, Clone)]
pub struct Embedding {
    pub(crate) weight: Tensor,
}

impl Embedding {
    /// Creates `classes + 1` vectors of `dim` elements. Initial values are standard normals, as in PyTorch.
    ///
    /// # Errors
    /// Returns an error if `classes` or `dim` is not from 1 to 65,536, if the dtype of `vb` is neither f32 nor f64, or
    /// if `vb` cannot supply the weight.
    pub fn new(classes: usize, dim: usize, vb: VarBuilder) -> Result<Self> {
        check_length("classes", classes, MAX_CHANNELS)?;
        check_length("length of a class's vector", dim, MAX_CHANNELS)?;
        let init = Init::Randn { mean: 0.0, stdev: 1.0 };
        Ok(Self { weight: weight(&vb, &[classes + 1, dim], "weight", init)? })
    }

    /// The number of classes. It is also the number of the last vector, that of no class.
    pub(crate) fn classes(&self) -> usize {
        self.weight.dims()[0] - 1
    }

    /// The length of a vector.
    pub(crate) fn dim(&self) -> usize {
        self.weight.dims()[1]
    }
}

/// GroupNorm (Wu and He 2018) of feature maps with 8 groups, followed by an activation. Names of weights are PyTorch's
/// (`weight`, `bias`).
#[derive(Debug, Clone)]
pub struct GroupNorm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) activation: Activation,
}

impl GroupNorm {
    /// Creates a normalisation of maps with this number of channels.
    ///
    /// # Errors
    /// Returns an error if `channels` is not a multiple of 8 from 8 to 65,536, if the dtype of `vb` is neither f32 nor
    /// f64, or if `vb` cannot supply a weight.
    pub fn new(channels: usize, activation: Activation, vb: VarBuilder) -> Result<Self> {
        if !(GROUPS..=MAX_CHANNELS).contains(&channels) || !channels.is_multiple_of(GROUPS) {
            let expected = format!("a multiple of {GROUPS}, from {GROUPS} to {MAX_CHANNELS}");
            return Err(Error::config("channels", channels, expected));
        }
        Ok(Self {
            weight: weight(&vb, &[channels], "weight", Init::Const(1.0))?,
            bias: weight(&vb, &[channels], "bias", Init::Const(0.0))?,
            activation,
        })
    }

    /// The number of channels.
    pub(crate) fn channels(&self) -> usize {
        self.weight.elem_count()
    }
}

/// The sines and cosines of a timestep at geometrically decreasing frequencies, of which the last is 1 / 10000.
/// Vaswani et al. 2017; the divisor is that of Ho et al.'s code.
#[derive(Debug, Clone)]
pub struct Sinusoids {
    half: usize,
    /// The k-th frequency is `exp(-decay * k)`.
    pub(crate) decay: f64,
}

impl Sinusoids {
    /// Creates `half` sines and `half` cosines; `half` is at least 2.
    pub(crate) fn new(half: usize) -> Self {
        Self { half, decay: libm::log(10000.0) / (half - 1) as f64 }
    }

    /// The number of values of a timestep.
    pub(crate) fn dim(&self) -> usize {
        2 * self.half
    }

    /// Computes `[sin | cos]` of `t` times each frequency: (batch, dim), in `dtype`.
    pub(crate) fn values(&self, t: &Tensor, dtype: DType) -> Result<Tensor> {
        // In half precision the phase would be wrong by 0.1 rad. Metal has no f64, not even to cast from.
        let exact = if t.device().is_metal() { DType::F32 } else { DType::F64 };
        let frequencies = (0..self.half).map(|k| libm::exp(-self.decay * k as f64)).collect();
        let frequencies = Tensor::from_vec(frequencies, self.half, &Device::Cpu)?
            .to_dtype(exact)?
            .to_device(t.device())?;
        let angles = t.to_dtype(exact)?.unsqueeze(1)?.broadcast_mul(&frequencies.unsqueeze(0)?)?;
        Ok(Tensor::cat(&[angles.sin()?, angles.cos()?], 1)?.to_dtype(dtype)?)
    }
}
