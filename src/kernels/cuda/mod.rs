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
mod operations;
mod process;
#[cfg(test)]
mod tests;
mod upload;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, LaunchConfig,
};
use candle_core::cuda_backend::cudarc::nvrtc::{
    CompileError, CompileOptions, compile_ptx_with_opts,
};
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Result, Storage, Tensor};

use crate::Precision;
pub(crate) use adam::{Counts, UpdateSettings, Updater, WeightUpdate};
pub(crate) use convolution::{Added, Convolution};
use gemm::Products;
pub(crate) use graph::StepGraph;
pub(crate) use operations::{Attention, LinearLayer, Norm, NormStatistics};
pub(crate) use process::*;
pub(crate) use upload::upload;

const SOURCE: &str = concat!(
    include_str!("source/types.cu"),
    include_str!("source/maps.cu"),
    include_str!("source/norm.cu"),
    include_str!("source/patches.cu"),
    include_str!("source/process.cu"),
    include_str!("source/adam.cu"),
);

/// Threads of a block that sums up: `THREADS` in `types.cu`.
const THREADS: u32 = 256;

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
    modules: RefCell<HashMap<Element, Arc<CudaModule>>>,
    functions: RefCell<HashMap<(Element, &'static str), CudaFunction>>,
    free: RefCell<BTreeMap<usize, Vec<CudaSlice<u8>>>>,
    /// Of schedules that were used: their values, and where they are on the device.
    tables: RefCell<Vec<(Vec<[f64; 2]>, Tensor)>>,
    staging: RefCell<upload::Staging>,
    /// The step that random numbers are drawn for, on the device and as it is known here.
    step: RefCell<(CudaSlice<u64>, Option<u64>)>,
    /// Whether launches are noted instead of run; see [`Gpu::captured`].
    capturing: Cell<bool>,
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
    /// If it is not a CUDA device, or cuBLASLt cannot be had.
    pub fn of(device: &Device) -> Result<Rc<Self>> {
        let Device::Cuda(device) = device else {
            candle_core::bail!("a CUDA kernel was given a tensor of another device")
        };
        GPUS.with_borrow_mut(|gpus| {
            if let Some(gpu) = gpus.get(&device.id()) {
                return Ok(gpu.clone());
            }
            let stream = device.cuda_stream();
            let gpu = Rc::new(Self {
                device: device.clone(),
                products: Products::new(&stream)?,
                #[cfg(feature = "cudnn")]
                // `DDPM_CUDNN=0` goes without, as does a machine that lacks it.
                cudnn: match std::env::var("DDPM_CUDNN").as_deref() {
                    Ok("0") => None,
                    _ => cudnn::Cudnn::new(&stream).ok(),
                },
                step: RefCell::new((device.alloc_zeros(1)?, None)),
                capturing: Cell::new(false),
                stream,
                modules: RefCell::default(),
                functions: RefCell::default(),
                free: RefCell::default(),
                tables: RefCell::default(),
                staging: RefCell::default(),
            });
            gpus.insert(device.id(), gpu.clone());
            Ok(gpu)
        })
    }

    fn function(&self, element: Element, name: &'static str) -> Result<CudaFunction> {
        if let Some(function) = self.functions.borrow().get(&(element, name)) {
            return Ok(function.clone());
        }
        let function = self.module(element)?.load_function(name).w()?;
        self.functions.borrow_mut().insert((element, name), function.clone());
        Ok(function)
    }

    fn module(&self, element: Element) -> Result<Arc<CudaModule>> {
        if let Some(module) = self.modules.borrow().get(&element) {
            return Ok(module.clone());
        }
        let context = self.stream.context();
        let (major, minor) = context.compute_capability().w()?;
        let options = vec![
            format!("--gpu-architecture=compute_{major}{minor}"),
            "--std=c++17".to_owned(),
            element.definition().to_owned(),
        ];
        let options = CompileOptions { options, ..Default::default() };
        let ptx = compile_ptx_with_opts(SOURCE, options).map_err(|error| match error {
            CompileError::CompileError { log, .. } => {
                let log = log.to_string_lossy();
                let line = log.lines().find(|line| line.contains("error")).unwrap_or(&log);
                candle_core::Error::Msg(format!("NVRTC does not take the kernels' source: {line}"))
            }
            other => candle_core::Error::wrap(other),
        })?;
        let module = context.load_module(ptx).w()?;
        self.modules.borrow_mut().insert(element, module.clone());
        Ok(module)
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
            // SAFETY: whoever takes memory writes it before it is read.
            None => unsafe { self.device.alloc::<u8>(bytes)? },
        };
        let pointer = slice.device_ptr(&self.stream).0;
        Ok(Memory { slice: Some(slice), pointer, gpu: self.clone() })
    }

    /// Memory for a map of `len` values.
    pub fn take_for(self: &Rc<Self>, len: usize, element: Element) -> Result<Memory> {
        self.take(len * element.bytes())
    }

    /// Where kernels read the step that they draw random numbers for, once it is this.
    ///
    /// # Errors
    /// If the step is another one while launches are captured.
    pub fn step(&self, step: u64) -> Result<u64> {
        let mut current = self.step.borrow_mut();
        let (memory, known) = &mut *current;
        if *known != Some(step) {
            if self.capturing.get() {
                candle_core::bail!("the step changes within what is captured")
            }
            self.device.memcpy_htod(&[step], memory)?;
            *known = Some(step);
        }
        Ok(memory.device_ptr(&self.stream).0)
    }

    /// Waits for whatever any thread gave the device to do.
    pub fn wait_for_all(&self) -> Result<()> {
        self.stream.context().synchronize().w()
    }

    /// A tensor of f32 whose values are still to be written.
    fn tensor(&self, dims: &[usize]) -> Result<(Tensor, u64)> {
        // SAFETY: whoever asks for it writes it before it is read.
        let slice = unsafe { self.device.alloc::<f32>(dims.iter().product::<usize>().max(1))? };
        let pointer = slice.device_ptr(&self.stream).0;
        let storage = CudaStorage::wrap_cuda_slice(slice, self.device.clone());
        let storage = Storage::Cuda(storage);
        Ok((Tensor::from_storage(storage, dims, BackpropOp::none(), false), pointer))
    }

    /// Where the values of a contiguous tensor lie.
    fn pointer(&self, tensor: &Tensor) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cuda(storage), true) = (&*storage, layout.is_contiguous()) else {
            candle_core::bail!(
                "a CUDA kernel was given a tensor that is elsewhere or not contiguous"
            )
        };
        let (pointer, size) = match tensor.dtype() {
            DType::F32 => (storage.as_cuda_slice::<f32>()?.device_ptr(&self.stream).0, 4),
            DType::U32 => (storage.as_cuda_slice::<u32>()?.device_ptr(&self.stream).0, 4),
            dtype => candle_core::bail!("a CUDA kernel was given a tensor of {}", dtype.as_str()),
        };
        Ok(pointer + (layout.start_offset() * size) as u64)
    }
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
    pointer: u64,
    gpu: Rc<Gpu>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // What was launched before still uses it; whoever takes it next launches after.
        if let Some(slice) = self.slice.take() {
            self.gpu.free.borrow_mut().entry(slice.len()).or_default().push(slice);
        }
    }
}

