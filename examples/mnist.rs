//! Trains on MNIST: on the digits in the repository, or with `--data` on a full set.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, Recipe, RecipeName, TrainArgs, datasets};
use ddpm::sample::SamplerConfig;
use ddpm::{Diffusion, Solver, TrainConfig, UNetConfig};

/// The digits in the repository.
const DIGITS: &str = "examples/data/mnist-train-10k-images-idx3-ubyte.gz";

/// The recipe for a full set: the process of the paper, or the recommended one.
fn full(out: &'static str, name: RecipeName) -> Recipe {
    // Noise corrects the errors that a briefly trained network makes in earlier sampling steps.
    let sampling = SamplerConfig::new(Solver::Ddim { eta: 1.0 }, 100).clip_denoised(true);
    let recipe = Recipe::new(UNetConfig::mnist(), Diffusion::ddpm(), TrainConfig::mnist());
    let recipe = Recipe { out, cargo_target: "--example mnist", sampling, ..recipe };
    match name {
        RecipeName::Ddpm => recipe,
        RecipeName::Recommended => recipe.recommended(6_000, 64),
    }
}

/// The recipe for the digits in the repository, which takes a few minutes: many updates of small batches.
fn quick() -> Recipe {
    let recipe = full("out/mnist", RecipeName::Recommended).recommended(1_875, 16);
    Recipe { sample_every: 625, ..recipe }
}

fn defaults() -> String {
    let full = |name| full("out/mnist-full", name);
    format!(
        "{}\n\n{}\n\n{}\n\nWith --fashion: as with --data, except for --out out/fashion-mnist.",
        quick().defaults("Defaults"),
        full(RecipeName::Ddpm).defaults("With --data"),
        full(RecipeName::Recommended).defaults("With --data --recipe recommended"),
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
    /// Recipe for a full set: ddpm, with the process of the paper, or recommended, with velocity and Muon
    #[arg(long, value_name = "R", value_enum, default_value = "ddpm", requires = "data")]
    recipe: RecipeName,
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> ExitCode {
    cli::main(|Cli { data, fashion, recipe, train }| {
        let recipe = match (fashion, &data) {
            (true, _) => full("out/fashion-mnist", recipe),
            (false, Some(_)) => full("out/mnist-full", recipe),
            (false, None) => quick(),
        };
        let (data, repository) = (data.as_deref(), env!("CARGO_MANIFEST_DIR"));
        cli::train(&recipe, &train, || datasets::mnist(data, fashion, repository, DIGITS))
    })
}
