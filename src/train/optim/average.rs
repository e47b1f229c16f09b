use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::adam::check_floating;
use super::post_hoc::exponent;
use crate::backend;
use crate::error::{Error, Result};

/// Settings of a [`WeightAverage`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum AverageConfig {
    /// An exponential average by its half-life. Karras et al. 2022 (EDM), appendix F.
    HalfLife {
        /// The half-life.
        length: Length,
        /// The largest half-life as a fraction of the training so far; positive. The random initial weights then soon
        /// lose their influence. EDM uses 0.05. `None` does not limit the half-life.
        #[serde(default)]
        ramp_up: Option<f64>,
    },
    /// An average by a power function: its width is a fraction of the training so far. From averages of two widths in
    /// several checkpoints, [`Checkpoint::post_hoc`](crate::Checkpoint::post_hoc) computes the average of any width.
    /// Karras et al. 2024 (EDM2), section 3.
    Power {
        /// The standard deviation of the weighting as a fraction of the training so far; positive and less than 0.2886,
        /// about that of a uniform average. EDM2 stores averages of 0.05 and 0.10.
        sigma_rel: f64,
    },
}

/// A length of training; positive.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Length {
    /// In images.
    Images(f64),
    /// In updates.
    Updates(f64),
}

/// The training that an average has followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::train) struct Followed {
    pub updates: u64,
    pub images: u64,
}

impl AverageConfig {
    /// The two averages that EDM2 stores.
    pub const POST_HOC: [Self; 2] =
        [Self::Power { sigma_rel: 0.05 }, Self::Power { sigma_rel: 0.1 }];

    pub(in crate::train) fn validate(&self) -> Result<()> {
        let positive = |field, x: f64| match x > 0.0 && x.is_finite() {
            true => Ok(()),
            false => Err(Error::config(field, x, "positive and finite")),
        };
        match *self {
            Self::HalfLife { length: Length::Images(n) | Length::Updates(n), ramp_up } => {
                positive("averages.half_life.length", n)?;
                ramp_up.map_or(Ok(()), |ratio| positive("averages.half_life.ramp_up", ratio))
            }
            Self::Power { sigma_rel } => exponent(sigma_rel).map(drop),
        }
    }

    /// The fraction of the average that remains after an update of this number of images.
    fn decay(&self, before: Followed, images: u64) -> Result<f64> {
        Ok(match *self {
            Self::HalfLife { length, ramp_up } => {
                let (length, now, more) = match length {
                    Length::Images(length) => (length, before.images, images as f64),
                    Length::Updates(length) => (length, before.updates, 1.0),
                };
                let length = ramp_up.map_or(length, |ratio| length.min(ratio * now as f64));
                // A half-life of 0 gives 0.
                0.5f64.powf(more / length)
            }
            Self::Power { sigma_rel } => {
                let after = before.images.saturating_add(images).max(1) as f64;
                (1.0 - images as f64 / after).powf(exponent(sigma_rel)? + 1.0)
            }
        })
    }
}

/// An average of weights beside the one that a run samples from. The weights themselves do not depend on it.
///
/// The average begins as a copy of the weights.
#[derive(Debug)]
pub struct WeightAverage {
    config: AverageConfig,
    /// The number of averages before this one.
    index: usize,
    followed: Followed,
    vars: BTreeMap<String, Var>,
    values: BTreeMap<String, Tensor>,
}

impl WeightAverage {
    /// Creates an average that begins as a copy of these weights.
    ///
    /// # Errors
    /// Returns an error if a setting is out of range, or if a weight is not of a floating-point dtype.
    pub fn new(config: AverageConfig, vars: &BTreeMap<String, Var>) -> Result<Self> {
        Self::numbered(0, config, vars)
    }

    /// Creates the averages of a run.
    pub(in crate::train) fn all(
        configs: &[AverageConfig],
        vars: &BTreeMap<String, Var>,
    ) -> Result<Vec<Self>> {
        let numbered = configs.iter().enumerate();
        numbered.map(|(index, config)| Self::numbered(index, *config, vars)).collect()
    }

    fn numbered(index: usize, config: AverageConfig, vars: &BTreeMap<String, Var>) -> Result<Self> {
        config.validate()?;
        let copy = |(name, var): (&String, &Var)| {
            check_floating("weight", name, var)?;
            Ok((name.clone(), var.as_detached_tensor().copy()?))
        };
        let values = vars.iter().map(copy).collect::<Result<_>>()?;
        Ok(Self { config, index, followed: Followed::default(), vars: vars.clone(), values })
    }

    /// Updates the average after an update of the weights by this number of images.
    ///
    /// # Errors
    /// Returns an error if an operation fails.
    pub fn update(&mut self, images: u64) -> Result<()> {
        let decay = self.config.decay(self.followed, images)?;
        for (name, average) in &mut self.values {
            if let Some(var) = self.vars.get(name) {
                backend::of(average).follow(average, &var.as_detached_tensor(), decay)?;
            }
        }
        self.followed.updates += 1;
        self.followed.images = self.followed.images.saturating_add(images);
        Ok(())
    }

    /// The settings.
    pub fn config(&self) -> &AverageConfig {
        &self.config
    }

    /// The averaged weights by name. Training changes them in place; use `Tensor::copy` for values that must not
    /// change.
    pub fn values(&self) -> &BTreeMap<String, Tensor> {
        &self.values
    }

    pub(in crate::train) fn index(&self) -> usize {
        self.index
    }

    pub(in crate::train) fn followed(&self) -> Followed {
        self.followed
    }

    /// Continues from averages of the same names and shapes.
    ///
    /// # Errors
    /// Returns an error if a tensor cannot be copied to the device of its weight.
    pub(in crate::train) fn continue_from(
        &mut self,
        followed: Followed,
        mut values: BTreeMap<String, Tensor>,
    ) -> Result<()> {
        for (name, value) in &mut self.values {
            if let Some(new) = values.remove(name) {
                *value = new.to_dtype(value.dtype())?.to_device(value.device())?;
            }
        }
        self.followed = followed;
        Ok(())
    }
}
