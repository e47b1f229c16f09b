//! Draws images from a checkpoint: `--checkpoint out/mnist/checkpoint --gif denoising.gif`.

mod common;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use common::cli::{self, Result, fraction, precision, whole};
use common::progress::Progress;
use common::{device, files, pictures};
use ddpm::{Checkpoint, Denoiser, Error, Precision, Sampler, Solver, Steps, UNetConfig};

/// Draw images from a checkpoint of mnist or cifar10
#[derive(Parser)]
#[command(name = "sample", version)]
struct Cli {
    /// The checkpoint's directory, such as out/mnist/checkpoint
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// How many images
    #[arg(long, value_name = "N", default_value = "64", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1024))]
    count: usize,
    /// How to go from one timestep to the next
    #[arg(long, value_enum, default_value = "ddim")]
    solver: SolverName,
    /// How many timesteps; 50 unless given, all of them for ddpm
    #[arg(long, value_name = "S", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1_000_000))]
    sampling_steps: Option<usize>,
    /// Noise of ddim's steps, from 0 (none, and the default) to 1
    #[arg(long, value_name = "E", allow_negative_numbers = true, value_parser = fraction)]
    eta: Option<f64>,
    /// Which images
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    /// The averaged weights, or those of the last update
    #[arg(long, value_enum, default_value = "ema")]
    weights: Weights,
    /// How exactly products are computed: highest, high or bf16 (with the feature f16)
    #[arg(long, value_name = "P", default_value = "highest", value_parser = precision)]
    precision: Precision,
    /// Do not clip the predicted image to the range of pixels at each step
    #[arg(long)]
    no_clip: bool,
    /// The picture to write
    #[arg(long, value_name = "FILE.png", default_value = "samples.png")]
    out: PathBuf,
    /// An animation of the denoising to write
    #[arg(long, value_name = "FILE.gif")]
    gif: Option<PathBuf>,
    /// Sample on the CPU, even where this was built for a GPU
    #[arg(long)]
    cpu: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum SolverName {
    /// Ancestral sampling
    Ddpm,
    /// Denoising diffusion implicit models
    Ddim,
}

#[derive(Clone, Copy, ValueEnum)]
enum Weights {
    Ema,
    Model,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(cli: Cli) -> Result<ExitCode> {
    let checkpoint = open(&cli.checkpoint)?;
    let network: UNetConfig = checkpoint.network()?;
    pictures::check_channels(network.channels)?;
    let sampler = sampler(&cli, &checkpoint)?;
    files::check("--out", &cli.out, "png")?;
    cli.gif.as_deref().map_or(Ok(()), |gif| files::check("--gif", gif, "gif"))?;

    let device = device::pick(cli.cpu)?;
    let model = match cli.weights {
        Weights::Ema => checkpoint.ema::<UNetConfig>(&device)?,
        Weights::Model => checkpoint.model::<UNetConfig>(&device)?,
    }
    .with_precision(cli.precision)?;
    println!("checkpoint  {}, step {}", checkpoint.dir().display(), checkpoint.step());
    println!("device      {}", device::describe(&device));
    let start = Instant::now();
    let shape = (cli.count, network.channels, network.image_size, network.image_size);
    draw(&cli, sampler.steps(&model, shape, cli.seed, &device)?)?;

    let files: Vec<_> = [Some(&cli.out), cli.gif.as_ref()].into_iter().flatten().collect();
    let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
    let seconds = start.elapsed().as_secs_f64();
    let images = if cli.count == 1 { "image" } else { "images" };
    println!("{} {images} in {seconds:.1} s: {}", cli.count, files.join(", "));
    Ok(ExitCode::SUCCESS)
}

fn open(dir: &Path) -> Result<Checkpoint> {
    Checkpoint::open(dir).map_err(|error| {
        let nested = dir.join("checkpoint");
        match error {
            Error::NoCheckpoint { .. } if nested.is_dir() => {
                format!("{error}; --checkpoint {} is one", nested.display()).into()
            }
            _ => error.into(),
        }
    })
}

fn sampler(cli: &Cli, checkpoint: &Checkpoint) -> Result<Sampler> {
    let all = checkpoint.diffusion().schedule().steps();
    let (solver, steps) = match (cli.solver, cli.eta) {
        (SolverName::Ddpm, None) => (Solver::ddpm(), all),
        (SolverName::Ddpm, Some(_)) => return Err("--eta is for --solver ddim only".into()),
        (SolverName::Ddim, eta) => (Solver::Ddim { eta: eta.unwrap_or(0.0) }, all.min(50)),
    };
    let steps = cli.sampling_steps.unwrap_or(steps);
    Ok(Sampler::new(checkpoint.diffusion(), solver, steps)?.clip_denoised(!cli.no_clip))
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
