//! A thread's view of a device: its libraries, kernels and memory.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, DeviceRepr, LaunchConfig, result};
use candle_core::cuda_backend::{CudaDType, CudaDevice, DeviceId, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Result, Storage, Tensor};

use super::blas::Blas;
use super::capture::Capture;
#[cfg(feature = "cudnn")]
use super::dnn::Dnn;
use super::element::{Element, Pointer};
use super::kernel::{Argument, Kernel, Launch, Module};
use super::memory::{Memory, Pool};
use super::modules::Modules;
use super::staging::{DeviceValue, Staging};
use crate::error::Error;
use crate::precision::Precision;

/// A device with its kernels and memory, for one thread. With `Device::new_cuda`, each thread has its own
/// stream.
pub(crate) struct Gpu {
    pub(super) device: CudaDevice,
    pub(super) stream: Arc<CudaStream>,
    /// The compute capability: major and minor number.
    capability: (i32, i32),
    pub(super) pool: Rc<Pool>,
    modules: Modules,
    staging: RefCell<Staging>,
    pub(super) capture: Capture,
    /// The step for which random numbers are drawn.
    step: RefCell<DeviceValue<u64>>,
    /// The tables of factors on the device, with their values; see [`Gpu::table`].
    tables: RefCell<Vec<(Vec<[f64; 2]>, Tensor)>>,
    pub(super) blas: Blas,
    #[cfg(feature = "cudnn")]
    pub(super) dnn: Option<Dnn>,
}

thread_local! {
    static GPUS: RefCell<HashMap<DeviceId, Rc<Gpu>>> = RefCell::default();
}

