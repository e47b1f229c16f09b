use std::fmt;

use serde::{Deserialize, Serialize};

use super::ancestral::{self, Variance};
use super::plan::{Level, Stage};
use super::{ddim, heun};
use crate::error::Result;

/// The rule by which a sampler goes from one timestep to the next.
///
/// Each solver is a list of stages per sampling step: evaluations of the network, and sums with factors in f64. The
/// chapter on sampling lists the factors. As text, a solver is its name and settings, such as `DDIM with eta 0.5`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Solver {
    /// Ancestral sampling. Ho et al. 2020, algorithm 2.
    Ddpm {
        /// The variance of each step.
        variance: Variance,
    },
    /// Denoising diffusion implicit models. Song et al. 2021, equation 12.
    Ddim {
        /// From 0 (deterministic) to 1 (as much noise as ancestral sampling with
        /// [`Variance::Posterior`]).
        eta: f64,
    },
    /// Heun's second-order method for the probability-flow ODE, without noise. Karras et al. 2022, algorithm 1.
    ///
    /// Each step evaluates the network twice, except the last one. A step that divides
    /// `sqrt((1 - alpha_bar) / alpha_bar)` by a large factor is inaccurate. With the cosine schedule, whose last
    /// timestep is almost without signal, a sampler of few steps should therefore begin at an earlier timestep. The
    /// chapter on sampling has the numbers.
    Heun,
}

impl Solver {
    /// Ancestral sampling with `sigma_t^2 = beta_t`.
    pub const fn ddpm() -> Self {
        Self::Ddpm { variance: Variance::Beta }
    }

    /// Deterministic DDIM.
    pub const fn ddim() -> Self {
        Self::Ddim { eta: 0.0 }
    }

    /// Returns the stages of the step from `levels[i]` to `levels[i + 1]`; see [`Plan::new`](super::plan::Plan::new).
    /// A multistep solver also reads the levels before `i`.
    ///
    /// # Errors
    /// Returns an error if a setting of the solver is not in its range.
    pub(super) fn stages(self, levels: &[Level], i: usize) -> Result<Vec<Stage>> {
        let (from, to) = (levels[i], levels[i + 1]);
        match self {
            Self::Ddpm { variance } => Ok(ancestral::stages(variance, from, to)),
            Self::Ddim { eta } => ddim::stages(eta, from, to),
            Self::Heun => Ok(heun::stages(from, to)),
        }
    }
}

impl fmt::Display for Solver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ddpm { variance: Variance::Beta } => f.write_str("DDPM"),
            Self::Ddpm { variance: Variance::Posterior } => {
                f.write_str("DDPM with the posterior variance")
            }
            Self::Ddpm { variance: Variance::Learned } => {
                f.write_str("DDPM with the learned variance")
            }
            Self::Ddim { eta } => write!(f, "DDIM with eta {eta}"),
            Self::Heun => f.write_str("Heun"),
        }
    }
}
