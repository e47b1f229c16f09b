use std::cell::RefCell;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::checkpoint::store::Saved;
use super::config::TrainConfig;
use super::published::{Published, Value};
use super::state::Progress;
use crate::data::loader::Batch;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::Diffusion;
use crate::sample::SamplerConfig;

/// An observer's view of a training run: its state, its network, and methods to save it.
///
/// A `Run` hides the network type of the [`Trainer`](crate::Trainer) that it borrows. An
/// [`Observer`](crate::train::Observer) therefore needs no type parameter.
pub struct Run<'a> {
    pub(super) progress: &'a Progress,
    pub(super) config: &'a TrainConfig,
    pub(super) diffusion: &'a Diffusion,
    pub(super) device: &'a Device,
    pub(super) model: &'a dyn Denoiser,
    pub(super) trainer: &'a dyn View,
    pub(super) scene: &'a Scene,
}

/// The surroundings of a run during one [`fit`](crate::Trainer::fit).
pub(super) struct Scene {
    pub image_shape: (usize, usize, usize),
    pub frontends: Vec<Arc<dyn Frontend>>,
    /// The values that the observers have not received yet.
    pub published: RefCell<Vec<Published>>,
}

impl Scene {
    pub fn publish(&self, step: u64, name: String, value: Value) {
        self.published.borrow_mut().push(Published { step, name, value });
    }
}

/// The methods of a trainer that a [`Run`] calls, without the type of its network.
pub(super) trait View {
    fn averaged_model(&self) -> Result<Box<dyn Denoiser + '_>>;
    fn loss(&self, model: &dyn Denoiser, batch: &Batch, t: &Tensor, eps: &Tensor) -> Result<f64>;
    fn save(&self, dir: &Path, keep: usize) -> Result<Saved>;
    fn check_save(&self, dir: &Path) -> Result<()>;
}

impl<'a> Run<'a> {
    /// The number of updates so far.
    pub fn step(&self) -> u64 {
        self.progress.step
    }

    /// Returns whether the run has made all of its [`steps`](TrainConfig::steps).
    pub fn is_complete(&self) -> bool {
        self.step() >= self.config().steps
    }

    /// The number of images in all updates so far.
    pub fn images_seen(&self) -> u64 {
        self.progress.images_seen
    }

    /// The number of channels, the height and the width of the training images.
    pub fn image_shape(&self) -> (usize, usize, usize) {
        self.scene.image_shape
    }

