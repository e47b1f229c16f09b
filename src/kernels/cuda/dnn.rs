//! Convolutions with cuDNN.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cudnn::result::{self, CudnnError};
use candle_core::cuda_backend::cudarc::cudnn::sys;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{Error, Result};

use super::element::{Element, Pointer};
use super::owned::Owned;

/// Maximum bytes of workspace of an algorithm.
const WORKSPACE: usize = 1 << 30;

/// Number of algorithms requested from cuDNN.
const CHOICES: usize = 8;

/// A thread's cuDNN handle, and the plan of each convolution.
pub(super) struct Dnn {
    handle: sys::cudnnHandle_t,
    /// Keeps the context alive longer than the handle.
    _stream: Arc<CudaStream>,
    plans: RefCell<HashMap<Shape, Option<Rc<Plan>>>>,
}

/// A convolution of maps, of stride 1 or more, padded by half of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub element: Element,
    /// Whether f32 values may be multiplied as TF32.
    pub tf32: bool,
    /// (batch, height, width, channels)
    pub x: [usize; 4],
    pub y: [usize; 4],
    pub kernel: usize,
    pub stride: usize,
}

/// The result of a computation: a plan computes one of input, weight and output from the two others.
#[derive(Debug, Clone, Copy)]
pub(super) enum Direction {
    /// The output.
    Forward,
    /// The gradient of the input.
    Input,
    /// The gradient of the weight.
    Weight,
}

/// The descriptors and algorithms of a convolution. cuDNN selects the algorithms by heuristics, not by timing.
/// Only deterministic algorithms are used.
pub(super) struct Plan {
    handle: sys::cudnnHandle_t,
    x: Owned<sys::cudnnTensorDescriptor_t, CudnnError>,
    y: Owned<sys::cudnnTensorDescriptor_t, CudnnError>,
    w: Owned<sys::cudnnFilterDescriptor_t, CudnnError>,
    /// One per direction, because the kind of arithmetic depends on the algorithm.
    convolutions: [Owned<sys::cudnnConvolutionDescriptor_t, CudnnError>; 3],
    forward: (sys::cudnnConvolutionFwdAlgo_t, usize),
    of_input: (sys::cudnnConvolutionBwdDataAlgo_t, usize),
    of_weight: (sys::cudnnConvolutionBwdFilterAlgo_t, usize),
}

impl Drop for Dnn {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        // SAFETY: the handle was created by `new` and has not been destroyed. A failure to destroy it does no
        // harm.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Dnn {
    /// Creates a handle. Returns `None` if `DDPM_CUDNN=0` is set, or if this machine's cuDNN cannot be used.
    pub fn of_environment(stream: &Arc<CudaStream>) -> Option<Self> {
        match std::env::var("DDPM_CUDNN").as_deref() {
            Ok("0") => None,
            _ => Self::new(stream).ok(),
        }
    }

    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        stream.context().bind_to_thread().w()?;
        let handle = result::create_handle().map_err(Error::wrap)?;
        // SAFETY: the stream belongs to candle, and lives as long as the device.
        unsafe { result::set_stream(handle, stream.cu_stream().cast()) }.map_err(Error::wrap)?;
        Ok(Self { handle, _stream: stream.clone(), plans: RefCell::default() })
    }

    /// Returns the plan of a convolution, if cuDNN can compute it.
    pub fn plan(&self, shape: &Shape) -> Option<Rc<Plan>> {
        if let Some(plan) = self.plans.borrow().get(shape) {
            return plan.clone();
        }
        let plan = Plan::new(self.handle, shape).ok().flatten().map(Rc::new);
        self.plans.borrow_mut().insert(*shape, plan.clone());
        plan
    }

    /// Marks a convolution as failed, so that another algorithm computes it from now on.
    pub fn forget(&self, shape: &Shape) {
        self.plans.borrow_mut().insert(*shape, None);
    }
}

