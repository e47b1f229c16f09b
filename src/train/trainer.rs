#[cfg(feature = "cuda")]
mod by_graph;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, Var};

use super::checkpoint::{self, Checkpoint, Claim, MAX_STEP, Saved, Snapshot};
use super::run::{Outcome, Run, Scene, View};
use super::{AdamW, Ema, GradScaler, Metrics, Observer, TrainConfig, by_name};
use crate::denoiser::{Condition, Denoiser, Output, Trainable};
use crate::kernels::{add_to, combine, squared_error};
use crate::random::{Noise, Purpose};
use crate::{
    Diffusion, Dropout, Error, ImageSource, Network, Parameters, Precision, Result, SamplerConfig,
};

/// Trains a network. Ho et al. 2020, algorithm 1.
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
pub struct Trainer<N: Network> {
    network: N,
    config: TrainConfig,
    diffusion: Diffusion,
    device: Device,
    model: N::Model,
    vars: BTreeMap<String, Var>,
    optimizer: AdamW,
    ema: Option<Ema>,
    scaler: Option<GradScaler>,
    step: u64,
    images_seen: u64,
    /// Number of images in the source, once a source was used: the order of the images depends on it.
    dataset_len: Option<u64>,
    sampling: Option<SamplerConfig>,
    /// The right to save at the directory of the run, if it was claimed.
    claim: Option<Claim>,
    #[cfg(feature = "cuda")]
    capture: by_graph::Capture,
    /// The thread that made the last update.
    #[cfg(feature = "cuda")]
    thread: std::thread::ThreadId,
    /// The order of the images in the current epoch: epoch, number of images, order.
    order: Option<(u64, usize, Vec<u32>)>,
    /// Whether the weights were checked for missing gradients.
    gradients_checked: bool,
    /// Updates since the last report whose losses have not been read.
    unread: Vec<Update>,
    /// Sum and number of the losses read since the last report.
    read: (f64, u64),
}

impl<N: Network> fmt::Debug for Trainer<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = f.debug_struct("Trainer");
        fields
            .field("network", &N::KIND)
            .field("config", &self.config)
            .field("device", &self.device)
            .field("step", &self.step);
        #[cfg(feature = "cuda")]
        fields.field("capture", &self.capture);
        fields.finish_non_exhaustive()
    }
}

/// Number of updates after which a loop of the user's own has its losses read and checked.
const MAX_UNREAD: usize = 10_000;

/// The loss, the gradient's norm, and the gradients.
type Computed = (Tensor, Tensor, Vec<Tensor>);

/// The results of an update. The numbers are still on the device: reading one waits for the device.
#[derive(Debug, Clone)]
pub struct Update {
    /// The update's number, from 1.
    pub step: u64,
    /// The mean squared error over the whole batch, a scalar.
    pub loss: Tensor,
    /// The global norm of the gradient before clipping, a scalar. With [`Precision::F16`] it is not finite if the
    /// update was skipped.
    pub grad_norm: Tensor,
}

impl<N: Network> Trainer<N> {
    /// Creates a trainer of a new network, whose weights are drawn from `config.seed`.
    ///
    /// # Errors
    /// Returns an error that names the field if a configuration is not valid.
    pub fn new(
        network: N,
        config: TrainConfig,
        diffusion: Diffusion,
        device: &Device,
    ) -> Result<Self> {
        config.validate()?;
        let parameters = Parameters::new(config.seed, DType::F32, device);
        Self::with_weights(network, config, diffusion, device, &parameters)
    }

