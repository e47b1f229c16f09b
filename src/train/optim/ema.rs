use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::adam::check_floating;
use crate::backend::AverageRule;
use crate::error::{Result, check_fraction};

/// Settings of [`Ema`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// Fraction of the average that remains after each update; at least 0 and less than 1.
    pub decay: f64,
    /// Whether the decay after `n` updates is at most `(1 + n) / (10 + n)`, so that the random initial weights soon
    /// lose their influence.
    pub warmup: bool,
}

impl Default for EmaConfig {
    /// A decay of 0.999 with warm-up.
    fn default() -> Self {
        Self { decay: 0.999, warmup: true }
    }
}

impl EmaConfig {
    pub(in crate::train) fn validate(&self) -> Result<()> {
        check_fraction("ema.decay", self.decay)
    }

    fn rule(&self) -> AverageRule {
        AverageRule { decay: self.decay, warmup: self.warmup }
    }
}

/// An exponential moving average of weights, used for sampling. Its samples are better than those of the weights being
/// trained. Ho et al. 2020, appendix B.
///
/// The average begins as a copy of the weights. The weights themselves do not depend on it.
#[derive(Debug)]
pub struct Ema {
    config: EmaConfig,
    updates: u64,
    averages: BTreeMap<String, Tensor>,
}

impl Ema {
    /// Creates an average that begins as a copy of these weights.
    ///
    /// # Errors
    /// Returns an error if `decay` is not at least 0 and less than 1, or if a weight is not of a floating-point dtype.
    pub fn new(config: EmaConfig, vars: &BTreeMap<String, Var>) -> Result<Self> {
        config.validate()?;
        let copy = |(name, var): (&String, &Var)| {
            check_floating("weight", name, var)?;
            Ok((name.clone(), var.as_detached_tensor().copy()?))
        };
        Ok(Self { config, updates: 0, averages: vars.iter().map(copy).collect::<Result<_>>()? })
    }

    /// Updates the average with the current weights.
    ///
    /// # Errors
    /// Returns an error if the shape of a weight has changed.
    pub fn update(&mut self, vars: &BTreeMap<String, Var>) -> Result<()> {
        let decay = self.rule().decay_after(self.updates);
        self.updates += 1;
        for (name, var) in vars {
            if let Some(average) = self.averages.get_mut(name) {
                let new = var.as_detached_tensor().affine(1.0 - decay, 0.0)?;
                *average = (average.affine(decay, 0.0)? + new)?;
            }
        }
        Ok(())
    }

    pub(super) fn rule(&self) -> AverageRule {
        self.config.rule()
    }

    pub(super) fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }

    pub(super) fn averages_mut(&mut self) -> &mut BTreeMap<String, Tensor> {
        &mut self.averages
    }

    /// The number of updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The averaged weights by name, in the shapes and the dtype of the weights. Training changes them in place; use
    /// `Tensor::copy` for values that must not change.
    pub fn averages(&self) -> &BTreeMap<String, Tensor> {
        &self.averages
    }

    /// Continues from averages of the same names and shapes after `updates` updates.
    ///
    /// # Errors
    /// Returns an error if a tensor cannot be copied to the device of its weight.
    pub(in crate::train) fn continue_from(
        &mut self,
        updates: u64,
        mut averages: BTreeMap<String, Tensor>,
    ) -> Result<()> {
        for (name, average) in &mut self.averages {
            if let Some(new) = averages.remove(name) {
                *average = new.to_dtype(average.dtype())?.to_device(average.device())?;
            }
        }
        self.updates = updates;
        Ok(())
    }
}
