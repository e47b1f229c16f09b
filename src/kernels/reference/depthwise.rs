use candle_core::{Result, Tensor};

use super::layout::every;
use crate::kernels::op::depthwise::DepthwiseShape;

/// Computes the depthwise convolution of `x` (batch, height, width, channels) with `weight` (channels, 1, kernel,
/// kernel). The result is the sum of shifted maps, one for each pixel of the kernel, times the weights of that pixel.
pub(crate) fn depthwise(x: &Tensor, weight: &Tensor, shape: &DepthwiseShape) -> Result<Tensor> {
    let DepthwiseShape { h, w, channels, h_out, w_out, kernel, stride, .. } = *shape;
    let ([above, below], [left, right]) = (shape.padding(h), shape.padding(w));
    let padded = x.pad_with_zeros(1, above, below)?.pad_with_zeros(2, left, right)?;
    let taps = weight.reshape((channels, kernel, kernel))?.permute((1, 2, 0))?;
    let mut sum = Tensor::zeros(&shape.output(), x.dtype(), x.device())?;
    for ky in 0..kernel {
        let rows = every(&padded, 1, ky, stride, h_out)?;
        for kx in 0..kernel {
            let map = every(&rows, 2, kx, stride, w_out)?;
            sum = (sum + map.broadcast_mul(&taps.get(ky)?.get(kx)?)?)?;
        }
    }
    Ok(sum)
}