    /// Continues the run that was [saved](Self::save) in `dir`. On the CPU the results are identical in each bit
    /// to those of an uninterrupted run.
    ///
    /// # Errors
    /// Returns an error if `dir` holds no complete checkpoint, or a checkpoint of another run. A run continues
    /// with the network, the process and the training configuration with which it began, except for
    /// [`steps`](TrainConfig::steps), [`log_every`](TrainConfig::log_every) and
    /// [`keep_checkpoints`](TrainConfig::keep_checkpoints). To train its weights with another configuration,
    /// begin a new run with [`set_weights`](Self::set_weights).
    pub fn resume(
        dir: impl AsRef<Path>,
        network: N,
        config: TrainConfig,
        diffusion: Diffusion,
        device: &Device,
    ) -> Result<Self> {
        config.validate()?;
        let checkpoint = Checkpoint::open(dir)?;
        let remedy = "resume the run with the configuration of its Checkpoint, or begin a new run at its \
                      weights with Trainer::set_weights";
        checkpoint.must_match(&network, &config, &diffusion, remedy)?;
        let parameters = checkpoint.parameters(device)?;
        let mut run = Self::with_weights(network, config, diffusion, device, &parameters)?;
        run.optimizer = checkpoint.optimizer(run.config.optimizer, &run.vars, device)?;
        if let Some(ema) = run.config.ema {
            run.ema = Some(checkpoint.average(ema, &run.vars, device)?);
        }
        if run.scaler.is_some() {
            run.scaler = Some(checkpoint.grad_scaler(run.config.grad_scaler)?);
        }
        run.step = checkpoint.step();
        run.images_seen = checkpoint.images_seen();
        run.dataset_len = checkpoint.dataset_len();
        run.sampling = checkpoint.sampling().copied();
        Ok(run)
    }

    /// Creates a trainer of a run that begins at these weights.
    fn with_weights(
        network: N,
        config: TrainConfig,
        diffusion: Diffusion,
        device: &Device,
        parameters: &Parameters,
    ) -> Result<Self> {
        let model = {
            let mut model = parameters.build(&network)?;
            model.set_precision(config.precision)?;
            model
        };
        let vars = parameters.vars();
        let optimizer = AdamW::new(config.optimizer, &vars)?;
        let ema = config.ema.map(|ema| Ema::new(ema, &vars)).transpose()?;
        let scaler = (config.precision == Precision::F16)
            .then(|| GradScaler::new(config.grad_scaler))
            .transpose()?;
        Ok(Self {
            network,
            config,
            diffusion,
            device: device.clone(),
            model,
            vars,
            optimizer,
            ema,
            scaler,
            step: 0,
            images_seen: 0,
            dataset_len: None,
            sampling: None,
            claim: None,
            #[cfg(feature = "cuda")]
            capture: Default::default(),
            #[cfg(feature = "cuda")]
            thread: std::thread::current().id(),
            order: None,
            gradients_checked: false,
            unread: Vec::new(),
            read: (0.0, 0),
        })
    }

    /// Updates the weights until the run has made [`steps`](TrainConfig::steps) updates in total, or the observer
    /// stops it. The observer `()` does nothing.
    ///
    /// # Errors
    /// Returns an error if the source is empty, if its images do not have the shape that the network takes, or if
    /// a loss or a gradient is not finite. Also returns the errors of the source and of the observer.
    pub fn fit(&mut self, images: &dyn ImageSource, mut observer: impl Observer) -> Result<()> {
        let scene = Scene { image_shape: images.shape(), frontends: observer.frontends() };
        let fitted = self.observed(images, &mut observer, &scene);
        scene.frontends.iter().for_each(|frontend| frontend.finish());
        fitted
    }

    /// Tells the observer the beginning and the end of the [loop](Self::train).
    fn observed(
        &mut self,
        images: &dyn ImageSource,
        observer: &mut dyn Observer,
        scene: &Scene,
    ) -> Result<()> {
        observer.on_start(&Run::new(self, scene))?;
        let trained = self.train(images, observer, scene);
        let run = Run::new(self, scene);
        let outcome = match &trained {
            Err(error) => Outcome::Failed(error),
            Ok(()) if run.is_complete() => Outcome::Complete,
            Ok(()) => Outcome::Stopped,
        };
        observer.on_end(&run, outcome)?;
        trained
    }

