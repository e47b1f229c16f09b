//! Times whole networks, with figures that can be set beside another implementation's.
//!
//! ```text
//! cargo bench --bench unet -- --model mnist|cifar10 --batch N [--iters N] [--threads N] --json
//! ```
//!
//! `train_step` is noising, forward, loss, backward, clipping to norm 1 and AdamW; `forward` is the network
//! alone, without gradients; `sample` is ten steps of DDIM. One line a measure, in JSON with `--json`. With
//! `--device cuda`, a run is ten of them before the device is waited for, and memory is the device's.

use std::time::Instant;

use candle_core::{Device, Tensor};
use clap::{Parser, ValueEnum};
use ddpm::{
    AdamConfig, Denoiser, Diffusion, Precision, Result, Sampler, Solver, TrainConfig, Trainer,
    UNetConfig,
};

#[derive(Parser)]
struct Args {
    /// Which network.
    #[arg(long, value_enum, default_value = "mnist")]
    model: Model,
    /// Images a batch.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// What computes.
    #[arg(long, value_enum, default_value = "cpu")]
    device: Where,
    /// How exactly products are computed: highest or high; bf16 or f16 (with the feature f16).
    #[arg(long, default_value = "highest")]
    precision: Precision,
    /// Timed runs, after three that are not, or ten on a GPU.
    #[arg(long, default_value_t = 10)]
    iters: usize,
    /// Threads; all cores unless given.
    #[arg(long)]
    threads: Option<usize>,
    /// What to measure: train_step, forward or sample; the first two unless given.
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

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Where {
    Cpu,
    Cuda,
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
    let device = match args.device {
        Where::Cpu => Device::Cpu,
        Where::Cuda => Device::new_cuda(0)?,
    };
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
    let x = Sampler::prior(shape, 0, &device)?;
    let eps = Sampler::prior(shape, 1, &device)?;
    let t: Vec<u32> = (0..args.batch as u32).map(|k| k * 37 % 1000).collect();
    let t = Tensor::from_vec(t, args.batch, &device)?;

    let wanted = |what: &str| args.what.as_deref().is_none_or(|w| w == what);
    if wanted("train_step") {
        measure("train_step", name, &args, &device, &mut || match args.device {
            Where::Cpu => trainer.step_with(&x, &t, &eps).map(drop),
            // Noise and all, as training goes there.
            Where::Cuda => trainer.step(&x).map(drop),
        })?;
        if args.device == Where::Cuda && !trainer.is_captured() {
            eprintln!("the step was not captured as a graph: {trainer:?}");
            std::process::exit(1);
        }
    }
    if wanted("forward") {
        // Weights that take no gradient, as in sampling.
        let unet = trainer.ema_model()?;
        drop(trainer);
        measure("forward", name, &args, &device, &mut || unet.forward(&x, &t).map(drop))?;
    } else if args.what.as_deref() == Some("sample") {
        let unet = trainer.ema_model()?;
        let sampler = Sampler::new(trainer.diffusion(), Solver::ddim(), 10)?.clip_denoised(true);
        measure("sample", name, &args, &device, &mut || {
            sampler.sample(&unet, shape, 0, &device).map(drop)
        })?;
    }
    Ok(())
}

fn measure(
    name: &str,
    model: &str,
    args: &Args,
    device: &Device,
    run: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    // On a GPU the first ones choose algorithms, and then the step is captured.
    let (warm_up, at_once) = if device.is_cpu() { (3, 1) } else { (10, 10) };
    for _ in 0..warm_up {
        run()?;
    }
    device.synchronize()?;
    let mut ms = Vec::new();
    for _ in 0..args.iters.max(1) {
        let start = Instant::now();
        for _ in 0..at_once {
            run()?;
        }
        device.synchronize()?;
        ms.push(start.elapsed().as_secs_f64() * 1e3 / at_once as f64);
    }
    ms.sort_by(f64::total_cmp);
    let (min, median) = (ms[0], ms[ms.len() / 2]);
    let (batch, threads, rss) = (args.batch, rayon::current_num_threads(), peak_rss_mb());
    if args.json {
        let line = serde_json::json!({
            "name": name, "model": model, "batch": batch, "precision": args.precision,
            "threads": threads, "ms_min": min, "ms_median": median, "peak_rss_mb": rss,
            "gpu_mb": gpu_mb(device),
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

/// What of a GPU's memory is taken: by this process, if it is alone. Maps' memory is not given back before
/// its end, so it is about the most that was.
fn gpu_mb(device: &Device) -> Option<f64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let (free, total) = device.cuda_stream().context().mem_get_info().ok()?;
        return Some((total - free) as f64 / 1e6);
    }
    let _ = device;
    None
}

/// The most memory that this process held, where the system tells.
fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| kib / 1024.0)
}
