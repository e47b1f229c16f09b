use serde::{Deserialize, Serialize};

use super::{AdamConfig, EmaConfig, GradScalerConfig};
use crate::{Error, Precision, Result};

/// How to train: everything that, with the network and the data, determines the result.
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
    /// Seed of everything random: weights, order of images, timesteps, noise, flips, dropout.
    pub seed: u64,
    /// How many updates of the weights there are in all; at least 1.
    pub steps: u64,
    /// Images for each update; at least 1 and less than 2^32.
    pub batch_size: usize,
    /// Parts in which a batch goes through the network, one after the other, to save memory; it
    /// divides `batch_size`. The result is that of the whole batch, but for rounding.
    pub accumulation: usize,
    /// The optimiser's settings.
    pub optimizer: AdamConfig,
    /// Updates over which the learning rate rises linearly to its full value; 0 for none.
    pub warmup_steps: u64,
    /// The share of [`steps`](Self::steps), at their end, over which the learning rate falls linearly
    /// to zero, from 0, for none, to 1. An update beyond `steps` changes nothing then.
    /// Hägele et al. 2024.
    #[serde(default)]
    pub cooldown: f64,
    /// The global norm to which gradients are clipped, positive; `None` does not clip.
    pub clip_norm: Option<f64>,
    /// The average of the weights that samples come from; `None` keeps none.
    pub ema: Option<EmaConfig>,
    /// How exactly products are computed.
    #[serde(default)]
    pub precision: Precision,
    /// How gradients are scaled with [`Precision::F16`], and with no other.
    #[serde(default)]
    pub grad_scaler: GradScalerConfig,
    /// Whether images are mirrored left to right, at random.
    pub horizontal_flip: bool,
    /// Updates from one report of the loss to the next; at least 1. Reading the loss makes a GPU
    /// wait.
    pub log_every: u64,
    /// How many checkpoints are kept, the latest included; at least 1.
    pub keep_checkpoints: usize,
}

impl TrainConfig {
    /// The MNIST recipe: Adam with a learning rate of 1e-4, batches of 64, no clipping, and an
    /// average of decay 0.999 with warm-up.
    pub fn mnist() -> Self {
        Self {
            seed: 0,
            steps: 20_000,
            batch_size: 64,
            accumulation: 1,
            optimizer: AdamConfig::adam(1e-4),
            warmup_steps: 0,
            cooldown: 0.0,
            clip_norm: None,
            ema: Some(EmaConfig { decay: 0.999, warmup: true }),
            precision: Precision::Highest,
            grad_scaler: GradScalerConfig::default(),
            horizontal_flip: false,
            log_every: 1,
            keep_checkpoints: 2,
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

    /// Whether one can train like this; [`Trainer::new`](crate::Trainer::new) asks as well.
    ///
    /// # Errors
    /// Returns an error that names the first field that does not fit, its value and what is allowed.
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
        if let Some(norm) = self.clip_norm
            && !(norm > 0.0 && norm.is_finite())
        {
            return Err(Error::config("clip_norm", norm, "positive and finite"));
        }
        self.precision.validate()?;
        self.grad_scaler.validate()?;
        self.optimizer.validate()?;
        self.ema.map_or(Ok(()), |ema| ema.validate())
    }

    /// The learning rate of the update that follows `step` others: `step` counts from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let rise = match self.warmup_steps {
            0 => 1.0,
            warmup => (step.saturating_add(1) as f64 / warmup as f64).min(1.0),
        };
        let left = self.steps.saturating_sub(step) as f64;
        let fall = match self.cooldown * self.steps as f64 {
            0.0 => 1.0,
            cooldown => (left / cooldown).min(1.0),
        };
        self.optimizer.learning_rate * rise.min(fall)
    }
}