    /// The loop of [`fit`](Self::fit).
    fn train(
        &mut self,
        images: &dyn ImageSource,
        observer: &mut dyn Observer,
        scene: &Scene,
    ) -> Result<()> {
        // Updates made outside of `fit` are checked, but are not part of the reports.
        self.read_metrics()?;
        let (mut elapsed, mut images_before) = (Duration::ZERO, self.images_seen);
        while self.step < self.config.steps {
            let start = Instant::now();
            let batch = self.next_batch(images)?;
            self.step(&batch)?;
            let last = self.step == self.config.steps;
            if self.step.is_multiple_of(self.config.log_every) || last {
                let mut metrics = self.read_metrics()?;
                elapsed += start.elapsed();
                let images = self.images_seen - images_before;
                metrics.images_per_second = images as f64 / elapsed.as_secs_f64();
                observer.on_metrics(&Run::new(self, scene), &metrics)?;
                (elapsed, images_before) = (Duration::ZERO, self.images_seen);
            } else {
                elapsed += start.elapsed();
            }
            let run = Run::new(self, scene);
            if observer.on_step(&run)?.is_break() || run.is_stopping() {
                break;
            }
        }
        Ok(())
    }

    /// Makes one update with a batch `x_0` (batch, channels, height, width) in [-1, 1]. `t` is drawn uniformly, and
    /// `eps` from the standard normal distribution.
    ///
    /// # Errors
    /// Returns an error if the dtype of the batch is not f32, if its shape does not fit the network, or if its size
    /// is not a multiple of [`accumulation`](TrainConfig::accumulation). The first update returns an error if a
    /// weight has no gradient and [may not lack it](Trainable::may_lack_gradient). A loss that is not finite is
    /// detected when it is read: by [`fit`](Self::fit), by [`save`](Self::save), or here after 10,000 updates
    /// without either.
    pub fn step(&mut self, x_0: &Tensor) -> Result<Update> {
        let dims = x_0.dims();
        if dims.is_empty() {
            let expected = "(batch, channels, height, width)".to_string();
            return Err(Error::Shape { what: "x_0", found: vec![], expected });
        }
        if x_0.dtype() != DType::F32 {
            return Err(Error::config("dtype of x_0", x_0.dtype().as_str(), "f32"));
        }
        self.check_step()?;
        let t = self.timesteps(dims[0])?;
        #[cfg(feature = "cuda")]
        if let Some(update) = self.step_by_graph(x_0, &t)? {
            return Ok(update);
        }
        let eps = self.noise().normal(Purpose::Training, self.step, 0, dims, &self.device)?;
        self.eager(x_0, &t, &eps)
    }

    /// Makes one update with the given timesteps `t` (batch) and noise `eps`. `t` has an integer dtype and values
    /// less than the number of timesteps in the schedule. `eps` has the shape of `x_0`.
    ///
    /// # Errors
    /// Returns the errors of [`step`](Self::step), and an error if the shapes or dtypes do not fit each other, or
    /// if a timestep is out of range. On a CUDA device, a timestep out of range makes the loss NaN instead.
    pub fn step_with(&mut self, x_0: &Tensor, t: &Tensor, eps: &Tensor) -> Result<Update> {
        self.check_step()?;
        #[cfg(feature = "cuda")]
        self.capture.forget();
        self.eager(x_0, t, eps)
    }

    /// # Errors
    /// Returns an error if no random numbers are left for another update.
    fn check_step(&self) -> Result<()> {
        if self.step >= MAX_STEP {
            return Err(Error::config("step", self.step, format!("less than {MAX_STEP} to go on")));
        }
        Ok(())
    }

    /// Makes an update that is not captured as a graph.
    fn eager(&mut self, x_0: &Tensor, t: &Tensor, eps: &Tensor) -> Result<Update> {
        self.follow_thread()?;
        let (loss, grad_norm, gradients) = self.compute(x_0, t, eps)?;
        self.model.recycle(gradients);
        self.note(x_0.dim(0)?, loss, grad_norm)
    }

    /// Counts and records an update.
    fn note(&mut self, batch: usize, loss: Tensor, grad_norm: Tensor) -> Result<Update> {
        self.step += 1;
        self.images_seen += batch as u64;
        let update = Update { step: self.step, loss, grad_norm };
        if self.unread.len() == MAX_UNREAD {
            self.read_losses()?;
        }
        self.unread.push(update.clone());
        Ok(update)
    }

