//! Trains on CIFAR-10. For a GPU: `cargo run --release --example cifar10 --features cuda`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, Recipe, TrainArgs, datasets};
use ddpm::{Diffusion, TrainConfig, UNetConfig};

/// The default sampler draws the grids: deterministic DDIM with 50 steps.
fn recipe() -> Recipe {
    Recipe {
        out: "out/cifar10",
        cargo_target: "--example cifar10",
        save_every: 1_000,
        sample_every: 5_000,
        ..Recipe::new(UNetConfig::cifar10(), Diffusion::ddpm(), TrainConfig::cifar10())
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
    cli::main(|cli: Cli| cli::train(&recipe(), &cli.train, || datasets::cifar10(&cli.data)))
}
