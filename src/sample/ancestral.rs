//! Ancestral sampling. Ho et al. 2020, algorithm 2.

use serde::{Deserialize, Serialize};

use super::plan::{Level, Stage};
use crate::process::learned::LogVariances;

/// The variance of an ancestral step.
///
/// The two fixed variances (Ho et al. 2020, section 3.2) give different results at any number of steps; neither is a
/// more exact form of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Variance {
    /// `beta_t`, exact if the data is standard normal noise. Also called "fixed large".
    Beta,
    /// `beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)`, exact if the data is a single point. Also called
    /// "fixed small".
    Posterior,
    /// A variance between the two others, which the network outputs for each value. Nichol and Dhariwal 2021,
    /// equation 15. The network must have been trained with
    /// [`ObjectiveConfig::variational_bound`](crate::train::ObjectiveConfig::variational_bound).
    Learned,
}

/// One stage: the mean of `q(x_{t-1} | x_t, x_0)` (Ho et al. 2020, equation 7), and noise.
pub(super) fn stages(variance: Variance, from: Level, to: Level) -> Vec<Stage> {
    let (noise, noise_prev) = (1.0 - from.alpha_bar, 1.0 - to.alpha_bar);
    let alpha = from.alpha_bar / to.alpha_bar;
    let beta = 1.0 - alpha;
    let mut learned = None;
    let z = match variance {
        // The last step returns the mean, because its image is the result and is not denoised again.
        _ if to == Level::IMAGE => 0.0,
        Variance::Beta => beta.sqrt(),
        Variance::Posterior => posterior_std(from, to),
        Variance::Learned => {
            learned = Some(LogVariances::between(from.alpha_bar, to.alpha_bar));
            1.0
        }
    };
    vec![Stage {
        evaluate: Some(from),
        x_0: vec![to.alpha_bar.sqrt() * beta / noise],
        x: alpha.sqrt() * noise_prev / noise,
        z,
        learned,
    }]
}

/// The standard deviation of `q(x_{t-1} | x_t, x_0)`; Ho et al. 2020, equation 7.
///
/// `beta` is computed from the two levels, and is thus correct for any subset of the timesteps (Nichol and Dhariwal
/// 2021, equation 19).
pub(super) fn posterior_std(from: Level, to: Level) -> f64 {
    let (noise, noise_prev) = (1.0 - from.alpha_bar, 1.0 - to.alpha_bar);
    let beta = 1.0 - from.alpha_bar / to.alpha_bar;
    (beta * noise_prev / noise).sqrt()
}
