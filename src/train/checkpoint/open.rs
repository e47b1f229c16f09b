use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::files::{Checksum, read_tensors};
use super::format::{Files, Identity, STATE, read_state};
use super::found::{Found, archived};
use crate::error::{Error, Result};
use crate::model::tensor_file::{check_known, weight_of};
use crate::model::{Architecture, Parameters};
use crate::process::diffusion::Diffusion;
use crate::sample::{Sampler, SamplerConfig};
use crate::train::config::TrainConfig;
use crate::train::history::Change;
use crate::train::optim::average::{AverageConfig, Followed};
use crate::train::optim::post_hoc::{Profile, exponent, factors};
use crate::train::state::{AVERAGE, EMA, MODEL};
use crate::train::stateful::Stateful;

/// A training run on disk: a directory of safetensors and JSON files from which a network can sample, or a run
/// resume.
///
/// [`Trainer::save`](crate::Trainer::save) writes it. All tensors are f32. Those that belong to weights are named after
/// them. Each weights file also describes the network and the process, so that
/// [`WeightsFile`](crate::train::WeightsFile) reads it without the other files.
///
/// | file | content |
/// | --- | --- |
/// | `checkpoint.json` | format version, step, configurations, checksums of the other files |
/// | `model.safetensors` | the weights |
/// | `ema.safetensors` | the averaged weights, unless the run has none |
/// | `average.safetensors`, `average-2.safetensors`, … | further averages of the weights, if the run has them |
/// | `optimizer.safetensors` | the state of the optimiser |
/// | `muon.safetensors` | the state of Muon, if the run uses it |
/// | `timesteps.safetensors` | the last losses of each timestep, with importance sampling |
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
/// let network: UNetConfig = checkpoint.architecture()?;
/// let diffusion = checkpoint.diffusion().clone();
/// let config = TrainConfig { steps: 30_000, ..checkpoint.train_config().clone() };
/// let trainer = Trainer::resume(dir, network, config, diffusion, &device)?;
/// # Ok::<(), ddpm::Error>(())
/// ```
pub struct Checkpoint(Found);

impl Checkpoint {
    /// Opens the checkpoint at `dir`. A save can be interrupted at the one moment when there is no checkpoint
    /// at `dir`. In that case, opens the new checkpoint beside `dir`, or else the newest of the previous ones.
    ///
    /// Each file is read once and compared with its checksum. A missing file is an error only when its tensors
    /// are read. Checkpoints of format 1 have no checksums.
    ///
    /// Weights can be read by any build and on any device, regardless of how they were trained.
    ///
    /// # Errors
    /// Returns an error if there is no complete checkpoint, if the checkpoint is damaged, or if its format is
    /// newer than this version reads.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        /// Maximum number of attempts. It exceeds the number of saves that can take place while a checkpoint is
        /// read.
        const ATTEMPTS: usize = 8;

