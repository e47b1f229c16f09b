use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How much noise each timestep adds: `beta_t` and what follows from it, in f64.
///
/// Timesteps are `0..steps`; `t = 0` is already one noising step, so `x_0` itself has
/// `alpha_bar = 1`, which no `t` has. The tables hold no tensors: they are cast once, where they
/// meet one. Ho et al. 2020, section 2.
///
/// ```
/// use ddpm::NoiseSchedule;
///
/// let schedule = NoiseSchedule::linear(1000, 1e-4, 0.02)?;
/// assert_eq!(schedule.steps(), 1000);
/// assert!(schedule.alpha_bar(999)? < 5e-5); // nearly nothing of the image is left
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Spec", into = "Spec")]
pub struct NoiseSchedule {
    spec: Spec,
    betas: Vec<f64>,
    alpha_bars: Vec<f64>,
}

/// What a schedule was made from: all that a checkpoint has to remember of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Spec {
    Linear { steps: usize, beta_start: f64, beta_end: f64 },
    Cosine { steps: usize },
    Custom { betas: Vec<f64> },
}

impl NoiseSchedule {
    /// The most timesteps that a schedule may have.
    pub const MAX_STEPS: usize = 1 << 20;

    /// `beta` from `beta_start` to `beta_end` in equal steps, both ends included.
    ///
    /// Ho et al. 2020 use `linear(1000, 1e-4, 0.02)`.
    ///
    /// # Errors
    /// Unless `1 <= steps <= MAX_STEPS`, both betas lie strictly between 0 and 1, and `alpha_bar`
    /// stays at 1e-30 or more.
    pub fn linear(steps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        check_steps(steps)?;
        for (field, beta) in [("beta_start", beta_start), ("beta_end", beta_end)] {
            if !is_beta(beta) {
                return Err(Error::config(field, beta, "strictly between 0 and 1"));
            }
        }
        let last = (steps - 1).max(1) as f64;
        let betas = (0..steps)
            .map(|t| {
                // From the nearer end, so that both ends are exact and the table is symmetric.
                let step = (beta_end - beta_start) / last;
                if 2 * t < steps {
                    beta_start + step * t as f64
                } else {
                    beta_end - step * (steps - 1 - t) as f64
                }
            })
            .collect();
        Self::build(Spec::Linear { steps, beta_start, beta_end }, betas)
    }

    /// `alpha_bar_t = f(t + 1) / f(0)` with `f(t) = cos^2((t / steps + 0.008) / 1.008 * pi / 2)`,
    /// betas capped at 0.999. Nichol and Dhariwal 2021, equation 17.
    ///
    /// # Errors
    /// Unless `1 <= steps <= MAX_STEPS` and `alpha_bar` stays at 1e-30 or more.
    pub fn cosine(steps: usize) -> Result<Self> {
        check_steps(steps)?;
        let f = |t: usize| {
            let angle = (t as f64 / steps as f64 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2;
            libm::cos(angle) * libm::cos(angle)
        };
        let betas = (0..steps).map(|t| (1.0 - f(t + 1) / f(t)).min(0.999)).collect();
        Self::build(Spec::Cosine { steps }, betas)
    }

    /// A schedule of one's own: `betas[t]` for each timestep.
    ///
    /// # Errors
    /// Unless there are 1 to `MAX_STEPS` betas, each strictly between 0 and 1, and `alpha_bar`
    /// stays at 1e-30 or more. A beta of 1 (zero terminal signal-to-noise ratio) is refused:
    /// nothing of `x_0` would be left to predict noise from.
    pub fn from_betas(betas: Vec<f64>) -> Result<Self> {
        check_steps(betas.len())?;
        if let Some(t) = betas.iter().position(|&b| !is_beta(b)) {
            return Err(Error::config(
                "betas",
                format!("{} at t = {t}", betas[t]),
                "strictly between 0 and 1 at every timestep",
            ));
        }
        Self::build(Spec::Custom { betas: betas.clone() }, betas)
    }

    fn build(spec: Spec, betas: Vec<f64>) -> Result<Self> {
        let alpha_bars: Vec<f64> = betas
            .iter()
            .scan(1.0, |alpha_bar, beta| {
                *alpha_bar *= 1.0 - beta;
                Some(*alpha_bar)
            })
            .collect();
        // A beta too small for f64 would leave an alpha_bar of 1, where no noise is to be found.
        let falls = alpha_bars[0] < 1.0 && alpha_bars.windows(2).all(|w| w[1] < w[0]);
        if !falls {
            let value = "a table under which alpha_bar does not fall";
            return Err(Error::config("betas", value, "large enough to lower alpha_bar in f64"));
        }
        // Below this, 1 / sqrt(alpha_bar) leaves what f32 samplers can hold.
        let last = alpha_bars[alpha_bars.len() - 1];
        if last < 1e-30 {
            return Err(Error::config(
                "betas",
                format!("a table whose alpha_bar ends at {last:e}"),
                "small enough to leave alpha_bar at 1e-30 or more",
            ));
        }
        Ok(Self { spec, betas, alpha_bars })
    }

    /// Number of timesteps, `T`.
    pub fn steps(&self) -> usize {
        self.betas.len()
    }

    /// `beta_t` for every `t` in `0..steps`, each strictly between 0 and 1.
    pub fn betas(&self) -> &[f64] {
        &self.betas
    }

    /// `alpha_bar_t` for every `t` in `0..steps`: the product of `1 - beta_s` over all `s <= t`.
    /// Strictly decreasing, between 0 and 1.
    pub fn alpha_bars(&self) -> &[f64] {
        &self.alpha_bars
    }

    /// `alpha_bar_t`, between 0 and 1.
    ///
    /// # Errors
    /// Unless `t < steps`.
    pub fn alpha_bar(&self, t: usize) -> Result<f64> {
        self.alpha_bars.get(t).copied().ok_or_else(|| {
            let expected = format!("from 0 to {}, a timestep of the schedule", self.steps() - 1);
            Error::config("t", t, expected)
        })
    }

    /// Signal-to-noise ratio `alpha_bar_t / (1 - alpha_bar_t)`, of variances: not in decibels.
    ///
    /// # Errors
    /// Unless `t < steps`.
    pub fn snr(&self, t: usize) -> Result<f64> {
        self.alpha_bar(t).map(|alpha_bar| alpha_bar / (1.0 - alpha_bar))
    }
}

fn check_steps(steps: usize) -> Result<()> {
    if !(1..=NoiseSchedule::MAX_STEPS).contains(&steps) {
        let expected = format!("from 1 to {}", NoiseSchedule::MAX_STEPS);
        return Err(Error::config("schedule steps", steps, expected));
    }
    Ok(())
}

fn is_beta(beta: f64) -> bool {
    beta > 0.0 && beta < 1.0
}

impl TryFrom<Spec> for NoiseSchedule {
    type Error = Error;