/// Selects the first of cuDNN's answers that is possible, deterministic and within the workspace.
macro_rules! choose {
    ($function:ident, $performance:ty, $exact:expr; $($argument:expr),*) => {{
        let mut count = 0;
        let mut found = [const { std::mem::MaybeUninit::<$performance>::zeroed() }; CHOICES];
        // SAFETY: the descriptors are alive, and the array has room for the requested number of answers.
        unsafe {
            result::$function($($argument,)* CHOICES as i32, &mut count, found.as_mut_ptr().cast())?;
        }
        let count = usize::try_from(count).unwrap_or(0).min(CHOICES);
        // SAFETY: cuDNN wrote `count` answers.
        let found = found[..count].iter().map(|found| unsafe { found.assume_init_ref() });
        found
            .filter(|found| found.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS)
            .filter(|found| found.determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC)
            .filter(|found| {
                !$exact || found.mathType != sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH
            })
            // Exact f32 requires FMA arithmetic, even if cuDNN leaves it open.
            .map(|found| {
                let fma = sys::cudnnMathType_t::CUDNN_FMA_MATH;
                (found.algo, found.memory, if $exact { fma } else { found.mathType })
            })
            .find(|(_, bytes, _)| *bytes <= WORKSPACE)
    }};
}

/// Sets the kind of arithmetic that the algorithm needs.
fn settled<A>(
    found: Option<(A, usize, sys::cudnnMathType_t)>,
    convolution: sys::cudnnConvolutionDescriptor_t,
) -> std::result::Result<Option<(A, usize)>, CudnnError> {
    let Some((algorithm, bytes, math)) = found else { return Ok(None) };
    // SAFETY: the descriptor is alive.
    unsafe { result::set_convolution_math_type(convolution, math)? };
    Ok(Some((algorithm, bytes)))
}

impl Plan {
    fn new(
        handle: sys::cudnnHandle_t,
        shape: &Shape,
    ) -> std::result::Result<Option<Self>, CudnnError> {
        use sys::cudnnMathType_t::{CUDNN_DEFAULT_MATH, CUDNN_FMA_MATH, CUDNN_TENSOR_OP_MATH};
        use sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;

        let (element, math) = match shape.element {
            // The default arithmetic is TF32 if the device has it.
            Element::F32 if shape.tf32 => {
                (sys::cudnnDataType_t::CUDNN_DATA_FLOAT, CUDNN_DEFAULT_MATH)
            }
            Element::F32 => (sys::cudnnDataType_t::CUDNN_DATA_FLOAT, CUDNN_FMA_MATH),
            Element::Bf16 => (sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16, CUDNN_TENSOR_OP_MATH),
            Element::F16 => (sys::cudnnDataType_t::CUDNN_DATA_HALF, CUDNN_TENSOR_OP_MATH),
        };
        let channels_first = |[n, h, w, c]: [usize; 4]| [n, c, h, w].map(|size| size as i32);
        let (pad, stride, kernel) =
            ((shape.kernel / 2) as i32, shape.stride as i32, shape.kernel as i32);
        let tensor = || -> std::result::Result<_, CudnnError> {
            let made = result::create_tensor_descriptor()?;
            Ok(Owned::new(made, result::destroy_tensor_descriptor as _))
        };
        let convolution = || -> std::result::Result<_, CudnnError> {
            let made = result::create_convolution_descriptor()?;
            Ok(Owned::new(made, result::destroy_convolution_descriptor as _))
        };
        let (x, y) = (tensor()?, tensor()?);
        let w =
            Owned::new(result::create_filter_descriptor()?, result::destroy_filter_descriptor as _);
        let convolutions = [convolution()?, convolution()?, convolution()?];
        let weight = [shape.y[3] as i32, shape.x[3] as i32, kernel, kernel];
        // SAFETY: the descriptors were created above.
        unsafe {
            let format = CUDNN_TENSOR_NHWC;
            result::set_tensor4d_descriptor(x.value, format, element, channels_first(shape.x))?;
            result::set_tensor4d_descriptor(y.value, format, element, channels_first(shape.y))?;
            result::set_filter4d_descriptor(w.value, element, format, weight)?;
            for convolution in convolutions.each_ref().map(|own| own.value) {
                // Sums are in f32 for every element type.
                result::set_convolution2d_descriptor(
                    convolution,
                    pad,
                    pad,
                    stride,
                    stride,
                    1,
                    1,
                    sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
                    sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
                )?;
                result::set_convolution_math_type(convolution, math)?;
            }
        }
        let exact = math == CUDNN_FMA_MATH;
        let [for_y, for_x, for_w] = convolutions.each_ref().map(|own| own.value);
        let (of_x, of_y, of_w) = (x.value, y.value, w.value);
        let forward = choose!(get_convolution_forward_algorithm, sys::cudnnConvolutionFwdAlgoPerf_t,
            exact; handle, of_x, of_w, for_y, of_y);
        let of_input = choose!(get_convolution_backward_data_algorithm,
            sys::cudnnConvolutionBwdDataAlgoPerf_t, exact; handle, of_w, of_y, for_x, of_x);
        let of_weight = choose!(get_convolution_backward_filter_algorithm,
            sys::cudnnConvolutionBwdFilterAlgoPerf_t, exact; handle, of_x, of_y, for_w, of_w);
        let (Some(forward), Some(of_input), Some(of_weight)) =
            (settled(forward, for_y)?, settled(of_input, for_x)?, settled(of_weight, for_w)?)
        else {
            return Ok(None);
        };
        Ok(Some(Self { handle, x, y, w, convolutions, forward, of_input, of_weight }))
    }

