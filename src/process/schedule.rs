use std::fmt;
use std::sync::Arc;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// The amount of noise at each timestep: tables of `beta_t` and `alpha_bar_t` in f64. Ho et al. 2020, section 2.
///
/// Timesteps are `0..steps`. `t = 0` is already one noising step, so `x_0` itself has `alpha_bar = 1`, which no
/// timestep has. The tables are not tensors; their values are cast when they are combined with a tensor. Clones
/// share the tables.
///
/// Sampling begins at pure noise. If the last timestep of a schedule still contains signal, training and sampling
/// return no error, but samples have the wrong mean and variance; see [`reaches_noise`](Self::reaches_noise).
///
/// ```
/// use ddpm::NoiseSchedule;
///
/// let schedule = NoiseSchedule::linear(1000, 1e-4, 0.02)?;
/// assert_eq!(schedule.steps(), 1000);
/// assert!(schedule.alpha_bar(999)? < 5e-5); // almost nothing of the image is left
/// assert!(schedule.reaches_noise());
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Spec", into = "Spec")]
pub struct NoiseSchedule {
    spec: Spec,
    betas: Arc<[f64]>,
    alpha_bars: Arc<[f64]>,
}

/// The arguments from which a schedule was made, which a checkpoint stores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Spec {
    Linear { steps: usize, beta_start: f64, beta_end: f64 },
    Cosine { steps: usize },
    Custom { betas: Betas },
}

/// The table of a custom schedule. Reading it stops with an error beyond the length of the longest schedule.
#[derive(Debug, Clone, PartialEq)]
struct Betas(Arc<[f64]>);

impl Serialize for Betas {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Betas {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Table;

        impl<'de> Visitor<'de> for Table {
            type Value = Betas;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {} betas", NoiseSchedule::MAX_STEPS)
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> std::result::Result<Betas, A::Error> {
                let mut betas = Vec::new();
                while let Some(beta) = list.next_element()? {
                    if betas.len() == NoiseSchedule::MAX_STEPS {
                        return Err(serde::de::Error::invalid_length(betas.len() + 1, &self));
                    }
                    betas.push(beta);
                }
                Ok(Betas(betas.into()))
            }
        }

        deserializer.deserialize_seq(Table)
    }
}

impl NoiseSchedule {
    /// The maximum number of timesteps of a schedule.
    pub const MAX_STEPS: usize = 1 << 20;

    /// The largest [`terminal_snr`](Self::terminal_snr) that counts as noise. The share of the image in the last
    /// `x_t` is then at most its square root, 0.032.
    ///
    /// Ho's schedule ends at 4.0e-5, and the cosine schedule of 1,000 timesteps at 2.4e-9. A schedule that ends at
    /// 4.7e-3 is known to prevent samples from being as dark or as bright as the data
    /// (Lin et al. 2024, [Common Diffusion Noise Schedules and Sample Steps are
    /// Flawed](https://arxiv.org/abs/2305.08891), table 1).
    pub const NOISE_SNR: f64 = 1e-3;

    /// The linear schedule: `beta` from `beta_start` to `beta_end` in equal increments, both ends included.
    ///
    /// Ho et al. 2020 use `linear(1000, 1e-4, 0.02)`. These betas suit that number of timesteps: with fewer than 683
    /// the schedule does not [reach noise](Self::reaches_noise). [`linear_scaled`](Self::linear_scaled) adapts them
    /// to another number of timesteps.
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `1..=MAX_STEPS`, if a beta does not lie strictly between 0
    /// and 1, or if `alpha_bar` falls below 1e-30.
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
                // Computed from the nearer end, so that both ends are exact and the table is symmetric.
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

