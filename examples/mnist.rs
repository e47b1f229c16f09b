//! Trains on MNIST: on the digits that come with the repository, or on a full set with `--data`.

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

/// For a full set, and for a quarter of an hour on the embedded digits.
fn recipe(full: bool, fashion: bool) -> Recipe {
    // Small batches, since many updates do more than exact ones, and large strides, which need a warm-up
    // and clipping, and to become small in the end.
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
        // One for each data set, so that none is in the way of another's run.
        out: match (full, fashion) {
            (_, true) => "out/fashion-mnist",
            (true, false) => "out/mnist-full",
            (false, false) => "out/mnist",
        },
        save_every: 500,
        sample_every: if full { 1_000 } else { 2_500 },
        sample_count: 64,
        // With noise: it corrects what a network of so little training gets wrong on the way.
        sampling: SamplerConfig {
            solver: Solver::Ddim { eta: 1.0 },
            steps: 100,
            clip_denoised: true,
        },
    }
}

/// The cosine schedule and velocity, by which so short a training comes further than by the paper's linear
/// one and noise. Nichol and Dhariwal 2021; Salimans and Ho 2022.
fn quick() -> Result<Diffusion> {
    Ok(Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Velocity))
}

fn defaults() -> String {
    let (embedded, full) = (recipe(false, false), recipe(true, false));
    format!(
        "{}\n  the network learns velocity, on the cosine schedule\n\n\
         {}\n  the network learns noise, on the linear schedule\n\n\
         With --fashion: as with --data, but for --out {}.",
        embedded.defaults("Defaults"),
        full.defaults("With --data"),
        recipe(true, true).out
    )
}

/// Train a DDPM on MNIST, and draw samples from it
#[derive(Parser)]
#[command(name = "mnist", version, after_help = defaults())]
struct Cli {
    /// The full set's directory, or `hub`; without it, train on 10,000 embedded digits
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Fashion-MNIST instead of the digits; needs --data
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
