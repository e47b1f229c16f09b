//! Checkpoints, the form of a training run on disk: opened here, written by [`store`].

mod files;
mod lock;
mod state;
mod store;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};

use self::files::{Checksum, read_tensors};
use self::state::{Files, STATE, State, mismatch, read_state};
use super::{AdamConfig, AdamW, Ema, EmaConfig, GradScaler, GradScalerConfig, TrainConfig};
use crate::error::in_short;
use crate::model::tensor_file::missing;
use crate::{Diffusion, Error, Network, Parameters, Result, Sampler, SamplerConfig};

pub(super) use self::state::MAX_STEP;
pub use self::store::Saved;
pub(super) use self::store::{Claim, Snapshot, save};

const MODEL: &str = "model.safetensors";
const EMA: &str = "ema.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// A training run on disk: a directory of safetensors and JSON files, enough to sample or to resume.
///
/// [`Trainer::save`](crate::Trainer::save) writes it. All tensors are f32, and have the names of the weights.
///
/// | file | content |
/// | --- | --- |
/// | `checkpoint.json` | format version, step, configurations, checksums of the other files |
/// | `model.safetensors` | the weights |
/// | `ema.safetensors` | the averaged weights, unless the run has none |
/// | `optimizer.safetensors` | the state of the optimiser |
///
/// ```no_run
/// use candle_core::Device;
/// use ddpm::{Checkpoint, TrainConfig, Trainer, UNetConfig};
///
/// let (dir, device) = ("out/mnist/checkpoint", Device::Cpu);
/// let checkpoint = Checkpoint::open(dir)?;
///
/// // Images from the averaged weights, drawn with the sampler settings of the run.
/// let unet = checkpoint.ema::<UNetConfig>(&device)?;
/// let images = checkpoint.sampler()?.sample(&unet, (16, 1, 28, 28), 0, &device)?;
///
/// // Or more training, up to 30,000 steps in total.
/// let network: UNetConfig = checkpoint.network()?;
/// let diffusion = checkpoint.diffusion().clone();
/// let config = TrainConfig { steps: 30_000, ..checkpoint.train_config().clone() };
/// let trainer = Trainer::resume(dir, network, config, diffusion, &device)?;
/// # Ok::<(), ddpm::Error>(())
/// ```
pub struct Checkpoint {
    dir: PathBuf,
    state: State,
}

impl Checkpoint {
    /// Opens the checkpoint at `dir`. If a save was interrupted at the one moment when there is none, opens the
    /// new checkpoint beside it, or else the newest of the previous ones.
    ///
    /// Each file is read once and compared with its checksum. A missing file is an error only when its tensors
    /// are read. Checkpoints of format 1 have no checksums.
    ///
    /// Weights can be read by any build and on any device, however they were trained.
    ///
    /// # Errors
    /// Returns an error if there is no complete checkpoint, if the checkpoint is damaged, or if its format is
    /// newer than this version reads.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        /// More than the number of saves that can take place while a checkpoint is read.
        const ATTEMPTS: usize = 8;

