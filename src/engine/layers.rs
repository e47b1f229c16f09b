use std::sync::{Arc, OnceLock};

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::Precision;
use crate::kernels::{Activation, Scale, Weights};

/// PyTorch's default for convolutions and linear layers, weights and biases alike.
fn uniform(fan_in: usize) -> Init {
    let bound = 1.0 / (fan_in as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// A weight as a layer keeps it: a trainable one is shared with whoever trains it, any other is a
/// copy, which nobody else can change.
fn weight(vb: &VarBuilder, shape: &[usize], name: &str, init: Init) -> Result<Tensor> {
    let tensor = vb.get_with_hints(shape, name, init)?;
    if tensor.track_op() { tensor.contiguous() } else { tensor.copy()?.contiguous() }
}

/// A convolution of channels-last maps, padded, which keeps the size unless it has another scale.
#[derive(Debug, Clone)]
pub(crate) struct Conv2d {
    pub weight: Tensor,
    pub bias: Tensor,
    pub scale: Scale,
    /// The weights as the CPU's kernels want them in each precision, once used, where they do not
    /// change.
    pub packed: Arc<[OnceLock<Weights>; Precision::COUNT]>,
}

impl Conv2d {
    pub fn new(input: usize, output: usize, kernel: usize, vb: VarBuilder) -> Result<Self> {
        let init = uniform(input * kernel * kernel);
        let shape = [output, input, kernel, kernel];
        Ok(Self {
            weight: weight(&vb, &shape, "weight", init)?,
            bias: weight(&vb, &[output], "bias", init)?,
            scale: Scale::Stride(1),
            packed: Arc::default(),
        })
    }

    pub fn with_scale(self, scale: Scale) -> Self {
        Self { scale, ..self }
    }
}

/// `x W^T + b` of vectors.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub weight: Tensor,
    pub bias: Tensor,
}

impl Linear {
    pub fn new(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        let init = uniform(input);
        Ok(Self {
            weight: weight(&vb, &[output, input], "weight", init)?,
            bias: weight(&vb, &[output], "bias", init)?,
        })
    }
}

/// How many groups every normalisation has.
pub(crate) const GROUPS: usize = 8;

/// GroupNorm of channels-last maps, with what follows it.
#[derive(Debug, Clone)]
pub(crate) struct GroupNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub activation: Activation,
}

impl GroupNorm {
    pub fn new(channels: usize, activation: Activation, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: weight(&vb, &[channels], "weight", Init::Const(1.0))?,
            bias: weight(&vb, &[channels], "bias", Init::Const(0.0))?,
            activation,
        })
    }
}
