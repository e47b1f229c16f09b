//! Times whole networks, with figures that can be compared with those of other implementations.
//!
//! ```text
//! cargo bench --bench unet -- --model mnist|cifar10|ho --batch N [--iters N] [--threads N]
//!     [--precision highest|high|bf16|f16] [--optimizer adamw|muon] [--recompute] [--what train_step|forward|sample]
//!     --json
//! ```
//!
//! `train_step` is noising, forward, loss, backward, clipping to norm 1 and AdamW; `forward` is the network
//! alone, without gradients; `sample` is ten steps of DDIM. Each measure prints one line, in JSON with `--json`.
//! There, `ran_as` is the precision that this CPU actually used. With `--device cuda`, a run consists of ten
//! repetitions before the wait for the device, and the memory is that of the device.

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use clap::builder::RangedU64ValueParser;
use clap::{Parser, ValueEnum};
use ddpm::nn::{Architecture, Trainable, UNet2DConfig};
use ddpm::train::{AdamConfig, MuonConfig};
use ddpm::{
    Denoiser, Diffusion, Precision, Result, Sampler, Solver, TrainConfig, Trainer, UNetConfig,
};

#[derive(Parser)]
struct Args {
    /// The network.
    #[arg(long, value_enum, default_value = "mnist")]
    model: Model,
    /// Images per batch.
    #[arg(long, default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    batch: usize,
    /// The device.
    #[arg(long, value_enum, default_value = "cpu")]
    device: Where,
    /// The precision of products: highest, high, bf16 or f16 (the last two with the feature f16).
    #[arg(long, default_value = "highest")]
    precision: Precision,
    /// The optimiser of matrices.
    #[arg(long, value_enum, default_value = "adamw")]
    optimizer: Optimizer,
    /// Computes feature maps again in the backward pass instead of keeping them. A forward pass alone packs the weights
    /// again.
    #[arg(long)]
    recompute: bool,
    /// The number of timed runs. Three runs before them are not timed, ten on a GPU.
    #[arg(long, default_value_t = 10, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    iters: usize,
    /// The number of threads; by default that of all cores.
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    threads: Option<usize>,
    /// The measure; by default train_step and forward.
    #[arg(long, value_enum)]
    what: Option<What>,
    /// Prints JSON lines.
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
    Ho,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Optimizer {
    Adamw,
    Muon,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Where {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum What {
    TrainStep,
    Forward,
    Sample,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("first use");
    }
    match args.model {
        Model::Mnist => time("mnist", &UNetConfig::mnist(), (1, 28), args),
        Model::Cifar10 => time("cifar10", &UNetConfig::cifar10(), (3, 32), args),
        Model::Ho => time("ho", &UNet2DConfig::cifar10(), (3, 32), args),
    }
}

/// Times a network for square images with this number of channels and this size.
fn time<N: Architecture + Clone>(
    name: &str,
    config: &N,
    (channels, size): (usize, usize),
    args: &Args,
) -> Result<()> {
    let device = match args.device {
        Where::Cpu => Device::Cpu,
        Where::Cuda => Device::new_cuda(0)?,
    };
    let train = TrainConfig {
        batch_size: args.batch,
        optimizer: AdamConfig::adamw(2e-4, 1e-5),
        muon: (args.optimizer == Optimizer::Muon).then(MuonConfig::default),
        clip_norm: Some(1.0),
        ema: None,
        precision: args.precision,
        recompute: args.recompute,
        ..TrainConfig::mnist()
    };
    let shape = (args.batch, channels, size, size);
    // Random values: some units multiply zeros faster.
    let x = Sampler::prior(shape, 0, &device)?;
    let eps = Sampler::prior(shape, 1, &device)?;
    let t: Vec<u32> = (0..args.batch as u32).map(|k| k * 37 % 1000).collect();
    let t = Tensor::from_vec(t, args.batch, &device)?;

    if ran_as(args)?.is_some_and(|precision| precision != args.precision) {
        eprintln!("On this CPU, high is highest.");
    }
    let wanted = |what| args.what.is_none_or(|w| w == what);
    if wanted(What::TrainStep) {
        let mut trainer = Trainer::new(config.clone(), train, Diffusion::ddpm(), &device)?;
        measure("train_step", name, args, &device, &mut || match args.device {
            Where::Cpu => trainer.step_with(&x, &t, &eps).map(drop),
            // Includes the noise, because training draws it on the device.
            Where::Cuda => trainer.step(&x).map(drop),
        })?;
        if args.device == Where::Cuda && !trainer.is_captured() {
            eprintln!("the step was not captured as a graph: {trainer:?}");
            std::process::exit(1);
        }
    }
    if wanted(What::Forward) {
        let unet = frozen(config, args, &device)?;
        measure("forward", name, args, &device, &mut || unet.forward(&x, &t).map(drop))?;
    } else if args.what == Some(What::Sample) {
        let unet = frozen(config, args, &device)?;
        let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 10)?.clip_denoised(true);
        measure("sample", name, args, &device, &mut || {
            sampler.sample(&unet, shape, 0, &device).map(drop)
        })?;
    }
    Ok(())
}

/// Builds a network whose weights take no gradients, as for sampling.
fn frozen<N: Architecture>(config: &N, args: &Args, device: &Device) -> Result<N::Model> {
    let weights = VarBuilder::from_backend(Box::new(Initial), DType::F32, device.clone());
    let mut unet = config.build(weights)?;
    unet.set_precision(args.precision)?;
    unet.set_recompute(args.recompute)?;
    Ok(unet)
}

/// Creates random weights, and keeps none of them, so that they are in memory once.
struct Initial;

impl SimpleBackend for Initial {
    fn get(
        &self,
        shape: Shape,
        _: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(init.var(shape, dtype, device)?.as_detached_tensor())
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("weight {name} has no shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

fn measure(
    name: &str,
    model: &str,
    args: &Args,
    device: &Device,
    run: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    // On a GPU the first runs select algorithms, and then the step is captured.
    let (warm_up, at_once) = if device.is_cpu() { (3, 1) } else { (10, 10) };
    for _ in 0..warm_up {
        run()?;
    }
    device.synchronize()?;
    let mut ms = Vec::new();
    for _ in 0..args.iters {
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
            "ran_as": ran_as(args)?, "threads": threads, "ms_min": min, "ms_median": median, "peak_rss_mb": rss,
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

/// Returns the precision that the CPU uses if this one is requested. It is determined by a computation, because
/// the crate does not report it.
fn ran_as(args: &Args) -> Result<Option<Precision>> {
    if args.device != Where::Cpu || args.precision != Precision::High {
        return Ok((args.device == Where::Cpu).then_some(args.precision));
    }
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let x =
        Sampler::prior((1, 1, config.image_size.height, config.image_size.width), 0, &Device::Cpu)?;
    let t = Tensor::new(&[500u32], &Device::Cpu)?;
    let output = |precision| -> Result<Vec<f32>> {
        // Trainable weights would have a differentiable forward pass, in f32.
        let weights = VarBuilder::from_backend(Box::new(Initial), DType::F32, Device::Cpu);
        let y = config.build(weights)?.with_precision(precision)?.forward(&x, &t)?;
        Ok(y.flatten_all()?.to_vec1()?)
    };
    let same = output(Precision::High)? == output(Precision::Highest)?;
    Ok(Some(if same { Precision::Highest } else { Precision::High }))
}

/// Returns the GPU memory in use, which is that of this process if no other uses the GPU. The memory of maps is
/// not returned before the process ends, so the value is close to the maximum.
fn gpu_mb(device: &Device) -> Option<f64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let (free, total) = device.cuda_stream().context().mem_get_info().ok()?;
        return Some((total - free) as f64 / 1e6);
    }
    let _ = device;
    None
}

/// Returns the maximum memory of this process, if the system reports it.
fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| kib / 1024.0)
}
