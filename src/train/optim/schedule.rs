use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The shape of the learning rate between its warm-up and its cool-down.
///
/// In the formulae, `p` is the fraction of the updates after the warm-up that have been made, from 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum LearningRateSchedule {
    /// The full learning rate.
    #[default]
    Constant,
    /// A straight line from the full learning rate to `end` times it: `1 - (1 - end) p`.
    Linear {
        /// The last fraction of the learning rate, from 0 to 1.
        end: f64,
    },
    /// Half a wave of a cosine, from the full learning rate to `end` times it: `end + (1 - end) (1 + cos πp) / 2`.
    /// Loshchilov and Hutter 2017, equation 5, without restarts.
    Cosine {
        /// The last fraction of the learning rate, from 0 to 1.
        end: f64,
    },
    /// The full learning rate for the first `reference_steps` updates, and then `√(reference_steps / n)` times it,
    /// where `n` is the number of updates so far. Karras et al. 2024 (EDM2), appendix B.
    InverseSqrt {
        /// Number of updates with the full learning rate; at least 1.
        reference_steps: u64,
    },
}

impl LearningRateSchedule {
    /// Returns whether this is the default.
    pub(in crate::train) fn is_constant(&self) -> bool {
        *self == Self::Constant
    }

    pub(in crate::train) fn validate(&self) -> Result<()> {
        match *self {
            Self::Linear { end } | Self::Cosine { end } if !(0.0..=1.0).contains(&end) => {
                Err(Error::config("schedule.end", end, "from 0 to 1"))
            }
            Self::InverseSqrt { reference_steps: 0 } => {
                Err(Error::config("schedule.reference_steps", 0, "at least 1"))
            }
            _ => Ok(()),
        }
    }

    /// The factor of the learning rate in the update that follows `step` others, of `steps` in total.
    fn factor(&self, step: u64, warmup_steps: u64, steps: u64) -> f64 {
        let after_warmup = |n: u64| n.saturating_sub(warmup_steps) as f64;
        let fraction = || match after_warmup(steps) {
            0.0 => 0.0,
            all => (after_warmup(step) / all).min(1.0),
        };
        match *self {
            Self::Constant => 1.0,
            Self::Linear { end } => 1.0 - (1.0 - end) * fraction(),
            Self::Cosine { end } => end + (1.0 - end) * 0.5 * (1.0 + (PI * fraction()).cos()),
            Self::InverseSqrt { reference_steps } => {
                (reference_steps as f64 / step.max(reference_steps) as f64).sqrt()
            }
        }
    }
}

/// The learning rate of a run: a linear rise to `peak`, a schedule, and a linear fall to zero at the end.
///
/// The schedule is multiplied by the smaller of the two other factors.
///
/// ```
/// use ddpm::train::{LearningRate, LearningRateSchedule};
///
/// let rate = LearningRate { peak: 1.0, warmup_steps: 4, cooldown: 0.5, steps: 8, ..Default::default() };
/// let rates: Vec<f64> = (0..9).map(|step| rate.at(step)).collect();
/// assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]);
///
/// let schedule = LearningRateSchedule::Linear { end: 0.5 };
/// let rate = LearningRate { peak: 1.0, steps: 4, schedule, ..Default::default() };
/// let rates: Vec<f64> = (0..5).map(|step| rate.at(step)).collect();
/// assert_eq!(rates, [1.0, 0.875, 0.75, 0.625, 0.5]);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LearningRate {
    /// The full learning rate.
    pub peak: f64,
    /// Number of updates of the rise; 0 for none.
    pub warmup_steps: u64,
    /// The shape between the rise and the fall.
    pub schedule: LearningRateSchedule,
    /// Fraction of `steps` that the fall takes, at the end of the run; from 0 (no fall) to 1. Hägele et al. 2024.
    pub cooldown: f64,
    /// Number of updates of the run.
    pub steps: u64,
}

impl LearningRate {
    /// The learning rate of an update; `step` counts from 0.
    pub fn at(&self, step: u64) -> f64 {
        let rise = match self.warmup_steps {
            0 => 1.0,
            warmup => (step.saturating_add(1) as f64 / warmup as f64).min(1.0),
        };
        let left = self.steps.saturating_sub(step) as f64;
        let fall = match self.cooldown * self.steps as f64 {
            0.0 => 1.0,
            cooldown => (left / cooldown).min(1.0),
        };
        let factor = self.schedule.factor(step, self.warmup_steps, self.steps);
        self.peak * factor * rise.min(fall)
    }
}
