use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;

use super::checkpoint::claim::Claim;
use super::checkpoint::format::Identity;
use super::checkpoint::store::{self, Saved, Snapshot};
use super::config::TrainConfig;
use super::executor::{Executor, Updated};
use super::history::Change;
use super::meter::{Meter, Update};
use super::objective::Objective;
use super::optim::average::WeightAverage;
use super::optim::ema::Ema;
use super::optim::scaler::GradScaler;
use super::state::{MAX_STEP, TrainState};
use super::stateful::{Fields, Stateful};
use super::update::UpdateContext;
use crate::data::dataset::Dataset;
use crate::data::loader::{self, Batch, Loader};
use crate::denoiser::{Denoiser, Trainable, lack_of_guidance};
use crate::error::{Error, Result};
use crate::model::{Architecture, Parameters};
use crate::process::diffusion::Diffusion;
use crate::sample::SamplerConfig;

/// The training loop of a network. Ho et al. 2020, algorithm 1.
///
/// ```no_run
/// use candle_core::Device;
/// use ddpm::{Diffusion, TrainConfig, Trainer, UNetConfig, data};
///
/// let images = data::mnist("data/mnist", data::Split::Train)?;
/// let (network, config) = (UNetConfig::mnist(), TrainConfig::mnist());
/// let mut trainer = Trainer::new(network, config, Diffusion::ddpm(), &Device::Cpu)?;
/// trainer.claim("out/checkpoint")?;
/// trainer.fit(&images, ())?;
/// trainer.save("out/checkpoint")?;
/// # Ok::<(), ddpm::Error>(())
/// ```
///
/// All random numbers of a step are determined by the seed, the step's number and the position of each image
/// in its batch. A run that was saved and [resumed](Self::resume) therefore continues as if it had never stopped.
pub struct Trainer<N: Architecture> {
    pub(super) network: N,
    pub(super) config: TrainConfig,
    pub(super) diffusion: Diffusion,
    pub(super) device: Device,
    pub(super) objective: Box<dyn Objective>,
    pub(super) model: N::Model,
    pub(super) state: TrainState,
    pub(super) loader: Loader,
    pub(super) executor: Executor,
    pub(super) meter: Meter,
    /// The right to save at the directory of the run, if the run claimed it.
    pub(super) claim: Option<Claim>,
}

impl<N: Architecture> fmt::Debug for Trainer<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trainer")
            .field("network", &N::KIND)
            .field("config", &self.config)
            .field("objective", &self.objective)
            .field("device", &self.device)
            .field("step", &self.steps())
            .field("executor", &self.executor)
            .finish_non_exhaustive()
    }
}

impl<N: Architecture> Trainer<N> {
    /// Reads the next `batch_size` images in the order of the run, with random flips if they are configured: (batch,
    /// channels, height, width) on the trainer's device. A second call before the next update returns the same images.
    ///
    /// Each epoch has a new order of all images. A batch may span the end of an epoch.
    ///
    /// # Errors
    /// Returns an error if the data set is empty, fails to read, if its number of images has changed since an earlier
    /// update, or if a class is out of the data set's range.
    pub fn next_batch(&mut self, dataset: &dyn Dataset) -> Result<Batch> {
        self.use_images(dataset)?;
        let at = self.state.progress.position();
        match self.loader.read(dataset, at, &AtomicBool::new(false))? {
            Some(batch) => batch.upload(&self.device),
            None => Err(Error::config("batch", "not read", "read")),
        }
    }

    pub(super) fn use_images(&mut self, dataset: &dyn Dataset) -> Result<()> {
        loader::check(dataset)?;
        if let Some(classes) = self.model.classes().filter(|&n| n as usize != dataset.classes()) {
            let expected = format!("{classes}, the number of classes of the network");
            return Err(Error::config("classes of the data set", dataset.classes(), expected));
        }
        self.state.progress.use_images(dataset.len() as u64)
    }

