//! Folders of pipelines of the Python library diffusers: a network and a scheduler.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::ancestral::Variance;
use super::config::SamplerConfig;
use super::solver::Solver;
use super::spacing::Spacing;
use crate::error::{Error, Result};
use crate::model::diffusers::{CONFIG, VERSION, weights_file};
use crate::model::{Parameters, UNet2DConfig};
use crate::process::{Diffusion, NoiseSchedule, Prediction};

/// A folder that a `DDPMPipeline` or `DDIMPipeline` of diffusers saved.
///
/// The network is in the folder `unet`, and the scheduler in `scheduler`. In folders of the first versions of diffusers
/// both are in the folder itself.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use ddpm::sample::DiffusersFolder;
///
/// let folder = DiffusersFolder::open("ddpm-cifar10-32")?;
/// let unet = folder.weights(DType::F32, &Device::Cpu)?.build(folder.network())?;
/// let sampler = folder.sampling().sampler(folder.diffusion())?;
/// let images = sampler.sample(&unet, (4, 3, 32, 32), 0, &Device::Cpu)?;
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug)]
pub struct DiffusersFolder {
    path: PathBuf,
    unet: PathBuf,
    network: UNet2DConfig,
    diffusion: Diffusion,
    sampling: SamplerConfig,
}

impl DiffusersFolder {
    /// Reads the configurations of the network and of the scheduler.
    ///
    /// # Errors
    /// Returns the errors of [`UNet2DConfig::from_diffusers`] and [`SamplerConfig::from_diffusers`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (unet, scheduler) = (part(path, "unet"), part(path, "scheduler"));
        let network = UNet2DConfig::from_diffusers(&unet)?;
        let (diffusion, sampling) = SamplerConfig::from_diffusers(&scheduler)?;
        Ok(Self { path: path.to_owned(), unet, network, diffusion, sampling })
    }

    /// Returns whether `path` has the files of a network of diffusers. The scheduler may be missing.
    pub fn is_at(path: impl AsRef<Path>) -> bool {
        let unet = part(path.as_ref(), "unet");
        unet.join(CONFIG).is_file() && weights_file(&unet).is_file()
    }

    /// The path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration of the network.
    pub fn network(&self) -> &UNet2DConfig {
        &self.network
    }

    /// The process that the network learned to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        &self.diffusion
    }

    /// The sampler settings of the scheduler.
    pub fn sampling(&self) -> &SamplerConfig {
        &self.sampling
    }

    /// The file of the weights, or the list of several files.
    pub fn weights_file(&self) -> PathBuf {
        weights_file(&self.unet)
    }

    /// Reads the weights.
    ///
    /// # Errors
    /// Returns the errors of [`Parameters::load_diffusers`].
    pub fn weights(&self, dtype: DType, device: &Device) -> Result<Parameters> {
        Parameters::load_diffusers(&self.unet, dtype, device)
    }
}

/// The folder of a part of a pipeline.
fn part(path: &Path, name: &str) -> PathBuf {
    let own = path.join(name);
    if own.is_dir() { own } else { path.to_owned() }
}

impl SamplerConfig {
    /// The closest settings that a folder of diffusers has, in place of those of DDIM with clipping or with even
    /// timesteps. Their images differ slightly, or more with few steps. Other settings stay as they are.
    ///
    /// The `DDIMScheduler` of diffusers computes the noise from the prediction before it is clipped
    /// ([`Solver::DdimUnclippedNoise`]). Each of its steps is as long as the others, so of its spacings only
    /// [`Spacing::Leading`] is exact for every number of steps.
    #[must_use]
    pub fn for_diffusers(self) -> Self {
        let solver = match self.solver {
            Solver::Ddim { eta } if self.clip_denoised => Solver::DdimUnclippedNoise { eta },
            solver => solver,
        };
        let implicit = matches!(solver, Solver::Ddim { .. } | Solver::DdimUnclippedNoise { .. });
        let spacing = match self.spacing {
            Spacing::Even if implicit => Spacing::Leading,
            spacing => spacing,
        };
        Self { solver, spacing, ..self }
    }
}

/// The files of a pipeline that describe it, without the network.
pub(crate) struct Described {
    /// The content of `model_index.json`.
    pub index: Value,
    /// The content of `scheduler/scheduler_config.json`.
    pub scheduler: Value,
}