    /// Updates the weights. Returns the loss, the norm of the gradient, and gradients whose memory can be reused.
    fn compute(&mut self, x_0: &Tensor, t: &Tensor, eps: &Tensor) -> Result<Computed> {
        let batch = x_0.dims().first().copied().unwrap_or(0);
        let parts = self.config.accumulation;
        if batch == 0 || !batch.is_multiple_of(parts) {
            let expected = format!("(batch, ...), the batch a multiple of accumulation = {parts}");
            return Err(Error::Shape { what: "x_0", found: x_0.dims().to_vec(), expected });
        }
        self.diffusion.check(x_0, t, eps)?;
        let whole = x_0.dims().to_vec();
        let part = batch / parts;
        let mut sums = BTreeMap::new();
        let mut sum_of_losses: Option<Tensor> = None;
        let gradient_scale = self.optimizer.loss_scale(self.ema.as_ref(), self.scaler.as_ref())?;
        for first in (0..batch).step_by(part) {
            let (x_0, eps) = (x_0.narrow(0, first, part)?, eps.narrow(0, first, part)?);
            let t = t.narrow(0, first, part)?;
            let dropout = Dropout { noise: self.noise(), step: self.step, first_sample: first };

            let x_t = self.diffusion.q_sample(&x_0, &t, &eps)?;
            let target = self.diffusion.target(&x_0, &t, &eps)?;
            let scale = 1.0 / (parts * target.elem_count()) as f64;
            let mut losses = Vec::new();
            let found = self.model.gradients(&x_t, &t, &Condition::None, &dropout, &mut |output| {
                let output = &output.prediction;
                if output.dims() != x_t.dims() {
                    let expected = format!("{:?}, that of its input", x_t.dims());
                    let (what, found) = ("the network's output", output.dims().to_vec());
                    return Err(Error::Shape { what, found, expected });
                }
                let (loss, gradient) =
                    squared_error(output, &target, scale, gradient_scale.as_ref())?;
                losses.push(loss);
                Ok(Output::new(gradient))
            });
            let found = found.map_err(|error| match error {
                // The caller passed x_0, of which x_t is a part.
                Error::Shape { what: "x_t", expected, .. } => {
                    Error::Shape { what: "x_0", found: whole.clone(), expected }
                }
                error => error,
            })?;

            let [loss] = losses.as_slice() else {
                let expected = "called once by Trainable::gradients";
                return Err(Error::config("d_output", "called more often, or never", expected));
            };
            sum_of_losses = Some(match sum_of_losses {
                Some(sum) => combine(&sum, 1.0, loss, 1.0)?,
                None => loss.clone(),
            });

            let found = by_name(found, &self.vars);
            if !self.gradients_checked {
                self.check_gradients(&found)?;
                self.gradients_checked = true;
            }
            if parts == 1 {
                sums = found;
            } else {
                self.accumulate(&mut sums, found)?;
            }
        }
        let Some(loss) = sum_of_losses else {
            return Err(Error::config("accumulation", parts, "at least 1"));
        };
        let max_norm = self.config.clip_norm.unwrap_or(f64::INFINITY);
        let learning_rate = self.config.learning_rate(self.step);
        let (ema, scaler) = (self.ema.as_mut(), self.scaler.as_mut());
        let grad_norm = self.optimizer.update(&mut sums, max_norm, learning_rate, ema, scaler)?;
        // With several parts, the sums are not buffers of the network.
        let gradients = if parts == 1 { sums.into_values().collect() } else { Vec::new() };
        Ok((loss, grad_norm, gradients))
    }

    /// # Errors
    /// Returns an error if a weight has no gradient and the network does not allow it to lack one.
    fn check_gradients(&self, found: &BTreeMap<String, Tensor>) -> Result<()> {
        let lacks =
            |name: &&String| !found.contains_key(*name) && !self.model.may_lack_gradient(name);
        let mut lacking = self.vars.keys().filter(lacks);
        match lacking.next() {
            None => Ok(()),
            Some(name) => Err(Error::NoGradient {
                name: name.clone(),
                missing: 1 + lacking.count(),
                total: self.vars.len(),
            }),
        }
    }