    /// Makes one update with a batch of [`next_batch`](Self::next_batch), or with any images `x_0`
    /// (batch, channels, height, width) in [-1, 1]. `t` is drawn uniformly, and `eps` from the standard normal
    /// distribution.
    ///
    /// # Errors
    /// Returns an error if the dtype of the batch is not f32, if its shape does not fit the network, or if its size
    /// is not a multiple of [`accumulation`](TrainConfig::accumulation). The first update returns an error if a
    /// weight has no gradient and [may not lack it](Trainable::may_lack_gradient). A loss that is not finite is
    /// detected when it is read: by [`fit`](Self::fit), by [`save`](Self::save), or here after 10,000 updates
    /// without either.
    pub fn step(&mut self, batch: impl Into<Batch>) -> Result<Update> {
        let batch = batch.into();
        self.check_batch(&batch)?;
        let (executor, mut context) = self.context();
        let results = executor.update(&mut context, &batch)?;
        self.record(batch.images.dim(0)?, results)
    }

    /// Makes one update with the given timesteps `t` (batch) and noise `eps`. `t` has an integer dtype and values
    /// less than the number of timesteps in the schedule. `eps` has the shape of the images.
    ///
    /// # Errors
    /// Returns the errors of [`step`](Self::step), and an error if the shapes or dtypes do not fit each other, or
    /// if a timestep is out of range. On a CUDA device, a timestep out of range makes the loss NaN instead.
    pub fn step_with(
        &mut self,
        batch: impl Into<Batch>,
        t: &Tensor,
        eps: &Tensor,
    ) -> Result<Update> {
        let batch = batch.into();
        batch.check()?;
        self.check_step()?;
        let (executor, mut context) = self.context();
        let results = executor.update_with(&mut context, &batch, t, eps)?;
        self.record(batch.images.dim(0)?, results)
    }

    /// # Errors
    /// Returns an error if the next update cannot be made with this batch.
    pub(super) fn check_batch(&self, batch: &Batch) -> Result<()> {
        let x_0 = &batch.images;
        if x_0.rank() == 0 {
            return Err(Error::shape("x_0", [], "(batch, channels, height, width)"));
        }
        if x_0.dtype() != DType::F32 {
            return Err(Error::config("dtype of x_0", x_0.dtype().as_str(), "f32"));
        }
        batch.check()?;
        self.check_step()
    }

    /// # Errors
    /// Returns an error if no random numbers are left for another update.
    fn check_step(&self) -> Result<()> {
        if self.steps() >= MAX_STEP {
            let expected = format!("less than {MAX_STEP} to go on");
            return Err(Error::config("step", self.steps(), expected));
        }
        Ok(())
    }

    /// Borrows the executor, and the parts of the run that an update uses.
    pub(super) fn context(&mut self) -> (&mut Executor, UpdateContext<'_, N::Model>) {
        let Self { model, config, diffusion, objective, state, executor, .. } = self;
        (executor, UpdateContext { model, config, diffusion, objective: &**objective, state })
    }

    /// Counts and records an update.
    fn record(&mut self, batch: usize, updated: Updated) -> Result<Update> {
        self.state.progress.step += 1;
        self.state.progress.images_seen += batch as u64;
        let Updated { loss, grad_norm, images } = updated;
        let update = Update { step: self.steps(), loss, grad_norm, images };
        if self.meter.is_full() {
            self.read_losses()?;
        }
        self.meter.record(update.clone());
        Ok(update)
    }

    /// Returns whether gradients that are not finite are skipped.
    fn may_skip(&self) -> Result<bool> {
        Ok(self.grad_scaler()?.is_some_and(|scaler| !scaler.is_exhausted()))
    }

    pub(super) fn read_losses(&mut self) -> Result<()> {
        self.meter.read(self.may_skip()?)?;
        self.state.optimizer.sync()
    }

    /// Claims the exclusive right to save at `dir` until this trainer is dropped. Also performs every check of
    /// [`save`](Self::save). Problems that would make a save fail are thus reported before training.
    ///
    /// The right is an advisory lock on the file `checkpoint.lock`, beside the directory `checkpoint`. It ends with the
    /// process, even if the process is killed. On a file system without locks there is no lock.
    ///
    /// # Errors
    /// - [`Error::Locked`] if another process or trainer saves there.
    /// - [`Error::Occupied`] if there is anything other than a checkpoint of this run at `dir`, or at a path to which
    ///   one of its checkpoints would be moved.
    /// - [`Error::ConfigMismatch`] if the checkpoint at `dir` belongs to another run.
    /// - Another error if that checkpoint is of a later step, or if nothing can be written there.
    pub fn claim(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        if let Some(claim) = self.rehearse(dir.as_ref())? {
            self.claim = Some(claim);
        }
        Ok(())
    }