    /// The workspace of [`run`](Self::run) in bytes.
    pub fn workspace(&self, direction: Direction) -> usize {
        match direction {
            Direction::Forward => self.forward.1,
            Direction::Input => self.of_input.1,
            Direction::Weight => self.of_weight.1,
        }
    }

    /// Computes one of input, weight and output from the others, or adds to it. Returns false if cuDNN fails.
    pub fn run(
        &self,
        direction: Direction,
        [x, w, y]: [Pointer; 3],
        workspace: Pointer,
        accumulate: bool,
    ) -> bool {
        let (one, keep) = (1f32, if accumulate { 1f32 } else { 0.0 });
        let (one, keep) = ((&raw const one).cast(), (&raw const keep).cast());
        let [x, w, y, workspace] = [x, w, y, workspace].map(Pointer::as_ptr);
        let (of_x, of_w, of_y) = (self.x.value, self.w.value, self.y.value);
        let convolution = self.convolutions[direction as usize].value;
        let (handle, bytes) = (self.handle, self.workspace(direction));
        // SAFETY: the descriptors are alive. They describe the memory at the pointers, which the caller keeps
        // alive, as it does the workspace. The workspace has the length that cuDNN requested.
        let done = unsafe {
            match direction {
                Direction::Forward => result::convolution_forward(
                    handle,
                    one,
                    of_x,
                    x,
                    of_w,
                    w,
                    convolution,
                    self.forward.0,
                    workspace,
                    bytes,
                    keep,
                    of_y,
                    y,
                ),
                Direction::Input => result::convolution_backward_data(
                    handle,
                    one,
                    of_w,
                    w,
                    of_y,
                    y,
                    convolution,
                    self.of_input.0,
                    workspace,
                    bytes,
                    keep,
                    of_x,
                    x,
                ),
                Direction::Weight => result::convolution_backward_filter(
                    handle,
                    one,
                    of_x,
                    x,
                    of_y,
                    y,
                    convolution,
                    self.of_weight.0,
                    workspace,
                    bytes,
                    keep,
                    of_w,
                    w,
                ),
            }
        };
        done.is_ok()
    }
}
