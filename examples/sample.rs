//! Draws images from a checkpoint: `--checkpoint out/mnist/checkpoint --gif denoising.gif`.

use std::ops::ControlFlow;
use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, EditingArgs, OutputArgs, Result, SamplingArgs, device, out, whole};
use ddpm::eval::Generator;
use ddpm::observe::Progress;
use ddpm::pictures;

/// Draw images from a checkpoint of any U-Net with images of 1 to 4 channels; vary, interpolate or inpaint pictures
#[derive(Parser)]
#[command(name = "sample", version)]
struct Cli {
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Seed of the images
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    /// Number of images; only a few at a time are in memory
    #[arg(long, value_name = "N", default_value = "64", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=10_000_000))]
    count: usize,
    /// Number of the first image, among those of a seed
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<usize>(0..=1_000_000_000))]
    from: usize,
    #[command(flatten)]
    editing: EditingArgs,
    #[command(flatten)]
    output: OutputArgs,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(cli: Cli) -> Result<ExitCode> {
    let checkpoint = cli.sampling.open()?;
    let network = checkpoint.architecture()?;
    let shape = network.image_shape();
    pictures::check_channels(shape.0)?;
    let config = cli.sampling.config(&checkpoint)?;
    cli.editing.check(&cli.sampling, &network)?;
    let condition = cli.sampling.condition(&network, cli.from, cli.count)?;
    let sampler = config.sampler(checkpoint.diffusion())?.condition(condition);
    cli.output.check(cli.count)?;
    let device = device::pick(cli.sampling.cpu)?;
    let model = cli.sampling.model(&checkpoint, &device)?;
    cli.sampling.announce(&config, &checkpoint, &device);
    let start = std::time::Instant::now();
    let sampler = cli.editing.apply(sampler, shape, cli.count, &model, &device)?;
    let generator = Generator::new(&sampler, shape, cli.seed, &device).first_image(cli.from);
    let mut output = cli.output.begin(shape, cli.count, sampler.timesteps().len())?;
    let progress = Progress::started(generator.steps(cli.count) as u64);
    let _ = generator.visit(&model, cli.count, |step| {
        output.add(&step)?;
        progress.advance(step.done as u64);
        Ok(ControlFlow::Continue(()))
    })?;
    progress.finish();
    let written = output.finish()?;
    let (n, images) = (cli.count, if cli.count == 1 { "image" } else { "images" });
    out(format_args!("{n} {images} in {:.1} s: {written}", start.elapsed().as_secs_f64()));
    Ok(ExitCode::SUCCESS)
}
