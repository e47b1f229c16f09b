use candle_core::{Result, Tensor};

use crate::kernels::op::conv::Scale;

/// Computes the convolution of `x` (batch, height, width, in) with `weight` (out, in, k, k) and `bias` (out),
/// as one product of all patches.
///
/// This replaces candle's `conv2d`, whose gradient is a naive loop, and has a wrong shape at stride 2 for
/// maps that are not square.
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, scale: Scale) -> Result<Tensor> {
    let (x, stride) = match scale {
        Scale::Stride(stride) => (x, stride),
        Scale::Upsample => (&upsample_nearest_2x(x)?, 1),
    };
    let (b, h, w, _) = x.dims4()?;
    let (c_out, c_in, kernel, _) = weight.dims4()?;
    let (h_out, w_out) = (h.div_ceil(stride), w.div_ceil(stride));
    let pad = kernel / 2;
    let padded = x.pad_with_zeros(1, pad, pad)?.pad_with_zeros(2, pad, pad)?;
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

/// Doubles each pixel in both directions: (batch, h, w, channels) to (batch, 2 h, 2 w, channels).
fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    // This replaces candle's `upsample_nearest2d`, whose backward pass overwrites existing gradients.
    x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?.reshape((b, 2 * h, 2 * w, c))
}
