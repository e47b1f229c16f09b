use std::path::PathBuf;

use candle_core::Device;
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use serde_json::{Value, json};

use super::arguments::{fraction, precision, scale, whole};
use super::device::{check_speed, describe};
use super::network::Network;
use super::print::{grouped, out};
use super::result::Result;
use super::trained::{NetworkSettings, Trained, Weights};
use crate::denoiser::{Condition, Denoiser};
use crate::precision::Precision;
use crate::sample::{Guidance, SamplerConfig, Solver, Spacing, Variance};

/// The options of a program that draws images from a checkpoint of a U-Net.
#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// Directory of a checkpoint, such as out/mnist/checkpoint, a weights file, such as its ema.safetensors, or a
    /// folder of a pipeline of diffusers
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,
    /// Solver of the sampler; the defaults of --solver, --sampling-steps and --eta are those of the run's
    /// grids; ddpm has the learned variance if the network learns one
    #[arg(long, value_name = "NAME", value_parser = named(Solver::NAMES))]
    solver: Option<String>,
    /// Choice of the timesteps; by default that of the run's grids, or with another solver log-snr for heun
    /// and edm, and even for all others
    #[arg(long, value_name = "NAME", value_parser = named(Spacing::NAMES))]
    spacing: Option<String>,
    /// Number of sampling steps; with another solver than the run's, the default is 50, or all
    /// timesteps for ddpm
    #[arg(long, value_name = "S", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1_000_000))]
    sampling_steps: Option<usize>,
    /// Noise in the steps of ddim, from 0 (none) to 1
    #[arg(long, value_name = "E", allow_negative_numbers = true, value_parser = fraction)]
    eta: Option<f64>,
    /// Classes of the images, such as 3 or 0,1,2, of which the last is followed by the first; default all
    /// classes of the network
    #[arg(long, value_name = "C", value_delimiter = ',', allow_negative_numbers = true,
          value_parser = whole::<u32>(0..=65_535))]
    pub(super) class: Vec<u32>,
    /// Scale of the guidance towards the class: 1 for none, more for clearer and less varied
    /// images; the default is that of the run's grids
    #[arg(long, value_name = "W", allow_negative_numbers = true, value_parser = scale)]
    guidance: Option<f64>,
    /// The averaged weights (the default), or those of the last update
    #[arg(long, value_enum)]
    pub weights: Option<Weights>,
    /// Precision of products: highest or high; bf16 or f16 (with the feature f16)
    #[arg(long, value_name = "P", default_value = "highest", value_parser = precision)]
    pub precision: Precision,
    /// Prepare the weights of convolutions again in each step instead of keeping them: less memory and more time, and
    /// the same images
    #[arg(long)]
    pub recompute: bool,
    /// Do not clip or threshold the predicted image to the range of pixels at each step
    #[arg(long)]
    pub no_clip: bool,
    /// Sample on the CPU, even in a build for a GPU
    #[arg(long)]
    pub cpu: bool,
}

