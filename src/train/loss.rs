//! The objectives that a configuration can name.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::objective::{Noised, Objective};
use super::variational_bound;
use super::weighting::Weighting;
use crate::denoiser::Output;
use crate::error::{Error, Result};
use crate::kernels::op::loss::Loss;

/// The training objective that a configuration describes.
///
/// It is the loss of the prediction, weighted for each image by its timestep, and averaged over all values. With
/// [`variational_bound`](Self::variational_bound) it is the hybrid loss of Nichol and Dhariwal 2021, which also trains
/// the variance of the reverse process. The default is the mean squared error; Ho et al. 2020, equation 14.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ObjectiveConfig {
    /// The loss of one value.
    pub loss: Loss,
    /// The weights of the timesteps.
    pub weighting: Weighting,
    /// The factor `lambda` of the variational bound in the hybrid loss, `L_simple + lambda L_vlb`; positive. Nichol and
    /// Dhariwal 2021, equation 16, who use 0.001. The bound is in bits per value, and changes only the learned
    /// variance. `None` for networks that do not learn the variance.
    pub variational_bound: Option<f64>,
}

impl ObjectiveConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// Returns an error that names the first invalid field, its value and the allowed values.
    pub fn validate(&self) -> Result<()> {
        if let Loss::Huber { delta } = self.loss {
            positive("objective.loss.huber.delta", delta)?;
        }
        match self.weighting {
            Weighting::Uniform => {}
            Weighting::MinSnr { gamma } => positive("objective.weighting.min_snr.gamma", gamma)?,
            Weighting::P2 { k, gamma } => {
                positive("objective.weighting.p2.k", k)?;
                positive("objective.weighting.p2.gamma", gamma)?;
            }
            Weighting::Edm { sigma_data } => {
                positive("objective.weighting.edm.sigma_data", sigma_data)?;
            }
        }
        self.variational_bound
            .map_or(Ok(()), |factor| positive("objective.variational_bound", factor))
    }

    /// Computes the weighted loss of the prediction, and its gradient.
    fn simple(&self, batch: &Noised<'_>, output: &Tensor) -> Result<(Tensor, Tensor)> {
        let target = batch.target()?;
        match (self.loss, self.weighting) {
            (Loss::Mse, Weighting::Uniform) => batch.mean_square(output, &target),
            (Loss::Mse, weighting) => batch.weighted_mean_square(output, &target, weighting),
            (loss, weighting) => batch.mean_loss(loss, output, &target, weighting),
        }
    }
}

impl Objective for ObjectiveConfig {
    fn loss(&self, batch: &Noised<'_>, output: &Output) -> Result<(Tensor, Output)> {
        let (loss, gradient) = self.simple(batch, &output.prediction)?;
        match (self.variational_bound, &output.variance) {
            (None, None) => Ok((loss, Output::new(gradient))),
            (Some(factor), Some(variance)) => {
                let (bound, d_variance) =
                    variational_bound::weighted(batch, &output.prediction, variance, factor)?;
                Ok(((loss + bound)?, Output::new(gradient).with_variance(d_variance)))
            }
            (None, Some(_)) => Err(Error::config(
                "objective.variational_bound",
                "none",
                "a factor, such as 0.001, because the network learns the variance",
            )),
            (Some(factor), None) => Err(Error::config(
                "objective.variational_bound",
                factor,
                "none, because the network does not learn the variance",
            )),
        }
    }

    fn is_repeatable(&self) -> bool {
        // The other losses, and the bound, copy values between device and host.
        self.loss == Loss::Mse && self.variational_bound.is_none()
    }
}

fn positive(field: &'static str, value: f64) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::config(field, value, "positive and finite"))
}