    fn try_from(spec: Spec) -> Result<Self> {
        match spec {
            Spec::Linear { steps, beta_start, beta_end } => {
                Self::linear(steps, beta_start, beta_end)
            }
            Spec::Cosine { steps } => Self::cosine(steps),
            Spec::Custom { betas } => Self::from_betas(betas),
        }
    }
}

impl From<NoiseSchedule> for Spec {
    fn from(schedule: NoiseSchedule) -> Self {
        schedule.spec
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_bar_falls_strictly_from_nearly_one_to_nearly_nothing() {
        for schedule in
            [NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap(), NoiseSchedule::cosine(1000).unwrap()]
        {
            assert!(schedule.alpha_bars().windows(2).all(|w| w[1] < w[0]));
            assert!(schedule.snr(0).unwrap() > 1e3, "{schedule:?}");
            assert!(schedule.snr(999).unwrap() < 1e-3);
        }
    }

    #[test]
    fn linear_matches_published_values() {
        let schedule = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
        assert_eq!(schedule.betas()[0], 1e-4);
        assert_eq!(schedule.betas()[999], 0.02);
        // abar_T of Ho et al.: the closed sum of log(1 - beta) by Euler-Maclaurin is -10.1176.
        assert!((schedule.alpha_bar(999).unwrap().ln() + 10.1176).abs() < 1e-3);
        assert_eq!(NoiseSchedule::linear(1, 0.1, 0.2).unwrap().betas(), [0.1]);
    }

    #[test]
    fn cosine_follows_its_formula_until_the_cap() {
        let schedule = NoiseSchedule::cosine(1000).unwrap();
        let f = |t: f64| ((t / 1000.0 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
        for t in 0..999 {
            let expected = f(t as f64 + 1.0) / f(0.0);
            assert!((schedule.alpha_bars()[t] - expected).abs() < 1e-12, "t = {t}");
        }
        assert_eq!(schedule.betas()[999], 0.999);
    }

    #[test]
    fn survives_json_exactly() {
        for schedule in [
            NoiseSchedule::linear(10, 0.1, 0.3).unwrap(),
            NoiseSchedule::cosine(10).unwrap(),
            NoiseSchedule::from_betas(vec![0.1, 1.0 / 3.0]).unwrap(),
        ] {
            let json = serde_json::to_string(&schedule).unwrap();
            assert_eq!(serde_json::from_str::<NoiseSchedule>(&json).unwrap(), schedule);
        }
    }

    #[test]
    fn refuses_what_is_no_timestep() {
        let schedule = NoiseSchedule::linear(10, 0.1, 0.3).unwrap();
        assert_eq!(schedule.alpha_bar(9).unwrap(), schedule.alpha_bars()[9]);
        for t in [10, usize::MAX] {
            for result in [schedule.alpha_bar(t), schedule.snr(t)] {
                let message = result.unwrap_err().to_string();
                let expected = format!("t is {t}; it must be from 0 to 9, a timestep");
                assert!(message.contains(&expected), "{message}");
            }
        }
    }

    #[test]
    fn refuses_what_is_no_schedule() {
        let errors = [
            (NoiseSchedule::linear(0, 0.1, 0.2), "schedule steps is 0; it must be from 1 to"),
            (NoiseSchedule::linear(usize::MAX, 0.1, 0.2), "it must be from 1 to"),
            (NoiseSchedule::linear(10, 0.0, 0.2), "beta_start is 0; it must be strictly between"),
            (NoiseSchedule::linear(10, 0.1, 1.0), "beta_end is 1; it must be strictly between"),
            (NoiseSchedule::linear(10, f64::NAN, 0.2), "beta_start is NaN"),
            (NoiseSchedule::from_betas(vec![]), "schedule steps is 0"),
            (NoiseSchedule::from_betas(vec![0.5, 1.0]), "betas is 1 at t = 1"),
            (NoiseSchedule::from_betas(vec![0.999; 100]), "alpha_bar ends at"),
            (NoiseSchedule::from_betas(vec![1e-17; 4]), "alpha_bar does not fall"),
            (NoiseSchedule::cosine(0), "schedule steps is 0"),
        ];
        for (result, expected) in errors {
            let message = result.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let json = r#"{"linear": {"steps": 10, "beta_start": 2, "beta_end": 0.1}}"#;
        assert!(serde_json::from_str::<NoiseSchedule>(json).is_err());
    }
}
