use serde::{Deserialize, Serialize};

use super::loss::ObjectiveConfig;
use super::noise::NoiseConfig;
use super::optim::adam::AdamConfig;
use super::optim::average::AverageConfig;
use super::optim::ema::EmaConfig;
use super::optim::muon::MuonConfig;
use super::optim::scaler::GradScalerConfig;
use super::optim::schedule::{LearningRate, LearningRateSchedule};
use super::timesteps::TimestepSampling;
use crate::error::{Error, Result};
use crate::precision::Precision;

/// The training configuration. With the network and the data, it determines the result.
///
/// ```
/// use ddpm::TrainConfig;
///
/// let config = TrainConfig { batch_size: 64, steps: 20_000, ..TrainConfig::mnist() };
/// config.validate()?;
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of all random numbers: weights, order of images, timesteps, noise, crops, flips, hidden classes, dropout.
    pub seed: u64,
    /// Total number of updates of the weights; at least 1.
    pub steps: u64,
    /// Images per update; at least 1 and less than 2^32.
    pub batch_size: usize,
    /// Number of parts into which a batch is divided to save memory; `batch_size` is a multiple of it. The result
    /// equals that of the whole batch up to rounding.
    pub accumulation: usize,
    /// Settings of the optimiser.
    pub optimizer: AdamConfig,
    /// Settings of Muon, which then updates matrices in place of Adam, with the same learning rate; `None` updates
    /// every weight by Adam.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonConfig>,
    /// Number of updates over which the learning rate rises linearly to its full value; 0 for none.
    pub warmup_steps: u64,
    /// The shape of the learning rate between warm-up and cool-down.
    #[serde(default, skip_serializing_if = "LearningRateSchedule::is_constant")]
    pub schedule: LearningRateSchedule,
    /// Fraction of [`steps`](Self::steps), at the end, over which the learning rate falls linearly to zero; from 0 (no
    /// cool-down) to 1. With a cool-down, an update beyond `steps` changes nothing. Hägele et al. 2024.
    #[serde(default)]
    pub cooldown: f64,
    /// Global norm to which gradients are clipped; positive. `None` does not clip.
    pub clip_norm: Option<f64>,
    /// Settings of the averaged weights, from which samples are drawn; `None` keeps no average.
    pub ema: Option<EmaConfig>,
    /// Further averages of the weights; at most 16. Without `ema`, samples are drawn from the first of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub averages: Vec<AverageConfig>,
    /// Precision of products.
    #[serde(default)]
    pub precision: Precision,
    /// Settings of the gradient scaler, which is used only with [`Precision::F16`].
    #[serde(default)]
    pub grad_scaler: GradScalerConfig,
    /// The objective, unless [`TrainerBuilder::objective`](super::TrainerBuilder::objective) replaces it.
    #[serde(default)]
    pub objective: ObjectiveConfig,
    /// The distribution of timesteps.
    #[serde(default)]
    pub timesteps: TimestepSampling,
    /// The noise that is added to images.
    #[serde(default)]
    pub noise: NoiseConfig,
    /// Whether images are flipped horizontally at random.
    pub horizontal_flip: bool,
    /// Probability that an update hides the class of an image from a network with classes, from 0 to 1. The network
    /// thus also learns to predict without a class, which guidance needs. Ho and Salimans 2022, algorithm 1. It has no
    /// effect on a network without a [number for no class](crate::Denoiser::no_class).
    #[serde(default = "class_dropout")]
    pub class_dropout: f64,
    /// Number of updates between two reports of the loss; at least 1. Reading the loss waits for the GPU.
    pub log_every: u64,
    /// Whether [`Metrics`](super::Metrics) report the loss by quartiles of the timesteps; always with
    /// [`TimestepSampling::Importance`]. The objective is then also evaluated for each image, and an update is not
    /// captured as a CUDA graph. The losses and the weights stay the same in each bit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub loss_quartiles: bool,
    /// Number of checkpoints that are kept, including the latest; at least 1.
    pub keep_checkpoints: usize,
    /// True if the backward pass computes the feature maps of the network's blocks again, instead of keeping them from
    /// the forward pass. This takes less memory, and about a third more time. The weights stay the same in each bit.
    /// Chen et al. 2016.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub recompute: bool,
}

