use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ancestral::{self, Variance};
use super::edm::{self, Churn};
use super::plan::{Level, Stage};
use super::spacing::Spacing;
use super::unipc::{self, BFunction};
use super::{ddim, dpm_solver, heun};
use crate::error::{Error, Result};
use crate::process::NoiseSchedule;

/// The rule by which a sampler goes from one timestep to the next.
///
/// Each solver is a list of stages per sampling step: evaluations of the network, and sums with factors in f64. The
/// chapter on sampling compares the solvers. As text, a solver is its name and settings, such as `DDIM with eta 0.5`.
/// [`NAMES`](Self::NAMES) lists the names that can be parsed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Solver {
    /// Ancestral sampling. Ho et al. 2020, algorithm 2.
    Ddpm {
        /// The variance of each step.
        variance: Variance,
    },
    /// Denoising diffusion implicit models. Song et al. 2021, equation 12. Also Euler's method, for the
    /// [probability-flow ODE](Self::euler) and with [ancestral noise](Self::euler_ancestral).
    Ddim {
        /// From 0 (deterministic) to 1 (as much noise as ancestral sampling with
        /// [`Variance::Posterior`]).
        eta: f64,
    },
    /// DDIM whose noise is that of the prediction before it is clipped or thresholded, as diffusers' `DDIMScheduler`
    /// computes it. In [`Ddim`](Self::Ddim) the noise follows from the clipped prediction, as in `x_t`. Without
    /// clipping both are the same, except for rounding.
    DdimUnclippedNoise {
        /// As in [`Ddim`](Self::Ddim).
        eta: f64,
    },
    /// Heun's second-order method for the probability-flow ODE, without noise. Karras et al. 2022, algorithm 1.
    ///
    /// Each step evaluates the network twice, except the last one. A step that divides
    /// `sqrt((1 - alpha_bar) / alpha_bar)` by a large factor is inaccurate. Even timesteps of the cosine schedule, whose
    /// last timestep is almost without signal, have such steps; [`usual_spacing`](Self::usual_spacing) avoids them. The
    /// chapter on sampling has the numbers.
    Heun,
    /// Heun's method after noise that each step adds first. Karras et al. 2022, algorithm 2.
    Edm(Churn),
    /// DPM-Solver++, multistep, without noise. Lu et al. 2022, [DPM-Solver++](https://arxiv.org/abs/2211.01095),
    /// algorithm 2. One evaluation per step.
    DpmSolver {
        /// The order of accuracy: 2 ("2M") or 3 ("3M"). Order 1 would be deterministic DDIM.
        order: usize,
    },
    /// DPM-Solver++ of order 2 for the reverse SDE ("SDE 2M"), with noise in each step except the last one. Lu et al.
    /// 2022 (DPM-Solver++), the section on diffusion SDEs. One evaluation per step.
    DpmSolverSde,
    /// UniPC: a predictor, and a corrector that uses the evaluation of the next step. Zhao et al. 2023,
    /// [UniPC](https://arxiv.org/abs/2302.04867). One evaluation per step.
    #[serde(rename = "unipc")]
    UniPc {
        /// The order of the predictor, from 1 to 3. The corrector raises the order of accuracy by one.
        order: usize,
        /// The function `B(h)`.
        b: BFunction,
    },
}

impl Solver {
    /// The names that [`FromStr`] accepts, with their meaning. `euler` and `euler-ancestral` are other names of `ddim`
    /// with eta 0 and 1.
    pub const NAMES: [(&str, Self); 13] = [
        ("ddpm", Self::ddpm()),
        ("ddim", Self::ddim()),
        ("ddim-unclipped-noise", Self::DdimUnclippedNoise { eta: 0.0 }),
        ("euler", Self::euler()),
        ("euler-ancestral", Self::euler_ancestral(1.0)),
        ("heun", Self::Heun),
        ("edm", Self::Edm(Churn::IMAGE_NET_64)),
        ("dpm-solver-2m", Self::DpmSolver { order: 2 }),
        ("dpm-solver-3m", Self::DpmSolver { order: 3 }),
        ("dpm-solver-sde", Self::DpmSolverSde),
        ("unipc-1", Self::UniPc { order: 1, b: BFunction::Bh2 }),
        ("unipc-2", Self::UniPc { order: 2, b: BFunction::Bh2 }),
        ("unipc-3", Self::UniPc { order: 3, b: BFunction::Bh2 }),
    ];

    /// Ancestral sampling with `sigma_t^2 = beta_t`.
    pub const fn ddpm() -> Self {
        Self::Ddpm { variance: Variance::Beta }
    }

    /// Deterministic DDIM.
    pub const fn ddim() -> Self {
        Self::Ddim { eta: 0.0 }
    }

