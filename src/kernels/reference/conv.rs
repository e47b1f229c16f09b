use candle_core::{Result, Tensor};

use super::layout::every;
use super::pixels::upsample_nearest_2x;
use crate::kernels::op::conv::Scale;

/// Computes the convolution of `x` (batch, height, width, in) with `weight` and `bias` (out), as one product of all
/// patches. `weight` is (out, in, kernel height, kernel width), or (out, in) for a kernel of one value.
///
/// This replaces candle's `conv2d`, whose gradient is a naive loop, and has a wrong shape at stride 2 for
/// maps that are not square.
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, scale: Scale) -> Result<Tensor> {
    let (b, h, w, _) = x.dims4()?;
    let stride = scale.stride();
    let x = if scale == Scale::Upsample { &upsample_nearest_2x(x)? } else { x };
    let weight = match weight.dims() {
        &[c_out, c_in] => &weight.reshape((c_out, c_in, 1, 1))?,
        _ => weight,
    };
    let (c_out, c_in, height, width) = weight.dims4()?;
    let (h_out, w_out) = (scale.output(h, height), scale.output(w, width));
    let padded = |x: &Tensor, dim: usize, kernel: usize| {
        let (before, after) = match scale {
            Scale::Stride(_) | Scale::Upsample => (kernel / 2, kernel / 2),
            Scale::StrideFromEdge(_) => (0, kernel - 1),
            Scale::StrideWithin(_) => (0, 0),
        };
        x.pad_with_zeros(dim, before, after)
    };
    let padded = padded(&padded(x, 1, height)?, 2, width)?;
    let taps = height * width;
    let mut patches = Vec::with_capacity(taps);
    for ky in 0..height {
        let rows = every(&padded, 1, ky, stride, h_out)?;
        for kx in 0..width {
            patches.push(every(&rows, 2, kx, stride, w_out)?);
        }
    }
    let patches = Tensor::cat(&patches, 3)?.reshape((b * h_out * w_out, taps * c_in))?;
    let weight = weight.permute((2, 3, 1, 0))?.reshape((taps * c_in, c_out))?;
    patches.matmul(&weight)?.broadcast_add(bias)?.reshape((b, h_out, w_out, c_out))
}
