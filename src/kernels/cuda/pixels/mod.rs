//! The arithmetic of the diffusion process on images in f32.

use candle_core::{DType, Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, kernel};
use super::launch::{THREADS, blocks_of, each};
use super::maps::add_at;

const MODULE: &Module = &Module {
    name: "pixels",
    source: concat!(include_str!("../common.cuh"), include_str!("pixels.cu")),
};

kernel! { MODULE, "mix", Mix {
    x: Pointer, y: Pointer, t: Pointer, table: Pointer, timesteps: u32, sum: Pointer,
    image: u64, count: u64,
} }
kernel! { MODULE, "combine", Combine {
    x: Pointer, a: f32, y: Pointer, b: f32, sum: Pointer, count: u64,
} }
kernel! { MODULE, "clamp", Clamp { x: Pointer, low: f32, high: f32, y: Pointer, count: u64 } }
kernel! { MODULE, "squared_error", SquaredError {
    output: Pointer, target: Pointer, factor: f32, scale: Pointer, gradient: Pointer, squares:
    Pointer, count: u64,
} }
kernel! { MODULE, "total", Total { x: Pointer, scale: f64, y: Pointer, count: u64 } }

/// Returns whether the functions of this module accept these tensors: f32 on one CUDA device,
/// contiguous, of one shape, not empty, and not tracked for gradients.
pub(crate) fn are_plain(tensors: &[&Tensor]) -> bool {
    let Some(first) = tensors.first() else { return false };
    first.device().is_cuda()
        && first.elem_count() > 0
        && tensors.iter().all(|t| {
            t.dtype() == DType::F32
                && t.is_contiguous()
                && !t.track_op()
                && t.dims() == first.dims()
                && t.device().same_device(first.device())
        })
}

/// Computes `a x + b y`, with the factors of each image's timestep `t` (batch) from `table`. A
/// timestep out of range gives NaN.
pub(crate) fn mix(x: &Tensor, y: &Tensor, t: &Tensor, table: &[[f64; 2]]) -> Result<Tensor> {
    let gpu = Gpu::of(x.device())?;
    let t = &t.to_dtype(DType::U32)?.contiguous()?;
    let table = &gpu.table(table)?;
    let (tensor, sum) = gpu.tensor(x.dims())?;
    let count = x.elem_count();
    let mix = Mix {
        x: gpu.pointer(x)?,
        y: gpu.pointer(y)?,
        t: gpu.pointer(t)?,
        table: gpu.pointer(table)?,
        timesteps: table.dim(0)? as u32,
        sum,
        image: (count / t.elem_count()) as u64,
        count: count as u64,
    };
    gpu.launch(Element::F32, each(count)?, mix)?;
    Ok(tensor)
}

/// Computes `a x + b y`.
pub(crate) fn combine(x: &Tensor, a: f64, y: &Tensor, b: f64) -> Result<Tensor> {
    let gpu = Gpu::of(x.device())?;
    let (tensor, sum) = gpu.tensor(x.dims())?;
    let (count, x, y) = (x.elem_count(), gpu.pointer(x)?, gpu.pointer(y)?);
    let combine = Combine { x, a: a as f32, y, b: b as f32, sum, count: count as u64 };
    gpu.launch(Element::F32, each(count)?, combine)?;
    Ok(tensor)
}

/// Adds `more` to `sum` in place.
pub(crate) fn add_to(sum: &Tensor, more: &Tensor) -> Result<()> {
    let gpu = Gpu::of(sum.device())?;
    let count = sum.elem_count();
    add_at(&gpu, gpu.pointer(sum)?, gpu.pointer(more)?, count, Element::F32)
}

/// Replaces values below `low` by `low`, and values above `high` by `high`.
pub(crate) fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    let gpu = Gpu::of(x.device())?;
    let (tensor, y) = gpu.tensor(x.dims())?;
    let (count, x) = (x.elem_count(), gpu.pointer(x)?);
    gpu.launch(Element::F32, each(count)?, Clamp { x, low, high, y, count: count as u64 })?;
    Ok(tensor)
}

/// Computes `scale` times the sum of the squares of `output - target`, and its gradient with respect
/// to `output`. The gradient is multiplied by the scalar `gradient_scale`, if it is given.
pub(crate) fn squared_error(
    output: &Tensor,
    target: &Tensor,
    scale: f64,
    gradient_scale: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let gpu = Gpu::of(output.device())?;
    let count = output.elem_count();
    let (gradient, gradient_at) = gpu.tensor(output.dims())?;
    let (loss, loss_at) = gpu.tensor(&[])?;
    let config = each(count)?;
    let squares = gpu.take_for(config.grid_dim.0 as usize, Element::F32)?;
    let error = SquaredError {
        output: gpu.pointer(output)?,
        target: gpu.pointer(target)?,
        factor: (2.0 * scale) as f32,
        scale: gradient_scale.map_or(Ok(Pointer::NONE), |scale| gpu.pointer(scale))?,
        gradient: gradient_at,
        squares: squares.pointer,
        count: count as u64,
    };
    gpu.launch(Element::F32, config, error)?;
    let total =
        Total { x: squares.pointer, scale, y: loss_at, count: u64::from(config.grid_dim.0) };
    gpu.launch(Element::F32, blocks_of((1, 1), (THREADS, 1)), total)?;
    Ok((loss, gradient))
}