    /// Euler's method for the probability-flow ODE `dy/dsigma = (y - x_0) / sigma` (Karras et al. 2022, equation 1),
    /// with `y = x / sqrt(alpha_bar)` and `sigma = sqrt((1 - alpha_bar) / alpha_bar)`. It is deterministic DDIM: a step
    /// of either gives `sigma'/sigma y + (1 - sigma'/sigma) x_0`.
    pub const fn euler() -> Self {
        Self::ddim()
    }

    /// Euler's method with ancestral noise, as k-diffusion's and diffusers' (whose `eta` is 1). It is DDIM with the
    /// same `eta`.
    ///
    /// Both go to `sqrt(sigma'^2 - up^2)` by Euler's method, and then add noise of standard deviation
    /// `up = eta sigma' sqrt(1 - sigma'^2 / sigma^2)`. With `sigma^2 = 1 / alpha_bar - 1`, this is the noise of Song et
    /// al. 2021, equation 16, divided by `sqrt(alpha_bar')`.
    pub const fn euler_ancestral(eta: f64) -> Self {
        Self::Ddim { eta }
    }

    /// The name of the solver, one of [`NAMES`](Self::NAMES), or `None` if its order is not in its range. The order of
    /// a solver is a part of its name. `eta`, the variance, the churn and `B(h)` are not.
    pub fn name(self) -> Option<&'static str> {
        let usual = match self {
            Self::Ddpm { .. } => Self::ddpm(),
            Self::Ddim { .. } => Self::ddim(),
            Self::DdimUnclippedNoise { .. } => Self::DdimUnclippedNoise { eta: 0.0 },
            Self::Edm(_) => Self::Edm(Churn::IMAGE_NET_64),
            Self::UniPc { order, .. } => Self::UniPc { order, b: BFunction::Bh2 },
            other => other,
        };
        Self::NAMES.iter().find(|(_, solver)| *solver == usual).map(|(name, _)| *name)
    }

    /// The spacing with which the solver is usually best in few steps: [`Spacing::LogSnr`] for the solvers that take
    /// Heun's steps, whose steps must not divide the noise by a large factor, and otherwise [`Spacing::Even`].
    pub const fn usual_spacing(self) -> Spacing {
        match self {
            Self::Heun | Self::Edm(_) => Spacing::LogSnr,
            _ => Spacing::Even,
        }
    }

    /// Whether the stages use predictions before they are clipped.
    pub(super) fn needs_unclipped(self) -> bool {
        matches!(self, Self::DdimUnclippedNoise { .. })
    }

    /// Returns the stages of the step from `levels[i]` to `levels[i + 1]`; see [`Plan::new`](super::plan::Plan::new).
    /// A multistep solver also reads the levels before `i`.
    ///
    /// # Errors
    /// Returns an error if a setting of the solver is not in its range.
    pub(super) fn stages(
        self,
        schedule: &NoiseSchedule,
        levels: &[Level],
        i: usize,
    ) -> Result<Vec<Stage>> {
        let (from, to) = (levels[i], levels[i + 1]);
        match self {
            Self::Ddpm { variance } => Ok(ancestral::stages(variance, from, to)),
            Self::Ddim { eta } => ddim::stages(eta, from, to),
            Self::DdimUnclippedNoise { eta } => ddim::unclipped_stages(eta, from, to),
            Self::Heun => Ok(heun::stages(from, to)),
            Self::Edm(churn) => edm::stages(churn, schedule, levels, i),
            Self::DpmSolver { order } => dpm_solver::stages(order, levels, i),
            Self::DpmSolverSde => Ok(dpm_solver::sde_stages(levels, i)),
            Self::UniPc { order, b } => unipc::stages(order, b, levels, i),
        }
    }
}

impl FromStr for Solver {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, solver)| *solver).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name).join(", ");
            Error::config("solver", name, format!("one of {names}"))
        })
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
            Self::DdimUnclippedNoise { eta } => {
                write!(f, "DDIM with eta {eta} and unclipped noise")
            }
            Self::Heun => f.write_str("Heun"),
            Self::Edm(Churn { amount, min, max, noise }) => {
                write!(f, "EDM with churn {amount} from {min} to {max} and noise {noise}")
            }
            Self::DpmSolver { order } => write!(f, "DPM-Solver++({order}M)"),
            Self::DpmSolverSde => f.write_str("SDE-DPM-Solver++(2M)"),
            Self::UniPc { order, b: BFunction::Bh1 } => write!(f, "UniPC-{order} with B1"),
            Self::UniPc { order, b: BFunction::Bh2 } => write!(f, "UniPC-{order}"),
        }
    }
}
