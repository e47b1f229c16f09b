//! The random numbers of a sampler, and the checks of tensors that a sampler receives.

use candle_core::{DType, Device, Shape, Tensor};

use crate::backend;
use crate::error::{Error, Result, check_dims, check_float};
use crate::random::{Noise, Purpose};

/// A source of noise for the step that begins at a timestep.
pub(super) type NoiseSource<'a> = dyn FnMut(usize) -> Result<Tensor> + 'a;

/// Draws standard normals for images, beginning with number `first`.
pub(super) fn draw(
    purpose: Purpose,
    step: u64,
    first: u32,
    shape: &Shape,
    seed: u64,
    device: &Device,
) -> Result<Tensor> {
    if shape.rank() == 0 {
        return Err(no_batch("sample"));
    }
    let at = Noise::new(seed).address(purpose, 0, step);
    backend::on(device, DType::F32).normal(at, first, shape.dims(), device)
}

/// # Errors
/// Returns an error if `start` is a scalar or not of a floating-point dtype.
pub(super) fn check_start(start: &Tensor) -> Result<()> {
    if start.rank() == 0 {
        return Err(no_batch("the start"));
    }
    check_float("dtype of the start", start.dtype())
}

/// Checks the result of a denoiser or a source of noise for a sample `x`, and converts it to the dtype of `x`.
pub(super) fn like(x: &Tensor, found: &Tensor, [what, dtype]: [&'static str; 2]) -> Result<Tensor> {
    check_dims(what, found.dims(), x.dims(), "that of the sample")?;
    check_float(dtype, found.dtype())?;
    Ok(found.to_dtype(x.dtype())?)
}

fn no_batch(what: &'static str) -> Error {
    Error::shape(what, [], "(batch, ...), such as (16, 1, 28, 28)")
}
