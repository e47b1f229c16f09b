//! The random numbers of a sampler, and the checks of tensors that a sampler receives.

use candle_core::{DType, Device, Shape, Tensor};

use super::plan::PlannedStep;
use crate::backend;
use crate::error::{Error, Result, check_dims, check_float};
use crate::random::{Address, Noise, Purpose};

/// A source of noise for a step.
pub(super) type NoiseSource<'a> = dyn FnMut(&PlannedStep) -> Result<Tensor> + 'a;

/// Draws the start of images, beginning with number `first`: standard normals.
pub(super) fn draw_prior(first: u32, shape: &Shape, seed: u64, device: &Device) -> Result<Tensor> {
    draw(Noise::new(seed).address(Purpose::Prior, 0, 0), first, shape, device)
}

/// Draws the noise of the step from `t`, for images beginning with number `first`: standard normals.
pub(super) fn draw_step(
    t: f64,
    first: u32,
    shape: &Shape,
    seed: u64,
    device: &Device,
) -> Result<Tensor> {
    // Of the 56 bits of an address, 20 are the timestep, as `NoiseSchedule::MAX_STEPS` requires. The others are the
    // fraction, in the parts of the address that are 0 at a timestep.
    let fixed = (t * (1u64 << 36) as f64) as u64;
    let (timestep, high, low) = (fixed >> 36, fixed >> 20, fixed & 0xf_ffff);
    let at = Noise::new(seed).address(Purpose::Sampling, high as u16, low << 20 | timestep);
    draw(at, first, shape, device)
}

/// Draws the noise of a step of a plan, for images beginning with number `first`. This is the noise of [`draw_step`],
/// or other noise if an earlier step began at the same time.
pub(super) fn draw_planned(
    step: &PlannedStep,
    first: u32,
    shape: &Shape,
    seed: u64,
    device: &Device,
) -> Result<Tensor> {
    let Some(index) = step.again else { return draw_step(step.at.t, first, shape, seed, device) };
    draw(Noise::new(seed).address(Purpose::Resampling, 0, index), first, shape, device)
}

fn draw(at: Address, first: u32, shape: &Shape, device: &Device) -> Result<Tensor> {
    if shape.rank() == 0 {
        return Err(no_batch("sample"));
    }
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
