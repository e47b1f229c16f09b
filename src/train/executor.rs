use std::collections::BTreeMap;
use std::thread::{self, ThreadId};

use candle_core::{DType, Device, Tensor};

use super::image_losses::ImageLosses;
use super::noise::NoiseConfig;
use super::timesteps::Timesteps;
use super::update::UpdateContext;
use crate::backend::{self, Capture, Inputs, Recorded};
use crate::data::loader::Batch;
use crate::denoiser::Trainable;
use crate::error::{Error, Result};

/// Number of batches of one shape before the update is recorded. These first batches compile kernels, select
/// algorithms, and allocate the memory that the recorded update reuses.
const STEPS_BEFORE: usize = 4;

/// Maximum number of consecutive failures to record. A cause that some more steps do not remove is taken to be
/// permanent.
const ATTEMPTS: usize = 3;

/// The results of an update: the loss, the gradient norm, and the losses of the images if they are needed.
#[derive(Debug)]
pub(super) struct Updated {
    pub loss: Tensor,
    pub grad_norm: Tensor,
    pub images: Option<ImageLosses>,
}

/// Makes updates: one operation after the other, or by repeating a recorded update.
#[derive(Debug)]
pub(super) struct Executor {
    device: Device,
    /// The thread that made the last update.
    thread: ThreadId,
    /// Whether the weights were checked for missing gradients.
    gradients_checked: bool,
    recorded: Option<Box<dyn Recorded>>,
    /// The shape of the last batches, and their number.
    shape: Vec<usize>,
    steps: usize,
    /// Number of blocks of memory that had been allocated before the last update.
    allocated: Option<u64>,
    failures: usize,
    /// The last error of recording.
    error: Option<String>,
}

