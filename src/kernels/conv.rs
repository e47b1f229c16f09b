use candle_core::{Result, Tensor};

use super::{to_channels_first, to_channels_last};

/// A convolution with zero padding of half the kernel, so that stride 1 keeps the size.
///
/// `x` (batch, height, width, in); `weight` (out, in, k, k) with odd k; `bias` (out); the result
/// is (batch, ceil(height / stride), ceil(width / stride), out).
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    composed(x, weight, bias, stride)
}

fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let padding = weight.dim(2)? / 2;
    let y = to_channels_first(x)?.conv2d(weight, padding, stride, 1, 1)?;
    to_channels_last(&y)?.broadcast_add(bias)
}
