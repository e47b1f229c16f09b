//! Times whole networks, with figures that can be set beside another implementation's.
//!
//! ```text
//! cargo bench --bench unet -- --model mnist|cifar10 --batch N [--iters N] [--threads N] --json
//! ```
//!
//! `train_step` is noising, forward, loss, backward, clipping to norm 1 and AdamW; `forward` is the network
//! alone, without gradients. One line a measure, in JSON with `--json`.

use std::time::Instant;

use candle_core::{Device, Tensor};
use clap::{Parser, ValueEnum};
use ddpm::{AdamConfig, Denoiser, Diffusion, Precision, Result, TrainConfig, Trainer, UNetConfig};

#[derive(Parser)]
struct Args {
    /// Which network.
    #[arg(long, value_enum, default_value = "mnist")]
    model: Model,
    /// Images a batch.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// How exactly products are computed: highest, high or bf16 (with the feature f16).
    #[arg(long, default_value = "highest")]
    precision: Precision,
    /// Timed runs, after three that are not.
    #[arg(long, default_value_t = 10)]
    iters: usize,
    /// Threads; all cores unless given.
    #[arg(long)]
    threads: Option<usize>,
    /// What to measure; both unless given.
    #[arg(long)]
    what: Option<String>,
    /// Print JSON lines.
    #[arg(long)]
    json: bool,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Model {
    Mnist,
    Cifar10,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("first use");
    }
    let (name, config) = match args.model {
        Model::Mnist => ("mnist", UNetConfig::mnist()),
        Model::Cifar10 => ("cifar10", UNetConfig::cifar10()),
    };
    let device = Device::Cpu;
    let train = TrainConfig {
        batch_size: args.batch,
        optimizer: AdamConfig::adamw(2e-4, 1e-5),
        clip_norm: Some(1.0),
        ema: None,
        precision: args.precision,
        ..TrainConfig::mnist()
    };
    let mut trainer = Trainer::new(config.clone(), train, Diffusion::ddpm(), &device)?;

    let shape = (args.batch, config.channels, config.image_size, config.image_size);
    // Not zeros, which some units multiply faster.
    let x = Tensor::randn(0f32, 1.0, shape, &device)?;
    let eps = Tensor::randn(0f32, 1.0, shape, &device)?;
    let t: Vec<u32> = (0..args.batch as u32).map(|k| k * 37 % 1000).collect();
    let t = Tensor::new(t, &device)?;

    let wanted = |what: &str| args.what.as_deref().is_none_or(|w| w == what);
    if wanted("train_step") {
        measure("train_step", name, &args, &mut || trainer.step_with(&x, &t, &eps).map(drop))?;
    }
    if wanted("forward") {
        // Weights that take no gradient, as in sampling.
        let unet = trainer.ema_model()?;
        drop(trainer);
        measure("forward", name, &args, &mut || unet.forward(&x, &t).map(drop))?;
    }
    Ok(())
}

fn measure(
    name: &str,
    model: &str,
    args: &Args,
    run: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    for _ in 0..3 {
        run()?;
    }
    let mut ms = Vec::new();
    for _ in 0..args.iters.max(1) {
        let start = Instant::now();
        run()?;
        ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    ms.sort_by(f64::total_cmp);
    let (min, median) = (ms[0], ms[ms.len() / 2]);
    let (batch, threads, rss) = (args.batch, rayon::current_num_threads(), peak_rss_mb());
    if args.json {
        let line = serde_json::json!({
            "name": name, "model": model, "batch": batch, "precision": args.precision,
            "threads": threads, "ms_min": min, "ms_median": median, "peak_rss_mb": rss,
        });
        println!("{line}");
    } else {
        println!(
            "{name} {model}, batch {batch}, {threads} threads: {median:.1} ms (least {min:.1}); \
             peak memory {rss:.0} MB"
        );
    }
    Ok(())
}

/// The most memory that this process held, where the system tells.
fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| kib / 1024.0)
}