/// A thread for each of `count` values.
///
/// # Errors
/// If they are too many for the kernels' indices.
fn each(count: usize) -> Result<LaunchConfig> {
    if count > u32::MAX as usize {
        candle_core::bail!("{count} values in a map: the CUDA kernels take less than 2^32")
    }
    let blocks = count.div_ceil(THREADS as usize) as u32;
    Ok(blocks_of((blocks, 1), (THREADS, 1)))
}

fn blocks_of(grid: (u32, u32), block: (u32, u32)) -> LaunchConfig {
    let (grid_dim, block_dim) = ((grid.0.max(1), grid.1, 1), (block.0, block.1, 1));
    LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }
}

/// Launches a kernel: `launch!(gpu, element, "name", config; arguments)`. The arguments must be those of
/// its source, in type and order, and pointers to as much memory as it reads and writes.
macro_rules! launch {
    ($gpu:expr, $element:expr, $name:literal, $config:expr; $($argument:expr),* $(,)?) => {{
        use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
        let function = $gpu.function($element, $name)?;
        let mut arguments = $gpu.stream.launch_builder(&function);
        $(
            let argument = $argument;
            arguments.arg(&argument);
        )*
        // SAFETY: the arguments are those of the source; the functions here that launch see to the
        // memory, whose sizes they know.
        let launched = unsafe { arguments.launch($config) };
        candle_core::cuda_backend::WrapErr::w(launched).map(drop)
    }};
}
use launch;
