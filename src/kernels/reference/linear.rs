use candle_core::{Result, Tensor};

/// Computes `x W^T + b`: `x` (batch, in), `weight` (out, in), `bias` (out).
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}