    /// Ho's linear schedule for another number of timesteps: `beta` from `1e-4 s` to `0.02 s` with
    /// `s = 1000 / steps`, so that it ends with as much noise. `linear_scaled(1000)` equals
    /// `linear(1000, 1e-4, 0.02)`. The scaling is that of Nichol and Dhariwal's code.
    ///
    /// ```
    /// use ddpm::NoiseSchedule;
    ///
    /// let few = NoiseSchedule::linear_scaled(100)?;
    /// assert_eq!(few, NoiseSchedule::linear(100, 1e-3, 0.2)?);
    /// assert!(few.reaches_noise());
    /// assert!(!NoiseSchedule::linear(100, 1e-4, 0.02)?.reaches_noise());
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `21..=MAX_STEPS`: with 20 steps the last beta is 1.
    pub fn linear_scaled(steps: usize) -> Result<Self> {
        if !(21..=Self::MAX_STEPS).contains(&steps) {
            let expected = format!(
                "from 21 to {}: with fewer, 1000 / steps times Ho's last beta of 0.02 is not below 1",
                Self::MAX_STEPS
            );
            return Err(Error::config("schedule steps", steps, expected));
        }
        let scale = 1000.0 / steps as f64;
        Self::linear(steps, scale * 1e-4, scale * 0.02)
    }

