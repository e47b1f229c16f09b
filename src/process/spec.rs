//! The formulae of the schedules.

use std::fmt;
use std::sync::Arc;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// The maximum number of timesteps of a schedule.
pub(super) const MAX_STEPS: usize = 1 << 20;

/// The arguments from which a schedule was made, which a checkpoint stores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Spec {
    Linear { steps: usize, beta_start: f64, beta_end: f64 },
    Quadratic { steps: usize, beta_start: f64, beta_end: f64 },
    Cosine { steps: usize },
    Sigmoid { steps: usize, start: f64, end: f64, tau: f64 },
    Custom { betas: Betas },
    Shifted { schedule: Box<Spec>, log_snr_shift: f64 },
    ZeroTerminalSnr { schedule: Box<Spec> },
}

/// The table of a custom schedule. Reading it stops with an error beyond the length of the longest schedule.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Betas(pub Arc<[f64]>);

impl Serialize for Betas {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Betas {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct List;

        impl<'de> Visitor<'de> for List {
            type Value = Betas;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {} betas", MAX_STEPS)
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> std::result::Result<Betas, A::Error> {
                let mut betas = Vec::new();
                while let Some(beta) = list.next_element()? {
                    if betas.len() == MAX_STEPS {
                        return Err(serde::de::Error::invalid_length(betas.len() + 1, &self));
                    }
                    betas.push(beta);
                }
                Ok(Betas(betas.into()))
            }
        }

        deserializer.deserialize_seq(List)
    }
}

/// The tables of a schedule: `beta_t` and `alpha_bar_t`.
type Tables = (Arc<[f64]>, Arc<[f64]>);

