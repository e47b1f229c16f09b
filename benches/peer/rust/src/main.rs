//! Times the crate's networks in other libraries, with the options and the JSON lines of `cargo bench --bench unet`.
//!
//! ```text
//! cargo run --release -- --peer burn|candle --model mnist|cifar10 --batch N [--iters N] [--threads N]
//!     [--what train_step|forward] --json
//! ```
//!
//! `train_step` is the forward pass, the loss, the backward pass and AdamW. burn also clips gradients. `forward` computes
//! no gradients.

use std::error::Error;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::builder::RangedU64ValueParser;
use clap::{Parser, ValueEnum};
use serde::Deserialize;

mod burn;
mod candle;
#[cfg(test)]
mod tests;

/// Number of groups of each normalisation.
const GROUPS: usize = 8;
const LEARNING_RATE: f64 = 2e-4;
const WEIGHT_DECAY: f64 = 1e-5;

/// The environment variable from which both libraries read the number of threads.
const THREADS: &str = "RAYON_NUM_THREADS";

/// One run of a measure.
type Run = Box<dyn FnMut() -> Result<(), Box<dyn Error>>>;

#[derive(Parser)]
struct Args {
    /// The library.
    #[arg(long, value_enum)]
    peer: Peer,
    /// The network.
    #[arg(long, value_enum, default_value = "mnist")]
    model: Model,
    /// Images per batch.
    #[arg(long, default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    batch: usize,
    /// The number of timed runs. Three runs before them are not timed.
    #[arg(long, default_value_t = 10, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    iters: usize,
    /// The number of threads. Default: the number of cores.
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    threads: Option<usize>,
    /// The measure; by default train_step, then forward.
    #[arg(long, value_enum)]
    what: Option<What>,
    /// Prints JSON lines.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Peer {
    Burn,
    Candle,
}

#[derive(Clone, Copy, ValueEnum)]
enum Model {
    Mnist,
    Cifar10,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum What {
    TrainStep,
    Forward,
}

/// A network, with the names of tests/data/generate/reference.py.
#[derive(Deserialize)]
pub struct Config {
    image_size: usize,
    channels: usize,
    hidden_dims: Vec<usize>,
    time_dim: usize,
    attention_resolutions: Vec<usize>,
    dropout: f64,
}

impl Config {
    fn of(model: Model) -> Self {
        match model {
            Model::Mnist => Self {
                image_size: 28,
                channels: 1,
                hidden_dims: vec![32, 64, 128],
                time_dim: 128,
                attention_resolutions: vec![],
                dropout: 0.0,
            },
            Model::Cifar10 => Self {
                image_size: 32,
                channels: 3,
                hidden_dims: vec![128, 256, 256, 256],
                time_dim: 128,
                attention_resolutions: vec![1],
                dropout: 0.02,
            },
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if let Some(threads) = args.threads.map(|threads| threads.to_string())
        && std::env::var(THREADS).ok().as_ref() != Some(&threads)
    {
        // Restarts the program, because a process cannot safely change its own environment.
        let args = std::env::args_os().skip(1);
        return Err(Command::new(std::env::current_exe()?)
            .args(args)
            .env(THREADS, threads)
            .exec()
            .into());
    }
    for what in [What::TrainStep, What::Forward] {
        if args.what.is_none_or(|wanted| wanted == what) {
            measure(args, what)?;
        }
    }
    Ok(())
}

fn measure(args: &Args, what: What) -> Result<(), Box<dyn Error>> {
    let config = Config::of(args.model);
    let mut run = match args.peer {
        Peer::Burn => burn::prepare(&config, args.batch, what),
        Peer::Candle => candle::prepare(&config, args.batch, what)?,
    };
    for _ in 0..3 {
        run()?;
    }
    let mut ms = Vec::new();
    for _ in 0..args.iters {
        let start = Instant::now();
        run()?;
        ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    ms.sort_by(f64::total_cmp);
    let (min, median, rss) = (ms[0], ms[ms.len() / 2], peak_rss_mb());
    let (what, peer, model) = (name(what), name(args.peer), name(args.model));
    let (batch, threads) = (args.batch, rayon::current_num_threads());
    if args.json {
        let line = serde_json::json!({
            "name": what, "peer": peer, "model": model, "batch": batch, "precision": "highest",
            "threads": threads, "ms_min": min, "ms_median": median, "peak_rss_mb": rss,
        });
        println!("{line}");
    } else {
        println!(
            "{peer}: {what} {model}, batch {batch}, {threads} threads: {median:.1} ms (least {min:.1}); \
             peak memory {rss:.0} MB"
        );
    }
    Ok(())
}

/// Returns the name of a value in the arguments.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Returns the timesteps of a batch.
fn timesteps(batch: usize) -> Vec<u32> {
    (0..batch as u32).map(|k| k * 37 % 1000).collect()
}

/// Returns the sines and cosines of timesteps, (batch, dim), computed in f64.
fn waves(t: &[u32], dim: usize) -> Vec<f32> {
    let half = dim / 2;
    let scale = -10000f64.ln() / (half as f64 - 1.0);
    let angles = |&t: &u32| (0..half).map(move |k| f64::from(t) * (scale * k as f64).exp());
    let of = |t| angles(t).map(f64::sin).chain(angles(t).map(f64::cos)).map(|wave| wave as f32);
    t.iter().flat_map(of).collect()
}

/// Returns the maximum memory of this process, if the system reports it.
fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| kib / 1024.0)
}
