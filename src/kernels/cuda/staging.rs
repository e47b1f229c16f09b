//! Copies from the host to the device that the host does not wait for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, PinnedHostSlice, result,
};

use super::element::Pointer;
use super::kernel::Argument;

/// The number of copies of one length that may be under way at once; the next one waits for the first of them.
const AHEAD: usize = 3;

/// The number of lengths that memory is kept for.
const MAX_LENGTHS: usize = 8;

/// Memory of the host from which the device copies by itself, and the events by which it has; by length.
#[derive(Default)]
pub(super) struct Staging(BTreeMap<usize, VecDeque<(PinnedHostSlice<u8>, CudaEvent)>>);

/// One value in the device's memory, and the value that is known to be there.
pub(crate) struct DeviceValue<T> {
    memory: CudaSlice<T>,
    known: Option<T>,
}

impl Staging {
    /// Copies values to the device's memory, where there must be room for them.
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
        // SAFETY: arguments of kernels are plain numbers, of which any byte can be read.
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
        unsafe { result::memcpy_htod_async(to.0, staged, stream.cu_stream()) }.w()?;
        copied.record(stream).w()?;
        queue.push_back((memory, copied));
        Ok(())
    }

    /// Frees all of it, after it was copied.
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

impl<T: Argument + PartialEq> DeviceValue<T> {
    /// Memory for a value that is not known yet.
    pub fn new(memory: CudaSlice<T>) -> Self {
        Self { memory, known: None }
    }

    pub fn pointer(&self, stream: &CudaStream) -> Pointer {
        Pointer::to(&self.memory, stream)
    }

    /// Makes it this value: by `send`, unless it is this already.
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