impl Gpu {
    /// Returns the kernels and memory of the device for this thread.
    ///
    /// # Errors
    /// Returns an error if `device` is not a CUDA device of compute capability 7.0 or later, or if cuBLASLt
    /// cannot be used.
    pub fn of(device: &Device) -> Result<Rc<Self>> {
        let Device::Cuda(device) = device else {
            candle_core::bail!("a CUDA kernel was given a tensor of another device")
        };
        GPUS.with_borrow_mut(|gpus| {
            if let Some(gpu) = gpus.get(&device.id()) {
                return Ok(gpu.clone());
            }
            let gpu = Rc::new(Self::new(device)?);
            gpus.insert(device.id(), gpu.clone());
            Ok(gpu)
        })
    }

    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let capability = stream.context().compute_capability().w()?;
        if capability < (7, 0) {
            let (major, minor) = capability;
            candle_core::bail!(
                "the CUDA kernels are for compute capability 7.0 and later; this device has {major}.{minor}"
            )
        }
        Ok(Self {
            device: device.clone(),
            capability,
            pool: Pool::new(device.clone(), stream.clone()),
            modules: Modules::new(stream.context().clone(), capability),
            staging: RefCell::default(),
            capture: Capture::default(),
            step: RefCell::new(DeviceValue::new(device.alloc_zeros(1)?)),
            tables: RefCell::default(),
            blas: Blas::new(&stream)?,
            #[cfg(feature = "cudnn")]
            dnn: Dnn::of_environment(&stream),
            stream,
        })
    }

    /// Checks that the device supports this precision.
    ///
    /// # Errors
    /// Returns an error that names the supported precisions.
    pub fn check(&self, precision: Precision) -> crate::error::Result<()> {
        check_precision(precision, self.capability)
    }

    /// Waits for all work that any thread has submitted to the device.
    pub fn wait_for_all(&self) -> Result<()> {
        self.stream.context().synchronize().w()
    }

    /// Returns whether this thread is in a pass, whose maps may share memory with a captured step.
    pub fn in_a_pass(&self) -> bool {
        self.pool.is_in_use()
    }

    /// Returns the number of blocks of memory that passes of this thread have allocated so far.
    pub fn allocated_blocks(&self) -> u64 {
        self.pool.allocated()
    }

    /// Keeps a tensor alive while launches are captured: memory allocated before the capture must not be freed
    /// during it.
    pub fn keep(&self, tensor: &Tensor) {
        self.capture.keep(tensor);
    }

    /// Takes memory of this many bytes, with arbitrary content.
    pub(super) fn take(&self, bytes: usize) -> Result<Memory> {
        self.pool.take(bytes, !self.capture.is_active())
    }

    /// Takes memory for a map of `len` values.
    pub fn take_for(&self, len: usize, element: Element) -> Result<Memory> {
        self.take(len * element.bytes())
    }

    /// Creates a tensor of f32 with arbitrary values, and returns its address.
    pub(super) fn tensor(&self, dims: &[usize]) -> Result<(Tensor, Pointer)> {
        self.tensor_of::<f32>(dims)
    }

    pub(super) fn tensor_of<T: CudaDType + DeviceRepr>(
        &self,
        dims: &[usize],
    ) -> Result<(Tensor, Pointer)> {
        let slice = self.pool.allocate::<T>(dims.iter().product::<usize>().max(1))?;
        let pointer = Pointer::to(&slice, &self.stream);
        let storage = CudaStorage::wrap_cuda_slice(slice, self.device.clone());
        let storage = Storage::Cuda(storage);
        Ok((Tensor::from_storage(storage, dims, BackpropOp::none(), false), pointer))
    }

    /// Returns the address of the values of a contiguous tensor.
    pub(super) fn pointer(&self, tensor: &Tensor) -> Result<Pointer> {
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

    /// Returns whether kernels are compiled for this architecture, such as 80 for compute capability 8.0, or a later
    /// one.
    pub(super) fn compiles_for(&self, architecture: i32) -> bool {
        self.modules.architecture().is_ok_and(|own| own >= architecture)
    }

    /// Launches a kernel for maps of this type.
    ///
    /// The memory behind each pointer among the arguments must be as large as the kernel reads or writes. The
    /// launching functions of these modules guarantee this.
    ///
    /// # Errors
    /// Returns an error if the kernel's module cannot be compiled or loaded, or if the launch fails.
    pub(super) fn launch<L: Launch>(
        &self,
        element: Element,
        config: LaunchConfig,
        arguments: L,
    ) -> Result<()> {
        self.launch_of(L::KERNEL.module, element, config, arguments)
    }

    /// Launches the kernel of another module whose source differs in its definitions only.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub(super) fn launch_of<L: Launch>(
        &self,
        module: &'static Module,
        element: Element,
        config: LaunchConfig,
        arguments: L,
    ) -> Result<()> {
        let may_load = !self.capture.is_active();
        let kernel = Kernel { module, ..L::KERNEL };
        let function = self.modules.function(kernel, element, config.shared_mem_bytes, may_load)?;
        let mut launch = self.stream.launch_builder(&function);
        arguments.push(&mut launch);
        // SAFETY: the declaration of the kernel checks the arguments against the source. They live until this
        // returns. The memory behind pointers is guaranteed as described above.
        unsafe { launch.launch(config) }.w().map(drop)
    }

    /// Copies values to `to` without waiting for the device. The memory there must be large enough.
    pub(super) fn send<T: Argument>(&self, values: &[T], to: Pointer) -> Result<()> {
        if self.capture.is_active() {
            candle_core::bail!("an upload within what is captured")
        }
        self.staging.borrow_mut().send(&self.stream, values, to)
    }

    /// Copies the values of one tensor to another of the same shape and dtype.
    pub(super) fn copy(&self, from: &Tensor, to: &Tensor) -> Result<()> {
        let fits = from.dims() == to.dims() && from.dtype() == to.dtype();
        if !fits || !matches!(from.dtype(), DType::F32 | DType::U32) {
            candle_core::bail!("{:?} cannot be copied to {:?}", from.shape(), to.shape())
        }
        let bytes = from.elem_count() * 4;
        let (from, to) = (self.pointer(from)?, self.pointer(to)?);
        // SAFETY: both tensors have this length.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) }.w()
    }

    /// Sets the step for which kernels draw random numbers. Returns the address at which they read it.
    ///
    /// # Errors
    /// Returns an error if the step would change while launches are captured.
    pub fn step(&self, step: u64) -> Result<Pointer> {
        let mut current = self.step.borrow_mut();
        current.set(&self.stream, step, |step, to| self.send(step, to))?;
        Ok(current.pointer(&self.stream))
    }

    /// Returns a table (rows, 2) on the device. It is uploaded once and kept.
    pub(super) fn table(&self, table: &[[f64; 2]]) -> Result<Tensor> {
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

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("device", &self.device).finish_non_exhaustive()
    }
}

/// Uploads values to a tensor without waiting for the device.
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

fn check_precision(precision: Precision, capability: (i32, i32)) -> crate::error::Result<()> {
    if precision == Precision::BF16 && capability < (8, 0) {
        let (major, minor) = capability;
        let expected = format!(
            "highest, high or f16 on a device of compute capability {major}.{minor}: bf16 is for 8.0 and later"
        );
        return Err(Error::config("precision", precision, expected));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_lack_precisions() {
        for precision in [Precision::Highest, Precision::High, Precision::F16] {
            check_precision(precision, (7, 0)).unwrap();
        }
        check_precision(Precision::BF16, (8, 0)).unwrap();
        let message = check_precision(Precision::BF16, (7, 5)).unwrap_err().to_string();
        assert!(message.contains("capability 7.5: bf16 is for 8.0"), "{message}");
    }
}
