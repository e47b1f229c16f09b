use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, result, sys};
use candle_core::{DType, Tensor};

use super::Gpu;
use crate::Result;

/// A training step that was captured as a CUDA graph, to be launched again for other batches of its
/// shape: one launch in place of a thousand.
///
/// The graph itself belongs to the thread that captured it, whose stream it is for; on any other there
/// is none.
#[derive(Debug)]
pub(crate) struct StepGraph {
    id: u64,
    shape: Vec<usize>,
}

/// CUDA's handle of the stream that each thread has by itself.
const PER_THREAD: sys::CUstream = std::ptr::without_provenance_mut(2);

/// What a graph reads and writes of its own. The weights, what follows them, and the optimiser's part are
/// the trainer's, which lets go of the graph before it lets go of them.
struct Captured {
    graph: CudaGraph,
    gpu: Rc<Gpu>,
    x_0: Tensor,
    t: Tensor,
    loss: Tensor,
    norm: Tensor,
    _gradients: Vec<Tensor>,
}

thread_local! {
    static GRAPHS: RefCell<HashMap<u64, Captured>> = RefCell::default();
}

/// Whether this thread has captured steps, which use memory that is free otherwise.
pub(super) fn any() -> bool {
    // If they are not to be had, they are being looked at.
    GRAPHS.with(|graphs| graphs.try_borrow().map_or(true, |graphs| !graphs.is_empty()))
}

/// What a step computes: the loss, the gradient's norm, and the gradients.
pub(crate) type Computed = (Tensor, Tensor, Vec<Tensor>);

impl Drop for StepGraph {
    fn drop(&mut self) {
        // Another thread's graph ends with that thread.
        let _ = GRAPHS.try_with(|graphs| graphs.borrow_mut().remove(&self.id));
    }
}

impl StepGraph {
    /// Captures what `step` launches for batches like `x_0` and `t`: nothing of it is run. It must not
    /// wait for the device, nor upload anything.
    ///
    /// # Errors
    /// If it does, or memory that it takes is not there already; and its own.
    pub fn capture(
        x_0: &Tensor,
        t: &Tensor,
        step: impl FnOnce(&Tensor, &Tensor) -> Result<Computed>,
    ) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let gpu = Gpu::of(x_0.device())?;
        let scalar = || Tensor::from_vec(vec![0f32], (), x_0.device());
        let (x_0, t, loss, norm) = (x_0.copy()?, t.copy()?, scalar()?, scalar()?);
        let work = || -> Result<Vec<Tensor>> {
            let (own_loss, own_norm, gradients) = step(&x_0, &t)?;
            gpu.copy(&own_loss, &loss)?;
            gpu.copy(&own_norm, &norm)?;
            Ok(gradients)
        };
        let (graph, gradients) = gpu.captured(work)?;
        let (id, shape) = (COUNT.fetch_add(1, Ordering::Relaxed), x_0.dims().to_vec());
        let captured = Captured { graph, gpu, x_0, t, loss, norm, _gradients: gradients };
        GRAPHS.with_borrow_mut(|graphs| graphs.insert(id, captured));
        Ok(Self { id, shape })
    }

    /// Whether it can be launched for such a batch, from this thread.
    pub fn fits(&self, x_0: &Tensor) -> bool {
        x_0.dims() == self.shape && GRAPHS.with_borrow(|graphs| graphs.contains_key(&self.id))
    }

    /// Launches the step for this batch: the loss, and the gradient's norm.
    ///
    /// # Errors
    /// Unless it [fits](Self::fits), and no [pass](Gpu::in_a_pass) is under way.
    pub fn launch(&self, x_0: &Tensor, t: &Tensor) -> Result<(Tensor, Tensor)> {
        GRAPHS
            .with_borrow(|graphs| {
                let Some(own) = graphs.get(&self.id).filter(|_| x_0.dims() == self.shape) else {
                    candle_core::bail!("a captured step was given another batch, or another thread")
                };
                if own.gpu.in_a_pass() {
                    candle_core::bail!("a captured step was launched within another pass")
                }
                own.gpu.copy(x_0, &own.x_0)?;
                own.gpu.copy(t, &own.t)?;
                own.graph.launch().w()?;
                // The next launch writes over them.
                Ok((own.loss.copy()?, own.norm.copy()?))
            })
            .map_err(crate::Error::from)
    }
}

impl Gpu {
    /// Copies the values of one tensor to another of the same shape and dtype.
    fn copy(&self, from: &Tensor, to: &Tensor) -> candle_core::Result<()> {
        let fits = from.dims() == to.dims() && from.dtype() == to.dtype();
        if !fits || !matches!(from.dtype(), DType::F32 | DType::U32) {
            candle_core::bail!("{:?} cannot be copied to {:?}", from.shape(), to.shape())
        }
        let bytes = from.elem_count() * 4;
        let (from, to) = (self.pointer(from)?, self.pointer(to)?);
        // SAFETY: both are of this length.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) }.w()
    }

    /// A graph of what `work` launches, which is not run.
    fn captured<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(CudaGraph, R)> {
        struct Capture<'a>(&'a Gpu);

        impl Capture<'_> {
            fn end(&self) -> candle_core::Result<Option<CudaGraph>> {
                self.0.capturing.set(false);
                let flags =
                    sys::CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
                // What dropping something recorded would keep the capture from ending. It shows in the
                // graph, or in the error that led to it.
                let _ = self.0.stream.context().check_err();
                let graph = self.0.stream.end_capture(flags);
                let _ = self.0.stream.context().check_err();
                self.0.kept.borrow_mut().clear();
                graph.w()
            }
        }

        impl Drop for Capture<'_> {
            fn drop(&mut self) {
                if self.0.capturing.get() {
                    let _ = self.end();
                }
            }
        }

        let context = self.stream.context();
        // What other threads launch must not be captured, nor slices wait for events from without.
        if self.stream.cu_stream() != PER_THREAD || context.is_managing_stream_synchronization() {
            let reason =
                "only the stream of `Device::new_cuda` is captured, the only one of its device";
            return Err(candle_core::Error::Msg(reason.into()).into());
        }
        // With it candle refuses to upload and to read back while launches are captured.
        let _no_copies = self.device.enable_cuda_graph_htod_cache();
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.stream.begin_capture(mode).w()?;
        self.capturing.set(true);
        // Ended even after an error, which is told first.
        let capture = Capture(self);
        let result = work();
        let graph = capture.end();
        let result = result?;
        match graph? {
            Some(graph) => Ok((graph, result)),
            None => Err(candle_core::Error::Msg("nothing was captured".into()).into()),
        }
    }
}
