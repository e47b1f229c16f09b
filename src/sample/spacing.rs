use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::process::NoiseSchedule;

/// The choice of the `S` times at which the steps of a sampler begin, from the timesteps `0..T` of the schedule.
///
/// `Karras` and `LogSnr` choose levels of noise, whose times lie between two timesteps. There the log-SNR is
/// [interpolated](NoiseSchedule::log_snr), and the network receives the time in f32. Both are an error for a schedule
/// that [ends without signal](NoiseSchedule::zero_terminal_snr).
///
/// As text, a spacing is its name and settings, such as `Karras with rho 7`. [`NAMES`](Self::NAMES) lists the names
/// that can be parsed.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Spacing {
    /// Equal distances from 0 to `T - 1`, both included, rounded to timesteps, and the default. One step begins at `T -
    /// 1`. Nichol and Dhariwal 2021, section 4, with their code's rounding of halves to even.
    #[default]
    Even,
    /// The timesteps `i floor(T / S)`, from 0. With `S` less than `T` they do not include the last timestep, so that
    /// sampling begins at less noise than the process ends with. Song et al. 2021, appendix D.2, "linear"; [Lin et al.
    /// 2024](https://arxiv.org/abs/2305.08891), table 2, "leading".
    Leading,
    /// The timesteps `T - i T / S - 1`, rounded with halves to even, which end at `T - 1`. The first timestep is
    /// `T / S - 1`, rounded. Lin et al. 2024, table 2, "trailing".
    Trailing,
    /// The timesteps `floor(c i^2)` from 0 to `T - 1`, which are close to each other near the image. Song et al. 2021,
    /// appendix D.2, "quadratic", where the last timestep is not specified. With many steps the first of them would be
    /// equal. Each is then at least one more than the one before.
    Quadratic,
    /// Equal distances of `sigma^(1 / rho)`, from timestep 0 to `T - 1`, both included, with `sigma = sqrt((1 -
    /// alpha_bar) / alpha_bar)`. Karras et al. 2022, equation 5.
    Karras {
        /// From 1 to 100. The paper uses 7. Greater values bring the steps closer to the image.
        rho: f64,
    },
    /// Equal distances of the log-SNR, from timestep 0 to `T - 1`, both included. The values of `sigma` are then a
    /// geometric ("exponential") series. Lu et al. 2022,
    /// [DPM-Solver](https://arxiv.org/abs/2206.00927), the uniform steps of lambda.
    LogSnr,
}

impl Spacing {
    /// The names that [`FromStr`] accepts, with their meaning. `exponential` is another name of `log-snr`.
    pub const NAMES: [(&str, Self); 7] = [
        ("even", Self::Even),
        ("leading", Self::Leading),
        ("trailing", Self::Trailing),
        ("quadratic", Self::Quadratic),
        ("karras", Self::Karras { rho: 7.0 }),
        ("log-snr", Self::LogSnr),
        ("exponential", Self::LogSnr),
    ];

    /// Returns the times in increasing order.
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `1..=T`, or if `rho` is not in its range. Spacings by the log-SNR also
    /// return an error for a schedule that ends without signal.
    pub(super) fn times(self, schedule: &NoiseSchedule, steps: usize) -> Result<Vec<f64>> {
        let total = schedule.steps();
        if !(1..=total).contains(&steps) {
            let expected = format!("from 1 to {total}, the schedule's number of timesteps");
            return Err(Error::config("sampling steps", steps, expected));
        }
        let each = |time: &dyn Fn(usize) -> usize| (0..steps).map(|i| time(i) as f64).collect();
        let (last, gaps) = (total - 1, steps - 1);
        Ok(match self {
            Self::Leading => each(&|i| i * (total / steps)),
            Self::Trailing => {
                let stride = total as f64 / steps as f64;
                let above = |i| (total as f64 - (gaps - i) as f64 * stride).round_ties_even();
                each(&|i| above(i) as usize - 1)
            }
            Self::Karras { rho } if !(1.0..=100.0).contains(&rho) => {
                return Err(Error::config("rho", rho, "from 1 to 100"));
            }
            _ if steps == 1 => vec![last as f64],
            Self::Karras { .. } | Self::LogSnr
                if schedule.log_snr(last as f64)? == f64::NEG_INFINITY =>
            {
                let expected = "even, trailing or another whose times do not depend on the noise, \
                                because the schedule ends without signal";
                return Err(Error::config("spacing", self, expected));
            }
            Self::Even => {
                let gap = last as f64 / gaps as f64;
                each(&|i| (i as f64 * gap).round_ties_even() as usize)
            }
            Self::Quadratic => {
                let mut least = 0;
                let mut next = |i: usize| {
                    let square = (i * i) as u128 * last as u128 / (gaps * gaps) as u128;
                    let t = least.max(square as usize);
                    least = t + 1;
                    t as f64
                };
                (0..steps).map(&mut next).collect()
            }
            Self::Karras { rho } => {
                let root = |log_snr| libm::exp(-0.5 * log_snr / rho);
                between(schedule, steps, root, |root| -2.0 * rho * libm::log(root))?
            }
            Self::LogSnr => between(schedule, steps, |log_snr| log_snr, |log_snr| log_snr)?,
        })
    }
}

/// Returns times at equal distances of a function of the log-SNR, with both ends of the schedule.
fn between(
    schedule: &NoiseSchedule,
    steps: usize,
    of: impl Fn(f64) -> f64,
    inverse: impl Fn(f64) -> f64,
) -> Result<Vec<f64>> {
    let (last, gaps) = ((schedule.steps() - 1) as f64, (steps - 1) as f64);
    let (high, low) = (schedule.log_snr(0.0)?, schedule.log_snr(last)?);
    let time = |i: usize| match i {
        0 => Ok(0.0),
        i if i == steps - 1 => Ok(last),
        i => {
            let value = of(high) + i as f64 / gaps * (of(low) - of(high));
            schedule.time_of(inverse(value).clamp(low, high))
        }
    };
    (0..steps).map(time).collect()
}

/// # Errors
/// Returns an error if the list is empty, not strictly increasing, or contains a time that is not in [0, total - 1].
pub(super) fn check(times: &[f64], total: usize) -> Result<()> {
    let last = (total - 1) as f64;
    if times.is_empty() {
        let expected = format!("one or more, strictly increasing, from 0 to {last}");
        return Err(Error::config("timesteps", "[]", expected));
    }
    let fits = |i: usize| (0.0..=last).contains(&times[i]) && (i == 0 || times[i - 1] < times[i]);
    if let Some(i) = (0..times.len()).find(|&i| !fits(i)) {
        let value = format!("{} at index {i}", times[i]);
        let expected = format!("strictly increasing, from 0 to {last}");
        return Err(Error::config("timesteps", value, expected));
    }
    Ok(())
}

impl FromStr for Spacing {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, spacing)| *spacing).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name).join(", ");
            Error::config("spacing", name, format!("one of {names}"))
        })
    }
}

impl fmt::Display for Spacing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Even => f.write_str("even"),
            Self::Leading => f.write_str("leading"),
            Self::Trailing => f.write_str("trailing"),
            Self::Quadratic => f.write_str("quadratic"),
            Self::Karras { rho } => write!(f, "Karras with rho {rho}"),
            Self::LogSnr => f.write_str("even in log-SNR"),
        }
    }
}
