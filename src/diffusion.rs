use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Error, NoiseSchedule, Result};

/// What the network's output stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise `eps` that was added. Ho et al. 2020, and the default.
    #[default]
    Epsilon,
    /// The image `x_0` itself.
    Sample,
    /// `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0`. Salimans and Ho 2022, section 4.
    Velocity,
}

/// The diffusion process: a schedule, and what the network predicts about it.
///
/// The only place where the formulae that tie `x_0`, `x_t` and `eps` together stand. Training takes
/// [`q_sample`](Self::q_sample) and [`target`](Self::target) from here, sampling the way back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Diffusion {
    schedule: NoiseSchedule,
    prediction: Prediction,
}

impl Diffusion {
    /// The process with this schedule and this kind of prediction.
    pub fn new(schedule: NoiseSchedule, prediction: Prediction) -> Self {
        Self { schedule, prediction }
    }

    /// The process of Ho et al. 2020: 1000 steps, `beta` linear from 1e-4 to 0.02, predicting
    /// noise.
    pub fn ddpm() -> Self {
        let schedule =
            NoiseSchedule::linear(1000, 1e-4, 0.02).expect("the published schedule is valid");
        Self::new(schedule, Prediction::Epsilon)
    }

    /// The noise schedule.
    pub fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }

    /// What the network predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`. Ho et al. 2020, equation 4.
    ///
    /// `x_0` and `eps`: (batch, ...); `t`: (batch), of an integer dtype, less than the schedule's
    /// steps. The result has the shape and dtype of `x_0`.
    ///
    /// # Errors
    /// If the shapes do not fit, or a timestep is out of range.
    pub fn q_sample(&self, x_0: &Tensor, t: &Tensor, eps: &Tensor) -> Result<Tensor> {
        let (signal, noise) = self.rates(t, x_0)?;
        Ok((x_0.broadcast_mul(&signal)? + eps.broadcast_mul(&noise)?)?)
    }

    /// What the network should answer for `x_t = q_sample(x_0, t, eps)`; shapes as there.
    ///
    /// # Errors
    /// If the shapes do not fit, or a timestep is out of range.
    pub fn target(&self, x_0: &Tensor, t: &Tensor, eps: &Tensor) -> Result<Tensor> {
        match self.prediction {
            Prediction::Epsilon => Ok(eps.clone()),
            Prediction::Sample => Ok(x_0.clone()),
            Prediction::Velocity => {
                let (signal, noise) = self.rates(t, x_0)?;
                Ok((eps.broadcast_mul(&signal)? - x_0.broadcast_mul(&noise)?)?)
            }
        }
    }

    /// The `x_0` that a network's `output` for `x_t` implies when all of the batch is at the
    /// timestep with this `alpha_bar`.
    pub(crate) fn x_0(&self, x_t: &Tensor, output: &Tensor, alpha_bar: f64) -> Result<Tensor> {
        // x_0 = p x_t + q output
        let (signal, noise) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        let (p, q) = match self.prediction {
            Prediction::Epsilon => (1.0 / signal, -noise / signal),
            Prediction::Sample => return Ok(output.clone()),
            Prediction::Velocity => (signal, -noise),
        };
        Ok((x_t.affine(p, 0.0)? + output.affine(q, 0.0)?)?)
    }

    /// `sqrt(alpha_bar_t)` and `sqrt(1 - alpha_bar_t)` for each of the batch, in `like`'s dtype
    /// and shaped to multiply it.
    fn rates(&self, t: &Tensor, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let batch = like.dims().first().copied().unwrap_or(0);
        if like.rank() < 1 || t.dims() != [batch] {
            return Err(Error::Shape {
                what: "t",
                found: t.dims().to_vec(),
                expected: format!("[{batch}], one timestep for each image"),
            });
        }
        let mut shape = vec![1; like.rank()];
        shape[0] = batch;
        let gather = |rate: &dyn Fn(f64) -> f64| -> Result<Tensor> {
            let table: Vec<f64> = self.schedule.alpha_bars().iter().map(|&a| rate(a)).collect();
            let table = Tensor::from_vec(table, self.schedule.steps(), &Device::Cpu)?
                .to_dtype(like.dtype())?
                .to_device(like.device())?;
            Ok(table.index_select(t, 0)?.reshape(shape.as_slice())?)
        };
        Ok((gather(&f64::sqrt)?, gather(&|a| (1.0 - a).sqrt())?))
    }
}
