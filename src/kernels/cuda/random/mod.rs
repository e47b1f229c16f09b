//! Random numbers, from the same counters as on the CPU.

use candle_core::{Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, kernel};
use super::launch::{THREADS, blocks_of, each};
use super::memory::Memory;
use crate::random::Address;

const MODULE: &Module = &Module {
    name: "random",
    source: concat!(include_str!("../common.cuh"), include_str!("random.cu")),
};

kernel! { MODULE, "normals", Normals {
    y: Pointer, seed: u64, place: u64, step: Pointer, first: u32, size: u32,
} }
kernel! { MODULE, "dropout_mask", DropoutMask {
    y: Pointer, seed: u64, place: u64, step: Pointer, first_sample: u32, p: f64, keep: f32,
    channels: u32, count: u32,
} }
kernel! { MODULE, "integers", #[cfg(test)] Integers {
    y: Pointer, seed: u64, place: u64, step: Pointer, sample: u32, count: u32,
} }

/// Draws standard normals of shape (batch, ...) from the counters at this address. Each sample has its own
/// counters. The batch begins with sample number `first`.
pub(crate) fn normals(gpu: &Gpu, address: Address, first: u32, shape: &[usize]) -> Result<Tensor> {
    let (tensor, y) = gpu.tensor(shape)?;
    let batch = shape.first().copied().unwrap_or(0);
    let size = tensor.elem_count() / batch.max(1);
    if size > 0 {
        let blocks = size.div_ceil(4).div_ceil(THREADS as usize) as u32;
        let Address { seed, place, step } = address;
        let normals = Normals { y, seed, place, step: gpu.step(step)?, first, size: size as u32 };
        gpu.launch(Element::F32, blocks_of((batch as u32, blocks), (THREADS, 1)), normals)?;
    }
    Ok(tensor)
}

/// Draws the mask (batch, channels) of the dropout at this address. The batch begins with sample number
/// `first`.
pub(crate) fn dropout_mask(
    gpu: &Gpu,
    address: Address,
    first: usize,
    (batch, channels): (usize, usize),
    p: f64,
    element: Element,
) -> Result<Memory> {
    let count = batch * channels;
    let mask = gpu.take_for(count, element)?;
    let dropout = DropoutMask {
        y: mask.pointer,
        seed: address.seed,
        place: address.place,
        step: gpu.step(address.step)?,
        first_sample: first as u32,
        p,
        keep: (1.0 / (1.0 - p)) as f32,
        channels: channels as u32,
        count: count as u32,
    };
    gpu.launch(element, each(count)?, dropout)?;
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use rand::RngCore;

    use super::*;
    use crate::random::{Noise, Purpose};

    /// Draws the integers from which random numbers are made, from `count` counters of a sample.
    fn integers(gpu: &Gpu, address: Address, sample: u32, count: usize) -> Result<Vec<u32>> {
        let (tensor, y) = gpu.tensor_of::<u32>(&[4 * count])?;
        let Address { seed, place, step } = address;
        let step = gpu.step(step)?;
        let integers = Integers { y, seed, place, step, sample, count: count as u32 };
        gpu.launch(Element::F32, each(count)?, integers)?;
        tensor.to_vec1::<u32>()
    }

    #[test]
    fn integers_are_the_cpus() -> Result<()> {
        let gpu = Gpu::of(&Device::new_cuda(0)?)?;
        let noise = Noise::new(0x0123_4567_89ab_cdef);
        for (index, step, sample) in [(0, 0, 0), (3, 1 << 33, 7), (u16::MAX, 12, u32::MAX)] {
            let address = noise.address(Purpose::Dropout, index, step);
            let found = integers(&gpu, address, sample, 300)?;
            let mut stream = noise.indexed(Purpose::Dropout, index, step, sample);
            let expected: Vec<u32> = (0..1200).map(|_| stream.next_u32()).collect();
            assert_eq!(found, expected);
        }
        Ok(())
    }
}
