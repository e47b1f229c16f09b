//! Memory that passes reuse.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, sys};

use super::element::Pointer;

/// A thread's memory on a device. Blocks are taken from it and return to it.
pub(super) struct Pool {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// Free blocks by size in bytes.
    free: RefCell<BTreeMap<usize, Vec<CudaSlice<u8>>>>,
    /// Number of blocks that were allocated so far.
    allocated: Cell<u64>,
    /// Number of blocks in use.
    on_loan: Cell<usize>,
    /// Number of captured steps and passes. They use free blocks.
    captured: Cell<usize>,
    /// The captured passes, which release their memory if it is needed.
    releases: RefCell<Vec<Weak<dyn Release>>>,
}

/// Memory borrowed from a [`Pool`].
pub(crate) struct Memory {
    /// `None` only during the drop.
    slice: Option<CudaSlice<u8>>,
    pub(super) pointer: Pointer,
    pool: Rc<Pool>,
}

impl Memory {
    /// Returns the address of optional memory, or null.
    pub(super) fn pointer_or_none(memory: Option<&Self>) -> Pointer {
        memory.map_or(Pointer::NONE, |memory| memory.pointer)
    }
}

/// A holder of memory, which can give up the memory if it is needed elsewhere.
pub(super) trait Release {
    /// Drops the memory.
    fn release(&self);
}

/// Prevents a pool from returning memory to the device.
pub(super) struct Held(Rc<Pool>);

impl Pool {
    pub fn new(device: CudaDevice, stream: Arc<CudaStream>) -> Rc<Self> {
        keep_freed_memory(&stream);
        let (free, allocated, on_loan, captured, releases) = Default::default();
        Rc::new(Self { device, stream, free, allocated, on_loan, captured, releases })
    }

    /// Takes memory of this many bytes, with arbitrary content.
    ///
    /// # Errors
    /// Returns an error if no free block fits and no new one `may_be_allocated`, or if the allocation
    /// fails.
    pub fn take(self: &Rc<Self>, bytes: usize, may_be_allocated: bool) -> Result<Memory> {
        // An empty allocation would have no address, so it gets one byte.
        let bytes = bytes.max(1);
        let found = {
            let mut free = self.free.borrow_mut();
            // The smallest block that is large enough, unless most of it would be wasted.
            let found = free.range(bytes..=2 * bytes).find(|(_, free)| !free.is_empty());
            let size = found.map(|(&size, _)| size);
            size.and_then(|size| free.get_mut(&size)?.pop())
        };
        let slice = match found {
            Some(slice) => slice,
            None if may_be_allocated => {
                self.allocated.set(self.allocated.get() + 1);
                self.allocate::<u8>(bytes)?
            }
            // Memory allocated during a capture would belong to the graph.
            None => candle_core::bail!("no memory is free to be captured"),
        };
        let pointer = Pointer::to(&slice, &self.stream);
        self.on_loan.set(self.on_loan.get() + 1);
        Ok(Memory { slice: Some(slice), pointer, pool: self.clone() })
    }

    /// Allocates memory that does not return to the pool.
    pub fn allocate<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: users of this memory write it before they read it.
        let allocate = || unsafe { self.device.alloc::<T>(len) };
        allocate().or_else(|error| {
            // Dropping graphs and freeing blocks of other sizes may make room, but captured steps use the blocks.
            let holders: Vec<_> = self.releases.take().iter().filter_map(Weak::upgrade).collect();
            holders.iter().for_each(|holder| holder.release());
            let mut free = self.free.borrow_mut();
            let can_free = !free.is_empty() && self.captured.get() == 0;
            if holders.is_empty() && !can_free {
                return Err(error);
            }
            if can_free {
                free.clear();
            }
            allocate()
        })
    }

    /// Returns the number of blocks that were allocated so far. If a pass allocates none, the next pass of the same
    /// kind takes the same blocks.
    pub fn allocated(&self) -> u64 {
        self.allocated.get()
    }

    /// Returns whether any block is in use.
    pub fn is_in_use(&self) -> bool {
        self.on_loan.get() > 0
    }

    /// Calls `holder` when memory is needed.
    pub fn releases(&self, holder: Weak<dyn Release>) {
        let mut all = self.releases.borrow_mut();
        all.retain(|holder| holder.strong_count() > 0);
        all.push(holder);
    }

    /// Prevents the pool from freeing memory until every returned value has been dropped.
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
        // Earlier launches may still use the memory. Its next user launches after them, on the same
        // stream.
        if let Some(slice) = self.slice.take() {
            self.pool.free.borrow_mut().entry(slice.len()).or_default().push(slice);
            self.pool.on_loan.set(self.pool.on_loan.get() - 1);
        }
    }
}

/// Makes the process keep freed memory. By default each wait for the device returns it to the system,
/// and requesting it again takes longer than a step of a small network.
fn keep_freed_memory(stream: &CudaStream) {
    let (mut pool, mut all) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: the pool is the device's default pool, and the attribute is a `u64`. A failure only
    // affects speed.
    unsafe {
        let found = sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device());
        if found == sys::CUresult::CUDA_SUCCESS {
            let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let _ = sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut all).cast());
        }
    }
}
