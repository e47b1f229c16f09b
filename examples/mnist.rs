//! Trains on MNIST: on the digits in the repository, or with `--data` on a full set.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, Recipe, TrainArgs, datasets};
use ddpm::process::Prediction;
use ddpm::sample::SamplerConfig;
use ddpm::train::AdamConfig;
use ddpm::{Diffusion, NoiseSchedule, Result, Solver, TrainConfig, UNetConfig};

/// The digits in the repository.
const DIGITS: &str = "examples/data/mnist-train-10k-images-idx3-ubyte.gz";

/// The recipe for a full set: the process of the paper.
fn full(out: &'static str) -> Recipe {
    // Noise corrects the errors that a briefly trained network makes in earlier sampling steps.
    let solver = Solver::Ddim { eta: 1.0 };
    Recipe {
        out,
        cargo_target: "--example mnist",
        sampling: SamplerConfig::new(solver, 100).clip_denoised(true),
        ..Recipe::new(UNetConfig::mnist(), Diffusion::ddpm(), TrainConfig::mnist())
    }
}

/// The recipe for the digits in the repository, which takes a quarter of an hour. In such a short training, the cosine
/// schedule and velocity give better results than the process of the paper. Nichol and Dhariwal 2021; Salimans and Ho
/// 2022.
fn quick() -> Result<Recipe> {
    // Many large updates of small batches achieve more than a few accurate ones. They need a warm-up and clipping to
    // stay stable, and a cool-down.
    let train = TrainConfig {
        steps: 7_500,
        batch_size: 8,
        optimizer: AdamConfig::adam(1e-3),
        warmup_steps: 200,
        cooldown: 0.7,
        clip_norm: Some(1.0),
        ..TrainConfig::mnist()
    };
    let diffusion = Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Velocity);
    Ok(Recipe { diffusion, train, sample_every: 2_500, ..full("out/mnist") })
}

fn defaults() -> String {
    let quick = quick().map(|recipe| recipe.defaults("Defaults")).unwrap_or_default();
    let full = full("out/mnist-full").defaults("With --data");
    format!(
        "{quick}\n  the network predicts velocity, on the cosine schedule\n\n{full}\n  the network predicts noise, \
         on the linear schedule\n\nWith --fashion: as with --data, except for --out out/fashion-mnist."
    )
}

/// Train a DDPM on MNIST, and draw samples from it
#[derive(Parser)]
#[command(name = "mnist", version, after_help = defaults())]
struct Cli {
    /// Directory of the full set, or `hub`; without this option, train on 10,000 embedded digits
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Train on Fashion-MNIST instead of the digits; requires --data
    #[arg(long)]
    fashion: bool,
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> ExitCode {
    cli::main(|Cli { data, fashion, train }| {
        let recipe = match (fashion, &data) {
            (true, _) => full("out/fashion-mnist"),
            (false, Some(_)) => full("out/mnist-full"),
            (false, None) => quick()?,
        };
        let (data, repository) = (data.as_deref(), env!("CARGO_MANIFEST_DIR"));
        cli::train(&recipe, &train, || datasets::mnist(data, fashion, repository, DIGITS))
    })
}
