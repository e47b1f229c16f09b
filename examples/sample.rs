//! Draws images from a checkpoint: `--checkpoint out/mnist/checkpoint --gif denoising.gif`.

mod common;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use common::cli::{self, Result, whole};
use common::progress::Progress;
use common::sampling::SamplingArgs;
use common::tell::out;
use common::{device, files, pictures};
use ddpm::{Denoiser, Steps, UNetConfig};

/// Draw images from a checkpoint of mnist or cifar10
#[derive(Parser)]
#[command(name = "sample", version)]
struct Cli {
    #[command(flatten)]
    sampling: SamplingArgs,
    /// How many images
    #[arg(long, value_name = "N", default_value = "64", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1024))]
    count: usize,
    /// The picture to write
    #[arg(long, value_name = "FILE.png", default_value = "samples.png")]
    out: PathBuf,
    /// An animation of the denoising to write
    #[arg(long, value_name = "FILE.gif")]
    gif: Option<PathBuf>,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(cli: Cli) -> Result<ExitCode> {
    let checkpoint = cli.sampling.open()?;
    let network: UNetConfig = checkpoint.network()?;
    pictures::check_channels(network.channels)?;
    let sampler = cli.sampling.sampler(&checkpoint)?;
    files::check("--out", &cli.out, "png")?;
    cli.gif.as_deref().map_or(Ok(()), |gif| files::check("--gif", gif, "gif"))?;

    let device = device::pick(cli.sampling.cpu)?;
    let model = cli.sampling.model(&checkpoint, &device)?;
    out!("checkpoint  {}, step {}", checkpoint.dir().display(), checkpoint.step());
    out!("device      {}", device::describe(&device));
    let start = Instant::now();
    let shape = (cli.count, network.channels, network.image_size, network.image_size);
    draw(&cli, sampler.steps(&model, shape, cli.sampling.seed, &device)?)?;

    let files: Vec<_> = [Some(&cli.out), cli.gif.as_ref()].into_iter().flatten().collect();
    let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
    let seconds = start.elapsed().as_secs_f64();
    let images = if cli.count == 1 { "image" } else { "images" };
    out!("{} {images} in {seconds:.1} s: {}", cli.count, files.join(", "));
    Ok(ExitCode::SUCCESS)
}

/// Takes the steps, and writes the pictures.
fn draw<D: Denoiser>(cli: &Cli, steps: Steps<D>) -> Result<()> {
    let total = steps.len();
    let mut progress = Progress::new(total as u64, 0);
    let (mut frames, mut images) = (vec![], None);
    for step in steps {
        let step = step?;
        if cli.gif.is_some() && pictures::has_frame(step.index, total) {
            frames.push(pictures::grid(&step.x)?);
        }
        progress.advance(step.index as u64 + 1);
        images = Some(step.x);
    }
    progress.finish();
    let images = images.ok_or("the sampler has no steps")?;
    files::write(&cli.out, &pictures::png(&pictures::grid(&images)?)?)?;
    match &cli.gif {
        Some(path) => files::write(path, &pictures::gif(frames)?),
        None => Ok(()),
    }
}