    /// Does everything that [`save`](Self::save) does, except for writing weights. Returns the claim that it took, if
    /// this trainer did not have it.
    pub(super) fn rehearse(&self, dir: &Path) -> Result<Option<Claim>> {
        let snapshot = self.snapshot()?;
        match &self.claim {
            Some(claim) if claim.is_for(dir) => {
                store::rehearse(claim, &snapshot)?;
                Ok(None)
            }
            _ => {
                let claim = Claim::take(dir)?;
                store::rehearse(&claim, &snapshot)?;
                Ok(Some(claim))
            }
        }
    }

    /// Writes the latest checkpoint to `dir`. Previous checkpoints are kept beside `dir`, at most
    /// [`keep_checkpoints`](TrainConfig::keep_checkpoints) - 1 of them.
    ///
    /// At any moment while it writes, a complete checkpoint can be [opened](crate::Checkpoint::open) there. No other
    /// trainer can save there while this one writes. To hold this right for the whole run, and to detect reasons
    /// for a failure before training, [`claim`](Self::claim) the directory first.
    ///
    /// # Errors
    /// Returns an error if a loss since the last report or a weight is not finite, and the errors of
    /// [`claim`](Self::claim). Nothing is changed in these cases. Returns an error if a file cannot be written. An
    /// old checkpoint that cannot be removed is not an error, but a warning in [`Saved`].
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<Saved> {
        self.save_keeping(dir.as_ref(), self.config.keep_checkpoints)
    }

    /// Does what [`save`](Self::save) does, with another number of checkpoints to keep.
    pub(super) fn save_keeping(&self, dir: &Path, keep: usize) -> Result<Saved> {
        self.executor.wait_for_other_thread()?;
        self.meter.check(self.may_skip()?)?;
        let snapshot = self.snapshot()?;
        let for_now;
        let claim = match &self.claim {
            Some(claim) if claim.is_for(dir) => claim,
            _ => {
                for_now = Claim::take(dir)?;
                &for_now
            }
        };
        store::save(claim, keep, &snapshot)
    }

