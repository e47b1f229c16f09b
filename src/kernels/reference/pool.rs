use candle_core::{Result, Tensor};

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
    let pick = |x: &Tensor, dim: usize, offset: usize, count: usize| {
        let places = (0..count).map(|i| (i * shape.scale.stride() + offset) as u32);
        x.index_select(&Tensor::new(places.collect::<Vec<_>>(), x.device())?, dim)
    };
    let mut all: Option<Tensor> = None;
    for ky in 0..shape.window {
        let rows = pick(padded, 1, ky, shape.h_out)?;
        for kx in 0..shape.window {
            let map = pick(&rows, 2, kx, shape.w_out)?;
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
