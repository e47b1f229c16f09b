use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;

use super::checkpoint::store::Saved;
use super::config::TrainConfig;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::Diffusion;
use crate::sample::SamplerConfig;

/// A training run as its observers see it: its state, its network, and the means to save it.
///
/// A `Run` borrows the [`Trainer`](crate::Trainer), whatever its network is, so an [`Observer`](crate::train::Observer) has no
/// type parameter.
pub struct Run<'a> {
    trainer: &'a dyn View,
    scene: &'a Scene,
}

/// The parts of a run that stay the same during one [`fit`](crate::Trainer::fit).
pub(super) struct Scene {
    pub image_shape: (usize, usize, usize),
    pub frontends: Vec<Arc<dyn Frontend>>,
}

/// The operations of a trainer that a [`Run`] offers, without the type of its network.
pub(super) trait View {
    fn step(&self) -> u64;
    fn images_seen(&self) -> u64;
    fn config(&self) -> &TrainConfig;
    fn diffusion(&self) -> &Diffusion;
    fn device(&self) -> &Device;
    fn sampling(&self) -> Option<&SamplerConfig>;
    fn model(&self) -> &dyn Denoiser;
    fn averaged_model(&self) -> Result<Box<dyn Denoiser + '_>>;
    fn save(&self, dir: &Path) -> Result<Saved>;
    fn check_save(&self, dir: &Path) -> Result<()>;
}

impl<'a> Run<'a> {
    pub(super) fn new(trainer: &'a dyn View, scene: &'a Scene) -> Self {
        Self { trainer, scene }
    }

    /// The number of updates so far.
    pub fn step(&self) -> u64 {
        self.trainer.step()
    }

    /// Returns whether the run has made all of its [`steps`](TrainConfig::steps).
    pub fn is_complete(&self) -> bool {
        self.step() >= self.config().steps
    }

    /// The number of images in all updates so far.
    pub fn images_seen(&self) -> u64 {
        self.trainer.images_seen()
    }

    /// The number of channels, the height and the width of the training images.
    pub fn image_shape(&self) -> (usize, usize, usize) {
        self.scene.image_shape
    }

    /// The training configuration.
    pub fn config(&self) -> &'a TrainConfig {
        self.trainer.config()
    }

    /// The process that the network learns to reverse.
    pub fn diffusion(&self) -> &'a Diffusion {
        self.trainer.diffusion()
    }

    /// The device that computes.
    pub fn device(&self) -> &'a Device {
        self.trainer.device()
    }

    /// The sampler settings that [`Trainer::set_sampling`](crate::Trainer::set_sampling) recorded, or else
    /// [`SamplerConfig::usual`].
    pub fn sampling(&self) -> SamplerConfig {
        self.trainer.sampling().copied().unwrap_or_else(|| SamplerConfig::usual(self.diffusion()))
    }

    /// The network being trained; see [`Trainer::model`](crate::Trainer::model).
    pub fn model(&self) -> &'a dyn Denoiser {
        self.trainer.model()
    }

    /// Builds the same network with the averaged weights, or with the weights if the run has no average.
    ///
    /// # Errors
    /// Returns the errors of building the network.
    pub fn ema(&self) -> Result<Box<dyn Denoiser + 'a>> {
        self.trainer.averaged_model()
    }

    /// Writes a checkpoint to `dir`. See [`Trainer::save`](crate::Trainer::save), which also states the errors.
    ///
    /// # Errors
    /// Returns the errors of [`Trainer::save`](crate::Trainer::save).
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<Saved> {
        self.trainer.save(dir.as_ref())
    }

    /// Does everything that [`save`](Self::save) does, except for writing weights.
    ///
    /// # Errors
    /// Returns the errors of [`Trainer::claim`](crate::Trainer::claim).
    pub fn check_save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.trainer.check_save(dir.as_ref())
    }

    /// Tells the run's [`Frontend`]s what an observer does at the moment, such as `saving`. An empty text ends it.
    pub fn working(&self, on: &str) {
        self.scene.frontends.iter().for_each(|frontend| frontend.working(on));
    }

    /// Gives the run's [`Frontend`]s a warning. Without a front end it is lost.
    pub fn warn(&self, warning: &str) {
        self.scene.frontends.iter().for_each(|frontend| frontend.warn(warning));
    }

    /// Returns whether a [`Frontend`] wants the run to stop. Training ends after the present update. An observer that
    /// works for long, for example to draw samples, should return soon.
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

/// The user's side of a run: it shows what observers report, and knows whether the user wants the run to stop.
///
/// An [`Observer`](crate::train::Observer) names its front ends, and the other observers of the run reach them through
/// [`Run`]. Observers thus need not know each other: whichever shows the progress also shows the warnings of the one
/// that saves.
pub trait Frontend: Send + Sync {
    /// Shows what an observer does between updates; an empty text ends it.
    fn working(&self, on: &str) {
        let _ = on;
    }

    /// Shows a warning, which is one line.
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
