//! Trains on CIFAR-10. For a GPU: `cargo run --release --example cifar10 --features cuda`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, NetworkName, Recipe, RecipeName, TrainArgs, datasets};
use ddpm::nn::UNet2DConfig;
use ddpm::{Diffusion, TrainConfig, UNetConfig};

/// The recipe of this name. That of the paper draws its grids by the usual sampler: deterministic DDIM with 50 steps.
fn recipe(name: RecipeName) -> Recipe {
    let recipe = Recipe {
        out: "out/cifar10",
        cargo_target: "--example cifar10",
        save_every: 1_000,
        sample_every: 5_000,
        ..Recipe::new(UNetConfig::cifar10(), Diffusion::ddpm(), TrainConfig::cifar10())
    };
    match name {
        RecipeName::Ddpm => recipe,
        RecipeName::Recommended => recipe.recommended(100_000, 128),
    }
}

/// The network of the paper, with its process and its training.
fn ho() -> Recipe<UNet2DConfig> {
    Recipe {
        out: "out/cifar10-ho",
        cargo_target: "--example cifar10",
        save_every: 1_000,
        sample_every: 5_000,
        ..Recipe::new(UNet2DConfig::cifar10(), Diffusion::ddpm(), TrainConfig::ho())
    }
}

fn defaults() -> String {
    let [ddpm, recommended] = [RecipeName::Ddpm, RecipeName::Recommended].map(recipe);
    let recommended = recommended.defaults("With --recipe recommended");
    format!(
        "{}\n\n{recommended}\n\n{}",
        ddpm.defaults("Defaults"),
        ho().defaults("With --network ho")
    )
}

/// Train a DDPM on CIFAR-10, and draw samples from it
#[derive(Parser)]
#[command(name = "cifar10", version, after_help = defaults())]
struct Cli {
    /// Directory that contains cifar-10-batches-bin/, or `hub`
    #[arg(long, value_name = "DIR", default_value = "data")]
    data: PathBuf,
    /// Recipe: ddpm, with the process of the paper, or recommended, with velocity and Muon
    #[arg(long, value_name = "R", value_enum, default_value = "ddpm", conflicts_with = "network")]
    recipe: RecipeName,
    /// Network: unet, that of this crate, or ho, that of Ho et al. with their training
    #[arg(long, value_name = "N", value_enum, default_value = "unet")]
    network: NetworkName,
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> ExitCode {
    cli::main(|Cli { data, recipe: name, network, train }| match network {
        NetworkName::Unet => cli::train(&recipe(name), &train, || datasets::cifar10(&data)),
        NetworkName::Ho => cli::train(&ho(), &train, || datasets::cifar10(&data)),
    })
}