    /// The cosine schedule: `alpha_bar_t = f(t + 1) / f(0)` with
    /// `f(t) = cos^2((t / steps + 0.008) / 1.008 * pi / 2)`, and betas of at most 0.999. Nichol and Dhariwal 2021,
    /// equation 17.
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `1..=MAX_STEPS`, or if `alpha_bar` falls below 1e-30.
    pub fn cosine(steps: usize) -> Result<Self> {
        check_steps(steps)?;
        let f = |t: usize| {
            let angle = (t as f64 / steps as f64 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2;
            libm::cos(angle) * libm::cos(angle)
        };
        let betas = (0..steps).map(|t| (1.0 - f(t + 1) / f(t)).min(0.999)).collect();
        Self::build(Spec::Cosine { steps }, betas)
    }

    /// A custom schedule: `betas[t]` for each timestep.
    ///
    /// # Errors
    /// Returns an error if there are not 1 to `MAX_STEPS` betas, if one does not lie strictly between 0 and 1, or if
    /// `alpha_bar` falls below 1e-30. A beta of 1 (zero terminal signal-to-noise ratio) is an error, because `x_0`
    /// could not be computed from the predicted noise.
    pub fn from_betas(betas: Vec<f64>) -> Result<Self> {
        Self::custom(betas.into())
    }

    fn custom(betas: Arc<[f64]>) -> Result<Self> {
        check_steps(betas.len())?;
        if let Some(t) = betas.iter().position(|&b| !is_beta(b)) {
            return Err(Error::config(
                "betas",
                format!("{} at t = {t}", betas[t]),
                "strictly between 0 and 1 at every timestep",
            ));
        }
        Self::build(Spec::Custom { betas: Betas(betas.clone()) }, betas)
    }

    fn build(spec: Spec, betas: Arc<[f64]>) -> Result<Self> {
        let mut alpha_bar = 1.0;
        let next = |beta: &f64| {
            alpha_bar *= 1.0 - beta;
            alpha_bar
        };
        let alpha_bars: Arc<[f64]> = betas.iter().map(next).collect();
        // Below this, 1 / sqrt(alpha_bar) makes samplers in f32 overflow. Checked first, because an alpha_bar of 0
        // does not fall any further.
        if alpha_bar < 1e-30 {
            return Err(Error::config(
                "betas",
                format!("a table of {} whose alpha_bar ends at {alpha_bar:.1e}", betas.len()),
                "small enough to leave alpha_bar at 1e-30 or more: use smaller betas or fewer steps",
            ));
        }
        // A beta too small for f64 would leave alpha_bar at 1, that is, without noise.
        let falls = |t: usize| alpha_bars[t] < if t == 0 { 1.0 } else { alpha_bars[t - 1] };
        if let Some(t) = (0..betas.len()).find(|&t| !falls(t)) {
            let value = format!("{:e} at t = {t}", betas[t]);
            return Err(Error::config("betas", value, "large enough to lower alpha_bar in f64"));
        }
        Ok(Self { spec, betas, alpha_bars })
    }

    /// The number of timesteps, `T`.
    pub fn steps(&self) -> usize {
        self.betas.len()
    }

    /// The table of `beta_t` for `t` in `0..steps`, each strictly between 0 and 1.
    pub fn betas(&self) -> &[f64] {
        &self.betas
    }

    /// The table of `alpha_bar_t` for `t` in `0..steps`: the product of `1 - beta_s` over all `s <= t`. It is
    /// strictly decreasing, between 0 and 1.
    pub fn alpha_bars(&self) -> &[f64] {
        &self.alpha_bars
    }

    /// The value of `alpha_bar_t`, between 0 and 1.
    ///
    /// # Errors
    /// Returns an error if `t` is not less than `steps`.
    pub fn alpha_bar(&self, t: usize) -> Result<f64> {
        self.alpha_bars.get(t).copied().ok_or_else(|| {
            let expected = format!("from 0 to {}, a timestep of the schedule", self.steps() - 1);
            Error::config("t", t, expected)
        })
    }

    /// The signal-to-noise ratio `alpha_bar_t / (1 - alpha_bar_t)`, a ratio of variances, not in decibels.
    ///
    /// # Errors
    /// Returns an error if `t` is not less than `steps`.
    pub fn snr(&self, t: usize) -> Result<f64> {
        self.alpha_bar(t).map(snr_at)
    }

    /// The natural logarithm of the signal-to-noise ratio at a time `t` in [0, steps - 1], which may lie between two
    /// timesteps.
    ///
    /// It is `ln(alpha_bar_t / (1 - alpha_bar_t))`, as in Kingma et al. 2021 ([Variational Diffusion
    /// Models](https://arxiv.org/abs/2107.00630), section 3.2). The `lambda_t` of DPM-Solver (Lu et al. 2022) is half
    /// of it. Between two timesteps it is interpolated linearly in `t`, as k-diffusion does. It therefore agrees with
    /// the table at every timestep, decreases everywhere, and has an exact inverse, [`time_of`](Self::time_of).
    ///
    /// ```
    /// use ddpm::NoiseSchedule;
    ///
    /// let schedule = NoiseSchedule::cosine(1000)?;
    /// let log_snr = schedule.log_snr(250.5)?;
    /// assert!(schedule.log_snr(251.0)? < log_snr && log_snr < schedule.log_snr(250.0)?);
    /// assert!((schedule.time_of(log_snr)? - 250.5).abs() < 1e-9);
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if `t` is not in [0, steps - 1]. The image itself has no finite log-SNR.
    pub fn log_snr(&self, t: f64) -> Result<f64> {
        let last = self.steps() - 1;
        if !(0.0..=last as f64).contains(&t) {
            let expected = format!("from 0 to {last}, between two timesteps of the schedule");
            return Err(Error::config("t", t, expected));
        }
        let (before, share) = (t as usize, t.fract());
        let high = log_snr_at(self.alpha_bars[before]);
        if share == 0.0 {
            return Ok(high);
        }
        let low = log_snr_at(self.alpha_bars[before + 1]);
        // Without the bound, rounding could make it less than at the next timestep.
        Ok((high + share * (low - high)).max(low))
    }

    /// The time `t` in [0, steps - 1] at which the [log-SNR](Self::log_snr) has this value. It may lie between two
    /// timesteps.
    ///
    /// # Errors
    /// Returns an error if the value is not between the log-SNRs of the last and the first timestep.
    pub fn time_of(&self, log_snr: f64) -> Result<f64> {
        let after = self.alpha_bars.partition_point(|&bar| log_snr_at(bar) > log_snr);
        let low = self.alpha_bars.get(after).map(|&bar| log_snr_at(bar));
        match (after, low) {
            (_, Some(low)) if low == log_snr => Ok(after as f64),
            (1.., Some(low)) => {
                let high = log_snr_at(self.alpha_bars[after - 1]);
                Ok((after - 1) as f64 + (high - log_snr) / (high - low))
            }
            _ => {
                let ends = [self.steps() - 1, 0].map(|t| log_snr_at(self.alpha_bars[t]));
                let expected =
                    format!("from {} to {}, those of the schedule's ends", ends[0], ends[1]);
                Err(Error::config("log_snr", log_snr, expected))
            }
        }
    }

    /// The value of `alpha_bar` at a time `t` in [0, steps - 1], which may lie between two timesteps. There it follows
    /// from the interpolated [log-SNR](Self::log_snr). At a timestep it is the value of the table.
    ///
    /// # Errors
    /// Returns an error if `t` is not in [0, steps - 1].
    pub fn alpha_bar_at(&self, t: f64) -> Result<f64> {
        let log_snr = self.log_snr(t)?;
        let before = self.alpha_bars[t as usize];
        if t.fract() == 0.0 {
            return Ok(before);
        }
        // The inverse of `ln(a / (1 - a))`. The bounds of the neighbouring timesteps limit the effect of rounding.
        let bar = 1.0 / (1.0 + libm::exp(-log_snr));
        Ok(bar.max(self.alpha_bars[t as usize + 1]).min(before))
    }

    /// The signal-to-noise ratio of the last timestep, where sampling begins.
    pub fn terminal_snr(&self) -> f64 {
        snr_at(self.alpha_bars[self.steps() - 1])
    }

    /// Returns whether the last timestep is nearly pure noise, that is, [`terminal_snr`](Self::terminal_snr) is at
    /// most [`NOISE_SNR`](Self::NOISE_SNR).
    ///
    /// A sampler begins at standard normal noise, but the network was trained on `sqrt(alpha_bar) x_0 + sqrt(1 -
    /// alpha_bar) eps`. If the first term is not small, samples are wrong even with the best possible network. An
    /// example is `linear(10, 1e-4, 0.02)` with data of mean 0.8 and standard deviation 0.1:
    /// [`Solver::ddim`](crate::Solver::ddim) then gives a mean of 0.594 and a standard deviation of 0.271. Neither
    /// training nor sampling returns an error for such a schedule, because sampling may also begin at a tensor other
    /// than noise.
    pub fn reaches_noise(&self) -> bool {
        self.terminal_snr() <= Self::NOISE_SNR
    }
}

fn snr_at(alpha_bar: f64) -> f64 {
    alpha_bar / (1.0 - alpha_bar)
}

fn log_snr_at(alpha_bar: f64) -> f64 {
    libm::log(snr_at(alpha_bar))
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
            Spec::Custom { betas } => Self::custom(betas.0),
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
    fn log_snr_decreases_from_timestep_to_timestep_and_between_them() {
        let one = NoiseSchedule::from_betas(vec![0.5]).unwrap();
        // The last two alpha_bars are neighbours in f64, and have the same log-SNR.
        let close = NoiseSchedule::from_betas(vec![0.9, 0.9, 0.9, 0.9, 1.2e-16]).unwrap();
        let [linear, cosine] = [NoiseSchedule::linear(1000, 1e-4, 0.02), NoiseSchedule::cosine(50)];
        for schedule in [linear.unwrap(), cosine.unwrap(), one, close] {
            let last = schedule.steps() - 1;
            for t in 0..=last {
                let at = t as f64;
                let (log_snr, bar) = (schedule.log_snr(at).unwrap(), schedule.alpha_bars()[t]);
                assert_eq!(log_snr, libm::log(schedule.snr(t).unwrap()));
                assert_eq!(schedule.alpha_bar_at(at).unwrap(), bar);
                let time = schedule.time_of(log_snr).unwrap();
                assert_eq!(schedule.log_snr(time).unwrap(), log_snr, "{at} {time}");
                if t == last {
                    break;
                }
                let times =
                    [at, at.next_up(), at + 1e-9, at + 0.3, at + 0.7, (at + 1.0).next_down()];
                for pair in times.windows(2) {
                    let [early, late] = [pair[0], pair[1]];
                    let log_snr = [early, late].map(|t| schedule.log_snr(t).unwrap());
                    assert!(log_snr[0] >= log_snr[1], "{pair:?}: {log_snr:?}");
                    let bars = [early, late].map(|t| schedule.alpha_bar_at(t).unwrap());
                    assert!(bars[0] >= bars[1], "{pair:?}: {bars:?}");
                }
                let next = schedule.log_snr(at + 1.0).unwrap();
                assert!(schedule.log_snr((at + 1.0).next_down()).unwrap() >= next);
            }
        }
    }

    /// k-diffusion interpolates `log sigma` linearly, with `sigma^2 = (1 - alpha_bar) / alpha_bar`.
    #[test]
    fn between_two_timesteps_sigma_is_a_geometric_mean() {
        let schedule = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
        let sigma = |t: f64| {
            let bar = schedule.alpha_bar_at(t).unwrap();
            ((1.0 - bar) / bar).sqrt()
        };
        for t in [0.0, 1.0, 250.0, 500.0, 998.0] {
            for share in [0.25, 0.5, 0.8] {
                let expected = sigma(t).powf(1.0 - share) * sigma(t + 1.0).powf(share);
                assert!((sigma(t + share) / expected - 1.0).abs() < 1e-12, "{t} {share}");
                let time = schedule.time_of(schedule.log_snr(t + share).unwrap()).unwrap();
                assert!((time - t - share).abs() < 1e-10, "{time}");
            }
        }
    }

    #[test]
    fn refuses_times_outside_the_schedule() {
        let schedule = NoiseSchedule::linear(10, 0.1, 0.3).unwrap();
        let [first, last] = [0.0, 9.0].map(|t| schedule.log_snr(t).unwrap());
        assert_eq!([first, last].map(|log_snr| schedule.time_of(log_snr).unwrap()), [0.0, 9.0]);
        for t in [-0.1, 9.1, f64::NAN, f64::INFINITY] {
            for result in [schedule.log_snr(t), schedule.alpha_bar_at(t)] {
                let message = result.unwrap_err().to_string();
                let expected = format!("t is {t}; it must be from 0 to 9, between two timesteps");
                assert!(message.contains(&expected), "{message}");
            }
        }
        for log_snr in [first + 0.1, last - 0.1, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let message = schedule.time_of(log_snr).unwrap_err().to_string();
            let expected = format!("log_snr is {log_snr}; it must be from {last} to {first}");
            assert!(message.contains(&expected), "{message}");
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
            (NoiseSchedule::from_betas(vec![0.999; 100]), "100 whose alpha_bar ends at 1.0e-300;"),
            // At that point alpha_bar is 0 and falls no further.
            (
                NoiseSchedule::from_betas(vec![0.999; 110]),
                "110 whose alpha_bar ends at 0.0e0; it must",
            ),
            (NoiseSchedule::from_betas(vec![0.5; 1100]), "use smaller betas or fewer steps"),
            (NoiseSchedule::linear(80_000, 1e-4, 0.02), "use smaller betas or fewer steps"),
            (
                NoiseSchedule::from_betas(vec![0.1, 1e-17]),
                "betas is 1e-17 at t = 1; it must be large",
            ),
            (
                NoiseSchedule::linear_scaled(20),
                "schedule steps is 20; it must be from 21 to 1048576",
            ),
            (NoiseSchedule::linear_scaled(usize::MAX), "it must be from 21 to 1048576"),
            (NoiseSchedule::cosine(0), "schedule steps is 0"),
        ];
        for (result, expected) in errors {
            let message = result.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let json = r#"{"linear": {"steps": 10, "beta_start": 2, "beta_end": 0.1}}"#;
        assert!(serde_json::from_str::<NoiseSchedule>(json).is_err());
    }

    #[test]
    fn a_scaled_schedule_ends_in_as_much_noise_as_hos() {
        let ho = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
        assert_eq!(NoiseSchedule::linear_scaled(1000).unwrap(), ho);
        for steps in [21, 50, 100, 683, 4000, NoiseSchedule::MAX_STEPS] {
            let scaled = NoiseSchedule::linear_scaled(steps).unwrap();
            // The sum of the betas is that of Ho's schedule. Their squares, which matter with few steps, add to the
            // noise.
            let sum = scaled.betas().iter().sum::<f64>();
            assert!((sum / 10.05 - 1.0).abs() < 1e-12, "{steps} steps: {sum}");
            assert!(scaled.reaches_noise() && scaled.terminal_snr() < 5e-5, "{steps} steps");
            let json = serde_json::to_string(&scaled).unwrap();
            assert!(json.starts_with(r#"{"linear":"#), "{json}");
            assert_eq!(serde_json::from_str::<NoiseSchedule>(&json).unwrap(), scaled);
        }
    }

    #[test]
    fn a_schedule_with_signal_left_at_its_end_is_reported() {
        // Table 1 of Lin et al. 2024: the square root of the last alpha_bar.
        for (schedule, share, reaches) in [
            (NoiseSchedule::linear(1000, 1e-4, 0.02), 0.006353, true),
            (NoiseSchedule::cosine(1000), 4.928220e-5, true),
            // The squares of evenly spaced roots, as in Stable Diffusion.
            (
                NoiseSchedule::from_betas(
                    (0..1000)
                        .map(|t| {
                            0.00085f64
                                .sqrt()
                                .mul_add(1.0 - t as f64 / 999.0, 0.012f64.sqrt() * t as f64 / 999.0)
                        })
                        .map(|root| root * root)
                        .collect(),
                ),
                0.068265,
                false,
            ),
        ] {
            let schedule = schedule.unwrap();
            let found = schedule.alpha_bar(999).unwrap().sqrt();
            assert!((found / share - 1.0).abs() < 1e-3, "{found}, {share}");
            assert_eq!(schedule.reaches_noise(), reaches, "{found}");
            assert_eq!(schedule.terminal_snr(), schedule.snr(999).unwrap());
        }
        let reaches = |steps| NoiseSchedule::linear(steps, 1e-4, 0.02).unwrap().reaches_noise();
        assert_eq!([10, 500, 682, 683, 2000].map(reaches), [false, false, false, true, true]);
    }

    #[test]
    fn clones_share_their_tables() {
        for schedule in [NoiseSchedule::cosine(8), NoiseSchedule::from_betas(vec![0.1; 8])] {
            let schedule = schedule.unwrap();
            let clone = schedule.clone();
            assert!(std::ptr::eq(clone.betas(), schedule.betas()));
            assert!(std::ptr::eq(clone.alpha_bars(), schedule.alpha_bars()));
            if let Spec::Custom { betas } = &schedule.spec {
                assert!(std::ptr::eq(&*betas.0, schedule.betas()));
            }
        }
    }

    #[test]
    fn a_list_that_is_too_long_is_refused_while_it_is_read() {
        // The rest is not JSON, so a reader that gets there has read too much.
        let mut json = r#"{"custom": {"betas": [0.5"#.to_owned();
        json += &",0.5".repeat(NoiseSchedule::MAX_STEPS + 3);
        json += "!";
        let message = serde_json::from_str::<NoiseSchedule>(&json).unwrap_err().to_string();
        let expected = "invalid length 1048577, expected a list of at most 1048576 betas";
        assert!(message.starts_with(expected), "{message}");
    }
}
