use std::collections::VecDeque;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, PinnedHostSlice, result};
use candle_core::{Device, Result, Tensor};

use super::Gpu;

/// Batches that may be on their way at once; the next one waits for the first of them.
const AHEAD: usize = 3;

/// Memory of the host from which the device copies by itself, and when it has done so.
#[derive(Default)]
pub(super) struct Staging(VecDeque<(PinnedHostSlice<f32>, CudaEvent)>);

impl Drop for Staging {
    fn drop(&mut self) {
        for (_, copied) in &self.0 {
            // If that fails there is no device left to copy.
            let _ = copied.synchronize();
        }
    }
}

/// Values as a tensor on the device, without waiting for it.
pub(crate) fn upload(device: &Device, values: &[f32], dims: &[usize]) -> Result<Tensor> {
    let gpu = Gpu::of(device)?;
    let (tensor, pointer) = gpu.tensor(dims)?;
    if tensor.elem_count() != values.len() {
        candle_core::bail!("{} values for a tensor of shape {dims:?}", values.len())
    }
    let mut staging = gpu.staging.borrow_mut();
    let known = |(memory, _): &(PinnedHostSlice<f32>, _)| memory.len() == values.len();
    if !staging.0.iter().all(known) {
        for (_, copied) in staging.0.drain(..) {
            copied.synchronize().w()?;
        }
    }
    let (mut memory, copied) = match staging.0.pop_front() {
        Some(first) if staging.0.len() + 1 >= AHEAD => first,
        first => {
            staging.0.extend(first);
            let context = gpu.stream.context();
            // SAFETY: it is written below, before anything reads it.
            let memory = unsafe { context.alloc_pinned::<f32>(values.len()) }.w()?;
            (memory, context.new_event(None).w()?)
        }
    };
    copied.synchronize().w()?;
    let staged = memory.as_mut_slice().w()?;
    staged.copy_from_slice(values);
    // SAFETY: the tensor has as many values; the memory is not touched again before the event below, and
    // stays in the queue until then.
    unsafe { result::memcpy_htod_async(pointer, staged, gpu.stream.cu_stream()) }.w()?;
    copied.record(&gpu.stream).w()?;
    staging.0.push_back((memory, copied));
    Ok(tensor)
}
