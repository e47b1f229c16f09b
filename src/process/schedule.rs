use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::spec::{self, Betas, Spec};
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

impl NoiseSchedule {
    /// The maximum number of timesteps of a schedule.
    pub const MAX_STEPS: usize = spec::MAX_STEPS;

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
        Spec::Linear { steps, beta_start, beta_end }.try_into()
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
        Spec::Cosine { steps }.try_into()
    }

    /// The schedule whose betas are the squares of evenly spaced roots, from `beta_start` to `beta_end`, both ends
    /// included.
    ///
    /// It is the schedule `quad` of the code of Ho et al. 2020, and `scaled_linear` of diffusers. Stable Diffusion
    /// (Rombach et al. 2022) uses `quadratic(1000, 0.00085, 0.012)`, which does not [reach noise](Self::reaches_noise);
    /// [`zero_terminal_snr`](Self::zero_terminal_snr) corrects it.
    ///
    /// # Errors
    /// Returns the errors of [`linear`](Self::linear).
    pub fn quadratic(steps: usize, beta_start: f64, beta_end: f64) -> Result<Self> {
        Spec::Quadratic { steps, beta_start, beta_end }.try_into()
    }

    /// The sigmoid schedule: `alpha_bar_t = f(t + 1) / f(0)` with `f(t) = s(end / tau) - s((start + t / steps (end -
    /// start)) / tau)`. Here `s` is the logistic function, and betas are at most 0.999. Jabri et al. 2022 ([Scalable
    /// Adaptive Computation for Iterative Generation](https://arxiv.org/abs/2212.11972), algorithm 4).
    ///
    /// The authors use a `start` of -3, an `end` of 3, and a `tau` of 1 or less. They limit `alpha_bar` instead of the
    /// betas, to at least 1e-9. Schedules named `sigmoid` elsewhere may be other formulae: in diffusers, the betas
    /// follow the logistic function.
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `1..=MAX_STEPS`, if `start` and `end` are not finite and increasing, or if
    /// `tau` is not positive and finite. Also returns an error if `alpha_bar` falls below 1e-30 or is constant.
    pub fn sigmoid(steps: usize, start: f64, end: f64, tau: f64) -> Result<Self> {
        Spec::Sigmoid { steps, start, end, tau }.try_into()
    }

    /// A custom schedule: `betas[t]` for each timestep.
    ///
    /// # Errors
    /// Returns an error if there are not 1 to `MAX_STEPS` betas, if one does not lie strictly between 0 and 1, or if
    /// `alpha_bar` falls below 1e-30. A beta of 1 is an error; [`zero_terminal_snr`](Self::zero_terminal_snr) ends a
    /// schedule without signal.
    pub fn from_betas(betas: Vec<f64>) -> Result<Self> {
        Spec::Custom { betas: Betas(betas.into()) }.try_into()
    }

    /// This schedule with `log_snr_shift` added to its [log-SNR](Self::log_snr) at every timestep. A negative shift
    /// means more noise.
    ///
    /// Neighbouring pixels of large images are similar, so that averaging them removes noise. Hoogeboom et al. 2023
    /// ([simple diffusion](https://arxiv.org/abs/2301.11093), section 3.1) therefore shift the cosine schedule by
    /// `2 ln(64 / resolution)` for images larger than 64 x 64.
    ///
    /// ```
    /// use ddpm::NoiseSchedule;
    ///
    /// let small = NoiseSchedule::cosine(1000)?;
    /// let large = small.shifted(2.0 * (64.0f64 / 256.0).ln())?;
    /// assert!((large.snr(500)? / small.snr(500)? - 1.0 / 16.0).abs() < 1e-12);
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if the shift is not finite, if `alpha_bar` falls below 1e-30, or if the shift makes `alpha_bar`
    /// constant in f64.
    pub fn shifted(&self, log_snr_shift: f64) -> Result<Self> {
        Spec::Shifted { schedule: Box::new(self.spec.clone()), log_snr_shift }.try_into()
    }

    /// This schedule with `sqrt(alpha_bar)` shifted and scaled so that it is 0 at the last timestep, and unchanged at
    /// timestep 0. Lin et al. 2024, [Common Diffusion Noise Schedules and Sample Steps are
    /// Flawed](https://arxiv.org/abs/2305.08891), algorithm 1.
    ///
    /// The last `x_t` is then pure noise, at which sampling begins, and the last beta is 1. Predicted noise does not
    /// determine `x_0` there, so [`Prediction::Epsilon`](super::Prediction::Epsilon) is an error with such a schedule;
    /// see [`Diffusion::validate`](super::Diffusion::validate).
    ///
    /// ```
    /// use ddpm::NoiseSchedule;
    ///
    /// let schedule = NoiseSchedule::quadratic(1000, 0.00085, 0.012)?.zero_terminal_snr()?;
    /// assert_eq!(schedule.terminal_snr(), 0.0);
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if the schedule has only one timestep, or if `alpha_bar` falls below 1e-30 before the last one.
    pub fn zero_terminal_snr(&self) -> Result<Self> {
        Spec::ZeroTerminalSnr { schedule: Box::new(self.spec.clone()) }.try_into()
    }

    /// The number of timesteps, `T`.
    pub fn steps(&self) -> usize {
        self.betas.len()
    }

    /// The table of `beta_t` for `t` in `0..steps`, each strictly between 0 and 1. With
    /// [`zero_terminal_snr`](Self::zero_terminal_snr) the last one is 1.
    pub fn betas(&self) -> &[f64] {
        &self.betas
    }

    /// The table of `alpha_bar_t` for `t` in `0..steps`: the product of `1 - beta_s` over all `s <= t`. It is
    /// strictly decreasing, between 0 and 1. With [`zero_terminal_snr`](Self::zero_terminal_snr) the last one is 0.
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
    /// the table at every timestep, decreases everywhere, and has an exact inverse, [`time_of`](Self::time_of). If the
    /// last timestep has no signal, its log-SNR is negative infinity, and the SNR itself is interpolated before it.
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
        if low == f64::NEG_INFINITY {
            return Ok(high + libm::log1p(-share));
        }
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
                let share = if low == f64::NEG_INFINITY {
                    -libm::expm1(log_snr - high)
                } else {
                    (high - log_snr) / (high - low)
                };
                Ok((after - 1) as f64 + share)
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

impl TryFrom<Spec> for NoiseSchedule {
    type Error = Error;

    fn try_from(spec: Spec) -> Result<Self> {
        let (betas, alpha_bars) = spec.tables()?;
        Ok(Self { spec, betas, alpha_bars })
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
