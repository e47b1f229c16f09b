//! Converts weights of diffusers, of OpenAI's programs and of denoising-diffusion-pytorch:
//! `--from ddpm-cifar10-32 --to cifar10.safetensors`.

use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, ConvertArgs};

/// Convert a folder of diffusers, or weights of improved-diffusion, guided-diffusion or denoising-diffusion-pytorch, to a
/// weights file; or a checkpoint to a folder of diffusers
#[derive(Parser)]
#[command(name = "convert", version)]
struct Cli {
    #[command(flatten)]
    conversion: ConvertArgs,
}

fn main() -> ExitCode {
    cli::main(|cli: Cli| cli::convert(&cli.conversion))
}
