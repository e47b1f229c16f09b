use std::fmt;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::schedule::NoiseSchedule;
use crate::backend::{self, Rates};
use crate::error::{Error, Result, check_dims, check_float};

/// The meaning of the network's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Prediction {
    /// The added noise `eps`. Ho et al. 2020, and the default.
    #[default]
    Epsilon,
    /// The image `x_0` itself.
    Sample,
    /// `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0`. Salimans and Ho 2022, section 4.
    Velocity,
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Epsilon => "noise",
            Self::Sample => "x_0",
            Self::Velocity => "velocity",
        })
    }
}

/// The diffusion process: a schedule, and the quantity that the network predicts.
///
/// All formulae that relate `x_0`, `x_t` and `eps` are here. Training uses [`q_sample`](Self::q_sample) and
/// [`target`](Self::target), and sampling uses the inverse.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Diffusion {
    schedule: NoiseSchedule,
    prediction: Prediction,
}

impl Diffusion {
    /// Creates a process with this schedule and this kind of prediction.
    pub fn new(schedule: NoiseSchedule, prediction: Prediction) -> Self {
        Self { schedule, prediction }
    }

    /// The process of Ho et al. 2020: 1000 timesteps, `beta` linear from 1e-4 to 0.02, and prediction of noise.
    pub fn ddpm() -> Self {
        let schedule =
            NoiseSchedule::linear(1000, 1e-4, 0.02).expect("the published schedule is valid");
        Self::new(schedule, Prediction::Epsilon)
    }

    /// The process that this crate recommends: 1000 timesteps of the cosine schedule (Nichol and Dhariwal 2021), and
    /// prediction of velocity (Salimans and Ho 2022).
    pub fn velocity() -> Self {
        let schedule = NoiseSchedule::cosine(1000).expect("the published schedule is valid");
        Self::new(schedule, Prediction::Velocity)
    }

    /// Checks whether `x_0` follows from a prediction at every timestep. [`Trainer`](crate::Trainer) and
    /// [`Sampler`](crate::Sampler) call this.
    ///
    /// # Errors
    /// Returns an error for the prediction of noise with a schedule that [ends without
    /// signal](NoiseSchedule::zero_terminal_snr): `x_T` and the noise are then equal, and say nothing about `x_0`.
    pub fn validate(&self) -> Result<()> {
        if self.prediction == Prediction::Epsilon && self.schedule.terminal_snr() == 0.0 {
            let expected = "sample or velocity with a schedule of zero terminal SNR, where noise does not determine x_0";
            return Err(Error::config("prediction", "epsilon", expected));
        }
        Ok(())
    }

    /// The noise schedule.
    pub fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }

    /// The quantity that the network predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// Computes `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`. Ho et al. 2020, equation 4.
    ///
    /// `x_0` and `eps` have the same shape (batch, ...) and the same floating-point dtype. `t` (batch) has an integer
    /// dtype, and values less than the number of timesteps. The result has the shape and dtype of `x_0`.
    ///
    /// # Errors
    /// Returns an error if the shapes or dtypes do not fit, or if a timestep is out of range.
    pub fn q_sample(&self, x_0: &Tensor, t: &Tensor, eps: &Tensor) -> Result<Tensor> {
        self.check(x_0, t, eps)?;
        backend::of(x_0).mix(x_0, eps, t, self.rates(&|bar| [bar.sqrt(), (1.0 - bar).sqrt()]))
    }

    /// Computes the output that the network should have for `x_t = q_sample(x_0, t, eps)`, with the same shapes.
    ///
    /// # Errors
    /// Returns an error if the shapes or dtypes do not fit, or if a timestep is out of range.
    pub fn target(&self, x_0: &Tensor, t: &Tensor, eps: &Tensor) -> Result<Tensor> {
        self.check(x_0, t, eps)?;
        match self.prediction {
            Prediction::Epsilon => Ok(eps.clone()),
            Prediction::Sample => Ok(x_0.clone()),
            Prediction::Velocity => {
                let rates = self.rates(&|bar| [bar.sqrt(), -(1.0 - bar).sqrt()]);
                backend::of(eps).mix(eps, x_0, t, rates)
            }
        }
    }

    /// Computes the `x_0` that a network's `output` for `x_t` implies. The whole batch is at the timestep with this
    /// `alpha_bar`.
    pub(crate) fn x_0(&self, x_t: &Tensor, output: &Tensor, alpha_bar: f64) -> Result<Tensor> {
        if self.prediction == Prediction::Sample {
            return Ok(output.clone());
        }
        let [p, q] = self.x_0_factors(alpha_bar);
        backend::of(x_t).combine(x_t, p, output, q)
    }

    /// The factors `p` and `q` of `x_0 = p x_t + q output` at this `alpha_bar`.
    pub(crate) fn x_0_factors(&self, alpha_bar: f64) -> [f64; 2] {
        let (signal, noise) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        match self.prediction {
            Prediction::Epsilon => [1.0 / signal, -noise / signal],
            Prediction::Sample => [0.0, 1.0],
            Prediction::Velocity => [signal, -noise],
        }
    }

    /// # Errors
    /// Returns an error if `x_0` and `eps` do not have the same shape (batch, ...) and the same floating-point dtype,
    /// or if `t` does not hold one timestep of the schedule per image.
    pub(crate) fn check(&self, x_0: &Tensor, t: &Tensor, eps: &Tensor) -> Result<()> {
        let Some(&batch) = x_0.dims().first() else {
            return Err(Error::shape("x_0", [], "(batch, ...)"));
        };
        check_float("dtype of x_0", x_0.dtype())?;
        // Elementwise operations would broadcast a smaller tensor.
        check_dims("eps", eps.dims(), x_0.dims(), "that of x_0")?;
        if eps.dtype() != x_0.dtype() {
            let expected = format!("{}, that of x_0", x_0.dtype().as_str());
            return Err(Error::config("dtype of eps", eps.dtype().as_str(), expected));
        }
        check_timesteps(t, batch, Some(self.schedule.steps()))
    }

    /// The factors at every timestep, computed from its `alpha_bar`.
    pub(crate) fn rates<'a>(&'a self, factors: &'a dyn Fn(f64) -> [f64; 2]) -> Rates<'a> {
        Rates { alpha_bars: self.schedule.alpha_bars(), factors }
    }
}

