//! Draws images from a checkpoint: `--checkpoint out/mnist/checkpoint --gif denoising.gif`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, Result, SamplingArgs, device, out, whole};
use ddpm::eval::Generator;
use ddpm::observe::Progress;
use ddpm::{UNetConfig, files, pictures};

/// Draw images from a checkpoint of any U-Net with images of 1 or 3 channels
#[derive(Parser)]
#[command(name = "sample", version)]
struct Cli {
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Number of images; only a few at a time are in memory
    #[arg(long, value_name = "N", default_value = "64", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1024))]
    count: usize,
    /// Number of the first image, among those of a seed
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<usize>(0..=1_000_000_000))]
    from: usize,
    /// Directory for one PNG file per image
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Picture to write
    #[arg(long, value_name = "FILE.png", default_value = "samples.png")]
    out: PathBuf,
    /// Animation of the denoising to write
    #[arg(long, value_name = "FILE.gif")]
    gif: Option<PathBuf>,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(cli: Cli) -> Result<ExitCode> {
    let checkpoint = cli.sampling.open()?;
    let network: UNetConfig = checkpoint.architecture()?;
    let shape = network.image_shape();
    pictures::check_channels(shape.0)?;
    let config = cli.sampling.config(&checkpoint)?;
    let condition = cli.sampling.condition(&network, cli.from, cli.count)?;
    let sampler = config.sampler(checkpoint.diffusion())?.condition(condition);
    cli::check_output("--out", &cli.out, "png")?;
    cli.gif.as_deref().map_or(Ok(()), |gif| cli::check_output("--gif", gif, "gif"))?;
    let device = device::pick(cli.sampling.cpu)?;
    let model = cli.sampling.model(&checkpoint, &device)?;
    cli.sampling.announce(&config, &checkpoint, &device);
    let start = std::time::Instant::now();
    let generator =
        Generator::new(&sampler, shape, cli.sampling.seed, &device).first_image(cli.from);
    let mut frames = pictures::Frames::new(sampler.timesteps().len());
    let progress = Progress::started(generator.steps(cli.count) as u64);
    let drawn = generator.draw(&model, cli.count, |step| {
        cli.gif.as_ref().map_or(Ok(()), |_| frames.add(step.index, step.x))?;
        progress.advance(step.done as u64);
        Ok(ControlFlow::Continue(()))
    })?;
    progress.finish();
    let images = drawn.ok_or(cli::Interrupted)?;
    files::write(&cli.out, &pictures::png(&pictures::grid_of(images.pixels(), shape)?)?)?;
    let mut written = cli.out.display().to_string();
    if let Some(dir) = &cli.images {
        pictures::save_each(dir, cli.from, images.pixels(), shape)?;
        written += &format!(", {}", dir.display());
    }
    if let Some(gif) = &cli.gif {
        files::write(gif, &frames.gif(shape)?)?;
        written += &format!(", {}", gif.display());
    }
    let (n, images) = (cli.count, if cli.count == 1 { "image" } else { "images" });
    out(format_args!("{n} {images} in {:.1} s: {written}", start.elapsed().as_secs_f64()));
    Ok(ExitCode::SUCCESS)
}
