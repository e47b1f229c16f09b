use candle_core::{Result, Tensor};

/// What follows a normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    None,
    Silu,
}

/// Added to the variance, as in PyTorch.
const EPS: f64 = 1e-5;

/// Normalises each group of channels of each image to mean 0 and variance 1, then scales and
/// shifts each channel. Wu and He 2018.
///
/// `x` (batch, height, width, channels); `weight` and `bias` (channels).
pub(crate) fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    composed(x, groups, weight, bias, activation)
}

fn composed(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.reshape((b, h * w, groups, c / groups))?;
    let x = x.broadcast_sub(&x.mean_keepdim((1, 3))?)?;
    let variance = x.sqr()?.mean_keepdim((1, 3))?;
    let x = x.broadcast_div(&(variance + EPS)?.sqrt()?)?;
    let x = x.reshape((b, h, w, c))?.broadcast_mul(weight)?.broadcast_add(bias)?;
    match activation {
        Activation::None => Ok(x),
        Activation::Silu => x.silu(),
    }
}