/// The largest number of further averages.
const MAX_AVERAGES: usize = 16;

/// The default of [`TrainConfig::class_dropout`].
fn class_dropout() -> f64 {
    0.1
}

impl Default for TrainConfig {
    /// The [recipe of the paper](Self::ho).
    fn default() -> Self {
        Self::ho()
    }
}

impl TrainConfig {
    /// The recipe of the paper for CIFAR-10: Adam with a learning rate of 2e-4 after 5,000 updates of warm-up, batches
    /// of 128, gradients clipped to norm 1, horizontal flips, an average of decay 0.9999, 800,000 updates. Ho et al.
    /// 2020, appendix B, and their code. Their network is
    /// [`UNet2DConfig::cifar10`](crate::nn::UNet2DConfig::cifar10), which has a dropout of 0.1.
    pub fn ho() -> Self {
        Self {
            steps: 800_000,
            batch_size: 128,
            optimizer: AdamConfig::adam(2e-4),
            warmup_steps: 5_000,
            clip_norm: Some(1.0),
            ema: Some(EmaConfig { decay: 0.9999, warmup: false }),
            horizontal_flip: true,
            log_every: 50,
            ..Self::mnist()
        }
    }

    /// The MNIST recipe: Adam with a learning rate of 1e-4, batches of 64, no clipping, and an
    /// average of decay 0.999 with warm-up.
    pub fn mnist() -> Self {
        Self {
            seed: 0,
            steps: 20_000,
            batch_size: 64,
            accumulation: 1,
            optimizer: AdamConfig::adam(1e-4),
            muon: None,
            warmup_steps: 0,
            schedule: LearningRateSchedule::Constant,
            cooldown: 0.0,
            clip_norm: None,
            ema: Some(EmaConfig { decay: 0.999, warmup: true }),
            averages: Vec::new(),
            precision: Precision::Highest,
            grad_scaler: GradScalerConfig::default(),
            objective: ObjectiveConfig::default(),
            timesteps: TimestepSampling::default(),
            noise: NoiseConfig::default(),
            horizontal_flip: false,
            class_dropout: class_dropout(),
            log_every: 1,
            loss_quartiles: false,
            keep_checkpoints: 2,
            recompute: false,
        }
    }

    /// The CIFAR-10 recipe: AdamW with a learning rate of 2e-4 and weight decay 1e-5, batches of
    /// 128, gradients clipped to norm 1, horizontal flips, and an average of decay 0.999 with
    /// warm-up.
    pub fn cifar10() -> Self {
        Self {
            steps: 200_000,
            batch_size: 128,
            optimizer: AdamConfig::adamw(2e-4, 1e-5),
            clip_norm: Some(1.0),
            horizontal_flip: true,
            log_every: 50,
            ..Self::mnist()
        }
    }

    /// The recipe of this crate for the prediction of [velocity](crate::Diffusion::velocity). Muon updates matrices, and
    /// Adam the other weights. The learning rate of 1e-3 rises over the first 5% of the updates (at most 500), and falls
    /// to zero over the last 70%. Timesteps are spread over each batch, and gradients are clipped to norm 1. The average
    /// has a decay of 0.999 with warm-up. The half-life of this decay is `ln(1/2) / ln(0.999)`, about 693 updates. It
    /// holds from update 8,990 on. Before that, the warm-up limits the half-life to about a thirteenth of the updates so
    /// far. `steps` is the total number of updates, and `batch_size` the images per update.
    ///
    /// The results of training in the repository compare it with another recipe.
    pub fn recommended(steps: u64, batch_size: usize) -> Self {
        Self {
            steps,
            batch_size,
            optimizer: AdamConfig::adam(1e-3),
            muon: Some(MuonConfig::default()),
            warmup_steps: Self::recommended_warmup(steps),
            cooldown: 0.7,
            clip_norm: Some(1.0),
            timesteps: TimestepSampling::Stratified,
            ..Self::mnist()
        }
    }