    /// The values from which a checkpoint is written.
    fn snapshot(&self) -> Result<Snapshot<'_>> {
        let identity = Identity::new(&self.network, &self.config, &self.diffusion, self.history())?;
        let counters = self.state.optimizer.exact_counters()?;
        let (step, sampling) = (self.steps(), self.state.progress.sampling.as_ref());
        Ok(Snapshot { identity, step, sampling, parts: self.state.parts(), counters })
    }

    /// Records the run's sampler settings in its checkpoints; see
    /// [`Checkpoint::sampling`](crate::Checkpoint::sampling). Training does not depend on them.
    ///
    /// # Errors
    /// Returns the errors of [`Sampler::new`](crate::Sampler::new) for the process of this run, and an error if there is
    /// guidance, but the network has no [number for no class](crate::Denoiser::no_class).
    pub fn set_sampling(&mut self, sampling: SamplerConfig) -> Result<()> {
        sampling.sampler(&self.diffusion)?;
        if sampling.guidance.is_some_and(|guidance| guidance.scale != 1.0)
            && self.model.no_class().is_none()
        {
            let lack = lack_of_guidance(&self.model);
            let expected = format!("none, because the network has no {lack}");
            return Err(Error::config("sampling.guidance", "set", expected));
        }
        self.state.progress.sampling = Some(sampling);
        Ok(())
    }

    /// Replaces the weights by those of a safetensors file, from a checkpoint or from PyTorch. The averages begin as
    /// copies of them.
    ///
    /// # Errors
    /// Returns an error if the trainer has already made an update, because the state of the optimiser would belong to
    /// other weights. Returns an error if the file cannot be read, or if a weight is missing, unknown or of another
    /// shape. Nothing is changed in these cases.
    pub fn set_weights(&mut self, path: impl AsRef<Path>) -> Result<()> {
        if self.steps() > 0 {
            return Err(Error::config("step", self.steps(), "0 when weights are set"));
        }
        let parameters = Parameters::load(path, DType::F32, &self.device)?;
        parameters.build(&self.network)?;
        let new = parameters.vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor()));
        self.state.weights.restore(new.collect(), &Fields::default())?;
        let ema = self.config.ema.map(|ema| Ema::new(ema, &self.state.weights.0));
        self.state.optimizer.ema = ema.transpose()?;
        let averages = WeightAverage::all(&self.config.averages, &self.state.weights.0)?;
        self.state.optimizer.averages = averages;
        Ok(())
    }

    /// The network's configuration.
    pub fn architecture(&self) -> &N {
        &self.network
    }

    /// The network being trained. The next update changes its weights; [`ema_model`](Self::ema_model) returns a
    /// separate network.
    ///
    /// # Deadlocks
    /// Do not use this network, or a clone of it, in another rayon job while an update runs in the same pool. A thread
    /// that holds the lock of a weight could be given that job, which would then wait for itself.
    pub fn model(&self) -> &N::Model {
        &self.model
    }

    /// Builds the same network with a snapshot of the averaged weights, or of the weights if the run has no average.
    /// They take no gradients.
    ///
    /// # Errors
    /// Returns the errors of building the network.
    pub fn ema_model(&self) -> Result<N::Model> {
        self.executor.wait_for_other_thread()?;
        let weights = match (self.ema(), self.averages()) {
            (Some(ema), _) => ema.averages().clone(),
            (None, [first, ..]) => first.values().clone(),
            (None, []) => self.state.weights.values(),
        };
        let weights = Parameters::frozen(Path::new("ema"), weights, DType::F32, &self.device);
        let mut model = weights.build(&self.network)?;
        model.set_precision(self.config.precision)?;
        model.set_recompute(self.config.recompute)?;
        Ok(model)
    }

    /// The weights being trained, by name. They are not copies.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.state.weights.0
    }

    /// The current state of the gradient scaler, with [`Precision::F16`](crate::Precision::F16). Waits for the GPU.
    ///
    /// # Errors
    /// Returns an error if it cannot be read from the GPU.
    pub fn grad_scaler(&self) -> Result<Option<GradScaler>> {
        self.executor.wait_for_other_thread()?;
        self.state.optimizer.exact_scaler()
    }

    /// The average of the weights. `None` if the run has no average.
    pub fn ema(&self) -> Option<&Ema> {
        self.state.optimizer.ema.as_ref()
    }

    /// The averages of the weights beside [`ema`](Self::ema), in the order of
    /// [`TrainConfig::averages`](TrainConfig::averages).
    pub fn averages(&self) -> &[WeightAverage] {
        &self.state.optimizer.averages
    }

    /// The changes of the configuration during the run, the oldest first; see
    /// [`TrainerBuilder::resume_with_changes`](crate::train::TrainerBuilder::resume_with_changes).
    pub fn history(&self) -> &[Change] {
        &self.state.progress.history
    }

    /// Adds a change that the trainer cannot detect to the [history](Self::history) of the run, such as the same number
    /// of other images.
    ///
    /// # Errors
    /// Returns an error if the trainer itself records changes of this field (`train.…` and `dataset_len`), or if the
    /// run has 1,000 changes.
    pub fn record_change(&mut self, field: &str, from: Value, to: Value) -> Result<()> {
        if field.starts_with("train.") || field == "dataset_len" {
            let expected = "a field that the trainer does not record itself";
            return Err(Error::config("field of the change", field, expected));
        }
        let change = Change { step: self.steps(), field: field.into(), from, to };
        Change::record(&mut self.state.progress.history, vec![change])
    }

    /// The number of updates so far.
    pub fn steps(&self) -> u64 {
        self.state.progress.step
    }

    /// The number of images in all updates so far.
    pub fn images_seen(&self) -> u64 {
        self.state.progress.images_seen
    }

    /// Returns whether the last update was launched as a CUDA graph, which takes almost no CPU time.
    ///
    /// After some updates of one shape, [`step`](Self::step) and [`fit`](Self::fit) capture their updates. This
    /// requires a CUDA device, no [`accumulation`](TrainConfig::accumulation), and a network that
    /// [is repeatable](Trainable::is_repeatable). If updates are not captured, the `Debug` output states the reason.
    pub fn is_captured(&self) -> bool {
        self.executor.is_captured()
    }

    /// The training configuration.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The process that the network learns to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        &self.diffusion
    }

    /// The device on which the network is trained.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
