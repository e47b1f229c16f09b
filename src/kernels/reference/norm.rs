use candle_core::{Result, Tensor};

use crate::kernels::op::activation::Activation;
use crate::kernels::op::norm::NormConfig;

/// Computes the GroupNorm of `x` (batch, height, width, channels), with `weight` and `bias`
/// (channels).
pub(crate) fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    config: NormConfig,
) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.reshape((b, h * w, config.groups, c / config.groups))?;
    let x = x.broadcast_sub(&x.mean_keepdim((1, 3))?)?;
    let variance = x.sqr()?.mean_keepdim((1, 3))?;
    let x = x.broadcast_div(&(variance + config.eps)?.sqrt()?)?;
    let x = x.reshape((b, h, w, c))?.broadcast_mul(weight)?.broadcast_add(bias)?;
    match config.activation {
        Activation::None => Ok(x),
        Activation::Silu => x.silu(),
    }
}
