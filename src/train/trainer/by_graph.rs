use candle_core::Tensor;

use super::{Trainer, Update};
use crate::denoiser::Trainable;
use crate::kernels::cuda::{self, Gpu, StepGraph};
use crate::random::Purpose;
use crate::{Network, Result};

/// How many batches of a shape come before the update is captured: the first ones compile kernels, choose
/// algorithms, and leave the memory that it takes.
const STEPS_BEFORE: usize = 4;

/// How often capturing may fail in a row; some more steps may leave what was missing, or nothing will.
const ATTEMPTS: usize = 3;

/// The update as a CUDA graph, once it was captured.
#[derive(Debug, Default)]
pub(super) struct Capture {
    graph: Option<StepGraph>,
    /// Of the last batches, and how many of them there were.
    shape: Vec<usize>,
    steps: usize,
    failures: usize,
    /// Why it failed the last time.
    error: Option<String>,
}

impl Capture {
    pub fn is_there(&self) -> bool {
        self.graph.is_some()
    }

    /// Before an update that is not captured: its gradients may lie elsewhere, and the tables that a graph
    /// reads be written anew.
    pub fn forget(&mut self) {
        (self.graph, self.steps) = (None, 0);
    }

    /// Whether to capture now, for a batch of this shape.
    fn is_due(&mut self, shape: &[usize]) -> bool {
        if self.shape != shape {
            (self.shape, self.steps) = (shape.to_vec(), 0);
        }
        self.steps += 1;
        self.failures < ATTEMPTS && self.steps >= STEPS_BEFORE * (1 + 10 * self.failures)
    }
}

impl<N: Network> Trainer<N> {
    /// The update by a graph, where it was captured or can be.
    pub(super) fn step_by_graph(&mut self, x_0: &Tensor, t: &Tensor) -> Result<Option<Update>> {
        if !self.device.is_cuda() {
            return Ok(None);
        }
        self.follow_thread()?;
        let graph = self.capture.graph.take();
        // From within a pass, by the function that gives it its gradient, say, it could write over maps
        // that are in use.
        if !cuda::are_plain(&[x_0]) || Gpu::of(&self.device)?.in_a_pass() {
            self.capture.forget();
            return Ok(None);
        }
        let learning_rate = self.config.learning_rate(self.step);
        let Some(graph) = graph.filter(|graph| graph.fits(x_0)) else {
            let repeatable = self.config.accumulation == 1 && self.model.is_repeatable(x_0);
            if !repeatable || !self.capture.is_due(x_0.dims()) {
                return Ok(None);
            }
            match self.captured(x_0, t, learning_rate) {
                Ok(graph) => {
                    (self.capture.failures, self.capture.error) = (0, None);
                    return self.launched(graph, x_0, t, learning_rate).map(Some);
                }
                Err(error) => {
                    self.capture.failures += 1;
                    self.capture.error = Some(error.to_string());
                    return Ok(None);
                }
            }
        };
        self.launched(graph, x_0, t, learning_rate).map(Some)
    }

    fn captured(&mut self, x_0: &Tensor, t: &Tensor, learning_rate: f64) -> Result<StepGraph> {
        self.prepare(learning_rate)?;
        let steps = self.optimizer.steps();
        let captured = StepGraph::capture(x_0, t, |x_0, t| {
            let (step, dims) = (self.step, x_0.dims());
            let eps = self.noise().normal(Purpose::Training, step, 0, dims, &self.device)?;
            self.compute(x_0, t, &eps)
        });
        // Nothing of it was run.
        if self.optimizer.steps() > steps {
            self.optimizer.count(false, self.ema.as_mut(), self.scaler.as_ref());
        }
        captured
    }

    fn launched(
        &mut self,
        graph: StepGraph,
        x_0: &Tensor,
        t: &Tensor,
        learning_rate: f64,
    ) -> Result<Update> {
        self.prepare(learning_rate)?;
        let (loss, grad_norm) = graph.launch(x_0, t)?;
        self.optimizer.count(true, self.ema.as_mut(), self.scaler.as_ref());
        self.capture.graph = Some(graph);
        self.note(x_0.dim(0)?, loss, grad_norm)
    }

    /// What a graph reads of the next update.
    fn prepare(&mut self, learning_rate: f64) -> Result<()> {
        self.optimizer.prepare(learning_rate, self.ema.as_ref(), self.scaler.as_ref())?;
        Gpu::of(&self.device)?.step(self.step)?;
        Ok(())
    }
}