/// A parser of clap that accepts these names, and shows the text of what each means.
fn named<T: ToString, const N: usize>(names: [(&'static str, T); N]) -> impl TypedValueParser {
    let value =
        |(name, meaning): (&'static str, T)| PossibleValue::new(name).help(meaning.to_string());
    PossibleValuesParser::new(names.map(value))
}

impl SamplingArgs {
    /// Opens the checkpoint, the weights file or the folder of diffusers.
    ///
    /// # Errors
    /// Returns the errors of [`Trained::open`].
    pub fn open(&self) -> Result<Trained> {
        Trained::open(&self.checkpoint, self.weights)
    }

    /// The sampler settings: those of the run's grids, except for the given options. If `--solver ddpm` is another
    /// solver than the run's, it has the learned variance if the network learns one, and otherwise that of
    /// [`Solver::ddpm`].
    ///
    /// # Errors
    /// Returns an error if an option is not an option of the solver, and the errors of [`Trained::architecture`].
    pub fn config(&self, checkpoint: &Trained) -> Result<SamplerConfig> {
        let all = checkpoint.diffusion().schedule().steps();
        let usual = SamplerConfig::usual(checkpoint.diffusion());
        let run = checkpoint.sampling().copied().unwrap_or(usual);
        // The run's solver may have settings that its name does not have.
        let (mut solver, mut steps, mut spacing) = match self.solver.as_deref() {
            Some(name) if run.solver.name() != Some(name) => {
                let (mut solver, mut steps): (Solver, _) = (name.parse()?, usual.steps);
                if let Solver::Ddpm { variance } = &mut solver {
                    steps = all;
                    if checkpoint.architecture()?.learns_variance() {
                        *variance = Variance::Learned;
                    }
                }
                (solver, steps, solver.usual_spacing())
            }
            _ => (run.solver, run.steps, run.spacing),
        };
        match (&mut solver, self.eta) {
            (Solver::Ddim { eta } | Solver::DdimUnclippedNoise { eta }, Some(asked)) => {
                *eta = asked
            }
            (_, Some(_)) => return Err("--eta is for --solver ddim only".into()),
            (_, None) => {}
        }
        steps = self.sampling_steps.unwrap_or(steps);
        if let Some(name) = self.spacing.as_deref() {
            spacing = name.parse()?;
        }
        let clip_denoised = run.clip_denoised && !self.no_clip;
        let dynamic_threshold = run.dynamic_threshold.filter(|_| !self.no_clip);
        let guidance = match self.guidance {
            Some(scale) => Some(Guidance { scale, ..run.guidance.unwrap_or(Guidance::new(scale)) }),
            None => run.guidance,
        };
        Ok(SamplerConfig { solver, steps, clip_denoised, spacing, dynamic_threshold, guidance })
    }

    /// The condition of `count` images of this network, beginning with image `first`: the given classes, or all classes,
    /// one after the other. A network without classes has no condition.
    ///
    /// # Errors
    /// Returns an error if the network does not have a class, or if an option needs classes and the network has none.
    pub fn condition(&self, network: &Network, first: usize, count: usize) -> Result<Condition> {
        let Some(classes) = network.classes() else {
            let given =
                [("--class", !self.class.is_empty()), ("--guidance", self.guidance.is_some())];
            return match given.into_iter().find(|(_, given)| *given) {
                Some((option, _)) => {
                    Err(format!("{option} needs a network with classes; this one has none").into())
                }
                None => Ok(Condition::None),
            };
        };
        if let Some(class) = self.class.iter().find(|class| **class as usize >= classes) {
            let most = classes - 1;
            return Err(format!("--class is {class}; the network's are 0 to {most}").into());
        }
        let all = (0..classes as u32).collect();
        let classes = if self.class.is_empty() { &all } else { &self.class };
        let of_image = |k: usize| classes[k % classes.len()];
        Ok(Condition::classes((first..first + count).map(of_image).collect())?)
    }

    /// The choices on which the images depend, for a report in JSON. `class` is empty if the images have all classes of
    /// the network, one after the other.
    pub fn record(&self, config: &SamplerConfig, checkpoint: &Trained, seed: u64) -> Value {
        json!({
            "checkpoint": checkpoint.path().to_string_lossy(),
            "step": checkpoint.step(),
            "weights": checkpoint.weights(self.weights),
            "solver": config.solver,
            "sampling_steps": config.steps,
            "spacing": config.spacing,
            "clip_denoised": config.clip_denoised,
            "guidance": config.guidance,
            "dynamic_threshold": config.dynamic_threshold,
            "class": self.class,
            "seed": seed,
            "precision": self.precision,
        })
    }

    /// Prints the checkpoint, the sampler settings, compared with those of the run, and the device.
    pub fn announce(&self, config: &SamplerConfig, checkpoint: &Trained, device: &Device) {
        let (solver, steps) = (config.solver, grouped(config.steps));
        let steps = match config.spacing {
            Spacing::Even => format!("{steps} steps"),
            spacing => format!("{steps} steps ({spacing})"),
        };
        let clipped = match (config.dynamic_threshold, config.clip_denoised) {
            (Some(_), _) => "dynamically thresholded",
            (None, true) => "clipped",
            (None, false) => "not clipped",
        };
        let whose = match checkpoint.sampling() {
            Some(run) if run == config => "same as the run's grids",
            Some(_) => "different from the run's grids",
            None => "the checkpoint does not record the run's settings",
        };
        let dir = checkpoint.path().display();
        match checkpoint.step() {
            Some(step) => out(format_args!("checkpoint  {dir}, step {step}")),
            None => out(format_args!("checkpoint  {dir}")),
        }
        out(format_args!("sampler     {solver}, {steps}, {clipped} ({whose})"));
        if let Some(Guidance { scale, .. }) = config.guidance {
            out(format_args!("guidance    {scale}"));
        }
        out(format_args!("device      {}", describe(device)));
        check_speed(self.precision, device);
    }

    /// The network with the selected weights and settings.
    ///
    /// # Errors
    /// Returns the errors of [`Trained::model`].
    pub fn model(&self, checkpoint: &Trained, device: &Device) -> Result<Box<dyn Denoiser>> {
        let settings = NetworkSettings { precision: self.precision, recompute: self.recompute };
        checkpoint.model(self.weights, settings, device)
    }
}
