//! The scalar arithmetic of an update. `begin_update` in `kernels/cuda/adam/adam.cu` is its counterpart on the device.

use std::fmt;

use candle_core::{Device, Tensor, Var};

use crate::error::Result;
use crate::kernels::op::counters::Counters;

/// The settings of updates.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpdateRule {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// The L2 decay, which is added to the gradient.
    pub l2: f64,
    /// The decoupled decay, which is applied to the weight.
    pub decoupled: f64,
    /// The largest norm of the gradient; infinite for no clipping.
    pub max_norm: f64,
    pub average: Option<AverageRule>,
    pub scale: Option<ScaleRule>,
    /// The settings for weights without a mean of squares.
    pub muon: Option<MuonRule>,
}

/// The settings of Muon.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MuonRule {
    /// The decay of the momentum.
    pub momentum: f64,
    /// Whether the gradient is added to the momentum once more.
    pub nesterov: bool,
    /// The decoupled decay, which is applied to the weight.
    pub decoupled: f64,
}

/// The settings of the average of the weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AverageRule {
    pub decay: f64,
    pub warmup: bool,
}

impl AverageRule {
    /// Returns the decay of the average in the update that follows `updates` others.
    pub fn decay_after(&self, updates: u64) -> f64 {
        let n = updates as f64;
        if self.warmup { self.decay.min((1.0 + n) / (10.0 + n)) } else { self.decay }
    }
}

/// The settings of the scale, by which the loss's gradient is multiplied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScaleRule {
    pub growth_factor: f64,
    pub growth_interval: u64,
    pub backoff_factor: f64,
    pub min_scale: f64,
}

impl ScaleRule {
    /// Adjusts the scale after a backward pass, and counts a skipped update. Micikevicius et al. 2018, section 3.2.
    pub fn adapt(&self, counters: &mut Counters, finite: bool) {
        if !finite {
            counters.exhausted = counters.scale <= self.min_scale;
            let lower = (counters.scale * self.backoff_factor).max(self.min_scale);
            // Rounded to f32, as on a device.
            counters.scale = f64::from(lower as f32);
            counters.good_updates = 0;
            counters.skipped += 1;
            return;
        }
        counters.good_updates += 1;
        if counters.good_updates >= self.growth_interval {
            let grown = f64::from((counters.scale * self.growth_factor) as f32);
            if grown.is_finite() {
                counters.scale = grown;
            }
            counters.good_updates = 0;
        }
    }
}

/// The factors of one update. Kingma and Ba 2015, algorithm 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// The learning rate divided by the bias correction of the mean.
    pub step_size: f64,
    /// 1 / √(bias correction of the mean square).
    pub root_scale: f64,
    /// The factor of the weight: decoupled decay.
    pub keep: f64,
    /// The factor of the weight in the gradient: L2 decay.
    pub l2: f64,
    /// The factor of the gradient: clipping, and the inverse of the loss's scale.
    pub gradient_scale: f64,
    /// The decay of the average.
    pub average: f64,
    pub learning_rate: f64,
    pub muon: Option<MuonRule>,
}

impl UpdateRule {
    /// Counts an update, and returns its factors.
    pub fn begin(
        &self,
        counters: &mut Counters,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Factors {
        let Self { beta1, beta2, eps, l2, .. } = *self;
        let average = self.average.map_or(0.0, |rule| rule.decay_after(counters.average_updates));
        self.count(counters);
        // The correction of the bias of both means, which begin at 0.
        let n = counters.updates as f64;
        let (bias1, bias2) = (1.0 - beta1.powf(n), 1.0 - beta2.powf(n));
        Factors {
            beta1,
            beta2,
            eps,
            step_size: learning_rate / bias1,
            root_scale: 1.0 / bias2.sqrt(),
            keep: 1.0 - learning_rate * self.decoupled,
            l2,
            gradient_scale,
            average,
            learning_rate,
            muon: self.muon,
        }
    }

    /// Counts an update that is not skipped.
    pub fn count(&self, counters: &mut Counters) {
        counters.updates += 1;
        counters.average_updates += u64::from(self.average.is_some());
    }

    /// Returns the inverse of the gradient scale, or 1 without a scale.
    pub fn unscale(&self, counters: &Counters) -> f64 {
        if self.scale.is_some() { 1.0 / counters.scale } else { 1.0 }
    }
}

/// A weight with the state that its update reads or changes.
#[derive(Debug)]
pub(crate) struct WeightState<'a> {
    pub weight: &'a Var,
    /// The mean of gradients: Adam's first moment, or Muon's momentum.
    pub mean: &'a mut Tensor,
    /// The mean of squared gradients. `None` for a matrix (output, ...) that Muon updates.
    pub square: Option<&'a mut Tensor>,
    /// The gradient. A backend may replace it by a scaled, clipped or contiguous one.
    pub gradient: Option<&'a mut Tensor>,
    /// The average of the weight.
    pub average: Option<&'a mut Tensor>,
}

/// The updates of a run. The default methods are those of a backend whose counts are kept on the host.
pub(crate) trait Updater: fmt::Debug + Send + Sync {
    /// Unscales the gradients, clips them to a global norm, updates the weights and then their averages. Returns the
    /// norm before clipping, a scalar. If the gradients are scaled and their norm is not finite, changes only the
    /// scale.
    ///
    /// Sets `counters` to those after the update, as far as they are known without waiting for the device.
    fn update(
        &mut self,
        weights: Vec<WeightState<'_>>,
        rule: &UpdateRule,
        learning_rate: f64,
        counters: &mut Counters,
    ) -> Result<Tensor>;

    /// The factor of the loss's gradient in the next update, a scalar of f32.
    fn loss_scale(&mut self, counters: &Counters) -> Result<Tensor> {
        Ok(Tensor::new(counters.scale as f32, &Device::Cpu)?)
    }

    /// Returns the counters of the device. Waits for the device.
    fn read(&self, counters: &Counters) -> Result<Counters> {
        Ok(*counters)
    }

    /// Uploads the factors that a recorded update reads when it is repeated.
    fn stage(&mut self, learning_rate: f64, counters: &Counters) -> Result<()> {
        let _ = (learning_rate, counters);
        Ok(())
    }

    /// Sets the counters that the device is known to have, after an update was recorded or repeated.
    fn assume(&mut self, counters: &Counters) {
        let _ = counters;
    }
}
