//! Copies from the host to the device for which the host does not wait.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, PinnedHostSlice, result,
};

use super::element::Pointer;
use super::kernel::Argument;

/// Maximum number of concurrent copies of one length. The next copy waits for the first of them.
const AHEAD: usize = 3;

/// Maximum number of lengths for which memory is kept.
const MAX_LENGTHS: usize = 8;

/// Pinned host memory by length, from which the device copies asynchronously. The events mark the end of the
/// copies.
#[derive(Default)]
pub(super) struct Staging(BTreeMap<usize, VecDeque<(PinnedHostSlice<u8>, CudaEvent)>>);

/// A value in the device's memory, and the value that was last written there, if known.
pub(crate) struct DeviceValue<T> {
    memory: CudaSlice<T>,
    known: Option<T>,
}

impl Staging {
    /// Copies values to `to`. The memory there must be large enough.
    pub fn send<T: Argument>(
        &mut self,
        stream: &Arc<CudaStream>,
        values: &[T],
        to: Pointer,
    ) -> Result<()> {
        let len = size_of_val(values);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: arguments of kernels are plain numbers, so every byte is readable.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), len) };
        if self.0.len() >= MAX_LENGTHS && !self.0.contains_key(&len) {
            self.clear()?;
        }
        let queue = self.0.entry(len).or_default();
        let (mut memory, copied) = match queue.pop_front() {
            Some(first) if queue.len() + 1 >= AHEAD => first,
            first => {
                queue.extend(first);
                let context = stream.context();
                // SAFETY: the memory is written below, before anything reads it.
                let memory = unsafe { context.alloc_pinned::<u8>(len) }.w()?;
                (memory, context.new_event(None).w()?)
            }
        };
        copied.synchronize().w()?;
        let staged = memory.as_mut_slice().w()?;
        staged.copy_from_slice(bytes);
        // SAFETY: both sides have this length. The memory stays in the queue, and is not accessed before the
        // event below.
        unsafe { result::memcpy_htod_async(to.0, staged, stream.cu_stream()) }.w()?;
        copied.record(stream).w()?;
        queue.push_back((memory, copied));
        Ok(())
    }

    /// Frees all memory after its copies have ended.
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
        // If this fails, no device is left that could read the memory.
        let _ = self.clear();
    }
}

impl<T: Argument + PartialEq> DeviceValue<T> {
    /// Takes memory whose value is not yet known.
    pub fn new(memory: CudaSlice<T>) -> Self {
        Self { memory, known: None }
    }

    pub fn pointer(&self, stream: &CudaStream) -> Pointer {
        Pointer::to(&self.memory, stream)
    }

    /// Sets the value with `send`, if it has changed.
    pub fn set(
        &mut self,
        stream: &CudaStream,
        value: T,
        send: impl FnOnce(&[T], Pointer) -> Result<()>,
    ) -> Result<()> {
        if self.known.as_ref() != Some(&value) {
            send(std::slice::from_ref(&value), self.pointer(stream))?;
            self.known = Some(value);
        }
        Ok(())
    }
}
