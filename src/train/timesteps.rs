use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::process::schedule::NoiseSchedule;
use crate::random::{Noise, Purpose};

/// The distribution of the timesteps of a batch.
///
/// The timestep of an image depends on the seed, the step and the position of the image in the batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum TimestepSampling {
    /// Uniform, and independent of the other images. Ho et al. 2020, algorithm 1, and the default.
    #[default]
    Uniform,
    /// Uniform for each image, and spread evenly over the images of a batch. Image `k` of `B` has the timestep at the
    /// fraction `(u + k / B) mod 1` of the schedule, with one uniform `u` per batch. The mean loss of a batch varies
    /// less. Kingma et al. 2021, [Variational Diffusion Models](https://arxiv.org/abs/2107.00630), appendix I.1.
    Stratified,
    /// The logarithm of the noise level `sigma = SNR^(-1/2)` is normal; the timestep is the one with the nearest
    /// log-SNR. Karras et al. 2022, table 1, with mean -1.2 and standard deviation 1.2.
    LogNormal {
        /// The mean of `ln sigma`.
        mean: f64,
        /// The standard deviation of `ln sigma`; positive.
        std: f64,
    },
    /// Importance sampling: the probability of a timestep is proportional to the root mean square of its last ten
    /// losses, with 0.1% of uniform draws. The loss of an image is divided by this probability, relative to that of
    /// uniform draws. The mean of the loss does not change, but the loss of a batch varies less. Draws are uniform
    /// until every timestep has ten losses. Nichol and Dhariwal 2021, [Improved Denoising
    /// Diffusion](https://arxiv.org/abs/2102.09672), section 3.3, who use it for the variational bound.
    ///
    /// Checkpoints contain the losses. The losses are read from the device in each update, and such an update is not
    /// captured as a CUDA graph.
    Importance,
}

impl TimestepSampling {
    /// # Errors
    /// Returns an error that names the first invalid field, its value and the allowed values.
    pub(super) fn validate(self) -> Result<()> {
        let Self::LogNormal { mean, std } = self else { return Ok(()) };
        if !mean.is_finite() {
            return Err(Error::config("timesteps.log_normal.mean", mean, "finite"));
        }
        if !(std > 0.0 && std.is_finite()) {
            return Err(Error::config("timesteps.log_normal.std", std, "positive and finite"));
        }
        Ok(())
    }

    /// Draws the timestep of the image at a position in the batch of `batch_size` images of a step.
    pub(super) fn draw(
        self,
        schedule: &NoiseSchedule,
        (noise, step): (Noise, u64),
        (position, batch_size): (u32, usize),
    ) -> Result<u32> {
        let stream = |position| noise.stream(Purpose::Timestep, step, position);
        let steps = schedule.steps();
        match self {
            // Until every timestep has its losses.
            Self::Importance | Self::Uniform => Ok(stream(position).below(steps as u32)),
            Self::Stratified => {
                let place = stream(0).uniform() + f64::from(position) / batch_size as f64;
                Ok(((place.fract() * steps as f64) as u32).min(steps as u32 - 1))
            }
            Self::LogNormal { mean, std } => {
                let mut z = [0.0];
                stream(position).fill_normal(&mut z);
                let [first, last] = [0.0, (steps - 1) as f64].map(|t| schedule.log_snr(t));
                let log_snr = -2.0 * (mean + std * f64::from(z[0]));
                nearest(schedule, log_snr.min(first?).max(last?))
            }
        }
    }
}

/// The timesteps of a batch.
#[derive(Debug)]
pub(super) struct Timesteps {
    /// The timesteps (batch), on the device.
    pub t: Tensor,
    /// The factor of the loss of each image. `None` if every factor is 1.
    pub weights: Option<Vec<f64>>,
}

/// Timesteps with these probabilities, one per timestep of the process.
#[derive(Debug)]
pub(super) struct Distribution {
    probabilities: Vec<f64>,
    /// The sums of the probabilities up to and including each timestep.
    sums: Vec<f64>,
}

impl Distribution {
    pub fn new(probabilities: Vec<f64>) -> Self {
        let add = |sum: &mut f64, p: &f64| {
            *sum += p;
            Some(*sum)
        };
        Self { sums: probabilities.iter().scan(0.0, add).collect(), probabilities }
    }

    /// Draws the timestep of the image at a position in the batch of a step.
    pub fn draw(&self, (noise, step): (Noise, u64), position: u32) -> u32 {
        let uniform = noise.stream(Purpose::Timestep, step, position).uniform();
        let place = uniform * self.sums.last().copied().unwrap_or_default();
        let before = self.sums.partition_point(|&sum| sum <= place);
        before.min(self.sums.len().saturating_sub(1)) as u32
    }

    /// The factor of the loss at a timestep. With it, the mean loss is that of uniform timesteps.
    pub fn weight(&self, t: u32) -> f64 {
        let count = self.probabilities.len() as f64;
        self.probabilities.get(t as usize).map_or(1.0, |p| 1.0 / (count * p))
    }
}

/// Returns the timestep whose log-SNR is nearest to this one, which is within the range of the schedule.
fn nearest(schedule: &NoiseSchedule, log_snr: f64) -> Result<u32> {
    let before = schedule.time_of(log_snr)?.floor();
    let after = (before + 1.0).min((schedule.steps() - 1) as f64);
    let [high, low] = [before, after].map(|t| schedule.log_snr(t));
    Ok(if high? - log_snr <= log_snr - low? { before } else { after } as u32)
}
