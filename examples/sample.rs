//! Draws images from a checkpoint: `--checkpoint out/mnist/checkpoint --gif denoising.gif`.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::Device;
use clap::Parser;
use common::cli::{self, Result, whole};
use common::progress::Progress;
use common::sampling::SamplingArgs;
use common::tell::out;
use common::{device, draw, files, pictures};
use ddpm::{Denoiser, Sampler, UNetConfig};

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
    let network: UNetConfig = checkpoint.network()?;
    pictures::check_channels(network.channels)?;
    let config = cli.sampling.config(&checkpoint)?;
    let sampler = config.sampler(checkpoint.diffusion())?;
    files::check("--out", &cli.out, "png")?;
    cli.gif.as_deref().map_or(Ok(()), |gif| files::check("--gif", gif, "gif"))?;

    let device = device::pick(cli.sampling.cpu)?;
    let model = cli.sampling.model(&checkpoint, &device)?;
    out!("checkpoint  {}, step {}", checkpoint.dir().display(), checkpoint.step());
    out!("sampler     {}", SamplingArgs::describe(&config, &checkpoint));
    out!("device      {}", device::describe(&device));
    device::check_speed(cli.sampling.precision, &device);
    let start = Instant::now();
    draw_to_files(&cli, &sampler, &model, &network, &device)?;

    let files: Vec<_> = [Some(&cli.out), cli.gif.as_ref()].into_iter().flatten().collect();
    let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
    let seconds = start.elapsed().as_secs_f64();
    let images = if cli.count == 1 { "image" } else { "images" };
    out!("{} {images} in {seconds:.1} s: {}", cli.count, files.join(", "));
    Ok(ExitCode::SUCCESS)
}

fn draw_to_files(
    cli: &Cli,
    sampler: &Sampler,
    model: &impl Denoiser,
    network: &UNetConfig,
    device: &Device,
) -> Result<()> {
    let UNetConfig { channels, image_size: size, .. } = *network;
    let (shape, total) = ((cli.count, channels, size, size), sampler.timesteps().len());
    // Each part of the images is appended to every frame.
    let mut frames: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
    let mut progress = Progress::new(draw::steps(sampler, cli.count, device) as u64, 0);
    progress.start();
    let pixels = draw::draw(sampler, model, shape, cli.sampling.seed, device, |step| {
        if cli.gif.is_some() && pictures::has_frame(step.index, total) {
            frames.entry(step.index).or_default().extend(pictures::bytes(step.x)?);
        }
        progress.advance(step.done as u64);
        Ok(())
    })?;
    progress.finish();
    let grid = |pixels: &[u8]| pictures::grid(pixels, (channels, size, size));
    files::write(&cli.out, &pictures::png(&grid(&pixels)?)?)?;
    let Some(path) = &cli.gif else { return Ok(()) };
    let frames = frames.values().map(|pixels| grid(pixels)).collect::<ddpm::Result<Vec<_>>>()?;
    files::write(path, &ddpm::pictures::gif(&frames)?)
}