/// Checks the timesteps of a batch: integers less than `steps`, or with `None` also times between two timesteps, of
/// dtype f32 or f64.
///
/// # Errors
/// Returns an error if `t` does not hold one number per image, or if one is negative, not finite or not less than
/// `steps`. On a GPU the values are not checked here, because reading them would wait for all previous work. There the
/// kernels of candle check them, and the kernels of this crate return NaN.
pub(crate) fn check_timesteps(t: &Tensor, batch: usize, steps: Option<usize>) -> Result<()> {
    check_dims("t", t.dims(), &[batch], "one timestep for each image")?;
    let between = steps.is_none() && matches!(t.dtype(), DType::F32 | DType::F64);
    if !t.dtype().is_int() && !between {
        let expected =
            if steps.is_some() { "an integer dtype" } else { "an integer dtype, f32 or f64" };
        return Err(Error::config("dtype of t", t.dtype().as_str(), expected));
    }
    if backend::reading_waits(t.device()) {
        return Ok(());
    }
    if between {
        let times = t.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let wrong = times.into_iter().find(|t| !(0.0..f64::INFINITY).contains(t));
        return wrong.map_or(Ok(()), |t| Err(Error::config("t", t, "finite and at least 0")));
    }
    let last = steps.map_or(i64::MAX, |steps| steps as i64 - 1);
    let timesteps = t.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let Some(t) = timesteps.into_iter().find(|t| !(0..=last).contains(t)) else { return Ok(()) };
    let expected = match steps {
        Some(_) => format!("from 0 to {last}, a timestep of the schedule"),
        None => "at least 0, a timestep".into(),
    };
    Err(Error::config("t", t, expected))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn every_integer_dtype_means_the_same_timesteps() {
        let x_0 = Tensor::new(&[[0.5f64, -1.0], [0.25, 0.5]], &Device::Cpu).unwrap();
        let eps = Tensor::new(&[[1.5f64, 0.1], [-0.7, 0.3]], &Device::Cpu).unwrap();
        let values = |t: &Tensor| t.to_vec2::<f64>().unwrap();
        // 255 is a valid timestep, although it is the greatest u8.
        let t = Tensor::new(&[255i64, 10], &Device::Cpu).unwrap();
        let diffusion = Diffusion::new(Diffusion::ddpm().schedule, Prediction::Velocity);
        let bars = diffusion.schedule.alpha_bars();
        let first = bars[255].sqrt() * 0.5 + (1.0 - bars[255]).sqrt() * 1.5;
        let second = bars[10].sqrt() * 0.3 - (1.0 - bars[10]).sqrt() * 0.5;
        for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
            let t = t.to_dtype(dtype).unwrap();
            let x_t = values(&diffusion.q_sample(&x_0, &t, &eps).unwrap());
            let target = values(&diffusion.target(&x_0, &t, &eps).unwrap());
            assert!((x_t[0][0] - first).abs() < 1e-15, "{dtype:?}: {x_t:?}");
            assert!((target[1][1] - second).abs() < 1e-15, "{dtype:?}: {target:?}");
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let at = |t: &[i64], dtype| {
            let t = Tensor::new(t, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            (x.clone(), t, x.clone())
        };
        let t = at(&[1, 5], DType::U32).1;
        let bytes = x.to_dtype(DType::U8).unwrap();
        let cases = [
            (at(&[1, 1000], DType::I64), "t is 1000; it must be from 0 to 999"),
            (at(&[-1, 1], DType::I32), "t is -1; it must be from 0 to 999"),
            (at(&[i64::MAX, 1], DType::I64), "t is 9223372036854775807"),
            (at(&[u32::MAX.into(), 1], DType::U32), "t is 4294967295; it must be from 0 to 999"),
            (at(&[1, 5], DType::F32), "dtype of t is f32; it must be an integer dtype"),
            (at(&[1], DType::U32), "t has shape [1]; it must be [2], one timestep for each image"),
            (
                (x.clone(), t.clone(), x.narrow(0, 0, 1).unwrap()),
                "eps has shape [1, 3]; it must be [2, 3], that of x_0",
            ),
            (
                (x.clone(), t.clone(), x.to_dtype(DType::F64).unwrap()),
                "dtype of eps is f64; it must be f32, that of x_0",
            ),
            (
                (bytes.clone(), t.clone(), bytes),
                "dtype of x_0 is u8; it must be a floating-point dtype",
            ),
            ((x.sum_all().unwrap(), t, x.clone()), "x_0 has shape []; it must be (batch, ...)"),
        ];
        for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity] {
            let diffusion = Diffusion::new(Diffusion::ddpm().schedule, prediction);
            for ((x_0, t, eps), expected) in &cases {
                for result in [diffusion.q_sample(x_0, t, eps), diffusion.target(x_0, t, eps)] {
                    let message = result.unwrap_err().to_string();
                    assert!(message.contains(expected), "{prediction:?}: {message}");
                }
            }
        }
    }
}