        let dir = dir.as_ref();
        if dir.as_os_str().is_empty() {
            // A file name joined to an empty path would be looked up in the current directory.
            return Err(Error::config("checkpoint directory", r#""""#, "a path"));
        }
        let mut attempts = 1..ATTEMPTS;
        loop {
            // A save can move every checkpoint away from where it is looked for next. It does so once.
            let found = Self::find(dir).or_else(|_| Self::find(dir))?;
            match found.verify() {
                Ok(()) => return Ok(found),
                // A save took place in the meantime, and some of the files read belong to the next checkpoint.
                Err(_) if found.was_replaced() && attempts.next().is_some() => {}
                Err(error) => return Err(found.with_older(dir, error)),
            }
        }
    }

    /// Like [`open`](Self::open), but reads only `checkpoint.json`.
    fn find(dir: &Path) -> Result<Self> {
        let missing = match Self::newest(dir) {
            Err(error @ Error::NoCheckpoint { .. }) => error,
            found => return found,
        };
        store::archived(dir).ok().and_then(|mut older| older.pop()).ok_or(missing)
    }

    /// Opens the checkpoint at `dir`, or the new one that `save` was about to move there.
    fn newest(dir: &Path) -> Result<Self> {
        let missing = match read_state(dir) {
            Ok(state) => return Ok(Self { dir: dir.to_owned(), state }),
            Err(error @ Error::NoCheckpoint { .. }) => error,
            Err(error) => return Err(error),
        };
        let Ok(new) = store::new_beside(dir) else { return Err(missing) };
        match read_state(&new) {
            // The state is written last: if it can be read, the other files are complete.
            Ok(state) => Ok(Self { dir: new, state }),
            Err(Error::NoCheckpoint { .. } | Error::Damaged { .. }) => Err(missing),
            Err(error) => Err(error),
        }
    }

    /// Compares all existing files with their checksums.
    ///
    /// # Errors
    /// Returns an error if an existing file is not as it was written.
    fn verify(&self) -> Result<()> {
        for file in [MODEL, EMA, OPTIMIZER] {
            let path = self.dir.join(file);
            if let Some(written) = self.written(file)
                && path.exists()
            {
                written.verify(&path)?;
            }
        }
        Ok(())
    }

    /// The checksum of a file, if there is one.
    fn written(&self, file: &str) -> Option<&Checksum> {
        let Files { model, ema, optimizer } = self.state.files.as_ref()?;
        match file {
            MODEL => Some(model),
            EMA => ema.as_ref(),
            _ => Some(optimizer),
        }
    }

    /// Returns whether another checkpoint has replaced this one, for example because its run is still saving.
    fn was_replaced(&self) -> bool {
        self.state.files.is_some()
            && read_state(&self.dir).map_or(true, |now| now.files != self.state.files)
    }

    /// Adds the newest undamaged checkpoint among the previous ones to the error of a damaged one.
    fn with_older(&self, dir: &Path, error: Error) -> Error {
        let Error::Damaged { path, reason } = error else { return error };
        let older = store::archived(dir).unwrap_or_default();
        let whole = older.iter().rev().find(|older| older.verify().is_ok());
        let reason = match whole {
            Some(whole) => format!("{reason}; {} is whole", whole.dir.display()),
            None => reason,
        };
        Error::Damaged { path, reason }
    }

    /// The tensors of a file.
    fn read(&self, file: &str, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let path = self.dir.join(file);
        read_tensors(&path, self.written(file), device).map_err(|error| match error {
            Error::Damaged { .. } | Error::Io { .. } if self.was_replaced() => {
                Error::Replaced { path: self.dir.clone() }
            }
            error => error,
        })
    }

    /// The directory: the one passed to [`open`](Self::open), or the one found beside it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The number of updates of the weights so far.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// The process that the network learned to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        &self.state.diffusion
    }

    /// The training configuration.
    pub fn train_config(&self) -> &TrainConfig {
        &self.state.train
    }

    /// The sampler settings of the run, if it [recorded](crate::Trainer::set_sampling) them.
    pub fn sampling(&self) -> Option<&SamplerConfig> {
        self.state.sampling.as_ref()
    }

    /// A sampler with the settings of the run. If it recorded none, this is deterministic DDIM in 50 sampling
    /// steps (fewer if the schedule has fewer timesteps), with clipping.
    ///
    /// # Errors
    /// Returns the errors of [`Sampler::new`].
    pub fn sampler(&self) -> Result<Sampler> {
        let usual = SamplerConfig::usual(self.diffusion());
        self.sampling().unwrap_or(&usual).sampler(self.diffusion())
    }

    /// The network's configuration.
    ///
    /// # Errors
    /// Returns an error if the checkpoint holds another kind of network, or a configuration that `N` does not
    /// accept.
    pub fn network<N: Network>(&self) -> Result<N> {
        let network = &self.state.network;
        if network.kind != N::KIND {
            let remedy = "ask for a network of that kind";
            return Err(mismatch("network.kind", &network.kind, N::KIND, remedy));
        }
        serde_json::from_str(network.config.get()).map_err(|e| self.damaged_config(e))
    }

    fn damaged_config(&self, error: impl std::fmt::Display) -> Error {
        let reason = format!("network.config: {}", in_short(&error.to_string()));
        Error::damaged(self.dir.join(STATE), reason)
    }

    /// The network with its weights, which take no gradients.
    ///
    /// # Errors
    /// Returns an error if the file is damaged, or does not hold exactly the weights of the network.
    pub fn model<N: Network>(&self, device: &Device) -> Result<N::Model> {
        self.frozen::<N>(MODEL, device)
    }

