use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use crate::kernels::cuda::{Counts, UpdateSettings};
use crate::{Error, Result};

/// Settings of [`GradScaler`]; the defaults are PyTorch's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradScalerConfig {
    /// The scale at first; at least `min_scale`.
    pub initial_scale: f64,
    /// What the scale is multiplied by after `growth_interval` updates without an overflow; at
    /// least 1.
    pub growth_factor: f64,
    /// At least 1.
    pub growth_interval: u64,
    /// What the scale is multiplied by after an overflow; positive and less than 1.
    pub backoff_factor: f64,
    /// The least scale: gradients that overflow even then are an error. Positive.
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
    pub(super) fn validate(&self) -> Result<()> {
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

/// Keeps gradients of half precision from vanishing: the loss's gradient is multiplied by a scale,
/// which is divided out again in f32. Where one is infinite or NaN nevertheless, the update is
/// skipped and the scale falls; after many good ones it rises. Micikevicius et al. 2018, section
/// 3.2; as PyTorch's `GradScaler`.
///
/// [`Trainer`](crate::Trainer) has one with [`Precision::F16`](crate::Precision::F16). In a loop of
/// one's own: multiply the loss's gradient by [`scale`](Self::scale), divide the gradients by it,
/// look whether their norm is finite, then clip and step if it is, and tell
/// [`update`](Self::update).
#[derive(Debug, Clone)]
pub struct GradScaler {
    config: GradScalerConfig,
    state: ScalerState,
    exhausted: bool,
}

/// What a checkpoint keeps of a scaler.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScalerState {
    pub scale: f64,
    /// Updates since the last overflow or growth.
    pub good_updates: u64,
    /// Updates that were skipped.
    pub skipped: u64,
}

impl GradScaler {
    /// A scaler at its initial scale.
    ///
    /// # Errors
    /// If a setting is out of its range.
    pub fn new(config: GradScalerConfig) -> Result<Self> {
        let state = ScalerState { scale: config.initial_scale, good_updates: 0, skipped: 0 };
        Self::restore(config, state)
    }

    pub(super) fn restore(config: GradScalerConfig, state: ScalerState) -> Result<Self> {
        config.validate()?;
        // As a device keeps them.
        let rounded = |x: f64| f64::from(x as f32);
        let config = GradScalerConfig { min_scale: rounded(config.min_scale), ..config };
        let state = ScalerState { scale: rounded(state.scale), ..state };
        if !(state.scale >= config.min_scale && (state.scale as f32).is_finite()) {
            let expected = format!("at least {}, and finite in f32", config.min_scale);
            return Err(Error::config("grad_scaler.scale", state.scale, expected));
        }
        Ok(Self { config, state, exhausted: false })
    }

    pub(super) fn state(&self) -> ScalerState {
        self.state
    }

    /// With what a device counted.
    #[cfg(feature = "cuda")]
    pub(super) fn with_counts(&self, counts: Counts) -> Self {
        let Counts { scale, good_updates, skipped, exhausted, .. } = counts;
        Self { config: self.config, state: ScalerState { scale, good_updates, skipped }, exhausted }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn counts(&self, steps: u64, ema_updates: u64) -> Counts {
        let ScalerState { scale, good_updates, skipped } = self.state;
        let exhausted = self.exhausted;
        Counts { steps, ema_updates, scale, good_updates, skipped, exhausted }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn put_settings(&self, settings: &mut UpdateSettings) {
        settings.scaled = 1.0;
        settings.growth_factor = self.config.growth_factor;
        settings.growth_interval = self.config.growth_interval as f64;
        settings.backoff_factor = self.config.backoff_factor;
        settings.min_scale = self.config.min_scale;
    }

    /// What the loss's gradient is multiplied by.
    pub fn scale(&self) -> f64 {
        self.state.scale
    }

    /// How many updates were skipped.
    pub fn skipped(&self) -> u64 {
        self.state.skipped
    }

    /// Whether gradients overflowed at the least scale: then scaling does not mend them.
    pub fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// After a pass whose gradients were all finite, or not.
    pub fn update(&mut self, finite: bool) {
        let GradScalerConfig { growth_factor, growth_interval, backoff_factor, min_scale, .. } =
            self.config;
        let state = &mut self.state;
        if !finite {
            self.exhausted = state.scale <= min_scale;
            state.scale = f64::from((state.scale * backoff_factor).max(min_scale) as f32);
            state.good_updates = 0;
            state.skipped += 1;
            return;
        }
        state.good_updates += 1;
        if state.good_updates >= growth_interval {
            let grown = f64::from((state.scale * growth_factor) as f32);
            if grown.is_finite() {
                state.scale = grown;
            }
            state.good_updates = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What PyTorch 2.13's `GradScaler(growth_interval=3)` has after each of these.
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