impl Described {
    /// The description of a pipeline with this process and these sampler settings. The number of sampling steps is an
    /// argument of a pipeline, and not a part of it.
    ///
    /// # Errors
    /// Returns an error that names the first setting that a scheduler of diffusers does not have.
    pub fn of(
        network: &UNet2DConfig,
        diffusion: &Diffusion,
        sampler: &SamplerConfig,
    ) -> Result<Self> {
        sampler.sampler(diffusion)?;
        let refuse = |field, found: String, expected: &str| {
            Err(Error::config(field, found, format!("{expected} in a folder of diffusers")))
        };
        let clips = sampler.clip_denoised;
        let (name, variance) = match sampler.solver {
            Solver::Ddpm { variance } => ("DDPM", Some(variance)),
            Solver::Ddim { eta: 0.0 } if !clips => ("DDIM", None),
            Solver::DdimUnclippedNoise { eta: 0.0 } => ("DDIM", None),
            solver @ Solver::Ddim { eta: 0.0 } => {
                let expected =
                    "DdimUnclippedNoise, or not clip (SamplerConfig::for_diffusers replaces it),";
                return refuse("solver", format!("{solver}, which clips"), expected);
            }
            solver => {
                return refuse("solver", solver.to_string(), "ddpm, or ddim with an eta of 0,");
            }
        };
        let learns = network.learns_variance();
        if learns != (variance == Some(Variance::Learned)) {
            let which = if learns { "a" } else { "no" };
            let found = format!("{} of a network with {which} learned variance", sampler.solver);
            let expected = if learns { "ddpm with the learned variance" } else { "another" };
            return refuse("solver", found, expected);
        }
        // `DDPMScheduler` goes to the next timestep of the list. `DDIMScheduler` goes back by `T / S`, rounded down.
        let total = diffusion.schedule().steps();
        let spacing = match sampler.spacing {
            Spacing::Leading => "leading",
            // The only timestep of a `linspace` is the first, and that of even spacing the last.
            Spacing::Even if name == "DDPM" && sampler.steps > 1 => "linspace",
            Spacing::Trailing if name == "DDPM" || total.is_multiple_of(sampler.steps) => {
                "trailing"
            }
            spacing if name == "DDPM" => {
                let expected = "even with at least 2 steps, leading or trailing,";
                return refuse("spacing", spacing.to_string(), expected);
            }
            spacing => {
                let found = format!("{spacing}, with {} sampling steps of ddim", sampler.steps);
                let expected = format!(
                    "leading, or trailing with a divisor of {total} as the number of steps,"
                );
                return refuse("spacing", found, &expected);
            }
        };
        if sampler.guidance.is_some() {
            return refuse("guidance", "set".into(), "absent");
        }
        if sampler.dynamic_threshold.is_some() {
            return refuse("dynamic_threshold", "set".into(), "absent");
        }
        let class = format!("{name}Scheduler");
        let mut scheduler = json!({
            "_class_name": class,
            "_diffusers_version": VERSION,
            "clip_sample": clips,
            "prediction_type": match diffusion.prediction() {
                Prediction::Epsilon => "epsilon",
                Prediction::Sample => "sample",
                Prediction::Velocity => "v_prediction",
            },
            "timestep_spacing": spacing,
            "trained_betas": null,
            "rescale_betas_zero_snr": false,
        });
        match variance {
            Some(variance) => {
                scheduler["variance_type"] = match variance {
                    Variance::Posterior => "fixed_small",
                    Variance::Beta => "fixed_large",
                    Variance::Learned => "learned_range",
                }
                .into();
            }
            None => scheduler["set_alpha_to_one"] = true.into(),
        }
        schedule(diffusion.schedule(), &mut scheduler)?;
        let index = json!({
            "_class_name": format!("{name}Pipeline"),
            "_diffusers_version": VERSION,
            "scheduler": ["diffusers", class],
            "unet": ["diffusers", "UNet2DModel"],
        });
        Ok(Self { index, scheduler })
    }
}

/// Sets the options of a schedule. A schedule that diffusers does not name is a table of betas.
///
/// # Errors
/// Returns an error if the schedule ends without signal, and is not one that diffusers rescales.
fn schedule(schedule: &NoiseSchedule, options: &mut Value) -> Result<()> {
    options["num_train_timesteps"] = schedule.steps().into();
    let spec = serde_json::to_value(schedule).map_err(Error::external)?;
    let spec = match spec.get("zero_terminal_snr").and_then(|rescaled| rescaled.get("schedule")) {
        Some(inner) => {
            options["rescale_betas_zero_snr"] = true.into();
            inner
        }
        None => &spec,
    };
    for (name, in_diffusers) in [("linear", "linear"), ("quadratic", "scaled_linear")] {
        if let Some(own) = spec.get(name) {
            options["beta_schedule"] = in_diffusers.into();
            options["beta_start"] = own["beta_start"].clone();
            options["beta_end"] = own["beta_end"].clone();
            return Ok(());
        }
    }
    if spec.get("cosine").is_some() {
        options["beta_schedule"] = "squaredcos_cap_v2".into();
        return Ok(());
    }
    let table: NoiseSchedule = serde_json::from_value(spec.clone()).map_err(Error::external)?;
    if table.terminal_snr() == 0.0 {
        let expected = "a schedule that ends with signal, or one of linear, quadratic and cosine, in a folder of \
                        diffusers";
        return Err(Error::config("schedule", "shifted after zero_terminal_snr", expected));
    }
    options["trained_betas"] = json!(table.betas());
    Ok(())
}
