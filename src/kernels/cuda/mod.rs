//! The kernels for CUDA devices: compiled when the program runs, from the sources beside this file;
//! matrix products are cuBLASLt's, and convolutions cuDNN's with the feature `cudnn`.
//!
//! Maps are kept in f32, bf16 or f16 ([`Element`]); the kernels' arithmetic is in f32 or f64, their sums
//! have one order. Everything is launched on candle's stream, and nothing waits for the device but what
//! reads from it.

mod adam;
mod convolution;
#[cfg(feature = "cudnn")]
mod cudnn;
mod gemm;
mod graph;
mod launch;
mod operations;
mod process;
#[cfg(test)]
mod tests;
mod upload;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr, sys,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Result, Storage, Tensor};

use crate::Precision;
pub(crate) use adam::{Counts, UpdateSettings, Updater, WeightUpdate};
pub(crate) use convolution::{Added, Convolution};
use gemm::Products;
pub(crate) use graph::StepGraph;
use launch::{Argument, Kernel, THREADS, blocks_of, each, each_of};
pub(crate) use operations::{Attention, LinearLayer, Norm, NormStatistics};
pub(crate) use process::*;
pub(crate) use upload::upload;

/// Where something lies in the device's memory, or nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub(crate) struct Pointer(u64);

impl Pointer {
    const NONE: Self = Self(0);

    fn to<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> Self {
        Self(slice.device_ptr(stream).0)
    }

    fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    fn as_ptr(self) -> *mut c_void {
        self.0 as *mut c_void
    }
}

/// How the values of a map are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Element {
    F32,
    Bf16,
    F16,
}

impl Element {
    pub fn of(precision: Precision) -> Self {
        match precision {
            Precision::Highest | Precision::High => Self::F32,
            Precision::BF16 => Self::Bf16,
            Precision::F16 => Self::F16,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    fn definition(self) -> &'static str {
        match self {
            Self::F32 => "-DDDPM_F32",
            Self::Bf16 => "-DDDPM_BF16",
            Self::F16 => "-DDDPM_F16",
        }
    }
}

/// A device as a thread sees it, with memory that its passes use again. Each thread has its own, since
/// candle's stream is the thread's, with `Device::new_cuda`.
pub(crate) struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// Major and minor number.
    capability: (i32, i32),
    modules: RefCell<HashMap<Element, Arc<CudaModule>>>,
    kernels: RefCell<HashMap<(Element, &'static str), Kernel>>,
    free: RefCell<BTreeMap<usize, Vec<CudaSlice<u8>>>>,
    /// How many pieces of memory are taken and not free again.
    on_loan: Cell<usize>,
    /// Of schedules that were used: their values, and where they are on the device.
    tables: RefCell<Vec<(Vec<[f64; 2]>, Tensor)>>,
    staging: RefCell<upload::Staging>,
    /// The step that random numbers are drawn for, on the device and as it is known here.
    step: RefCell<(CudaSlice<u64>, Option<u64>)>,
    /// Whether launches are noted instead of run; see [`Gpu::captured`].
    capturing: Cell<bool>,
    /// What is not let go of before launches are run again.
    kept: RefCell<Vec<Tensor>>,
    products: Products,
    #[cfg(feature = "cudnn")]
    cudnn: Option<cudnn::Cudnn>,
}

thread_local! {
    static GPUS: RefCell<HashMap<DeviceId, Rc<Gpu>>> = RefCell::default();
}

impl Gpu {
    /// The device's kernels and memory, for this thread.
    ///
    /// # Errors
    /// If it is not a CUDA device of compute capability 7.0 or later, or cuBLASLt cannot be had.
    pub fn of(device: &Device) -> Result<Rc<Self>> {
        let Device::Cuda(device) = device else {
            candle_core::bail!("a CUDA kernel was given a tensor of another device")
        };
        GPUS.with_borrow_mut(|gpus| {
            if let Some(gpu) = gpus.get(&device.id()) {
                return Ok(gpu.clone());
            }
            let stream = device.cuda_stream();
            let capability = stream.context().compute_capability().w()?;
            if capability < (7, 0) {
                let (major, minor) = capability;
                candle_core::bail!(
                    "the CUDA kernels are for compute capability 7.0 and later; this device has {major}.{minor}"
                )
            }
            keep_freed_memory(&stream);
            let gpu = Rc::new(Self {
                device: device.clone(),
                products: Products::new(&stream)?,
                #[cfg(feature = "cudnn")]
                // `DDPM_CUDNN=0` goes without, as does a machine whose cuDNN cannot be used.
                cudnn: match std::env::var("DDPM_CUDNN").as_deref() {
                    Ok("0") => None,
                    _ => cudnn::Cudnn::new(&stream).ok(),
                },
                step: RefCell::new((device.alloc_zeros(1)?, None)),
                capturing: Cell::new(false),
                kept: RefCell::default(),
                stream,
                capability,
                modules: RefCell::default(),
                kernels: RefCell::default(),
                free: RefCell::default(),
                on_loan: Cell::new(0),
                tables: RefCell::default(),
                staging: RefCell::default(),
            });
            gpus.insert(device.id(), gpu.clone());
            Ok(gpu)
        })
    }

