use std::collections::{BTreeMap, VecDeque};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, PinnedHostSlice, result};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{Device, Result, Tensor};

use super::{Argument, Gpu, Pointer};

/// Uploads of one length that may be on their way at once; the next one waits for the first of them.
const AHEAD: usize = 3;

/// Lengths that memory is kept for, at most.
const MAX_LENGTHS: usize = 8;

/// Memory of the host from which the device copies by itself, and when it has done so; by its length.
#[derive(Default)]
pub(super) struct Staging(BTreeMap<usize, VecDeque<(PinnedHostSlice<u8>, CudaEvent)>>);

impl Staging {
    /// Frees all of it, when it was copied.
    fn clear(&mut self) -> Result<()> {
        for (_, copied) in self.0.values().flatten() {
            copied.synchronize().w()?;
        }
        self.0.clear();
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // If that fails there is no device left to copy.
        let _ = self.clear();
    }
}

/// Values as a tensor on the device, without waiting for it.
pub(crate) fn upload<T: CudaDType + Argument>(
    device: &Device,
    values: &[T],
    dims: &[usize],
) -> Result<Tensor> {
    let gpu = Gpu::of(device)?;
    let (tensor, pointer) = gpu.tensor_of::<T>(dims)?;
    if tensor.elem_count() != values.len() {
        candle_core::bail!("{} values for a tensor of shape {dims:?}", values.len())
    }
    gpu.send(values, pointer)?;
    Ok(tensor)
}

impl Gpu {
    /// Copies values to the device's memory, where there must be room for them, without waiting for it.
    pub(super) fn send<T: Argument>(&self, values: &[T], to: Pointer) -> Result<()> {
        if self.capturing.get() {
            candle_core::bail!("an upload within what is captured")
        }
        let len = size_of_val(values);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: arguments of kernels are plain numbers, of which any byte can be read.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), len) };
        let mut staging = self.staging.borrow_mut();
        if staging.0.len() >= MAX_LENGTHS && !staging.0.contains_key(&len) {
            staging.clear()?;
        }
        let queue = staging.0.entry(len).or_default();
        let (mut memory, copied) = match queue.pop_front() {
            Some(first) if queue.len() + 1 >= AHEAD => first,
            first => {
                queue.extend(first);
                let context = self.stream.context();
                // SAFETY: it is written below, before anything reads it.
                let memory = unsafe { context.alloc_pinned::<u8>(len) }.w()?;
                (memory, context.new_event(None).w()?)
            }
        };
        copied.synchronize().w()?;
        let staged = memory.as_mut_slice().w()?;
        staged.copy_from_slice(bytes);
        // SAFETY: there is room for as many; the memory is not touched again before the event below, and
        // stays in the queue until then.
        unsafe { result::memcpy_htod_async(to.0, staged, self.stream.cu_stream()) }.w()?;
        copied.record(&self.stream).w()?;
        queue.push_back((memory, copied));
        Ok(())
    }
}
