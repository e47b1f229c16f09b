use candle_core::{Result, Tensor};

use super::pixels::upsample_nearest_2x;
use crate::kernels::op::conv::Scale;

/// Computes the convolution of `x` (batch, height, width, in) with `weight` (out, in, k, k), or (out, in) for k = 1,
/// and `bias` (out), as one product of all patches.
///
/// This replaces candle's `conv2d`, whose gradient is a naive loop, and has a wrong shape at stride 2 for
/// maps that are not square.
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, scale: Scale) -> Result<Tensor> {
    let (x, stride) = match scale {
        Scale::Stride(stride) | Scale::StrideFromEdge(stride) => (x, stride),
        Scale::Upsample => (&upsample_nearest_2x(x)?, 1),
    };
    let (b, h, w, _) = x.dims4()?;
    let weight = match weight.dims() {
        &[c_out, c_in] => &weight.reshape((c_out, c_in, 1, 1))?,
        _ => weight,
    };
    let (c_out, c_in, kernel, _) = weight.dims4()?;
    let (h_out, w_out) = (h.div_ceil(stride), w.div_ceil(stride));
    let pad = if matches!(scale, Scale::StrideFromEdge(_)) { 0 } else { kernel / 2 };
    let rest = kernel - 1 - pad;
    let padded = x.pad_with_zeros(1, pad, rest)?.pad_with_zeros(2, pad, rest)?;
    // Every `stride`-th row or column from `offset` on.
    let pick = |x: &Tensor, dim: usize, offset: usize, count: usize| {
        if stride == 1 {
            return x.narrow(dim, offset, count);
        }
        let places: Vec<u32> = (0..count).map(|i| (i * stride + offset) as u32).collect();
        x.index_select(&Tensor::new(places, x.device())?, dim)
    };
    let mut patches = Vec::with_capacity(kernel * kernel);
    for ky in 0..kernel {
        let rows = pick(&padded, 1, ky, h_out)?;
        for kx in 0..kernel {
            patches.push(pick(&rows, 2, kx, w_out)?);
        }
    }
    let patches = Tensor::cat(&patches, 3)?.reshape((b * h_out * w_out, kernel * kernel * c_in))?;
    let weight = weight.permute((2, 3, 1, 0))?.reshape((kernel * kernel * c_in, c_out))?;
    patches.matmul(&weight)?.broadcast_add(bias)?.reshape((b, h_out, w_out, c_out))
}
