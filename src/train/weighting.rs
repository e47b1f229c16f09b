use serde::{Deserialize, Serialize};

use crate::process::diffusion::Prediction;

/// The weights of the timesteps in the loss, as functions of the signal-to-noise ratio.
///
/// Except for [`Uniform`](Self::Uniform), a weighting is a function of the error of `x_0`. The squared error of another
/// prediction is a multiple of the squared error of `x_0`: `SNR` times for noise, and `SNR + 1` times for velocity. The
/// weight of the prediction is divided by this factor, so that the objective with the square loss does not depend on
/// the kind of prediction.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Weighting {
    /// Weight 1 for the error of the prediction, whatever it is.
    #[default]
    Uniform,
    /// Min-SNR-gamma: `min(SNR, gamma)` for the error of `x_0`. Hang et al. 2023, [Efficient Diffusion Training via
    /// Min-SNR Weighting Strategy](https://arxiv.org/abs/2303.09556), section 3.4. They use a gamma of 5.
    MinSnr {
        /// The largest weight; positive.
        gamma: f64,
    },
    /// P2: `1 / (k + SNR)^gamma` for the error of noise. Choi et al. 2022, [Perception Prioritized
    /// Training](https://arxiv.org/abs/2204.00227), equation 8. They use a `k` of 1, and a gamma of 0.5 or 1.
    P2 {
        /// The offset of the SNR; positive.
        k: f64,
        /// The exponent; positive.
        gamma: f64,
    },
    /// The weighting of EDM: `(sigma² + sigma_data²) / (sigma sigma_data)²` for the error of `x_0`, with `sigma² = 1 /
    /// SNR`. Karras et al. 2022, table 1, with a `sigma_data` of 0.5. Usually with
    /// [`TimestepSampling::LogNormal`](super::TimestepSampling::LogNormal).
    Edm {
        /// The standard deviation of the data; positive.
        sigma_data: f64,
    },
}

impl Weighting {
    /// Returns the weight at a signal-to-noise ratio, which is 0 or positive, for the square of the error of this
    /// prediction.
    pub fn weight(self, snr: f64, prediction: Prediction) -> f64 {
        let of_x_0 = match self {
            Self::Uniform => return 1.0,
            Self::MinSnr { gamma } => snr.min(gamma),
            Self::P2 { k, gamma } => snr / libm::pow(k + snr, gamma),
            Self::Edm { sigma_data } => snr + 1.0 / (sigma_data * sigma_data),
        };
        match prediction {
            Prediction::Epsilon => of_x_0 / snr,
            Prediction::Sample => of_x_0,
            Prediction::Velocity => of_x_0 / (snr + 1.0),
        }
    }
}
