//! A training step as a CUDA graph.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;

use super::device::Gpu;
use super::replay::Replay;
use crate::error::{Error, Result};

/// A training step that was captured as a CUDA graph. It can be launched for other batches of the same shape: one
/// launch replaces about a thousand.
///
/// The graph belongs to the thread that captured it, and to that thread's stream. It cannot be launched from
/// other threads.
#[derive(Debug)]
pub(crate) struct StepGraph {
    id: u64,
    /// The shapes of the inputs.
    shapes: Vec<Vec<usize>>,
}

thread_local! {
    static GRAPHS: RefCell<HashMap<u64, Replay>> = RefCell::default();
}

/// The results of a step: the loss, the norm of the gradient, and the gradients.
pub(crate) type Computed = (Tensor, Tensor, Vec<Tensor>);

impl Drop for StepGraph {
    fn drop(&mut self) {
        // The graph of another thread is dropped when that thread ends.
        let _ = GRAPHS.try_with(|graphs| graphs.borrow_mut().remove(&self.id));
    }
}

impl StepGraph {
    /// Captures the work that `step` launches, without running it. `step` reads `inputs`, whose values each launch
    /// replaces. It must not wait for the device or upload data.
    ///
    /// # Errors
    /// Returns the error of `step`. Returns an error if `step` waits or uploads, or if it uses memory or a kernel
    /// that is not yet available.
    pub fn capture(inputs: Vec<Tensor>, step: impl FnOnce() -> Result<Computed>) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let Some(first) = inputs.first() else {
            return Err(Error::config("inputs of a captured step", 0, "at least 1"));
        };
        let (gpu, device) = (Gpu::of(first.device())?, first.device().clone());
        let scalar = || Tensor::from_vec(vec![0f32], (), &device);
        let (loss, norm) = (scalar()?, scalar()?);
        let (id, shapes) = (COUNT.fetch_add(1, Ordering::Relaxed), shapes(&inputs));
        // The trainer owns the weights and the optimiser's state, and drops the graph before them.
        let mut step = Some(step);
        let mut work = |_: &[Tensor]| {
            let step = step.take().ok_or_else(|| Error::config("captures of a step", 2, "1"))?;
            let (loss, norm, gradients) = step()?;
            Ok((vec![loss, norm], gradients))
        };
        let captured = Replay::capture(gpu, inputs, vec![loss, norm], &mut work)?;
        GRAPHS.with_borrow_mut(|graphs| graphs.insert(id, captured));
        Ok(Self { id, shapes })
    }

    /// Returns whether this thread can launch the graph for these inputs.
    pub fn fits(&self, inputs: &[Tensor]) -> bool {
        shapes(inputs) == self.shapes && GRAPHS.with_borrow(|graphs| graphs.contains_key(&self.id))
    }

    /// Launches the step for these inputs. Returns the loss and the norm of the gradient.
    ///
    /// # Errors
    /// Returns an error if the inputs do not [fit](Self::fits), or if a [pass](Gpu::in_a_pass) is in progress.
    pub fn launch(&self, inputs: &[Tensor]) -> Result<(Tensor, Tensor)> {
        GRAPHS
            .with_borrow(|graphs| {
                let fits = shapes(inputs) == self.shapes;
                let Some(own) = graphs.get(&self.id).filter(|_| fits) else {
                    candle_core::bail!("a captured step was given another batch, or another thread")
                };
                match <[Tensor; 2]>::try_from(own.launch(inputs)?) {
                    Ok([loss, norm]) => Ok((loss, norm)),
                    Err(_) => candle_core::bail!("a captured step has two results"),
                }
            })
            .map_err(Error::from)
    }
}

fn shapes(tensors: &[Tensor]) -> Vec<Vec<usize>> {
    tensors.iter().map(|tensor| tensor.dims().to_vec()).collect()
}