impl Spec {
    /// Computes the tables of the schedule.
    ///
    /// # Errors
    /// Returns an error that names the first argument that is not allowed.
    pub fn tables(&self) -> Result<Tables> {
        match self {
            &Self::Linear { steps, beta_start, beta_end } => {
                check_ends(steps, beta_start, beta_end)?;
                from_betas(even(steps, beta_start, beta_end).collect())
            }
            &Self::Quadratic { steps, beta_start, beta_end } => {
                check_ends(steps, beta_start, beta_end)?;
                let roots = even(steps, beta_start.sqrt(), beta_end.sqrt());
                from_betas(roots.map(|root| root * root).collect())
            }
            &Self::Cosine { steps } => {
                let f = |t: usize| {
                    let angle =
                        (t as f64 / steps as f64 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2;
                    libm::cos(angle) * libm::cos(angle)
                };
                from_ratios(steps, f)
            }
            &Self::Sigmoid { steps, start, end, tau } => {
                if !(start < end && start.is_finite() && end.is_finite()) {
                    let expected = format!("finite and less than end, which is {end}");
                    return Err(Error::config("start", start, expected));
                }
                if !(tau > 0.0 && tau.is_finite()) {
                    return Err(Error::config("tau", tau, "positive and finite"));
                }
                let logistic = |x: f64| 1.0 / (1.0 + libm::exp(-x / tau));
                let at = |t: usize| start + (end - start) * (t as f64 / steps as f64);
                from_ratios(steps, |t| logistic(end) - logistic(at(t)))
            }
            Self::Custom { betas } => {
                check_steps(betas.0.len())?;
                if let Some(t) = betas.0.iter().position(|&b| !is_beta(b)) {
                    return Err(Error::config(
                        "betas",
                        format!("{} at t = {t}", betas.0[t]),
                        "strictly between 0 and 1 at every timestep",
                    ));
                }
                from_betas(betas.0.clone())
            }
            Self::Shifted { schedule, log_snr_shift } => {
                if !log_snr_shift.is_finite() {
                    return Err(Error::config("log_snr_shift", log_snr_shift, "finite"));
                }
                let factor = libm::exp(*log_snr_shift);
                let shifted = |&bar: &f64| factor * bar / (factor * bar + (1.0 - bar));
                from_alpha_bars(schedule.tables()?.1.iter().map(shifted).collect())
            }
            Self::ZeroTerminalSnr { schedule } => {
                let (_, bars) = schedule.tables()?;
                let (first, last) = (bars[0].sqrt(), bars[bars.len() - 1].sqrt());
                if bars.len() == 1 {
                    let expected = "at least 2, to end without signal";
                    return Err(Error::config("schedule steps", 1, expected));
                }
                let rescaled = |bar: &f64| (bar.sqrt() - last) * (first / (first - last));
                from_alpha_bars(bars.iter().map(rescaled).map(|root| root * root).collect())
            }
        }
    }
}

/// The numbers from `start` to `end` in equal increments. They are computed from the nearer end, so that both ends are
/// exact and the table is symmetric.
fn even(steps: usize, start: f64, end: f64) -> impl Iterator<Item = f64> {
    let step = (end - start) / (steps - 1).max(1) as f64;
    (0..steps).map(move |t| {
        if 2 * t < steps { start + step * t as f64 } else { end - step * (steps - 1 - t) as f64 }
    })
}

/// The tables with `alpha_bar_t = f(t + 1) / f(0)`, and betas of at most 0.999.
fn from_ratios(steps: usize, f: impl Fn(usize) -> f64) -> Result<Tables> {
    check_steps(steps)?;
    from_betas((0..steps).map(|t| (1.0 - f(t + 1) / f(t)).min(0.999)).collect())
}

fn from_betas(betas: Arc<[f64]>) -> Result<Tables> {
    let mut alpha_bar = 1.0;
    let next = |beta: &f64| {
        alpha_bar *= 1.0 - beta;
        alpha_bar
    };
    let alpha_bars: Arc<[f64]> = betas.iter().map(next).collect();
    // Checked first, because an alpha_bar of 0 does not fall any further.
    check_least(alpha_bars.len(), alpha_bar)?;
    check_falls(&betas, &alpha_bars)?;
    Ok((betas, alpha_bars))
}

/// The tables with these `alpha_bar_t`, of which the last may be 0.
fn from_alpha_bars(alpha_bars: Arc<[f64]>) -> Result<Tables> {
    let signals = alpha_bars.iter().rev().skip_while(|bar| **bar == 0.0);
    check_least(alpha_bars.len(), signals.copied().next().unwrap_or(0.0))?;
    let before = [1.0].into_iter().chain(alpha_bars.iter().copied());
    let betas: Arc<[f64]> =
        alpha_bars.iter().zip(before).map(|(bar, before)| 1.0 - bar / before).collect();
    check_falls(&betas, &alpha_bars)?;
    Ok((betas, alpha_bars))
}

/// # Errors
/// Returns an error if the least `alpha_bar` is below 1e-30: `1 / sqrt(alpha_bar)` would make samplers in f32 overflow.
fn check_least(steps: usize, least: f64) -> Result<()> {
    if least >= 1e-30 {
        return Ok(());
    }
    Err(Error::config(
        "betas",
        format!("a table of {steps} whose alpha_bar ends at {least:.1e}"),
        "small enough to leave alpha_bar at 1e-30 or more: use smaller betas or fewer steps",
    ))
}

/// # Errors
/// Returns an error if `alpha_bar` does not fall at some timestep. A beta too small for f64, for example, would leave
/// it at 1, that is, without noise.
fn check_falls(betas: &[f64], alpha_bars: &[f64]) -> Result<()> {
    let falls = |t: usize| alpha_bars[t] < if t == 0 { 1.0 } else { alpha_bars[t - 1] };
    let Some(t) = (0..betas.len()).find(|&t| !falls(t)) else { return Ok(()) };
    let value = format!("{:e} at t = {t}", betas[t]);
    Err(Error::config("betas", value, "large enough to lower alpha_bar in f64"))
}

fn check_steps(steps: usize) -> Result<()> {
    if !(1..=MAX_STEPS).contains(&steps) {
        let expected = format!("from 1 to {}", MAX_STEPS);
        return Err(Error::config("schedule steps", steps, expected));
    }
    Ok(())
}

fn check_ends(steps: usize, beta_start: f64, beta_end: f64) -> Result<()> {
    check_steps(steps)?;
    for (field, beta) in [("beta_start", beta_start), ("beta_end", beta_end)] {
        if !is_beta(beta) {
            return Err(Error::config(field, beta, "strictly between 0 and 1"));
        }
    }
    Ok(())
}

fn is_beta(beta: f64) -> bool {
    beta > 0.0 && beta < 1.0
}
