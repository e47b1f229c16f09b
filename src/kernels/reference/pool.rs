use candle_core::{Result, Tensor};

use super::layout::every;
use crate::kernels::op::conv::Scale;
use crate::kernels::op::pool::{PoolShape, Pooling};

/// Computes a pooling of `x` (batch, height, width, channels), from shifted maps: one for each pixel of the window.
pub(crate) fn pool(x: &Tensor, pooling: Pooling, shape: &PoolShape) -> Result<Tensor> {
    let margin = if matches!(shape.scale, Scale::Stride(_)) { shape.window / 2 } else { 0 };
    match pooling {
        // The edges repeated add no values to a window that extends beyond them.
        Pooling::Max => {
            let padded = x.pad_with_same(1, margin, margin)?.pad_with_same(2, margin, margin)?;
            shifted(&padded, shape, |a, b| a.maximum(b))
        }
        Pooling::Average => {
            let sum = |x: &Tensor| {
                let padded = x.pad_with_zeros(1, margin, margin)?;
                shifted(&padded.pad_with_zeros(2, margin, margin)?, shape, Tensor::add)
            };
            sum(x)? / sum(&x.ones_like()?)?
        }
    }
}

/// Combines the values of all pixels of the window.
fn shifted(
    padded: &Tensor,
    shape: &PoolShape,
    combine: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let stride = shape.scale.stride();
    let mut all: Option<Tensor> = None;
    for ky in 0..shape.window {
        let rows = every(padded, 1, ky, stride, shape.h_out)?;
        for kx in 0..shape.window {
            let map = every(&rows, 2, kx, stride, shape.w_out)?;
            all = Some(match all {
                Some(all) => combine(&all, &map)?,
                None => map,
            });
        }
    }
    match all {
        Some(all) => Ok(all),
        None => candle_core::bail!("a window without pixels"),
    }
}
