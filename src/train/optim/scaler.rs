use serde::{Deserialize, Serialize};

use crate::backend::{Counters, ScaleRule};
use crate::error::{Error, Result};

/// Settings of [`GradScaler`]; the defaults are PyTorch's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradScalerConfig {
    /// The first scale; at least `min_scale`.
    pub initial_scale: f64,
    /// Factor of the scale after `growth_interval` updates without an overflow; at least 1.
    pub growth_factor: f64,
    /// Number of updates without an overflow before the scale grows; at least 1.
    pub growth_interval: u64,
    /// Factor of the scale after an overflow; positive and less than 1.
    pub backoff_factor: f64,
    /// The smallest scale; positive. Gradients that overflow at this scale are an error.
    pub min_scale: f64,
}

impl Default for GradScalerConfig {
    fn default() -> Self {
        Self {
            initial_scale: 65536.0,
            growth_factor: 2.0,
            growth_interval: 2000,
            backoff_factor: 0.5,
            min_scale: 1.0,
        }
    }
}

impl GradScalerConfig {
    pub(in crate::train) fn validate(&self) -> Result<()> {
        let f32_finite = |x: f64| (x as f32).is_finite();
        if !(self.min_scale > 0.0 && f32_finite(self.min_scale)) {
            let expected = "positive and finite in f32";
            return Err(Error::config("grad_scaler.min_scale", self.min_scale, expected));
        }
        if !(self.initial_scale >= self.min_scale && f32_finite(self.initial_scale)) {
            let expected = format!("at least min_scale, {}, and finite in f32", self.min_scale);
            return Err(Error::config("grad_scaler.initial_scale", self.initial_scale, expected));
        }
        if !(self.growth_factor >= 1.0 && self.growth_factor.is_finite()) {
            let expected = "at least 1 and finite";
            return Err(Error::config("grad_scaler.growth_factor", self.growth_factor, expected));
        }
        if self.growth_interval == 0 {
            return Err(Error::config("grad_scaler.growth_interval", 0, "at least 1"));
        }
        if !(self.backoff_factor > 0.0 && self.backoff_factor < 1.0) {
            let expected = "positive and less than 1";
            return Err(Error::config("grad_scaler.backoff_factor", self.backoff_factor, expected));
        }
        Ok(())
    }
}

/// A dynamic loss scale, which keeps gradients in half precision from vanishing. The gradient of the loss is multiplied
/// by a scale, which is divided out again in f32. If a gradient becomes infinite or NaN, the update is skipped and the
/// scale falls. After many good updates the scale rises. Micikevicius et al. 2018, section 3.2; the method is that of
/// PyTorch's `GradScaler`.
///
/// [`Trainer`](crate::Trainer) has a scaler with [`Precision::F16`](crate::Precision::F16). In a custom training loop:
/// multiply the gradient of the loss by [`scale`](Self::scale), divide the gradients of the weights by it, and check
/// whether their norm is finite. If it is, clip and update. Then call [`update`](Self::update).
#[derive(Debug, Clone)]
pub struct GradScaler {
    config: GradScalerConfig,
    state: ScalerState,
    exhausted: bool,
}

/// The state of a scaler in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::train) struct ScalerState {
    pub scale: f64,
    /// Updates since the last overflow or growth.
    pub good_updates: u64,
    /// Updates that were skipped.
    pub skipped: u64,
}

impl From<&Counters> for ScalerState {
    fn from(counters: &Counters) -> Self {
        let Counters { scale, good_updates, skipped, .. } = *counters;
        Self { scale, good_updates, skipped }
    }
}

impl GradScaler {
    /// Creates a scaler with its initial scale.
    ///
    /// # Errors
    /// Returns an error if a setting is out of range.
    pub fn new(config: GradScalerConfig) -> Result<Self> {
        config.validate()?;
        // Rounded to f32, as on a device.
        let min_scale = f64::from(config.min_scale as f32);
        let state = ScalerState { scale: config.initial_scale, good_updates: 0, skipped: 0 };
        let mut scaler =
            Self { config: GradScalerConfig { min_scale, ..config }, state, exhausted: false };
        scaler.continue_from(state)?;
        Ok(scaler)
    }

    /// Continues from the state of a checkpoint.
    ///
    /// # Errors
    /// Returns an error if the scale is out of its range.
    pub(in crate::train) fn continue_from(&mut self, state: ScalerState) -> Result<()> {
        let (scale, least) = (f64::from(state.scale as f32), self.config.min_scale);
        if !(scale >= least && (scale as f32).is_finite()) {
            let expected = format!("at least {least}, and finite in f32");
            return Err(Error::config("grad_scaler.scale", scale, expected));
        }
        (self.state, self.exhausted) = (ScalerState { scale, ..state }, false);
        Ok(())
    }

    pub(super) fn rule(&self) -> ScaleRule {
        let GradScalerConfig { growth_factor, growth_interval, backoff_factor, min_scale, .. } =
            self.config;
        ScaleRule { growth_factor, growth_interval, backoff_factor, min_scale }
    }

    /// The counts of this scaler. The counts of the optimiser and the average are 0.
    pub(super) fn counters(&self) -> Counters {
        let ScalerState { scale, good_updates, skipped } = self.state;
        let exhausted = self.exhausted;
        Counters { scale, good_updates, skipped, exhausted, ..Counters::default() }
    }

    pub(super) fn set_counters(&mut self, counters: &Counters) {
        (self.state, self.exhausted) = (counters.into(), counters.exhausted);
    }

    /// The factor of the loss's gradient.
    pub fn scale(&self) -> f64 {
        self.state.scale
    }

    /// The number of updates that were skipped.
    pub fn skipped(&self) -> u64 {
        self.state.skipped
    }

    /// Returns whether gradients overflowed at the smallest scale. Scaling cannot fix such an overflow.
    pub fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// Adjusts the scale after a backward pass. `finite` states whether all gradients were finite.
    pub fn update(&mut self, finite: bool) {
        let mut counters = self.counters();
        self.rule().adapt(&mut counters, finite);
        self.set_counters(&counters);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected scales are those of PyTorch 2.13's `GradScaler(growth_interval=3)`.
    #[test]
    fn the_scale_is_pytorchs_after_each_update() -> Result<()> {
        let mut scaler =
            GradScaler::new(GradScalerConfig { growth_interval: 3, ..Default::default() })?;
        let found: Vec<f64> = [1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1]
            .map(|finite| {
                scaler.update(finite == 1);
                scaler.scale()
            })
            .to_vec();
        let k = 1024.0;
        let expected = [64, 64, 128, 64, 64, 64, 32, 16, 16, 16, 32, 32].map(|n| f64::from(n) * k);
        assert_eq!(found, expected);
        assert_eq!(scaler.skipped(), 3);
        Ok(())
    }

    #[test]
    fn the_scale_stays_within_its_range() -> Result<()> {
        let config = GradScalerConfig {
            initial_scale: 3.0,
            min_scale: 1.0,
            growth_interval: 1,
            growth_factor: 1e30,
            ..Default::default()
        };
        let mut scaler = GradScaler::new(config)?;
        for (scale, exhausted) in [(1.5, false), (1.0, false), (1.0, true)] {
            scaler.update(false);
            assert_eq!((scaler.scale(), scaler.is_exhausted()), (scale, exhausted));
        }
        scaler.update(true);
        assert_eq!(scaler.scale() as f32, 1e30);
        scaler.update(true);
        assert_eq!(scaler.scale() as f32, 1e30);
        Ok(())
    }
}
