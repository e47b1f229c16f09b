use std::path::Path;

use candle_core::{DType, Device};

use super::checkpoint::format::Identity;
use super::checkpoint::open::Checkpoint;
use super::config::TrainConfig;
use super::executor::Executor;
use super::history::Change;
use super::importance::LossHistory;
use super::meter::Meter;
use super::objective::Objective;
use super::optim::adam::AdamW;
use super::optim::average::WeightAverage;
use super::optim::ema::Ema;
use super::optim::muon::Muon;
use super::optim::optimizer::Optimizer;
use super::optim::scaler::GradScaler;
use super::state::{GRAD_SCALER, Progress, TrainState, Weights};
use super::timesteps::TimestepSampling;
use super::trainer::Trainer;
use crate::data::loader::Loader;
use crate::denoiser::Trainable;
use crate::error::Result;
use crate::model::{Architecture, Parameters};
use crate::precision::Precision;
use crate::process::diffusion::Diffusion;

/// The settings of a [`Trainer`], created by [`Trainer::builder`].
///
/// ```
/// use ddpm::process::Prediction;
/// use ddpm::train::{ObjectiveConfig, Weighting};
/// use ddpm::{Diffusion, NoiseSchedule, TrainConfig, Trainer, UNetConfig};
///
/// let network = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
/// let trainer = Trainer::builder(network)
///     .config(TrainConfig {
///         steps: 1000,
///         objective: ObjectiveConfig { weighting: Weighting::MinSnr { gamma: 5.0 }, ..Default::default() },
///         ..TrainConfig::mnist()
///     })
///     .diffusion(Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Velocity))
///     .build()?;
/// assert_eq!(trainer.steps(), 0);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug)]
#[must_use]
pub struct TrainerBuilder<N> {
    network: N,
    config: TrainConfig,
    diffusion: Diffusion,
    device: Device,
    objective: Option<Box<dyn Objective>>,
}

impl<N: Architecture> TrainerBuilder<N> {
    /// The training configuration. The default is [`TrainConfig::default`].
    pub fn config(self, config: TrainConfig) -> Self {
        Self { config, ..self }
    }

    /// The process that the network learns to reverse. The default is [`Diffusion::ddpm`].
    pub fn diffusion(self, diffusion: Diffusion) -> Self {
        Self { diffusion, ..self }
    }

