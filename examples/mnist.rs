//! Trains on MNIST: on the digits that come with the repository, or on a full set with `--data`.

mod common;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use common::train::{Recipe, TrainArgs};
use common::{cli, datasets, train};
use ddpm::{AdamConfig, TrainConfig, UNetConfig};

fn recipe() -> Recipe {
    Recipe {
        example: "mnist",
        network: UNetConfig::mnist(),
        // For a quarter of an hour: small batches, since many updates do more than exact ones, and
        // large strides, which need a warm-up and clipping.
        train: TrainConfig {
            steps: 9_000,
            batch_size: 8,
            optimizer: AdamConfig::adam(4e-4),
            warmup_steps: 200,
            clip_norm: Some(1.0),
            ..TrainConfig::mnist()
        },
        out: "out/mnist",
        save_every: 1_000,
        sample_every: 2_000,
        sample_count: 64,
        sampling_steps: 50,
    }
}

/// Train a DDPM on MNIST, and draw samples from it
#[derive(Parser)]
#[command(name = "mnist", version, after_help = recipe().defaults())]
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
        train::run(&recipe(), &cli.train, || datasets::mnist(cli.data.as_deref(), cli.fashion))
    })
}
