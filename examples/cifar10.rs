//! Trains on CIFAR-10; for a GPU: `cargo run --release --example cifar10 --features cuda`.

mod common;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use common::train::{Recipe, TrainArgs};
use common::{cli, datasets, train};
use ddpm::{Diffusion, SamplerConfig, Solver, TrainConfig, UNetConfig};

fn recipe() -> Recipe {
    Recipe {
        example: "cifar10",
        network: UNetConfig::cifar10(),
        diffusion: || Ok(Diffusion::ddpm()),
        train: TrainConfig::cifar10(),
        out: "out/cifar10",
        save_every: 1_000,
        sample_every: 5_000,
        sample_count: 64,
        sampling: SamplerConfig::new(Solver::ddim(), 50).clip_denoised(true),
    }
}

/// Train a DDPM on CIFAR-10, and draw samples from it
#[derive(Parser)]
#[command(name = "cifar10", version, after_help = recipe().defaults("Defaults"))]
struct Cli {
    /// Directory that contains cifar-10-batches-bin/, or `hub`
    #[arg(long, value_name = "DIR", default_value = "data")]
    data: PathBuf,
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> ExitCode {
    cli::main(|cli: Cli| train::run(&recipe(), &cli.train, || datasets::cifar10(&cli.data)))
}