    /// The device on which the network is trained. The default is the CPU.
    pub fn device(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// An objective that replaces that of the [configuration](TrainConfig::objective). Checkpoints do not record it:
    /// set the same one when you resume a run.
    pub fn objective(self, objective: impl Objective + 'static) -> Self {
        Self { objective: Some(Box::new(objective)), ..self }
    }

    /// Creates a trainer of a new network, whose weights are drawn from the seed of the configuration.
    ///
    /// # Errors
    /// Returns an error that names the field if a configuration is not valid.
    pub fn build(mut self) -> Result<Trainer<N>> {
        self.config.validate()?;
        if let Some(muon) = &mut self.config.muon {
            muon.suit::<N>();
        }
        let parameters = Parameters::new(self.config.seed, DType::F32, &self.device);
        self.with_weights(&parameters)
    }

    /// Continues the run that was [saved](Trainer::save) in `dir`. On the CPU the results are bit-identical to
    /// those of an uninterrupted run.
    ///
    /// A run continues with the network, the process and the training configuration with which it began, except for
    /// [`steps`](TrainConfig::steps), [`log_every`](TrainConfig::log_every),
    /// [`loss_quartiles`](TrainConfig::loss_quartiles), [`keep_checkpoints`](TrainConfig::keep_checkpoints) and
    /// [`recompute`](TrainConfig::recompute). To train its weights with another configuration, begin a new run with
    /// [`set_weights`](Trainer::set_weights), or use [`resume_with_changes`](Self::resume_with_changes). Another number
    /// of steps is recorded in the [`history`](Trainer::history) if it changes the learning rate of later updates.
    ///
    /// # Errors
    /// Returns an error if `dir` holds no complete checkpoint, or a checkpoint of another run.
    pub fn resume(self, dir: impl AsRef<Path>) -> Result<Trainer<N>> {
        self.config.validate()?;
        self.resume_opened(&Checkpoint::open(dir)?, false)
    }

    /// Continues a run like [`resume`](Self::resume), with changes of its training configuration.
    ///
    /// All fields of the optimiser, the learning rate's warm-up, schedule and cool-down,
    /// [`batch_size`](TrainConfig::batch_size), [`accumulation`](TrainConfig::accumulation),
    /// [`clip_norm`](TrainConfig::clip_norm), [`precision`](TrainConfig::precision),
    /// [`grad_scaler`](TrainConfig::grad_scaler), [`horizontal_flip`](TrainConfig::horizontal_flip) and
    /// [`class_dropout`](TrainConfig::class_dropout) may change. The first data set may have another number of images
    /// than before. Weights, moments and averages continue. A run that changes to [`Precision::F16`] begins with the
    /// initial scale.
    ///
    /// Each change is recorded, with its step, in the [`history`](Trainer::history) of the run, which its checkpoints
    /// hold. A run has at most 1,000 changes.
    ///
    /// # Errors
    /// Returns the errors of [`resume`](Self::resume). A difference in any other field is one of them.
    pub fn resume_with_changes(self, dir: impl AsRef<Path>) -> Result<Trainer<N>> {
        self.config.validate()?;
        self.resume_opened(&Checkpoint::open(dir)?, true)
    }

    /// Continues the run of a checkpoint that is open, so that its files are not verified again. `may_change` allows
    /// the changes of [`resume_with_changes`](Self::resume_with_changes).
    ///
    /// # Errors
    /// Returns the errors of [`resume`](Self::resume).
    pub(crate) fn resume_opened(
        mut self,
        checkpoint: &Checkpoint,
        may_change: bool,
    ) -> Result<Trainer<N>> {
        self.config.validate()?;
        // A run that began with the default list of another network keeps it.
        if let Some(muon) = &mut self.config.muon
            && checkpoint.train_config().muon.as_ref().map(|before| &before.adam)
                != Some(&muon.adam)
        {
            muon.suit::<N>();
        }
        let identity = Identity::new(&self.network, &self.config, &self.diffusion, &[])?;
        let mut changes = if may_change {
            let remedy = "this field cannot change during a run; begin a new run at its weights with \
                          Trainer::set_weights";
            checkpoint.changes(&identity, remedy)?
        } else {
            let remedy = "resume the run with the configuration of its Checkpoint, or begin a new run at its \
                          weights with Trainer::set_weights";
            checkpoint.must_match(&identity, remedy)?;
            Vec::new()
        };
        let before = checkpoint.train_config();
        let depends = before.rate_depends_on_steps() || self.config.rate_depends_on_steps();
        if before.steps != self.config.steps && depends {
            changes.push(Change {
                step: checkpoint.step(),
                field: Change::STEPS.into(),
                from: before.steps.into(),
                to: self.config.steps.into(),
            });
        }
        let had_scaler = checkpoint.train_config().precision == Precision::F16;
        let parameters = checkpoint.parameters(&self.device)?;
        let mut trainer = self.with_weights(&parameters)?;
        let mut parts = trainer.state.parts_beside_weights();
        parts.retain(|part| had_scaler || part.kind().name != GRAD_SCALER.name);
        checkpoint.restore(parts, &trainer.device)?;
        let progress = &mut trainer.state.progress;
        Change::record(&mut progress.history, changes)?;
        progress.may_change_images = may_change;
        Ok(trainer)
    }

    /// Creates a trainer of a run that begins with the weights `parameters`.
    fn with_weights(self, parameters: &Parameters) -> Result<Trainer<N>> {
        let Self { network, config, diffusion, device, objective } = self;
        diffusion.validate()?;
        let mut model = parameters.build(&network)?;
        model.set_precision(config.precision)?;
        model.set_recompute(config.recompute)?;
        let vars = parameters.vars();
        let (matrices, others) = match &config.muon {
            Some(muon) => muon.divide(&vars),
            None => Default::default(),
        };
        let muon = config.muon.clone().map(|muon| Muon::new(muon, &matrices)).transpose()?;
        let adam = AdamW::new(config.optimizer, if muon.is_some() { &others } else { &vars })?;
        let ema = config.ema.map(|ema| Ema::new(ema, &vars)).transpose()?;
        let scaler = (config.precision == Precision::F16)
            .then(|| GradScaler::new(config.grad_scaler))
            .transpose()?;
        let mut optimizer = Optimizer::new(adam, muon, ema, scaler, config.clip_norm);
        optimizer.averages = WeightAverage::all(&config.averages, &vars)?;
        let losses = (config.timesteps == TimestepSampling::Importance)
            .then(|| LossHistory::new(diffusion.schedule().steps()))
            .transpose()?;
        Ok(Trainer {
            state: TrainState {
                progress: Progress::default(),
                weights: Weights(vars),
                optimizer,
                losses,
            },
            loader: Loader::new(config.seed, config.batch_size, config.horizontal_flip),
            executor: Executor::new(&device),
            meter: Meter::default(),
            claim: None,
            objective: objective.unwrap_or_else(|| Box::new(config.objective)),
            network,
            config,
            diffusion,
            device,
            model,
        })
    }
}

impl<N: Architecture> Trainer<N> {
    /// Returns a builder of a trainer for this network, with default settings.
    pub fn builder(network: N) -> TrainerBuilder<N> {
        TrainerBuilder {
            network,
            config: TrainConfig::default(),
            diffusion: Diffusion::ddpm(),
            device: Device::Cpu,
            objective: None,
        }
    }

    /// Creates a trainer like [`TrainerBuilder::build`], with the default objective.
    ///
    /// # Errors
    /// Returns an error that names the field if a configuration is not valid.
    pub fn new(
        network: N,
        config: TrainConfig,
        diffusion: Diffusion,
        device: &Device,
    ) -> Result<Self> {
        Self::builder(network).config(config).diffusion(diffusion).device(device).build()
    }

    /// Continues a run like [`TrainerBuilder::resume`], with the default objective.
    ///
    /// # Errors
    /// Returns the errors of [`TrainerBuilder::resume`].
    pub fn resume(
        dir: impl AsRef<Path>,
        network: N,
        config: TrainConfig,
        diffusion: Diffusion,
        device: &Device,
    ) -> Result<Self> {
        Self::builder(network).config(config).diffusion(diffusion).device(device).resume(dir)
    }
}
