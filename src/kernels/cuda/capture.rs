//! Capture of launches: they become a CUDA graph instead of running.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use candle_core::Tensor;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, sys};
use candle_core::cuda_backend::{CudaDevice, WrapErr};

use crate::error::Result;

/// The CUDA handle of the per-thread default stream.
const PER_THREAD: sys::CUstream = std::ptr::without_provenance_mut(2);

/// The capture state of a thread.
#[derive(Default)]
pub(super) struct Capture {
    is_active: Cell<bool>,
    /// Tensors that must stay allocated as long as the graph can be launched.
    kept: RefCell<Vec<Tensor>>,
    /// Objects that captured launches read. They must exist as long as the graph.
    held: RefCell<Vec<Rc<dyn Any>>>,
}

impl Capture {
    pub fn is_active(&self) -> bool {
        self.is_active.get()
    }

    /// Keeps a tensor alive while launches are captured: memory allocated before the capture must not be
    /// freed during it.
    pub fn keep(&self, tensor: &Tensor) {
        if self.is_active() {
            self.kept.borrow_mut().push(tensor.clone());
        }
    }

    /// Lets the graph hold an object that captured launches read.
    pub fn hold(&self, read: Rc<dyn Any>) {
        if self.is_active() {
            self.held.borrow_mut().push(read);
        }
    }

    /// Returns the objects that the last captured graph must hold.
    pub fn held(&self) -> Vec<Rc<dyn Any>> {
        self.held.take()
    }

    /// Captures the work that `work` launches on the stream of the device as a graph.
    ///
    /// # Errors
    /// Returns the error of `work`, or an error if an operation of `work` cannot be captured.
    pub fn of<R>(
        &self,
        device: &CudaDevice,
        work: impl FnOnce() -> Result<R>,
    ) -> Result<(CudaGraph, R)> {
        let stream = device.cuda_stream();
        // The launches of other threads must not be captured, and slices must not wait for events outside
        // the capture.
        let manages_events = stream.context().is_managing_stream_synchronization();
        if stream.cu_stream() != PER_THREAD || manages_events {
            let reason =
                "only the stream of `Device::new_cuda` is captured, the only one of its device";
            return Err(candle_core::Error::Msg(reason.into()).into());
        }
        // Makes candle return an error for uploads and reads during the capture.
        let _no_copies = device.enable_cuda_graph_htod_cache();
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        stream.begin_capture(mode).w()?;
        self.held.borrow_mut().clear();
        self.is_active.set(true);
        // The capture must end even after an error. The error of `work` is reported first.
        let active = Active { capture: self, stream: &stream };
        let result = work();
        let graph = active.end();
        let captured = result.and_then(|result| match graph? {
            Some(graph) => Ok((graph, result)),
            None => Err(candle_core::Error::Msg("nothing was captured".into()).into()),
        });
        if captured.is_err() {
            self.held.borrow_mut().clear();
        }
        captured
    }
}

/// A capture in progress, which ends when this value is dropped.
struct Active<'a> {
    capture: &'a Capture,
    stream: &'a Arc<CudaStream>,
}

impl Active<'_> {
    fn end(&self) -> candle_core::Result<Option<CudaGraph>> {
        self.capture.is_active.set(false);
        let flags =
            sys::CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // An error recorded during a drop would prevent the end of the capture. It shows up in the graph,
        // or in the error that led to it.
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