    /// Waits for the work of the thread that made the last update, because each thread has its own CUDA stream.
    fn follow_thread(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.wait_for_other_thread()? {
            self.thread = std::thread::current().id();
        }
        Ok(())
    }

    /// Waits for the last update if another thread made it. Returns whether that was the case.
    #[cfg(feature = "cuda")]
    fn wait_for_other_thread(&self) -> Result<bool> {
        let other = self.device.is_cuda() && self.thread != std::thread::current().id();
        if other {
            crate::kernels::cuda::Gpu::of(&self.device)?.wait_for_all()?;
        }
        Ok(other)
    }

    /// Adds gradients to their sums, and returns their memory to the network.
    fn accumulate(
        &self,
        sums: &mut BTreeMap<String, Tensor>,
        gradients: BTreeMap<String, Tensor>,
    ) -> Result<()> {
        for (name, gradient) in &gradients {
            match sums.get_mut(name) {
                Some(sum) => add_to(sum, gradient)?,
                // The gradient may use memory of the network, so it is copied.
                None => {
                    sums.insert(name.clone(), gradient.copy()?);
                }
            }
        }
        self.model.recycle(gradients.into_values().collect());
        Ok(())
    }

    /// Reads the next `batch_size` images in the order of the run, with random flips if they are configured:
    /// (batch, channels, height, width) on the trainer's device. A second call before the next update returns the
    /// same images.
    ///
    /// Each epoch has a new order of all images. A batch may span the end of an epoch.
    ///
    /// # Errors
    /// Returns an error if the source is empty, fails to read, or has another number of images than at an earlier
    /// update of the run. Returns an error if a pixel was not written or is outside [-1, 1] by more than 0.001.
    pub fn next_batch(&mut self, images: &dyn ImageSource) -> Result<Tensor> {
        let (channels, height, width) = images.shape();
        let size = [height, width].iter().try_fold(channels, |n, &d| n.checked_mul(d)).unwrap_or(0);
        if images.is_empty() || size == 0 || images.len() > u32::MAX as usize {
            let value = format!("{} images of {size} values", images.len());
            let expected = "1 to 2^32 - 1 images of at least one value each";
            return Err(Error::config("image source", value, expected));
        }
        let len = images.len() as u64;
        match self.dataset_len {
            Some(before) if before != len && self.step > 0 => {
                let expected = format!(
                    "{before}, as earlier in this run, because the order of images depends on it"
                );
                return Err(Error::config("number of images", len, expected));
            }
            // No update depends on the order yet.
            _ => self.dataset_len = Some(len),
        }
        let batch = self.config.batch_size;
        let mut pixels = Vec::new();
        let count = batch.checked_mul(size).filter(|&n| pixels.try_reserve_exact(n).is_ok());
        let Some(count) = count else {
            let expected = format!("small enough for a batch of images of {size} values in memory");
            return Err(Error::config("batch_size", batch, expected));
        };
        // A value that the source does not write stays NaN, and is refused.
        pixels.resize(count, f32::NAN);
        for (k, image) in pixels.chunks_mut(size).enumerate() {
            let index = self.shuffled(self.images_seen.wrapping_add(k as u64), images.len())?;
            images.read(index, image)?;
            check_range(index, image)?;
            if self.config.horizontal_flip {
                let mut stream = self.noise().stream(Purpose::Flip, self.step, k as u32);
                if stream.below(2) == 1 {
                    image.chunks_mut(width).for_each(<[f32]>::reverse);
                }
            }
        }
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            let dims = [batch, channels, height, width];
            return Ok(crate::kernels::cuda::upload(&self.device, &pixels, &dims)?);
        }
        Ok(Tensor::from_vec(pixels, (batch, channels, height, width), &self.device)?)
    }

    /// Claims the exclusive right to save at `dir` until this trainer is dropped. Does everything that
    /// [`save`](Self::save) does there, except for writing weights. A reason for which saving would fail later is
    /// therefore an error now, before there is anything to lose.
    ///
    /// The right is an advisory lock on the file `checkpoint.lock`, beside the directory `checkpoint`. It ends with
    /// the process, even if the process is killed. On a file system without locks there is no lock.
    ///
    /// # Errors
    /// - [`Error::Locked`] if another process or trainer saves there.
    /// - [`Error::Occupied`] if there is anything other than a checkpoint of this run at `dir`, or at a path to
    ///   which one of its checkpoints would be moved.
    /// - [`Error::ConfigMismatch`] if the checkpoint at `dir` belongs to another run.
    /// - Another error if that checkpoint is of a later step, or if nothing can be written there.
    pub fn claim(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        let snapshot = self.snapshot(self.scaler.as_ref(), 0);
        if let Some(claim) = &self.claim
            && claim.is_for(dir.as_ref())
        {
            return claim.rehearse(&snapshot);
        }
        let claim = Claim::take(dir.as_ref())?;
        claim.rehearse(&snapshot)?;
        self.claim = Some(claim);
        Ok(())
    }

    /// Writes the latest checkpoint to `dir`. Previous checkpoints are kept beside `dir`, at most
    /// [`keep_checkpoints`](TrainConfig::keep_checkpoints) - 1 of them.
    ///
    /// At any moment while it writes, a complete checkpoint can be [opened](Checkpoint::open) there. No other
    /// trainer can save there while this one writes. To hold this right for the whole run, and to detect reasons
    /// for a failure before training, [`claim`](Self::claim) the directory first.
    ///
    /// # Errors
    /// Returns an error if a loss since the last report or a weight is not finite, and the errors of
    /// [`claim`](Self::claim). Nothing is changed in these cases. Returns an error if a file cannot be written. An
    /// old checkpoint that cannot be removed is not an error, but a warning in [`Saved`].
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<Saved> {
        #[cfg(feature = "cuda")]
        self.wait_for_other_thread()?;
        self.read_unread()?;
        let scaler = self.grad_scaler()?;
        // Updates that the device skipped are counted until its counters are read.
        let skipped = |scaler: &Option<GradScaler>| scaler.as_ref().map_or(0, GradScaler::skipped);
        let skipped_since = skipped(&scaler) - skipped(&self.scaler);
        let snapshot = self.snapshot(scaler.as_ref(), skipped_since);
        let for_now;
        let claim = match &self.claim {
            Some(claim) if claim.is_for(dir.as_ref()) => claim,
            _ => {
                for_now = Claim::take(dir.as_ref())?;
                &for_now
            }
        };
        checkpoint::save(claim, self.config.keep_checkpoints, &snapshot)
    }

    /// The values from which a checkpoint is written. `scaler` has the current state, and `skipped_since` updates
    /// were skipped since the counts in `self` were read.
    fn snapshot<'a>(
        &'a self,
        scaler: Option<&'a GradScaler>,
        skipped_since: u64,
    ) -> Snapshot<'a, N> {
        Snapshot {
            network: &self.network,
            train: &self.config,
            diffusion: &self.diffusion,
            sampling: self.sampling,
            step: self.step,
            images_seen: self.images_seen,
            dataset_len: self.dataset_len,
            vars: &self.vars,
            optimizer: &self.optimizer,
            ema: self.ema.as_ref(),
            ema_updates: self.ema.as_ref().map_or(0, |ema| ema.updates() - skipped_since),
            scaler,
        }
    }

    /// Records in the checkpoints how the run draws its samples; see [`Checkpoint::sampling`]. Training does not
    /// depend on it.
    ///
    /// # Errors
    /// Returns the errors of [`Sampler::new`](crate::Sampler::new) for the process of this run.
    pub fn set_sampling(&mut self, sampling: SamplerConfig) -> Result<()> {
        sampling.sampler(&self.diffusion)?;
        self.sampling = Some(sampling);
        Ok(())
    }

    /// Replaces the weights by those of a safetensors file, from a checkpoint or from PyTorch. The average begins
    /// at them, too.
    ///
    /// # Errors
    /// Returns an error if the trainer has already made an update, because the state of the optimiser would belong
    /// to other weights. Returns an error if the file cannot be read, or if a weight is missing, unknown or of
    /// another shape. Nothing is changed in these cases.
    pub fn set_weights(&mut self, path: impl AsRef<Path>) -> Result<()> {
        if self.step > 0 {
            return Err(Error::config("step", self.step, "0 when weights are set"));
        }
        let parameters = Parameters::load(path, DType::F32, &self.device)?;
        parameters.build(&self.network)?;
        for (name, new) in parameters.vars() {
            if let Some(var) = self.vars.get(&name) {
                var.set(&new)?;
            }
        }
        self.ema = self.config.ema.map(|ema| Ema::new(ema, &self.vars)).transpose()?;
        Ok(())
    }

    /// The network's configuration.
    pub fn network(&self) -> &N {
        &self.network
    }

    /// The network being trained. The next update changes its weights; [`ema_model`](Self::ema_model) returns a
    /// separate network.
    ///
    /// # Deadlocks
    /// Do not use this network, or a clone of it, in another rayon job while an update runs in the same pool. A
    /// thread that holds the lock of a weight could be given that job, and would wait for itself.
    pub fn model(&self) -> &N::Model {
        &self.model
    }

    /// Builds the same network with a snapshot of the averaged weights, or of the weights if the run has no average.
    /// They take no gradients.
    ///
    /// # Errors
    /// Returns the errors of building the network.
    pub fn ema_model(&self) -> Result<N::Model> {
        #[cfg(feature = "cuda")]
        self.wait_for_other_thread()?;
        let weights = match &self.ema {
            Some(ema) => ema.averages().clone(),
            None => self.vars.iter().map(|(k, v)| (k.clone(), v.as_detached_tensor())).collect(),
        };
        let weights = Parameters::frozen(Path::new("ema"), weights, DType::F32, &self.device);
        {
            let mut model = weights.build(&self.network)?;
            model.set_precision(self.config.precision)?;
            Ok(model)
        }
    }

    /// The weights being trained, by name. They are not copies.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// The current state of the gradient scaler, with [`Precision::F16`]. Waits for the GPU.
    ///
    /// # Errors
    /// Returns an error if it cannot be read from the GPU.
    pub fn grad_scaler(&self) -> Result<Option<GradScaler>> {
        #[cfg(feature = "cuda")]
        self.wait_for_other_thread()?;
        self.scaler.as_ref().map(|scaler| self.optimizer.settled(scaler)).transpose()
    }

    /// The average of the weights, unless the run has none.
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_ref()
    }

    /// The number of updates so far.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Returns whether the last update was launched as a CUDA graph, which takes almost no CPU time.
    ///
    /// After some updates of one shape, [`step`](Self::step) and [`fit`](Self::fit) capture their updates. This
    /// requires a CUDA device, no [`accumulation`](TrainConfig::accumulation), and a network that
    /// [is repeatable](Trainable::is_repeatable). If updates are not captured, the `Debug` output states the reason.
    pub fn is_captured(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.capture.is_there();
        #[cfg(not(feature = "cuda"))]
        return false;
    }

    /// The training configuration.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The process that the network learns to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        &self.diffusion
    }

    /// The device that computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn noise(&self) -> Noise {
        Noise::new(self.config.seed)
    }

    /// Uniform timesteps for a batch.
    fn timesteps(&self, batch: usize) -> Result<Tensor> {
        let bound = self.diffusion.schedule().steps() as u32;
        let t: Vec<u32> = (0..batch)
            .map(|k| self.noise().stream(Purpose::Timestep, self.step, k as u32).below(bound))
            .collect();
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return Ok(crate::kernels::cuda::upload(&self.device, &t, &[batch])?);
        }
        Ok(Tensor::from_vec(t, batch, &self.device)?)
    }

    /// The index of the `position`-th image of the run.
    fn shuffled(&mut self, position: u64, len: usize) -> Result<usize> {
        let (epoch, place) = (position / len as u64, (position % len as u64) as usize);
        match &self.order {
            Some((e, n, order)) if (*e, *n) == (epoch, len) => Ok(order[place] as usize),
            _ => {
                let order = self.noise().stream(Purpose::Shuffle, epoch, 0).permutation(len)?;
                let index = order[place] as usize;
                self.order = Some((epoch, len, order));
                Ok(index)
            }
        }
    }

    /// Reads the losses and gradient norms of the unread updates.
    ///
    /// # Errors
    /// Returns an error if one is not finite, except for gradient norms that a smaller scale can fix.
    fn read_unread(&self) -> Result<Vec<(f32, f32)>> {
        let skips = self.grad_scaler()?.is_some_and(|scaler| !scaler.is_exhausted());
        let read = |update: &Update| -> Result<(f32, f32)> {
            let scalar = |t: &Tensor| -> Result<f32> { Ok(t.to_dtype(DType::F32)?.to_scalar()?) };
            let (loss, grad_norm) = (scalar(&update.loss)?, scalar(&update.grad_norm)?);
            for (what, value, fatal) in [("loss", loss, true), ("gradient norm", grad_norm, !skips)]
            {
                if fatal && !value.is_finite() {
                    return Err(Error::NonFinite { what: what.into(), value, step: update.step });
                }
            }
            Ok((loss, grad_norm))
        };
        self.unread.iter().map(read).collect()
    }

    /// Reads the losses of the unread updates and adds them to the sum. Returns the last finite gradient norm.
    fn read_losses(&mut self) -> Result<f32> {
        let read = self.read_unread()?;
        self.unread.clear();
        if let Some(scaler) = &mut self.scaler {
            self.optimizer.settle(self.ema.as_mut(), scaler)?;
        }
        self.read.0 += read.iter().map(|(loss, _)| f64::from(*loss)).sum::<f64>();
        self.read.1 += read.len() as u64;
        let mut norms = read.iter().map(|(_, norm)| *norm);
        Ok(norms.rfind(|norm| norm.is_finite()).unwrap_or_default())
    }

    /// The report on the updates since the last report, except for `images_per_second`.
    fn read_metrics(&mut self) -> Result<Metrics> {
        let grad_norm = self.read_losses()?;
        let (sum, count) = std::mem::take(&mut self.read);
        Ok(Metrics {
            step: self.step,
            loss: (sum / count.max(1) as f64) as f32,
            lr: self.config.learning_rate(self.step.saturating_sub(1)),
            grad_norm,
            loss_scale: self.scaler.as_ref().map(GradScaler::scale),
            images_per_second: 0.0,
        })
    }
}

