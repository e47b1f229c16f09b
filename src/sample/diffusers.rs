//! Schedulers in folders of the Python library diffusers.

use std::path::Path;

use serde::Deserialize;

use super::ancestral::Variance;
use super::config::SamplerConfig;
use super::solver::Solver;
use super::spacing::Spacing;
use crate::error::{Error, Result};
use crate::model::diffusers::Options;
use crate::process::{Diffusion, NoiseSchedule, Prediction};

/// The name of the configuration of a scheduler.
pub(crate) const SCHEDULER: &str = "scheduler_config.json";

/// The options of `DDPMScheduler` and `DDIMScheduler`, with their defaults.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Scheduler {
    num_train_timesteps: usize,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: Betas,
    trained_betas: Option<Vec<f64>>,
    variance_type: VarianceType,
    clip_sample: bool,
    prediction_type: PredictionType,
    timestep_spacing: TimestepSpacing,
    rescale_betas_zero_snr: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Betas {
    Linear,
    ScaledLinear,
    #[serde(rename = "squaredcos_cap_v2")]
    Cosine,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum VarianceType {
    FixedSmall,
    /// Diffusers computes the same number by its logarithm.
    FixedSmallLog,
    FixedLarge,
    LearnedRange,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum PredictionType {
    Epsilon,
    Sample,
    VPrediction,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum TimestepSpacing {
    Linspace,
    Leading,
    Trailing,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: Betas::Linear,
            trained_betas: None,
            variance_type: VarianceType::FixedSmall,
            clip_sample: true,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: TimestepSpacing::Leading,
            rescale_betas_zero_snr: false,
        }
    }
}

impl Scheduler {
    fn diffusion(&self) -> Result<Diffusion> {
        let (steps, start, end) = (self.num_train_timesteps, self.beta_start, self.beta_end);
        let schedule = match (&self.trained_betas, &self.beta_schedule) {
            (Some(betas), _) if betas.len() != steps => {
                let expected = format!("{steps} numbers, as num_train_timesteps");
                let found = format!("a list of {}", betas.len());
                return Err(Error::config("trained_betas", found, expected));
            }
            (Some(betas), _) => NoiseSchedule::from_betas(betas.clone()),
            (None, Betas::Linear) => NoiseSchedule::linear(steps, start, end),
            (None, Betas::ScaledLinear) => NoiseSchedule::quadratic(steps, start, end),
            (None, Betas::Cosine) => NoiseSchedule::cosine(steps),
        }?;
        let prediction = match self.prediction_type {
            PredictionType::Epsilon => Prediction::Epsilon,
            PredictionType::Sample => Prediction::Sample,
            PredictionType::VPrediction => Prediction::Velocity,
        };
        let rescaled = self.rescale_betas_zero_snr;
        let schedule = if rescaled { schedule.zero_terminal_snr()? } else { schedule };
        let diffusion = Diffusion::new(schedule, prediction);
        diffusion.validate()?;
        Ok(diffusion)
    }

    fn sampler(&self, ancestral: bool, steps: usize) -> SamplerConfig {
        let variance = match self.variance_type {
            VarianceType::FixedSmall | VarianceType::FixedSmallLog => Variance::Posterior,
            VarianceType::FixedLarge => Variance::Beta,
            VarianceType::LearnedRange => Variance::Learned,
        };
        let spacing = match self.timestep_spacing {
            TimestepSpacing::Linspace => Spacing::Even,
            TimestepSpacing::Leading => Spacing::Leading,
            TimestepSpacing::Trailing => Spacing::Trailing,
        };
        let config = match (ancestral, self.clip_sample) {
            (true, _) => SamplerConfig::new(Solver::Ddpm { variance }, steps),
            (false, true) => {
                SamplerConfig::new(Solver::DdimUnclippedNoise { eta: 0.0 }, steps.min(50))
            }
            (false, false) => SamplerConfig::new(Solver::ddim(), steps.min(50)),
        };
        config.spacing(spacing).clip_denoised(self.clip_sample)
    }
}

impl SamplerConfig {
    /// Reads `scheduler_config.json` of a `DDPMScheduler` or `DDIMScheduler` in a folder of diffusers: the process, and
    /// the settings of its sampler. Ancestral sampling takes every timestep, and DDIM at most 50, as in the pipelines
    /// of diffusers. DDIM that clips is [`Solver::DdimUnclippedNoise`].
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or is not JSON, and an error that names the option and its value if
    /// the crate lacks it. Each step of `DDIMScheduler` goes back by `T / S`, rounded down, whatever the next timestep
    /// of its list is. The crate lacks this for `linspace`, and for `trailing` if `S` does not divide `T`.
    pub fn from_diffusers(folder: impl AsRef<Path>) -> Result<(Diffusion, Self)> {
        let mut options = Options::read(folder.as_ref().join(SCHEDULER))?;
        let [ancestral, implicit] =
            ["DDPMScheduler", "DDIMScheduler"].map(|class| options.is("_class_name", class));
        options.check(&[
            ("_class_name", &["\"DDPMScheduler\"", "\"DDIMScheduler\""]),
            ("clip_sample_range", &["1", "1.0"]),
            ("set_alpha_to_one", &["true"]),
            ("steps_offset", &["0"]),
            ("thresholding", &["false"]),
            // Options of the first versions.
            ("timestep_values", &["null"]),
            ("tensor_format", &["\"pt\"", "\"np\""]),
        ])?;
        if !ancestral && !implicit {
            let expected = "\"DDPMScheduler\" or \"DDIMScheduler\"";
            return Err(options.refuse(format!("_class_name is absent; it must be {expected}")));
        }
        if implicit {
            // An option of `DDPMScheduler`, which `DDIMScheduler.from_config` keeps in the file and ignores.
            options.ignore("variance_type");
        }
        for of_thresholding in ["dynamic_thresholding_ratio", "sample_max_value"] {
            options.ignore(of_thresholding);
        }
        let scheduler: Scheduler = options.parse()?;
        let diffusion = scheduler.diffusion().map_err(|error| options.refuse(error.to_string()))?;
        let total = diffusion.schedule().steps();
        let sampler = scheduler.sampler(ancestral, total);
        if implicit {
            let steps = sampler.steps;
            let found = match sampler.spacing {
                Spacing::Even => "\"linspace\"".into(),
                Spacing::Trailing if !total.is_multiple_of(steps) => {
                    format!("\"trailing\", with {steps} steps of {total} timesteps")
                }
                _ => return Ok((diffusion, sampler)),
            };
            let expected = "\"leading\", or \"trailing\" with a divisor, because the steps of DDIMScheduler do not end \
                            at other timesteps of its list";
            return Err(
                options.refuse(format!("timestep_spacing is {found}; it must be {expected}"))
            );
        }
        Ok((diffusion, sampler))
    }
}
