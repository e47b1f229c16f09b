//! The learned variance of the reverse process. Nichol and Dhariwal 2021, equation 15.

use super::schedule::NoiseSchedule;
use crate::error::Result;

/// The logarithms of the two variances between which a network interpolates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LogVariances {
    /// The logarithm of the variance of the posterior; Ho et al. 2020, equation 7.
    pub least: f64,
    /// The logarithm of `beta`.
    pub most: f64,
}

impl LogVariances {
    /// The variances of a step from one `alpha_bar` to the next, which is not 1.
    pub fn between(from: f64, to: f64) -> Self {
        let beta = 1.0 - from / to;
        let (posterior, most) = (beta * (1.0 - to) / (1.0 - from), libm::log(beta));
        Self { least: libm::log(posterior), most }
    }

    /// The variances of a timestep in training.
    ///
    /// # Errors
    /// Returns an error if `t` is not less than the number of timesteps.
    pub fn of_training(schedule: &NoiseSchedule, t: usize) -> Result<Self> {
        schedule.alpha_bar(t)?;
        Ok(Self::of_chain(schedule.alpha_bars(), t))
    }

    /// The variances of the step from `bars[i]`, where the `alpha_bar` are those of decreasing signal. The posterior of
    /// the first has no variance, so that of the second takes its place, as in Nichol and Dhariwal's code. A chain of
    /// one `alpha_bar` has only its beta. `i` must be less than the length of `bars`.
    pub fn of_chain(bars: &[f64], i: usize) -> Self {
        if let Some(before) = i.checked_sub(1) {
            return Self::between(bars[i], bars[before]);
        }
        let most = libm::log(1.0 - bars[0]);
        let least = match bars {
            [first, second, ..] => Self::between(*second, *first).least,
            _ => most,
        };
        Self { least, most }
    }

    /// The logarithm of the variance for an output `v` of the network: -1 is the least variance, and 1 the largest.
    pub fn at(self, v: f64) -> f64 {
        let share = 0.5 * (v + 1.0);
        share * self.most + (1.0 - share) * self.least
    }

    /// The derivative of [`at`](Self::at).
    pub fn slope(self) -> f64 {
        0.5 * (self.most - self.least)
    }
}