impl<N: Network> View for Trainer<N> {
    fn step(&self) -> u64 {
        self.step
    }

    fn images_seen(&self) -> u64 {
        self.images_seen
    }

    fn config(&self) -> &TrainConfig {
        &self.config
    }

    fn diffusion(&self) -> &Diffusion {
        &self.diffusion
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn sampling(&self) -> Option<&SamplerConfig> {
        self.sampling.as_ref()
    }

    fn model(&self) -> &dyn Denoiser {
        &self.model
    }

    fn averaged_model(&self) -> Result<Box<dyn Denoiser + '_>> {
        Ok(Box::new(self.ema_model()?))
    }

    fn save(&self, dir: &Path) -> Result<Saved> {
        Trainer::save(self, dir)
    }
}

/// # Errors
/// Returns an error if a pixel is not a number from -1 to 1. A tolerance allows for rounding in resized images.
fn check_range(index: usize, image: &[f32]) -> Result<()> {
    const MOST: f32 = 1.001;
    match image.iter().find(|pixel| pixel.is_nan() || pixel.abs() > MOST) {
        None => Ok(()),
        Some(pixel) => {
            let value = format!("{pixel} in image {index}");
            let expected =
                "a number from -1 to 1; ImageSource::read converts a byte p to p / 127.5 - 1";
            Err(Error::config("pixel", value, expected))
        }
    }
}
