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
    activated(x, config.activation)
}

/// Computes the activation of `normalized (1 + scale) + shift`. `by` (batch, 1, 1, 2 channels) holds the scales of an
/// image, then its shifts.
pub(crate) fn modulated(
    normalized: &Tensor,
    by: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    let channels = normalized.dim(3)?;
    let (scale, shift) = (by.narrow(3, 0, channels)?, by.narrow(3, channels, channels)?);
    let x = normalized.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(&shift)?;
    activated(x, activation)
}

fn activated(x: Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::None => Ok(x),
        Activation::Silu => x.silu(),
    }
}
