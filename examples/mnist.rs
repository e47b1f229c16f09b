//! Trains on MNIST: on the digits that are part of the repository, or with `--data` on a full set.

mod common;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use common::train::{Recipe, TrainArgs};
use common::{cli, datasets, train};
use ddpm::{
    AdamConfig, Diffusion, NoiseSchedule, Prediction, Result, SamplerConfig, Solver, TrainConfig,
    UNetConfig,
};

/// The recipe for a full set, or for a quarter of an hour on the embedded digits.
fn recipe(full: bool, fashion: bool) -> Recipe {
    // Many large updates of small batches achieve more than a few accurate ones. They need a warm-up and clipping to
    // stay stable, and a cool-down.
    let short = || TrainConfig {
        steps: 7_500,
        batch_size: 8,
        optimizer: AdamConfig::adam(1e-3),
        warmup_steps: 200,
        cooldown: 0.7,
        clip_norm: Some(1.0),
        ..TrainConfig::mnist()
    };
    Recipe {
        example: "mnist",
        network: UNetConfig::mnist(),
        diffusion: if full { || Ok(Diffusion::ddpm()) } else { quick },
        train: if full { TrainConfig::mnist() } else { short() },
        // One directory per data set, so that runs on different data sets do not conflict.
        out: match (full, fashion) {
            (_, true) => "out/fashion-mnist",
            (true, false) => "out/mnist-full",
            (false, false) => "out/mnist",
        },
        save_every: 500,
        sample_every: if full { 1_000 } else { 2_500 },
        sample_count: 64,
        // Noise corrects the errors that a briefly trained network makes in earlier sampling steps.
        sampling: SamplerConfig::new(Solver::Ddim { eta: 1.0 }, 100).clip_denoised(true),
    }
}

/// The cosine schedule and velocity. In so short a training they give better results than the paper's linear schedule
/// and noise. Nichol and Dhariwal 2021; Salimans and Ho 2022.
fn quick() -> Result<Diffusion> {
    Ok(Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Velocity))
}

fn defaults() -> String {
    let (embedded, full) = (recipe(false, false), recipe(true, false));
    format!(
        "{}\n  the network predicts velocity, on the cosine schedule\n\n\
         {}\n  the network predicts noise, on the linear schedule\n\n\
         With --fashion: as with --data, except for --out {}.",
        embedded.defaults("Defaults"),
        full.defaults("With --data"),
        recipe(true, true).out
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
    cli::main(|cli: Cli| {
        let recipe = recipe(cli.data.is_some(), cli.fashion);
        train::run(&recipe, &cli.train, || datasets::mnist(cli.data.as_deref(), cli.fashion))
    })
}