    /// The number of updates of the warm-up of [`recommended`](Self::recommended).
    pub(crate) fn recommended_warmup(steps: u64) -> u64 {
        (steps / 20).min(500)
    }

    /// Checks the configuration. [`Trainer::new`](crate::Trainer::new) calls this.
    ///
    /// # Errors
    /// Returns an error that names the first invalid field, its value and the allowed values.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("steps", self.steps),
            ("batch_size", self.batch_size as u64),
            ("accumulation", self.accumulation as u64),
            ("log_every", self.log_every),
            ("keep_checkpoints", self.keep_checkpoints as u64),
        ] {
            if value == 0 {
                return Err(Error::config(field, value, "at least 1"));
            }
        }
        if self.batch_size > u32::MAX as usize {
            return Err(Error::config("batch_size", self.batch_size, "less than 2^32"));
        }
        if !self.batch_size.is_multiple_of(self.accumulation) {
            let expected = format!("a divisor of batch_size, which is {}", self.batch_size);
            return Err(Error::config("accumulation", self.accumulation, expected));
        }
        if !(0.0..=1.0).contains(&self.cooldown) {
            return Err(Error::config("cooldown", self.cooldown, "from 0 to 1"));
        }
        if !(0.0..=1.0).contains(&self.class_dropout) {
            return Err(Error::config("class_dropout", self.class_dropout, "from 0 to 1"));
        }
        if let Some(norm) = self.clip_norm
            && !(norm > 0.0 && norm.is_finite())
        {
            return Err(Error::config("clip_norm", norm, "positive and finite"));
        }
        self.precision.validate()?;
        self.objective.validate()?;
        self.timesteps.validate()?;
        self.noise.validate()?;
        self.grad_scaler.validate()?;
        self.optimizer.validate()?;
        self.muon.as_ref().map_or(Ok(()), MuonConfig::validate)?;
        self.schedule.validate()?;
        if self.averages.len() > MAX_AVERAGES {
            let expected = format!("at most {MAX_AVERAGES}");
            return Err(Error::config("number of averages", self.averages.len(), expected));
        }
        self.averages.iter().try_for_each(AverageConfig::validate)?;
        let averages = &self.averages;
        if let Some(twice) = (0..averages.len()).find(|&i| averages[..i].contains(&averages[i])) {
            let value = format!("{:?} twice", averages[twice]);
            return Err(Error::config("averages", value, "each at most once"));
        }
        self.ema.map_or(Ok(()), |ema| ema.validate())
    }

    /// Returns whether the learning rate of an update depends on [`steps`](Self::steps): with a cool-down, or with a
    /// schedule that ends there. Another number of steps then changes a run that is resumed.
    pub fn rate_depends_on_steps(&self) -> bool {
        let ends = matches!(
            self.schedule,
            LearningRateSchedule::Linear { .. } | LearningRateSchedule::Cosine { .. }
        );
        ends || self.cooldown > 0.0
    }

    /// Returns whether an update computes the loss of each image.
    pub(super) fn needs_image_losses(&self) -> bool {
        self.loss_quartiles || self.weights_images()
    }

    /// Returns whether the loss of each image has its own weight.
    pub(super) fn weights_images(&self) -> bool {
        self.timesteps == TimestepSampling::Importance
    }

    /// The learning rate of an update; `step` counts from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let Self { steps, warmup_steps, schedule, cooldown, optimizer, .. } = *self;
        LearningRate { peak: optimizer.learning_rate, warmup_steps, schedule, cooldown, steps }
            .at(step)
    }
}
