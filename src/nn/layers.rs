use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::kernels::{self, Activation};

/// PyTorch's default for convolutions and linear layers, weights and biases alike.
fn uniform(fan_in: usize) -> Init {
    let bound = 1.0 / (fan_in as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// A convolution of channels-last maps, padded to keep the size at stride 1.
#[derive(Debug, Clone)]
pub(crate) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
}

impl Conv2d {
    pub fn new(input: usize, output: usize, kernel: usize, vb: VarBuilder) -> Result<Self> {
        let init = uniform(input * kernel * kernel);
        let weight = vb.get_with_hints((output, input, kernel, kernel), "weight", init)?;
        let bias = vb.get_with_hints(output, "bias", init)?;
        Ok(Self { weight, bias, stride: 1 })
    }

    /// Halves the size, rounding up.
    pub fn with_stride_2(self) -> Self {
        Self { stride: 2, ..self }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::conv2d(x, &self.weight, &self.bias, self.stride)
    }
}

/// `x W^T + b` of (batch, in).
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    pub fn new(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        let init = uniform(input);
        let weight = vb.get_with_hints((output, input), "weight", init)?;
        let bias = vb.get_with_hints(output, "bias", init)?;
        Ok(Self { weight, bias })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::linear(x, &self.weight, &self.bias)
    }
}

/// How many groups every normalisation has.
pub(crate) const GROUPS: usize = 8;

/// GroupNorm of channels-last maps, with what follows it.
#[derive(Debug, Clone)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    activation: Activation,
}

impl GroupNorm {
    pub fn new(channels: usize, activation: Activation, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(channels, "weight", Init::Const(1.0))?;
        let bias = vb.get_with_hints(channels, "bias", Init::Const(0.0))?;
        Ok(Self { weight, bias, activation })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::group_norm(x, GROUPS, &self.weight, &self.bias, self.activation)
    }
}