    /// Memory for so many bytes, its content whatever was there before.
    pub fn take(self: &Rc<Self>, bytes: usize) -> Result<Memory> {
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
            // A graph would own it.
            None if self.capturing.get() => candle_core::bail!("no memory is free to be captured"),
            None => self.allocate::<u8>(bytes)?,
        };
        let pointer = Pointer::to(&slice, &self.stream);
        self.on_loan.set(self.on_loan.get() + 1);
        Ok(Memory { slice: Some(slice), pointer, gpu: self.clone() })
    }

    fn allocate<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: whoever takes memory writes it before it is read.
        let allocate = || unsafe { self.device.alloc::<T>(len) };
        allocate().or_else(|error| {
            // What lies free in other sizes may be enough; but captured steps use it.
            let mut free = self.free.borrow_mut();
            if free.is_empty() || graph::any() {
                return Err(error);
            }
            free.clear();
            allocate()
        })
    }

    /// Whether the device computes in this precision.
    ///
    /// # Errors
    /// Unless it does: which ones do.
    pub fn check(&self, precision: Precision) -> crate::Result<()> {
        check_precision(precision, self.capability)
    }

    /// Keeps a tensor while launches are captured: what was there before must not be freed among them.
    pub fn keep(&self, tensor: &Tensor) {
        if self.capturing.get() {
            self.kept.borrow_mut().push(tensor.clone());
        }
    }

    /// Whether this thread computes something with maps in memory that a captured step may use, too.
    pub fn in_a_pass(&self) -> bool {
        self.on_loan.get() > 0
    }

    /// Memory for a map of `len` values.
    pub fn take_for(self: &Rc<Self>, len: usize, element: Element) -> Result<Memory> {
        self.take(len * element.bytes())
    }

    /// Where kernels read the step that they draw random numbers for, once it is this.
    ///
    /// # Errors
    /// If the step is another one while launches are captured.
    pub fn step(&self, step: u64) -> Result<Pointer> {
        let mut current = self.step.borrow_mut();
        let (memory, known) = &mut *current;
        if *known != Some(step) {
            if self.capturing.get() {
                candle_core::bail!("the step changes within what is captured")
            }
            self.send(&[step], Pointer::to(memory, &self.stream))?;
            *known = Some(step);
        }
        Ok(Pointer::to(memory, &self.stream))
    }

    /// Waits for whatever any thread gave the device to do.
    pub fn wait_for_all(&self) -> Result<()> {
        self.stream.context().synchronize().w()
    }

    /// A tensor of f32 whose values are still to be written.
    fn tensor(&self, dims: &[usize]) -> Result<(Tensor, Pointer)> {
        self.tensor_of::<f32>(dims)
    }

    fn tensor_of<T: CudaDType + DeviceRepr>(&self, dims: &[usize]) -> Result<(Tensor, Pointer)> {
        let slice = self.allocate::<T>(dims.iter().product::<usize>().max(1))?;
        let pointer = Pointer::to(&slice, &self.stream);
        let storage = CudaStorage::wrap_cuda_slice(slice, self.device.clone());
        let storage = Storage::Cuda(storage);
        Ok((Tensor::from_storage(storage, dims, BackpropOp::none(), false), pointer))
    }

    /// Where the values of a contiguous tensor lie.
    fn pointer(&self, tensor: &Tensor) -> Result<Pointer> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cuda(storage), true) = (&*storage, layout.is_contiguous()) else {
            candle_core::bail!(
                "a CUDA kernel was given a tensor that is elsewhere or not contiguous"
            )
        };
        let first = match tensor.dtype() {
            DType::F32 => Pointer::to(storage.as_cuda_slice::<f32>()?, &self.stream),
            DType::U32 => Pointer::to(storage.as_cuda_slice::<u32>()?, &self.stream),
            dtype => candle_core::bail!("a CUDA kernel was given a tensor of {}", dtype.as_str()),
        };
        Ok(first.offset(layout.start_offset() * 4))
    }
}

/// Memory that is freed stays the process's: to ask the system for it anew takes longer than a small
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

/// A library's object, which is destroyed with this.
struct Owned<T: Copy, E> {
    value: T,
    destroy: unsafe fn(T) -> std::result::Result<(), E>,
}

impl<T: Copy, E> Owned<T, E> {
    /// What was just made, by what destroys it.
    fn new(value: T, destroy: unsafe fn(T) -> std::result::Result<(), E>) -> Self {
        Self { value, destroy }
    }
}

impl<T: Copy, E> Drop for Owned<T, E> {
    fn drop(&mut self) {
        // SAFETY: it was made for this, and is destroyed once. That destroying fails is no harm.
        let _ = unsafe { (self.destroy)(self.value) };
    }
}

fn check_precision(precision: Precision, capability: (i32, i32)) -> crate::Result<()> {
    if precision == Precision::BF16 && capability < (8, 0) {
        let (major, minor) = capability;
        let expected = format!(
            "highest, high or f16 on a device of compute capability {major}.{minor}: bf16 is for 8.0 and later"
        );
        return Err(crate::Error::config("precision", precision, expected));
    }
    Ok(())
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("device", &self.device).finish_non_exhaustive()
    }
}

/// Memory on loan from a [`Gpu`].
pub(crate) struct Memory {
    /// There until this is dropped.
    slice: Option<CudaSlice<u8>>,
    pointer: Pointer,
    gpu: Rc<Gpu>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // What was launched before still uses it; whoever takes it next launches after.
        if let Some(slice) = self.slice.take() {
            self.gpu.free.borrow_mut().entry(slice.len()).or_default().push(slice);
            self.gpu.on_loan.set(self.gpu.on_loan.get() - 1);
        }
    }
}
