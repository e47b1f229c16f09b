//! Which images to draw from a checkpoint, and how.

use std::path::PathBuf;

use candle_core::Device;
use clap::{Args, ValueEnum};
use ddpm::{Checkpoint, Error, Precision, Sampler, Solver, UNet, UNetConfig};
use serde::Serialize;

use super::cli::{Result, fraction, precision, quoted, whole};

#[derive(Args)]
pub struct SamplingArgs {
    /// The checkpoint's directory, such as out/mnist/checkpoint
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// How to go from one timestep to the next
    #[arg(long, value_enum, default_value = "ddim")]
    solver: SolverName,
    /// How many timesteps; 50 unless given, all of them for ddpm
    #[arg(long, value_name = "S", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1_000_000))]
    sampling_steps: Option<usize>,
    /// Noise of ddim's steps, from 0 (none, and the default) to 1
    #[arg(long, value_name = "E", allow_negative_numbers = true, value_parser = fraction)]
    eta: Option<f64>,
    /// Seed of the images
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    pub seed: u64,
    /// The averaged weights, or those of the last update
    #[arg(long, value_enum, default_value = "ema")]
    pub weights: Weights,
    /// How exactly products are computed: highest or high; bf16 or f16 (with the feature f16)
    #[arg(long, value_name = "P", default_value = "highest", value_parser = precision)]
    pub precision: Precision,
    /// Do not clip the predicted image to the range of pixels at each step
    #[arg(long)]
    pub no_clip: bool,
    /// Sample on the CPU, even where this was built for a GPU
    #[arg(long)]
    pub cpu: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum SolverName {
    /// Ancestral sampling
    Ddpm,
    /// Denoising diffusion implicit models
    Ddim,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    Ema,
    Model,
}

impl SamplingArgs {
    pub fn open(&self) -> Result<Checkpoint> {
        Checkpoint::open(&self.checkpoint).map_err(|error| {
            let nested = self.checkpoint.join("checkpoint");
            match error {
                Error::NoCheckpoint { .. } if nested.is_dir() => {
                    let nested = quoted(&nested.to_string_lossy());
                    format!("{error}; --checkpoint {nested} is one").into()
                }
                _ => error.into(),
            }
        })
    }

    pub fn solver(&self) -> Result<Solver> {
        match (self.solver, self.eta) {
            (SolverName::Ddpm, None) => Ok(Solver::ddpm()),
            (SolverName::Ddpm, Some(_)) => Err("--eta is for --solver ddim only".into()),
            (SolverName::Ddim, eta) => Ok(Solver::Ddim { eta: eta.unwrap_or(0.0) }),
        }
    }

    pub fn sampler(&self, checkpoint: &Checkpoint) -> Result<Sampler> {
        let all = checkpoint.diffusion().schedule().steps();
        let solver = self.solver()?;
        let steps = self.sampling_steps.unwrap_or(match solver {
            Solver::Ddpm { .. } => all,
            Solver::Ddim { .. } => all.min(50),
        });
        Ok(Sampler::new(checkpoint.diffusion(), solver, steps)?.clip_denoised(!self.no_clip))
    }

    pub fn model(&self, checkpoint: &Checkpoint, device: &Device) -> Result<UNet> {
        let model = match self.weights {
            Weights::Ema => checkpoint.ema::<UNetConfig>(device)?,
            Weights::Model => checkpoint.model::<UNetConfig>(device)?,
        };
        Ok(model.with_precision(self.precision)?)
    }
}
