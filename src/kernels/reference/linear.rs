use candle_core::{Result, Tensor};

use crate::kernels::op::activation::VectorActivation;

/// Applies the activation of a linear layer to its input.
pub(crate) fn activated(f: VectorActivation, x: &Tensor) -> Result<Tensor> {
    match f {
        VectorActivation::None => Ok(x.clone()),
        VectorActivation::Silu => x.silu(),
        VectorActivation::Gelu => x.gelu_erf(),
    }
}

/// Computes `x W^T + b`: `x` (batch, in), `weight` (out, in), `bias` (out).
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}
