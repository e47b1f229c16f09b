//! Measures samples: `--checkpoint out/mnist/checkpoint --data mnist:data --extractor digits:FILE`.

use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, EvaluateArgs};

/// Compare samples of a checkpoint, or pictures, with the images of a data set in the features of a network
#[derive(Parser)]
#[command(name = "evaluate", version)]
struct Cli {
    #[command(flatten)]
    evaluation: EvaluateArgs,
}

fn main() -> ExitCode {
    cli::main(|cli: Cli| cli::evaluate(&cli.evaluation))
}