    /// The training configuration.
    pub fn config(&self) -> &'a TrainConfig {
        self.config
    }

    /// The process that the network learns to reverse.
    pub fn diffusion(&self) -> &'a Diffusion {
        self.diffusion
    }

    /// The device on which the network is trained.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Returns the sampler settings recorded with [`Trainer::set_sampling`](crate::Trainer::set_sampling), or
    /// [`SamplerConfig::usual`] if there are none.
    pub fn sampling(&self) -> SamplerConfig {
        self.progress.sampling.unwrap_or_else(|| SamplerConfig::usual(self.diffusion()))
    }

    /// The network being trained; see [`Trainer::model`](crate::Trainer::model).
    pub fn model(&self) -> &'a dyn Denoiser {
        self.model
    }

    /// Builds the same network with the averaged weights, or with the weights if the run has no average.
    ///
    /// # Errors
    /// Returns the errors of building the network.
    pub fn ema(&self) -> Result<Box<dyn Denoiser + 'a>> {
        self.trainer.averaged_model()
    }

    /// Computes the loss of `model` by the run's objective, for a batch with the noise `eps` at the timesteps `t`
    /// (batch). The weights, the random numbers and the reports of the run do not change. A network [with
    /// classes](Denoiser::classes) receives those of the batch, or no class if the batch has none. Another network
    /// receives no condition.
    ///
    /// # Errors
    /// Returns an error if the shapes or dtypes do not fit each other, and the errors of the network and the objective.
    pub fn loss(
        &self,
        model: &dyn Denoiser,
        batch: &Batch,
        t: &Tensor,
        eps: &Tensor,
    ) -> Result<f64> {
        self.trainer.loss(model, batch, t, eps)
    }

    /// Writes a checkpoint to `dir`, as [`Trainer::save`](crate::Trainer::save) does.
    ///
    /// # Errors
    /// Returns the errors of [`Trainer::save`](crate::Trainer::save).
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<Saved> {
        self.trainer.save(dir.as_ref(), self.config.keep_checkpoints)
    }

    /// Does what [`save`](Self::save) does, but keeps no older checkpoints beside `dir`.
    pub(crate) fn save_one(&self, dir: impl AsRef<Path>) -> Result<Saved> {
        self.trainer.save(dir.as_ref(), 1)
    }

    /// Does everything that [`save`](Self::save) does, except for writing weights.
    ///
    /// # Errors
    /// Returns the errors of [`Trainer::claim`](crate::Trainer::claim).
    pub fn check_save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.trainer.check_save(dir.as_ref())
    }

    /// Reports to the run's [`Frontend`]s the present work of an observer, such as `saving`. An empty text ends the
    /// report.
    pub fn working(&self, on: &str) {
        self.scene.frontends.iter().for_each(|frontend| frontend.working(on));
    }

    /// Publishes a value of the current step under a name, such as `held_out/loss`, for all observers of the run.
    ///
    /// Every observer, including the one that publishes, receives it by
    /// [`on_published`](crate::train::Observer::on_published), after all observers have been called for the step. Their
    /// order does not matter.
    ///
    /// The name of a number contains a `/`, so that it differs from the fields of [`Metrics`](crate::train::Metrics). Of
    /// another name, [`fit`](crate::Trainer::fit) returns an error. Publish a name once per step: a file that holds one
    /// value per name and step keeps the last.
    pub fn publish(&self, name: impl Into<String>, value: impl Into<Value>) {
        self.scene.publish(self.step(), name.into(), value.into());
    }

    /// Passes a warning to the run's [`Frontend`]s. Without a front end, the warning is lost.
    pub fn warn(&self, warning: &str) {
        self.scene.frontends.iter().for_each(|frontend| frontend.warn(warning));
    }

    /// Returns whether a [`Frontend`] asks the run to stop. Training ends after the present update. A long-running
    /// observer, such as one that draws samples, should then return early.
    pub fn is_stopping(&self) -> bool {
        self.scene.frontends.iter().any(|frontend| frontend.wants_stop())
    }
}

impl fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run")
            .field("step", &self.step())
            .field("config", self.config())
            .field("device", self.device())
            .field("image_shape", &self.image_shape())
            .finish_non_exhaustive()
    }
}

/// The user interface of a run: it shows the reports of observers, and knows whether the user asked the run to stop.
///
/// An [`Observer`](crate::train::Observer) provides front ends. The other observers of the run reach them through
/// [`Run`], so observers need not know each other. The observer that shows the progress, for example, also shows the
/// warnings of the one that saves.
pub trait Frontend: Send + Sync {
    /// Shows the present work of an observer between updates. An empty text ends the display.
    fn working(&self, on: &str) {
        let _ = on;
    }

    /// Shows a warning of one line.
    fn warn(&self, warning: &str) {
        let _ = warning;
    }

    /// Returns whether the run should stop after the present update.
    fn wants_stop(&self) -> bool {
        false
    }

    /// Called when [`Trainer::fit`](crate::Trainer::fit) ends, after all observers.
    fn finish(&self) {}
}

/// The way in which [`Trainer::fit`](crate::Trainer::fit) ended.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Outcome<'a> {
    /// The run made all of its updates.
    Complete,
    /// An observer or a [`Frontend`] stopped the run before its last update.
    Stopped,
    /// An update or an observer returned this error.
    Failed(&'a Error),
}
