//! A training step as a CUDA graph.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaGraph;

use super::device::Gpu;
use super::memory::Held;
use crate::error::{Error, Result};

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
    _memory: Held,
}

thread_local! {
    static GRAPHS: RefCell<HashMap<u64, Captured>> = RefCell::default();
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
    /// Returns an error if it does, if memory or a kernel that it uses is not there already, or if `step` returns
    /// one.
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
        let _memory = gpu.pool.hold();
        let (graph, gradients) = gpu.capture.of(&gpu.device, work)?;
        let (id, shape) = (COUNT.fetch_add(1, Ordering::Relaxed), x_0.dims().to_vec());
        let captured = Captured { graph, gpu, x_0, t, loss, norm, _gradients: gradients, _memory };
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
    /// Returns an error if the batch does not [fit](Self::fits), or if a [pass](Gpu::in_a_pass) is under way.
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
            .map_err(Error::from)
    }
}
