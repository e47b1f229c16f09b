//! Capturing: what is launched becomes a CUDA graph and is not run.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use candle_core::Tensor;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, sys};
use candle_core::cuda_backend::{CudaDevice, WrapErr};

use crate::error::Result;

/// CUDA's handle of the stream that each thread has by itself.
const PER_THREAD: sys::CUstream = std::ptr::without_provenance_mut(2);

/// Whether a thread's launches are captured.
#[derive(Default)]
pub(super) struct Capture {
    is_active: Cell<bool>,
    /// Tensors that must not be freed before launches are run again.
    kept: RefCell<Vec<Tensor>>,
}

impl Capture {
    pub fn is_active(&self) -> bool {
        self.is_active.get()
    }

    /// Keeps a tensor while launches are captured: what was there before must not be freed among them.
    pub fn keep(&self, tensor: &Tensor) {
        if self.is_active() {
            self.kept.borrow_mut().push(tensor.clone());
        }
    }

    /// The graph of what `work` launches on the stream of the device.
    ///
    /// # Errors
    /// Returns an error if `work` does, or if it does what cannot be captured.
    pub fn of<R>(
        &self,
        device: &CudaDevice,
        work: impl FnOnce() -> Result<R>,
    ) -> Result<(CudaGraph, R)> {
        let stream = device.cuda_stream();
        // What other threads launch must not be captured, nor slices wait for events from outside.
        let manages_events = stream.context().is_managing_stream_synchronization();
        if stream.cu_stream() != PER_THREAD || manages_events {
            let reason =
                "only the stream of `Device::new_cuda` is captured, the only one of its device";
            return Err(candle_core::Error::Msg(reason.into()).into());
        }
        // With it candle refuses to upload and to read back while launches are captured.
        let _no_copies = device.enable_cuda_graph_htod_cache();
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        stream.begin_capture(mode).w()?;
        self.is_active.set(true);
        // Ended even after an error, which is reported first.
        let active = Active { capture: self, stream: &stream };
        let result = work();
        let graph = active.end();
        let result = result?;
        match graph? {
            Some(graph) => Ok((graph, result)),
            None => Err(candle_core::Error::Msg("nothing was captured".into()).into()),
        }
    }
}

/// A capture under way, which ends when this is dropped.
struct Active<'a> {
    capture: &'a Capture,
    stream: &'a Arc<CudaStream>,
}

impl Active<'_> {
    fn end(&self) -> candle_core::Result<Option<CudaGraph>> {
        self.capture.is_active.set(false);
        let flags =
            sys::CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // An error recorded by a drop would keep the capture from ending. It shows in the graph, or in the
        // error that led to it.
        let _ = self.stream.context().check_err();
        let graph = self.stream.end_capture(flags);
        let _ = self.stream.context().check_err();
        self.capture.kept.borrow_mut().clear();
        graph.w()
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        if self.capture.is_active() {
            let _ = self.end();
        }
    }
}
