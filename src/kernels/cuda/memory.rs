//! Memory that passes use again.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, sys};

use super::element::Pointer;

/// A thread's memory on a device, of which pieces are taken and come back.
pub(super) struct Pool {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// By size in bytes.
    free: RefCell<BTreeMap<usize, Vec<CudaSlice<u8>>>>,
    /// The number of pieces that are taken and not free again.
    on_loan: Cell<usize>,
    /// The number of captured steps, which use memory that is free otherwise.
    captured: Cell<usize>,
}

/// Memory on loan from a [`Pool`].
pub(crate) struct Memory {
    /// There until this is dropped.
    slice: Option<CudaSlice<u8>>,
    pub(super) pointer: Pointer,
    pool: Rc<Pool>,
}

impl Memory {
    /// The address of memory that may be missing.
    pub(super) fn pointer_or_none(memory: Option<&Self>) -> Pointer {
        memory.map_or(Pointer::NONE, |memory| memory.pointer)
    }
}

/// Keeps a pool from giving memory back to the device.
pub(super) struct Held(Rc<Pool>);

impl Pool {
    pub fn new(device: CudaDevice, stream: Arc<CudaStream>) -> Rc<Self> {
        keep_freed_memory(&stream);
        let (free, on_loan, captured) = Default::default();
        Rc::new(Self { device, stream, free, on_loan, captured })
    }

    /// Memory for so many bytes, its content whatever was there before.
    ///
    /// # Errors
    /// Returns an error if none is free, and none `may_be_allocated` or can be.
    pub fn take(self: &Rc<Self>, bytes: usize, may_be_allocated: bool) -> Result<Memory> {
        // Nothing is allocated as nothing, and is found again as what it is.
        let bytes = bytes.max(1);
        let found = {
            let mut free = self.free.borrow_mut();
            // The smallest that is large enough, unless most of it would be wasted.
            let found = free.range(bytes..=2 * bytes).find(|(_, free)| !free.is_empty());
            let size = found.map(|(&size, _)| size);
            size.and_then(|size| free.get_mut(&size)?.pop())
        };
        let slice = match found {
            Some(slice) => slice,
            None if may_be_allocated => self.allocate::<u8>(bytes)?,
            // A graph would own it.
            None => candle_core::bail!("no memory is free to be captured"),
        };
        let pointer = Pointer::to(&slice, &self.stream);
        self.on_loan.set(self.on_loan.get() + 1);
        Ok(Memory { slice: Some(slice), pointer, pool: self.clone() })
    }

    /// Memory of its own, which does not come back to the pool.
    pub fn allocate<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: who takes memory writes it before it is read.
        let allocate = || unsafe { self.device.alloc::<T>(len) };
        allocate().or_else(|error| {
            // Pieces that are free in other sizes may be enough; but captured steps use them.
            let mut free = self.free.borrow_mut();
            if free.is_empty() || self.captured.get() > 0 {
                return Err(error);
            }
            free.clear();
            allocate()
        })
    }

    /// Whether any piece is on loan.
    pub fn is_in_use(&self) -> bool {
        self.on_loan.get() > 0
    }

    /// From now on, what is free stays with the pool, until all that this returned are dropped.
    pub fn hold(self: &Rc<Self>) -> Held {
        self.captured.set(self.captured.get() + 1);
        Held(self.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.captured.set(self.0.captured.get() - 1);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // What was launched before still uses it; who takes it next launches after.
        if let Some(slice) = self.slice.take() {
            self.pool.free.borrow_mut().entry(slice.len()).or_default().push(slice);
            self.pool.on_loan.set(self.pool.on_loan.get() - 1);
        }
    }
}

/// Memory that is freed stays the process's: to ask the system for it again takes longer than a small
/// network's step, which frees some. Each wait for the device would give it back otherwise.
fn keep_freed_memory(stream: &CudaStream) {
    let (mut pool, mut all) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: the pool is the device's own, and its attribute a `u64`. Without it everything works, too.
    unsafe {
        let found = sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device());
        if found == sys::CUresult::CUDA_SUCCESS {
            let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let _ = sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut all).cast());
        }
    }
}