    /// The network with its averaged weights, which give better samples. If the run has no average, this is the
    /// same as [`model`](Self::model).
    ///
    /// # Errors
    /// Returns an error if the file is damaged, or does not hold exactly the weights of the network.
    pub fn ema<N: Network>(&self, device: &Device) -> Result<N::Model> {
        let file = if self.state.train.ema.is_some() { EMA } else { MODEL };
        self.frozen::<N>(file, device)
    }

    fn frozen<N: Network>(&self, file: &str, device: &Device) -> Result<N::Model> {
        let (path, tensors) = (self.dir.join(file), self.read(file, device)?);
        let parameters = Parameters::frozen(&path, tensors, DType::F32, device);
        parameters.build(&self.network::<N>()?).map_err(|error| match error {
            Error::Config { .. } => self.damaged_config(error),
            error => error,
        })
    }

    pub(super) fn images_seen(&self) -> u64 {
        self.state.images_seen
    }

    pub(super) fn dataset_len(&self) -> Option<u64> {
        self.state.dataset_len
    }

    pub(super) fn parameters(&self, device: &Device) -> Result<Parameters> {
        let (path, tensors) = (self.dir.join(MODEL), self.read(MODEL, device)?);
        Ok(Parameters::trainable(&path, tensors, DType::F32, device))
    }

    pub(super) fn optimizer(
        &self,
        config: AdamConfig,
        vars: &BTreeMap<String, Var>,
        device: &Device,
    ) -> Result<AdamW> {
        let path = self.dir.join(OPTIMIZER);
        let state = self.read(OPTIMIZER, device)?;
        let mut optimizer = AdamW::new(config, vars)?;
        check_tensors(&path, &state, &optimizer.shared_state())?;
        // The optimiser made every update of the run, except those that were skipped.
        let skipped = self.state.grad_scaler.map_or(0, |scaler| scaler.skipped);
        optimizer.restore(self.state.step - skipped, &state)?;
        Ok(optimizer)
    }

    /// Restores the gradient scaler of a run that has one.
    pub(super) fn grad_scaler(&self, config: GradScalerConfig) -> Result<GradScaler> {
        match self.state.grad_scaler {
            Some(state) => GradScaler::restore(config, state)
                .map_err(|e| Error::damaged(self.dir.join(STATE), e.to_string())),
            None => Err(Error::damaged(self.dir.join(STATE), "grad_scaler is missing")),
        }
    }

    pub(super) fn average(
        &self,
        config: EmaConfig,
        vars: &BTreeMap<String, Var>,
        device: &Device,
    ) -> Result<Ema> {
        let path = self.dir.join(EMA);
        let mut averages = self.read(EMA, device)?;
        let ema = Ema::new(config, vars)?;
        check_tensors(&path, &averages, ema.averages())?;
        for (name, average) in &mut averages {
            if let Some(var) = vars.get(name) {
                *average = average.to_dtype(var.dtype())?.to_device(var.device())?;
            }
        }
        Ok(Ema::restore(config, self.state.ema_updates, averages))
    }

    /// # Errors
    /// Returns an error that ends with `remedy` if the checkpoint is not of a run with these configurations.
    pub(super) fn must_match<N: Network>(
        &self,
        network: &N,
        train: &TrainConfig,
        diffusion: &Diffusion,
        remedy: &'static str,
    ) -> Result<()> {
        self.state.must_match(network, train, diffusion, remedy)
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("dir", &self.dir)
            .field("step", &self.state.step)
            .finish_non_exhaustive()
    }
}

/// # Errors
/// Returns an error if `found` has other names or shapes than `expected`.
fn check_tensors(
    path: &Path,
    found: &BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let path = path.to_owned();
    for (name, expected) in expected {
        let name = name.clone();
        let Some(found) = found.get(&name) else { return Err(missing(&path, &name, found)) };
        if found.shape() != expected.shape() {
            let (found, expected) = (found.dims().to_vec(), expected.dims().to_vec());
            return Err(Error::WeightShape { path, name, found, expected });
        }
    }
    match found.keys().find(|name| !expected.contains_key(*name)) {
        Some(name) => Err(Error::UnknownWeight { path, name: name.clone() }),
        None => Ok(()),
    }
}