        let dir = dir.as_ref();
        if dir.as_os_str().is_empty() {
            // A file name joined to an empty path would be looked up in the current directory.
            return Err(Error::config("checkpoint directory", r#""""#, "a path"));
        }
        let mut attempts = 1..ATTEMPTS;
        loop {
            // A save can move every checkpoint between two look-ups, but it does so only once.
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
        let missing = match Found::newest(dir) {
            Err(error @ Error::NoCheckpoint { .. }) => error,
            found => return found.map(Self),
        };
        let newest = archived(dir).ok().and_then(|mut older| older.pop());
        newest.map(Self).ok_or(missing)
    }

    /// Returns the step of the checkpoint at `dir`, or `None` if there is none. Reads only `checkpoint.json`.
    ///
    /// # Errors
    /// Returns an error if this file is damaged, or cannot be read.
    pub(crate) fn saved_step(dir: &Path) -> Result<Option<u64>> {
        match Found::newest(dir) {
            Ok(found) => Ok(Some(found.state.progress.step)),
            Err(Error::NoCheckpoint { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Compares all existing files with their checksums.
    ///
    /// # Errors
    /// Returns an error if an existing file has changed since it was written.
    fn verify(&self) -> Result<()> {
        for (file, written) in self.0.state.files.iter().flat_map(Files::iter) {
            let path = self.0.dir.join(file);
            if path.exists() {
                written.verify(&path)?;
            }
        }
        Ok(())
    }

    /// The checksum of a file, if there is one.
    fn written(&self, file: &str) -> Option<&Checksum> {
        self.0.state.files.as_ref()?.get(file)
    }

    /// Returns whether another checkpoint has replaced this one, for example because its run is still saving.
    fn was_replaced(&self) -> bool {
        self.0.state.files.is_some()
            && read_state(&self.0.dir).map_or(true, |now| now.files != self.0.state.files)
    }

    /// Extends the error of a damaged checkpoint by the path of the newest undamaged one among the previous
    /// checkpoints.
    fn with_older(&self, dir: &Path, error: Error) -> Error {
        let Error::Damaged { path, reason } = error else { return error };
        let older = archived(dir).unwrap_or_default();
        let mut older = older.into_iter().rev().map(Self);
        let whole = older.find(|older| older.verify().is_ok());
        let reason = match whole {
            Some(whole) => format!("{reason}; {} is whole", whole.dir().display()),
            None => reason,
        };
        Error::Damaged { path, reason }
    }

    /// The tensors of a file.
    fn read(&self, file: &str, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let path = self.0.dir.join(file);
        read_tensors(&path, self.written(file), device).map_err(|error| match error {
            Error::Damaged { .. } | Error::Io { .. } if self.was_replaced() => {
                Error::Replaced { path: self.0.dir.clone() }
            }
            error => error,
        })
    }

    /// The directory of this checkpoint: the one passed to [`open`](Self::open), or the one found beside it.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The number of updates of the weights so far.
    pub fn step(&self) -> u64 {
        self.0.state.progress.step
    }

    /// The process that the network learned to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        &self.0.state.diffusion
    }

    /// The training configuration.
    pub fn train_config(&self) -> &TrainConfig {
        &self.0.state.train
    }

    /// The sampler settings of the run, if it [recorded](crate::Trainer::set_sampling) them.
    pub fn sampling(&self) -> Option<&SamplerConfig> {
        self.0.state.progress.sampling.as_ref()
    }

    /// The changes of the training configuration during the run, the oldest first.
    pub fn history(&self) -> &[Change] {
        &self.0.state.progress.history
    }

    /// Creates a sampler with the settings of the run. If the run recorded none, the sampler is deterministic
    /// DDIM with 50 sampling steps (fewer if the schedule has fewer timesteps) and clipping.
    ///
    /// # Errors
    /// Returns the errors of [`Sampler::new`].
    pub fn sampler(&self) -> Result<Sampler> {
        let usual = SamplerConfig::usual(self.diffusion());
        self.sampling().unwrap_or(&usual).sampler(self.diffusion())
    }

    /// The [kind](Architecture::KIND) of the network.
    pub fn network_kind(&self) -> &str {
        &self.0.state.network.kind
    }

    /// The network's configuration.
    ///
    /// # Errors
    /// Returns an error if the checkpoint holds another kind of network, or a configuration that `N` does not
    /// accept.
    pub fn architecture<N: Architecture>(&self) -> Result<N> {
        self.0.state.network.architecture(&self.0.dir.join(STATE))
    }

    /// Builds the network with the weights of the checkpoint. They take no gradients.
    ///
    /// # Errors
    /// Returns an error if the file is damaged, or does not hold exactly the weights of the network.
    pub fn model<N: Architecture>(&self, device: &Device) -> Result<N::Model> {
        self.frozen::<N>(&MODEL.file(0), device)
    }

    /// Builds the network with the averaged weights, which give better samples. If the run has no average,
    /// returns the same as [`model`](Self::model).
    ///
    /// # Errors
    /// Returns an error if the file is damaged, or does not hold exactly the weights of the network.
    pub fn ema<N: Architecture>(&self, device: &Device) -> Result<N::Model> {
        self.frozen::<N>(&self.averaged(), device)
    }

    /// The name of the file with the averaged weights, or with the weights if the run has no average.
    fn averaged(&self) -> String {
        let train = &self.0.state.train;
        let kind = match (&train.ema, &*train.averages) {
            (Some(_), _) => &EMA,
            (None, [_, ..]) => &AVERAGE,
            (None, []) => &MODEL,
        };
        kind.file(0)
    }

    /// The file from which [`model`](Self::model) reads the weights.
    pub fn model_file(&self) -> PathBuf {
        self.0.dir.join(MODEL.file(0))
    }

    /// The file from which [`ema`](Self::ema) reads the weights.
    pub fn ema_file(&self) -> PathBuf {
        self.0.dir.join(self.averaged())
    }

    /// Builds the network with the weights of an average of [`TrainConfig::averages`]; `index` counts from 0.
    ///
    /// # Errors
    /// Returns an error if the run has no such average, if the file is damaged, or if it does not hold exactly the
    /// weights of the network.
    pub fn average<N: Architecture>(&self, index: usize, device: &Device) -> Result<N::Model> {
        let count = self.0.state.train.averages.len();
        if index >= count {
            let expected = format!("less than {count}, the number of averages of the run");
            return Err(Error::config("index of the average", index, expected));
        }
        self.frozen::<N>(&AVERAGE.file(index), device)
    }

    /// Builds the network with an average of the weights by a power function of the width `sigma_rel`, computed after
    /// training. Karras et al. 2024 (EDM2), section 3.2.
    ///
    /// The average is the sum of the [`AverageConfig::Power`] averages of this checkpoint and of all older ones of the
    /// run beside it. The factors bring the weighting of the sum closest to that of `sigma_rel`. A run with
    /// [`AverageConfig::POST_HOC`] that keeps many checkpoints ([`TrainConfig::keep_checkpoints`]) has them. The sum is
    /// computed in f64.
    ///
    /// # Errors
    /// Returns an error if `sigma_rel` is not positive and less than 0.2886, if the run has no such averages, or if a
    /// file is damaged. Returns an error if the magnitudes of the factors add up to more than 1,000, because the
    /// averages are too similar.
    pub fn post_hoc<N: Architecture>(&self, sigma_rel: f64, device: &Device) -> Result<N::Model> {
        let wanted = exponent(sigma_rel)?;
        let (here, files) = (&self.0.state, self.power_averages()?);
        let Some(end) = files.iter().map(|(profile, ..)| profile.end).max_by(f64::total_cmp) else {
            let expected = "with AverageConfig::Power and at least one update";
            return Err(Error::config("averages", format!("{:?}", here.train.averages), expected));
        };
        let profiles: Vec<Profile> = files.iter().map(|(profile, ..)| *profile).collect();
        let factors = factors(&profiles, Profile { end, exponent: wanted })?;
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        for ((_, checkpoint, file), factor) in files.iter().zip(factors) {
            for (name, tensor) in checkpoint.read(file, &Device::Cpu)? {
                let term = (tensor.to_dtype(DType::F64)? * factor)?;
                let sum = match sums.remove(&name) {
                    Some(sum) => {
                        if sum.dims() != term.dims() {
                            let expected = format!("{:?}, as in the other checkpoints", sum.dims());
                            return Err(Error::shape("an average", term.dims(), expected));
                        }
                        (sum + term)?
                    }
                    None => term,
                };
                sums.insert(name, sum);
            }
        }
        let path = self.0.dir.join(AVERAGE.file(0));
        self.build::<N>(&Parameters::frozen(&path, sums, DType::F32, device))
    }

    /// The averages by power functions in this checkpoint and in the older ones of its run: their profiles, the
    /// checkpoints and the files.
    fn power_averages(&self) -> Result<Vec<(Profile, Self, String)>> {
        let (here, step) = (&self.0.state, self.step());
        let of_the_run =
            |found: &Found| found.state.progress.step < step && found.state.is_of_the_run_of(here);
        let older = archived(&self.0.dir)?.into_iter().filter(of_the_run).map(|found| found.dir);
        let mut files = Vec::new();
        for dir in older.chain([self.0.dir.clone()]) {
            for (index, average) in here.train.averages.iter().enumerate() {
                let AverageConfig::Power { sigma_rel } = *average else { continue };
                let checkpoint = Self(Found { state: read_state(&dir)?, dir: dir.clone() });
                let followed: Followed = checkpoint.0.state.fields.get("averaged")?;
                let exponent = exponent(sigma_rel)?;
                if followed.images > 0 {
                    let profile = Profile { end: followed.images as f64, exponent };
                    files.push((profile, checkpoint, AVERAGE.file(index)));
                }
            }
        }
        Ok(files)
    }

    fn frozen<N: Architecture>(&self, file: &str, device: &Device) -> Result<N::Model> {
        let (path, tensors) = (self.0.dir.join(file), self.read(file, device)?);
        self.build::<N>(&Parameters::frozen(&path, tensors, DType::F32, device))
    }

    fn build<N: Architecture>(&self, parameters: &Parameters) -> Result<N::Model> {
        self.0.state.network.build::<N>(&self.0.dir.join(STATE), parameters)
    }

    pub(in crate::train) fn parameters(&self, device: &Device) -> Result<Parameters> {
        let file = MODEL.file(0);
        let (path, tensors) = (self.0.dir.join(&file), self.read(&file, device)?);
        Ok(Parameters::trainable(&path, tensors, DType::F32, device))
    }

    /// Continues the parts of a run from this checkpoint.
    ///
    /// # Errors
    /// Returns an error if a file is damaged, or does not hold exactly the tensors of its part.
    pub(in crate::train) fn restore(
        &self,
        parts: Vec<&mut dyn Stateful>,
        device: &Device,
    ) -> Result<()> {
        for part in parts {
            let mut tensors = BTreeMap::new();
            if let Some(expected) = part.tensors() {
                let file = part.kind().file(part.index());
                tensors = self.read(&file, device)?;
                let path = self.0.dir.join(file);
                for (name, expected) in &expected {
                    weight_of(&path, &tensors, name, expected.dims())?;
                }
                check_known(&path, &tensors, &expected)?;
            }
            part.restore(tensors, &self.0.state.fields).map_err(|error| match error {
                Error::Config { .. } | Error::External(_) => {
                    Error::damaged(self.0.dir.join(STATE), error.to_string())
                }
                error => error,
            })?;
        }
        Ok(())
    }

    /// # Errors
    /// Returns an error that ends with `remedy` if the checkpoint is not of a run with these configurations.
    pub(in crate::train) fn must_match(
        &self,
        identity: &Identity<'_>,
        remedy: &'static str,
    ) -> Result<()> {
        self.0.state.must_match(identity, remedy)
    }

    /// Returns the changes by which a run with this identity differs from the one of the checkpoint.
    ///
    /// # Errors
    /// Returns an error that ends with `remedy` if a difference is not allowed.
    pub(in crate::train) fn changes(
        &self,
        identity: &Identity<'_>,
        remedy: &'static str,
    ) -> Result<Vec<Change>> {
        self.0.state.changes(identity, remedy)
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("dir", &self.0.dir)
            .field("step", &self.0.state.progress.step)
            .finish_non_exhaustive()
    }
}