impl Executor {
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            thread: thread::current().id(),
            gradients_checked: false,
            recorded: None,
            shape: Vec::new(),
            steps: 0,
            allocated: None,
            failures: 0,
            error: None,
        }
    }

    /// Returns whether the last update was a repeated one.
    pub fn is_captured(&self) -> bool {
        self.recorded.is_some()
    }

    /// Performs an update with timesteps and noise of the run.
    pub fn update<D: Trainable>(
        &mut self,
        context: &mut UpdateContext<'_, D>,
        batch: &Batch,
    ) -> Result<Updated> {
        let (batch, timesteps) = (context.conditioned(batch)?, context.timesteps(batch)?);
        if let Some((loss, grad_norm)) = self.repeat(context, &batch, &timesteps.t)? {
            return Ok(Updated { loss, grad_norm, images: None });
        }
        let eps = context.eps(&batch)?;
        self.eager(context, &batch, &timesteps, &eps)
    }

    /// Makes an update with these timesteps and this noise.
    pub fn update_with<D: Trainable>(
        &mut self,
        context: &mut UpdateContext<'_, D>,
        batch: &Batch,
        t: &Tensor,
        eps: &Tensor,
    ) -> Result<Updated> {
        self.forget();
        let timesteps = Timesteps { t: t.clone(), weights: None };
        self.eager(context, &context.conditioned(batch)?, &timesteps, eps)
    }

    /// Computes the gradients of the next update without performing the update. Returns the gradients, and the loss
    /// scale by which they are multiplied.
    pub fn gradients<D: Trainable>(
        &mut self,
        context: &mut UpdateContext<'_, D>,
        batch: &Batch,
    ) -> Result<(BTreeMap<String, Tensor>, Option<Tensor>)> {
        self.forget();
        self.follow_thread()?;
        let (batch, t) = (context.conditioned(batch)?, context.timesteps(batch)?);
        let eps = context.eps(&batch)?;
        let summed = context.summed(&batch, &t, &eps, false)?;
        Ok((summed.gradients, context.state.optimizer.loss_scale()?))
    }

    /// Makes an update, one operation after the other.
    fn eager<D: Trainable>(
        &mut self,
        context: &mut UpdateContext<'_, D>,
        batch: &Batch,
        timesteps: &Timesteps,
        eps: &Tensor,
    ) -> Result<Updated> {
        self.follow_thread()?;
        let whole = batch.images.dims();
        let result = context.update(batch, timesteps, eps, !self.gradients_checked);
        let ((loss, grad_norm, gradients), images) = result.map_err(|error| match error {
            // The caller passed x_0; x_t belongs to a part of it.
            Error::Shape { what: "x_t", expected, .. } => Error::shape("x_0", whole, expected),
            error => error,
        })?;
        self.gradients_checked = true;
        context.model.recycle(gradients);
        Ok(Updated { loss, grad_norm, images })
    }

    /// Makes an update by repeating a recorded one, if there is one or if it can be recorded.
    fn repeat<D: Trainable>(
        &mut self,
        context: &mut UpdateContext<'_, D>,
        batch: &Batch,
        t: &Tensor,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let x_0 = &batch.images;
        let Some(capture) = backend::on(&self.device, DType::F32).capture(&self.device) else {
            return Ok(None);
        };
        self.follow_thread()?;
        let recorded = self.recorded.take();
        // A recorded update draws the noise of a whole batch.
        if batch.first != 0 || !capture.is_possible(x_0)? {
            self.forget();
            return Ok(None);
        }
        let allocated = Some(capture.allocated()?);
        let settled = std::mem::replace(&mut self.allocated, allocated) == allocated;
        let inputs = Inputs { x_0: x_0.clone(), t: t.clone(), classes: batch.classes.clone() };
        let recorded = match recorded.filter(|recorded| recorded.fits(&inputs)) {
            Some(recorded) => recorded,
            None => {
                let repeatable = context.config.accumulation == 1
                    && !context.config.needs_image_losses()
                    && context.state.optimizer.is_repeatable()
                    && context.config.noise == NoiseConfig::default()
                    && context.objective.is_repeatable()
                    && context.model.is_repeatable(x_0);
                // A recorded update must not need more memory than the last one.
                if !repeatable || !self.is_due(x_0.dims()) || !settled {
                    return Ok(None);
                }
                match record(context, &*capture, &inputs) {
                    Ok(recorded) => {
                        (self.failures, self.error) = (0, None);
                        recorded
                    }
                    Err(error) => {
                        self.failures += 1;
                        self.error = Some(error.to_string());
                        return Ok(None);
                    }
                }
            }
        };
        prepare(context, &*capture)?;
        let results = recorded.repeat(&inputs)?;
        context.state.optimizer.count_repeated();
        self.recorded = Some(recorded);
        Ok(Some(results))
    }

    /// Drops the recorded update before an update that is not recorded. The latter may move the gradients, and may
    /// overwrite the tables that a recorded update reads.
    fn forget(&mut self) {
        (self.recorded, self.steps) = (None, 0);
    }

    /// Returns whether an update of this batch shape should be recorded now.
    fn is_due(&mut self, shape: &[usize]) -> bool {
        if self.shape != shape {
            (self.shape, self.steps) = (shape.to_vec(), 0);
        }
        self.steps += 1;
        self.failures < ATTEMPTS && self.steps >= STEPS_BEFORE * (1 + 10 * self.failures)
    }

    /// Waits for the last update if another thread made it, because each thread has its own queue of work.
    pub fn wait_for_other_thread(&self) -> Result<()> {
        if self.thread == thread::current().id() {
            return Ok(());
        }
        backend::on(&self.device, DType::F32).synchronize(&self.device)
    }

    fn follow_thread(&mut self) -> Result<()> {
        self.wait_for_other_thread()?;
        self.thread = thread::current().id();
        Ok(())
    }
}

/// Records the update of a batch, without making it.
fn record<D: Trainable>(
    context: &mut UpdateContext<'_, D>,
    capture: &dyn Capture,
    inputs: &Inputs,
) -> Result<Box<dyn Recorded>> {
    prepare(context, capture)?;
    let before = context.state.optimizer.counters();
    let recorded = capture.record(inputs, &mut |Inputs { x_0, t, classes }| {
        let batch = Batch { images: x_0.clone(), classes: classes.clone(), first: 0 };
        let eps = context.eps(&batch)?;
        let timesteps = Timesteps { t: t.clone(), weights: None };
        context.update(&batch, &timesteps, &eps, false).map(|(computed, _)| computed)
    });
    context.state.optimizer.assume(&before);
    recorded
}

/// Uploads the values that a recorded update reads when it is repeated: factors of the optimiser, and the step.
fn prepare<D: Trainable>(context: &mut UpdateContext<'_, D>, capture: &dyn Capture) -> Result<()> {
    let learning_rate = context.learning_rate();
    context.state.optimizer.stage(learning_rate)?;
    capture.set_step(context.state.progress.step)
}
