use candle_core::{DType, Device, Result, Tensor};

use super::{Element, Gpu, Pointer, THREADS, blocks_of, each};
use crate::random::Address;

/// Whether the functions here take these: f32 on one CUDA device, contiguous, of one shape, not empty,
/// with no gradient to pass on.
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

/// Standard normals of shape (batch, ...), from the counters at this address: each sample has its own, and
/// the batch begins at number `first`.
pub(crate) fn normals(gpu: &Gpu, address: Address, first: u32, shape: &[usize]) -> Result<Tensor> {
    let (y, pointer) = gpu.tensor(shape)?;
    let batch = shape.first().copied().unwrap_or(0);
    let size = y.elem_count() / batch.max(1);
    if size > 0 {
        let blocks = size.div_ceil(4).div_ceil(THREADS as usize) as u32;
        gpu.launch(
            Element::F32,
            "normals",
            blocks_of((batch as u32, blocks), (THREADS, 1)),
            (pointer, address.seed, address.place, gpu.step(address.step)?, first, size as u32),
        )?;
    }
    Ok(y)
}

/// The integers that random numbers are made of, from `count` counters of a sample.
#[cfg(test)]
pub(crate) fn integers(gpu: &Gpu, address: Address, sample: u32, count: usize) -> Result<Tensor> {
    use candle_core::{Shape, Storage, op::BackpropOp};
    let slice = gpu.device.alloc_zeros::<u32>(4 * count)?;
    let storage = candle_core::CudaStorage::wrap_cuda_slice(slice, gpu.device.clone());
    let shape = Shape::from(4 * count);
    let y = Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false);
    gpu.launch(
        Element::F32,
        "integers",
        each(count)?,
        (
            gpu.pointer(&y)?,
            address.seed,
            address.place,
            gpu.step(address.step)?,
            sample,
            count as u32,
        ),
    )?;
    Ok(y)
}

/// `a x + b y` with the factors of each image's timestep `t` (batch), from `table`; with the second
/// negated where that is asked for. NaN where there is no such timestep.
pub(crate) fn mix(
    x: &Tensor,
    y: &Tensor,
    t: &Tensor,
    table: &[[f64; 2]],
    negate: bool,
) -> Result<Tensor> {
    let gpu = Gpu::of(x.device())?;
    let t = &t.to_dtype(DType::U32)?.contiguous()?;
    let table = &gpu.table(table)?;
    let (sum, pointer) = gpu.tensor(x.dims())?;
    let count = x.elem_count();
    gpu.launch(
        Element::F32,
        "mix",
        each(count)?,
        (
            gpu.pointer(x)?,
            gpu.pointer(y)?,
            gpu.pointer(t)?,
            gpu.pointer(table)?,
            table.dim(0)? as u32,
            pointer,
            i32::from(negate),
            (count / t.elem_count()) as u64,
            count as u64,
        ),
    )?;
    Ok(sum)
}

impl Gpu {
    /// The table (timesteps, 2) on the device, where it stays.
    fn table(&self, table: &[[f64; 2]]) -> Result<Tensor> {
        let mut tables = self.tables.borrow_mut();
        if let Some((_, found)) = tables.iter().find(|(own, _)| own == table) {
            return Ok(found.clone());
        }
        let values: Vec<f32> = table.iter().flatten().map(|&value| value as f32).collect();
        let device = Device::Cuda(self.device.clone());
        let found = Tensor::from_vec(values, (table.len(), 2), &device)?;
        tables.push((table.to_vec(), found.clone()));
        Ok(found)
    }
}

/// `a x + b y`.
pub(crate) fn combine(x: &Tensor, a: f64, y: &Tensor, b: f64) -> Result<Tensor> {
    let gpu = Gpu::of(x.device())?;
    let (sum, pointer) = gpu.tensor(x.dims())?;
    let count = x.elem_count();
    gpu.launch(
        Element::F32,
        "combine",
        each(count)?,
        (gpu.pointer(x)?, a as f32, gpu.pointer(y)?, b as f32, pointer, count as u64),
    )?;
    Ok(sum)
}

/// Adds `more` to `sum`, in place.
pub(crate) fn add_to(sum: &Tensor, more: &Tensor) -> Result<()> {
    let gpu = Gpu::of(sum.device())?;
    let count = sum.elem_count();
    gpu.add_at(gpu.pointer(sum)?, gpu.pointer(more)?, count, Element::F32)
}

/// What lies beyond `low` or `high` becomes that.
pub(crate) fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    let gpu = Gpu::of(x.device())?;
    let (y, pointer) = gpu.tensor(x.dims())?;
    let count = x.elem_count();
    gpu.launch(
        Element::F32,
        "clamp",
        each(count)?,
        (gpu.pointer(x)?, low, high, pointer, count as u64),
    )?;
    Ok(y)
}

/// `scale` times the sum of the squares of `output - target`, and its gradient with respect to
/// `output`, times the scalar `gradient_scale`, where it is given.
pub(crate) fn squared_error(
    output: &Tensor,
    target: &Tensor,
    scale: f64,
    gradient_scale: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let gpu = Gpu::of(output.device())?;
    let count = output.elem_count();
    let (gradient, d) = gpu.tensor(output.dims())?;
    let (loss, sum) = gpu.tensor(&[])?;
    let config = each(count)?;
    let squares = gpu.take(config.grid_dim.0 as usize * Element::F32.bytes())?;
    let factor = (2.0 * scale) as f32;
    let gradient_scale = gradient_scale.map_or(Ok(Pointer::NONE), |scale| gpu.pointer(scale))?;
    gpu.launch(
        Element::F32,
        "squared_error",
        config,
        (
            gpu.pointer(output)?,
            gpu.pointer(target)?,
            factor,
            gradient_scale,
            d,
            squares.pointer,
            count as u64,
        ),
    )?;
    gpu.launch(
        Element::F32,
        "total",
        blocks_of((1, 1), (THREADS, 1)),
        (squares.pointer, scale, sum, u64::from(config.grid_dim.0)),
    )?;
    Ok((loss, gradient))
}

#[cfg(test)]
mod tests {
    use rand::RngCore;

    use super::*;
    use crate::random::{Noise, Purpose};

    #[test]
    fn integers_are_the_cpus() -> Result<()> {
        let gpu = Gpu::of(&Device::new_cuda(0)?)?;
        let noise = Noise::new(0x0123_4567_89ab_cdef);
        for (index, step, sample) in [(0, 0, 0), (3, 1 << 33, 7), (u16::MAX, 12, u32::MAX)] {
            let address = noise.address(Purpose::Dropout, index, step);
            let found = integers(&gpu, address, sample, 300)?.to_vec1::<u32>()?;
            let mut stream = noise.indexed(Purpose::Dropout, index, step, sample);
            let expected: Vec<u32> = (0..1200).map(|_| stream.next_u32()).collect();
            assert_eq!(found, expected);
        }
        Ok(())
    }
}
