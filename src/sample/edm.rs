//! Stochastic Heun's method with churn. Karras et al. 2022, algorithm 2, with `sigma(t) = t` and `s(t) = 1`.

use serde::{Deserialize, Serialize};

use super::heun;
use super::plan::{Level, Stage};
use crate::error::{Error, Result};
use crate::process::NoiseSchedule;

/// The noise that [`Solver::Edm`](crate::Solver::Edm) adds before its steps; Karras et al. 2022, section 4.
///
/// Its levels are values of `sigma = sqrt((1 - alpha_bar) / alpha_bar)`. The default has the values for ImageNet-64 in
/// the paper's table 5. With `amount` 0, the solver is [`Solver::Heun`](crate::Solver::Heun).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Churn {
    /// `S_churn`, finite and at least 0. A step begins by raising `sigma` by the factor `1 + amount / steps`, but at
    /// most by the square root of 2.
    pub amount: f64,
    /// `S_tmin`, finite and at least 0. Steps that begin at a smaller `sigma` add no noise.
    pub min: f64,
    /// `S_tmax`, finite and at least `min`. Steps that begin at a greater `sigma` add no noise. `f64::MAX` is no limit.
    pub max: f64,
    /// `S_noise`, finite and at least 0: the standard deviation of the noise, 1 in theory. A little more than 1
    /// compensates for networks that remove too much noise.
    pub noise: f64,
}

impl Default for Churn {
    fn default() -> Self {
        Self::IMAGE_NET_64
    }
}

impl Churn {
    pub(super) const IMAGE_NET_64: Self = Self { amount: 40.0, min: 0.05, max: 50.0, noise: 1.003 };

    fn check(self) -> Result<()> {
        let limits = [
            ("churn amount", self.amount, 0.0, "finite and at least 0"),
            ("churn min", self.min, 0.0, "finite and at least 0"),
            ("churn max", self.max, self.min, "finite and at least the minimum"),
            ("churn noise", self.noise, 0.0, "finite and at least 0"),
        ];
        let wrong = |(_, value, low, _): &(_, f64, f64, _)| !(*low..f64::INFINITY).contains(value);
        match limits.into_iter().find(wrong) {
            Some((field, value, _, expected)) => Err(Error::config(field, value, expected)),
            None => Ok(()),
        }
    }

    /// The level to which a step from `from` raises the noise first. Its time is at most the last timestep, because the
    /// network knows no greater noise. The paper has no such limit.
    fn raised(self, schedule: &NoiseSchedule, from: Level, steps: usize) -> Result<Level> {
        let gamma = (self.amount / steps as f64).min(std::f64::consts::SQRT_2 - 1.0);
        if gamma == 0.0 || !(self.min..=self.max).contains(&from.sigma()) {
            return Ok(from);
        }
        let lowest = schedule.log_snr((schedule.steps() - 1) as f64)?;
        let log_snr = (schedule.log_snr(from.t)? - 2.0 * libm::log1p(gamma)).max(lowest);
        Level::new(schedule, schedule.time_of(log_snr)?)
    }
}

/// A stage that only adds noise, from `sigma` to `sigma^`, and then the stages of Heun's method from `sigma^`. Their
/// `x` is the sample before the noise, so each also adds its share of the same noise.
///
/// # Errors
/// Returns an error if a setting is not in its range.
pub(super) fn stages(
    churn: Churn,
    schedule: &NoiseSchedule,
    levels: &[Level],
    i: usize,
) -> Result<Vec<Stage>> {
    churn.check()?;
    let (from, to) = (levels[i], levels[i + 1]);
    let raised = churn.raised(schedule, from, levels.len() - 1)?;
    let mut stages = heun::stages(raised, to);
    if raised == from {
        return Ok(stages);
    }
    let variance = raised.sigma() * raised.sigma() - from.sigma() * from.sigma();
    let (x, z) = (raised.signal() / from.signal(), raised.signal() * churn.noise * variance.sqrt());
    for stage in &mut stages {
        (stage.x, stage.z) = (stage.x * x, stage.x * z);
    }
    stages.insert(0, Stage { evaluate: None, x_0: vec![], x, z, learned: None });
    Ok(stages)
}
