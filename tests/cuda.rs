//! A CUDA device compared with the CPU: the same networks give the same numbers, up to rounding.
//!
//! On a machine without a GPU, the libraries of `tests/stand-in-cuda` replace it.
#![cfg(feature = "cuda")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use ddpm::data::{Batch, Images};
use ddpm::nn::{Architecture, Condition, Model, Output, Trainable};
use ddpm::nn::{Dropout, Parameters, from_fn};
use ddpm::observe::{GradientNorms, HeldOutLoss};
use ddpm::process::Prediction;
use ddpm::sample::{DynamicThreshold, Spacing};
use ddpm::train::{AdamConfig, GradScalerConfig};
use ddpm::{
    Checkpoint, Diffusion, NoiseSchedule, Precision, Result, Sampler, Solver, TrainConfig, Trainer,
    UNet, UNetConfig,
};

mod passes;
mod small;

fn gpu() -> Device {
    Device::new_cuda(0).expect("a CUDA device, or the libraries that stand in for one")
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The norm of the difference, relative to that of `expected`.
fn off(found: &Tensor, expected: &Tensor) -> f64 {
    off_of(found, expected, 0.0)
}

/// The norm of the difference, relative to `beside`, for an `expected` that may be close to zero.
fn off_of(found: &Tensor, expected: &Tensor, beside: f64) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let difference: Vec<f32> =
        values(found).iter().zip(values(expected)).map(|(a, b)| a - b).collect();
    norm(&difference) / (norm(&values(expected)) + beside)
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// Networks with every kind of layer, and with sizes that are not multiples of block sizes.
fn networks() -> [UNetConfig; 2] {
    [
        UNetConfig {
            image_size: 8.into(),
            hidden_dims: vec![8, 16, 24],
            time_dim: 12,
            attention_levels: vec![0, 1],
            dropout: 0.3,
            classes: Some(2),
            ..UNetConfig::mnist()
        },
        UNetConfig {
            image_size: 12.into(),
            channels: 3,
            hidden_dims: vec![16, 8],
            ..UNetConfig::mnist()
        },
    ]
}

fn inputs(config: &UNetConfig) -> Result<(Tensor, Tensor)> {
    let (channels, height, width) = config.image_shape();
    let shape = (3, channels, height, width);
    let t = Tensor::new(&[3u32, 500, 999], &Device::Cpu)?;
    Ok((Sampler::prior(shape, 1, &Device::Cpu)?, t))
}

fn build(config: &UNetConfig, device: &Device) -> Result<(Parameters, Model<UNet>)> {
    let parameters = Parameters::new(7, DType::F32, device);
    let unet = parameters.build(config)?;
    Ok((parameters, unet))
}

fn gradients<N: Architecture>(
    config: &N,
    (x, t): (Tensor, Tensor),
    precision: Precision,
    device: &Device,
) -> Result<(Tensor, BTreeMap<String, Tensor>)> {
    let parameters = Parameters::new(7, DType::F32, device);
    let mut model = parameters.build(config)?;
    model.set_precision(precision)?;
    let target = Sampler::prior(x.dims(), 2, &Device::Cpu)?;
    let mut output = None;
    let mut pass = || -> Result<_> {
        // A network without classes ignores them.
        let condition = Condition::classes(vec![1, 2, 1])?;
        let (x, t, dropout) = (x.to_device(device)?, t.to_device(device)?, Dropout::new(5, 11));
        model.gradients(&x, &t, &condition, &dropout, &mut |y| {
            output = Some(y.prediction.clone());
            let d = (y.prediction.to_device(&Device::Cpu)? - &target)?;
            Ok(Output::new(d.to_device(device)?))
        })
    };
    let mut found = pass()?;
    let vars = parameters.vars();
    let mut named = BTreeMap::new();
    for (name, var) in &vars {
        named.insert(name.clone(), found.remove(var).expect("a gradient").to_device(&Device::Cpu)?);
    }
    Ok((output.unwrap().to_device(&Device::Cpu)?, named))
}

#[test]
fn networks_and_their_gradients_are_the_cpus() -> Result<()> {
    for config in networks() {
        let (expected, expected_gradients) =
            gradients(&config, inputs(&config)?, Precision::Highest, &Device::Cpu)?;
        // Limits for the output, for the gradient of each weight, and for all gradients together.
        let mut limits =
            vec![(Precision::Highest, 3e-6, 2e-5, 5e-6), (Precision::High, 2e-3, 1e-2, 5e-3)];
        if cfg!(feature = "f16") {
            limits
                .extend([(Precision::BF16, 3e-2, 3e-1, 6e-2), (Precision::F16, 4e-3, 3e-2, 8e-3)]);
        }
        for (precision, output_limit, gradient_limit, limit) in limits {
            let (output, found) = gradients(&config, inputs(&config)?, precision, &gpu())?;
            let error = off(&output, &expected);
            println!("{precision}: output off by {error:.1e}");
            assert!(error < output_limit, "{precision}: output off by {error}");
            let all =
                expected_gradients.values().map(|d| norm(&values(d)).powi(2)).sum::<f64>().sqrt();
            let (mut most, mut sum) = (0f64, 0f64);
            for (name, expected) in &expected_gradients {
                // A value added to every pixel of a channel has no gradient if the next layer
                // normalises single channels: both devices find rounding errors of zero, each
                // its own (measured: 2e-8 of `all`), which are compared with `all` only.
                let is_zero = norm(&values(expected)) < 1e-6 * all;
                let beside = if is_zero { 1e-2 * all } else { 1e-3 * all };
                let error = off_of(&found[name], expected, beside);
                most = most.max(error);
                sum += (off(&found[name], expected) * norm(&values(expected))).powi(2);
                assert!(error < gradient_limit, "{precision}: {name} off by {error}");
            }
            let together = sum.sqrt() / all;
            println!("{precision}: gradients off by {most:.1e}, together by {together:.1e}");
            assert!(together < limit, "{precision}: gradients off by {together}");
        }
    }
    Ok(())
}

#[test]
fn the_same_counters_give_the_same_noise() -> Result<()> {
    for shape in [vec![3, 5], vec![2, 1, 28, 28], vec![1, 1], vec![4, 3, 32, 32]] {
        let found = values(&Sampler::prior(shape.as_slice(), 42, &gpu())?);
        let expected = values(&Sampler::prior(shape.as_slice(), 42, &Device::Cpu)?);
        for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
            assert!((a - b).abs() < 1e-6, "{shape:?}, {i}: {a}, not {b}");
        }
    }
    Ok(())
}

#[test]
fn the_process_is_the_cpus() -> Result<()> {
    let gpu = gpu();
    let shape = (3, 2, 5, 7);
    let (x, eps) =
        (Sampler::prior(shape, 1, &Device::Cpu)?, Sampler::prior(shape, 2, &Device::Cpu)?);
    let t = Tensor::new(&[0u32, 17, 99], &Device::Cpu)?;
    let on_gpu = [x.to_device(&gpu)?, t.to_device(&gpu)?, eps.to_device(&gpu)?];
    for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity] {
        let diffusion = Diffusion::new(NoiseSchedule::cosine(100)?, prediction);
        let [gx, gt, ge] = &on_gpu;
        assert!(off(&diffusion.q_sample(gx, gt, ge)?, &diffusion.q_sample(&x, &t, &eps)?) < 1e-6);
        assert!(off(&diffusion.target(gx, gt, ge)?, &diffusion.target(&x, &t, &eps)?) < 1e-6);
    }
    // A timestep beyond the schedule must not be read from the table.
    let diffusion = Diffusion::new(NoiseSchedule::cosine(100)?, Prediction::Epsilon);
    let beyond = Tensor::new(&[5u32, 100, 6], &Device::Cpu)?.to_device(&gpu)?;
    let found = values(&diffusion.q_sample(&on_gpu[0], &beyond, &on_gpu[2])?);
    for (i, image) in found.chunks(2 * 5 * 7).enumerate() {
        assert!(image.iter().all(|x| x.is_nan() == (i == 1)), "image {i}: {image:?}");
    }
    Ok(())
}

#[test]
fn samples_are_the_cpus() -> Result<()> {
    let config = &networks()[0];
    let weights = build(config, &Device::Cpu)?.0;
    let sample = |device: &Device, solver, spacing| -> Result<Tensor> {
        let weights: BTreeMap<_, _> =
            weights.vars().into_iter().map(|(k, v)| (k, v.as_detached_tensor())).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.safetensors");
        candle_core::safetensors::save(&weights.into_iter().collect(), &path)?;
        let unet = Parameters::load(&path, DType::F32, device)?.build(config)?;
        let sampler = Sampler::with_spacing(&Diffusion::ddpm(), solver, spacing, 5)?
            .dynamic_threshold(DynamicThreshold { ratio: 0.9, max: 2.0 })?
            .first_image(7);
        sampler.sample(&unet, (2, 1, 8, 8), 3, device)
    };
    // The last one evaluates the network between two timesteps, and adds noise there.
    for (solver, spacing) in [
        (Solver::ddim(), Spacing::Even),
        (Solver::ddpm(), Spacing::Even),
        (Solver::DpmSolverSde, Spacing::Karras { rho: 7.0 }),
    ] {
        let [found, expected] = [gpu(), Device::Cpu].map(|device| sample(&device, solver, spacing));
        let error = off(&found?, &expected?);
        assert!(error < 1e-5, "{solver}, {spacing}: off by {error}");
    }
    Ok(())
}

/// Only the last step waits for the device.
#[test]
fn a_prediction_that_is_not_finite_is_reported_with_the_last_step() -> Result<()> {
    for (bad, value) in [(999, f32::NAN), (333, f32::INFINITY), (0, f32::NEG_INFINITY)] {
        let denoiser = from_fn(move |x_t: &Tensor, t: &Tensor| {
            let value = if t.to_vec1::<u32>()?[0] == bad { value } else { 0.5 };
            Ok(Tensor::full(value, x_t.shape(), &Device::Cpu)?.to_device(x_t.device())?)
        });
        for clip in [false, true] {
            let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 4)?.clip_denoised(clip);
            let mut steps = sampler.steps(&denoiser, (2, 1, 4, 4), 0, &gpu())?;
            for step in steps.by_ref().take(3) {
                step?;
            }
            let message = steps.next().expect("a last step").unwrap_err().to_string();
            let expected = format!("the denoiser's output is not finite at timestep {bad}");
            assert_eq!(message, expected);
        }
    }
    Ok(())
}

/// A training configuration with all features.
fn training(precision: Precision) -> TrainConfig {
    TrainConfig {
        optimizer: AdamConfig::adamw(1e-3, 0.1),
        batch_size: 4,
        accumulation: 2,
        clip_norm: Some(0.5),
        warmup_steps: 3,
        precision,
        log_every: 1000,
        ..TrainConfig::mnist()
    }
}

fn trainer(config: TrainConfig, device: &Device) -> Result<Trainer<UNetConfig>> {
    Trainer::new(networks()[0].clone(), config, Diffusion::ddpm(), device)
}

/// The `k`-th batch of 8x8 images.
fn batch(k: u64, device: &Device) -> Result<Batch> {
    let values = Sampler::prior((4, 1, 8, 8), 50 + k, &Device::Cpu)?;
    let mut batch = Batch::from(values.clamp(-1f32, 1f32)?.to_device(device)?);
    batch.classes = Some(Tensor::new(&[0u32, 1, (k % 2) as u32, 1], &Device::Cpu)?);
    Ok(batch)
}

/// All weights, or their averages, concatenated.
fn all(tensors: impl Iterator<Item = Tensor>) -> Result<Tensor> {
    let tensors = tensors.map(|t| Ok(t.to_device(&Device::Cpu)?.flatten_all()?));
    Ok(Tensor::cat(&tensors.collect::<Result<Vec<_>>>()?, 0)?)
}

fn weights(trainer: &Trainer<UNetConfig>) -> Result<Tensor> {
    all(trainer.vars().values().map(|var| var.as_detached_tensor()))
}

fn averages(trainer: &Trainer<UNetConfig>) -> Result<Tensor> {
    all(trainer.ema().unwrap().averages().values().cloned())
}

#[test]
fn training_is_the_cpus() -> Result<()> {
    // Undivided updates are captured after some steps, and launched as a graph from then on.
    for (optimizer, accumulation) in [
        (AdamConfig::adamw(1e-3, 0.1), 2),
        (AdamConfig::adamw(1e-3, 0.1), 1),
        (AdamConfig::adam(1e-3), 1),
    ] {
        let config = TrainConfig { optimizer, accumulation, ..training(Precision::Highest) };
        let devices = [Device::Cpu, gpu()];
        let mut runs = devices.clone().map(|device| trainer(config.clone(), &device).unwrap());
        let before = weights(&runs[0])?;
        for k in 0..8 {
            let mut found = [[0f32; 2]; 2];
            for ((run, device), found) in runs.iter_mut().zip(&devices).zip(&mut found) {
                let update = run.step(&batch(k, device)?)?;
                *found = [update.loss.to_scalar()?, update.grad_norm.to_scalar()?];
            }
            let [[loss, norm], [loss_there, norm_there]] = found;
            assert!((loss / loss_there - 1.0).abs() < 1e-4, "{k}: {loss}, {loss_there}");
            assert!((norm / norm_there - 1.0).abs() < 1e-3, "{k}: {norm}, {norm_there}");
        }
        let captured = runs[1].is_captured();
        assert_eq!(captured, accumulation == 1, "{:?}", runs[1]);
        // Adam's first updates depend on the signs of gradients near 0.
        let [expected, found] = [weights(&runs[0])?, weights(&runs[1])?];
        let way = off(&before, &expected);
        let error = off(&found, &expected);
        assert!(error < 0.05 * way, "weights went {way:.1e}, and are off by {error:.1e}");
        let error = off(&averages(&runs[1])?, &averages(&runs[0])?);
        assert!(error < 0.05 * way, "averages are off by {error:.1e}");
    }
    Ok(())
}

/// Bit for bit, as on the CPU. This requires that the sums of the device have a fixed order, which
/// they have here.
#[test]
fn a_resumed_run_is_the_unbroken_one() -> Result<()> {
    let mut precisions = vec![Precision::Highest];
    if cfg!(feature = "f16") {
        precisions.push(Precision::F16);
    }
    for precision in precisions {
        let scaler = GradScalerConfig { growth_interval: 2, ..GradScalerConfig::default() };
        // The uninterrupted run is captured, and recomputes maps. The run that is resumed after each step does neither.
        let config = TrainConfig { grad_scaler: scaler, accumulation: 1, ..training(precision) };
        let (gpu, dir) = (gpu(), tempfile::tempdir().unwrap());
        let path = dir.path().join("checkpoint");
        let mut unbroken = trainer(TrainConfig { recompute: true, ..config.clone() }, &gpu)?;
        let mut run = trainer(config.clone(), &gpu)?;
        for k in 0..7 {
            unbroken.step(&batch(k, &gpu)?)?;
            run.save(&path)?;
            let network = networks()[0].clone();
            run = Trainer::resume(&path, network, config.clone(), Diffusion::ddpm(), &gpu)?;
            run.step(&batch(k, &gpu)?)?;
        }
        assert!(unbroken.is_captured() && !run.is_captured(), "{unbroken:?}");
        assert_eq!(values(&weights(&run)?), values(&weights(&unbroken)?), "{precision}");
        assert_eq!(values(&averages(&run)?), values(&averages(&unbroken)?), "{precision}");
        let scale = |run: &Trainer<_>| run.grad_scaler().unwrap().map(|scaler| scaler.scale());
        assert_eq!(scale(&run), scale(&unbroken));
    }
    Ok(())
}

/// The scale falls from a value at which everything overflows to one at which nothing does.
#[test]
fn overflows_are_skipped_on_the_device() -> Result<()> {
    if !cfg!(feature = "f16") {
        return Ok(());
    }
    let initial_scale = 2f64.powi(40);
    let grad_scaler =
        GradScalerConfig { initial_scale, growth_interval: 4, ..GradScalerConfig::default() };
    let config = TrainConfig { grad_scaler, accumulation: 1, ..training(Precision::F16) };
    let (gpu, dir) = (gpu(), tempfile::tempdir().unwrap());
    let mut run = trainer(config.clone(), &gpu)?;
    let before = values(&weights(&run)?);
    let (mut scale, mut skipped, mut good, mut since) = (initial_scale, 0, 0, 0);
    for k in 0..40 {
        let update = run.step(&batch(k, &gpu)?)?;
        assert!(update.loss.to_scalar::<f32>()?.is_finite());
        if update.grad_norm.to_scalar::<f32>()?.is_finite() {
            (good, since) = (good + 1, since + 1);
            scale *= if since % 4 == 0 { 2.0 } else { 1.0 };
        } else {
            (skipped, scale, since) = (skipped + 1, scale / 2.0, 0);
        }
        let scaler = run.grad_scaler()?.expect("a scaler");
        assert_eq!((scaler.scale(), scaler.skipped()), (scale, skipped), "update {k}");
        assert_eq!(values(&weights(&run)?) == before, good == 0, "update {k}");
        if good == 8 {
            break;
        }
    }
    assert!(skipped > 5 && good == 8, "{skipped} skipped, {good} good");

    let path = dir.path().join("checkpoint");
    run.save(&path)?;
    let json = std::fs::read(path.join("checkpoint.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(state["ema_updates"], good);
    assert_eq!(state["grad_scaler"]["skipped"], skipped);
    assert_eq!(Checkpoint::open(&path)?.step(), good + skipped);
    Ok(())
}

/// Uploads more batches than may be in progress at once, and keeps each.
#[test]
fn batches_are_the_cpus() -> Result<()> {
    let images =
        ddpm::data::Images::new((0..64 * 20).map(|i| (i * 7 % 251) as u8).collect(), (1, 8, 8))?
            .with_labels((0..20).map(|i| i % 2).collect())?;
    let config = TrainConfig { horizontal_flip: true, ..training(Precision::Highest) };
    let mut batches = [Vec::new(), Vec::new()];
    for (device, batches) in [Device::Cpu, gpu()].iter().zip(&mut batches) {
        let mut run = trainer(config.clone(), device)?;
        for _ in 0..7 {
            let batch = run.next_batch(&images)?;
            run.step(&batch)?;
            batches.push(batch.images);
        }
    }
    for (found, expected) in batches[1].iter().zip(&batches[0]) {
        assert_eq!(values(found), values(expected));
    }
    Ok(())
}

#[test]
fn a_custom_network_is_computed_by_the_same_kernels_and_captured() -> Result<()> {
    let x = Sampler::prior((2, 3, 6, 10), 1, &Device::Cpu)?;
    let t = Tensor::new(&[3u32, 999], &Device::Cpu)?;
    let pass =
        |device| gradients(&small::CONFIG, (x.clone(), t.clone()), Precision::Highest, device);
    let ((expected, expected_gradients), (output, found)) = (pass(&Device::Cpu)?, pass(&gpu())?);
    assert!(off(&output, &expected) < 3e-6);
    for (name, expected) in &expected_gradients {
        let error = off(&found[name], expected);
        assert!(error < 5e-5, "{name}: {error:e}");
    }

    let config = TrainConfig { batch_size: 2, ..TrainConfig::cifar10() };
    let device = gpu();
    let mut trainer = Trainer::new(small::CONFIG, config, Diffusion::ddpm(), &device)?;
    for k in 0..12 {
        trainer.step(&Sampler::prior((2, 3, 6, 10), k, &device)?)?;
    }
    assert!(trainer.is_captured(), "{trainer:?}");
    Ok(())
}

/// The observers compute between captured updates, and their passes reuse the same memory.
#[test]
fn observers_that_compute_do_not_change_a_captured_run() -> Result<()> {
    let pixels = (0..10 * 48).map(|i| (i * 7 % 251) as u8).collect();
    let (images, device) = (Images::new(pixels, (3, 4, 4))?, gpu());
    let end = |observed: bool| -> Result<_> {
        let config = TrainConfig { steps: 9, batch_size: 8, ..TrainConfig::cifar10() };
        let mut trainer = Trainer::new(small::CONFIG, config, Diffusion::ddpm(), &device)?;
        // Updates are captured from the fourth on, and again from the fourth after the norms.
        let observers = (GradientNorms::steps(5), HeldOutLoss::steps(4, &images));
        trainer.fit(&images, observed.then_some(observers))?;
        assert!(trainer.is_captured(), "{trainer:?}");
        let weights = all(trainer.vars().values().map(|var| var.as_detached_tensor()))?;
        let averages = all(trainer.ema().unwrap().averages().values().cloned())?;
        Ok([weights, averages]
            .map(|x| values(&x).into_iter().map(f32::to_bits).collect::<Vec<_>>()))
    };
    assert!(end(true)? == end(false)?);
    Ok(())
}

/// The step runs within a pass of another network, whose maps share memory with a captured step.
#[test]
fn steps_within_a_pass_are_not_captured_ones() -> Result<()> {
    let config = TrainConfig { accumulation: 1, ..training(Precision::Highest) };
    let devices = [Device::Cpu, gpu()];
    let mut runs = devices.clone().map(|device| trainer(config.clone(), &device).unwrap());
    let before = weights(&runs[0])?;
    let mut others = Vec::new();
    for (run, device) in runs.iter_mut().zip(&devices) {
        let (parameters, other) = build(&networks()[0], device)?;
        let (x, t) = inputs(&networks()[0])?;
        let (x, t) = (x.to_device(device)?, t.to_device(device)?);
        for k in 0..12 {
            let batch = batch(k, device)?;
            if k != 6 {
                run.step(&batch)?;
                continue;
            }
            let dropout = Dropout::new(5, 11);
            let mut found = passes::gradients(&other, &x, &t, &dropout, &mut |y| {
                run.step(&batch)?;
                assert!(!run.is_captured());
                Ok(y.clone())
            })?;
            let vars = parameters.vars();
            others.push(all(vars.values().map(|var| found.remove(var).expect("a gradient")))?);
        }
        assert_eq!(run.is_captured(), device.is_cuda());
    }
    let [expected, found] = [weights(&runs[0])?, weights(&runs[1])?];
    let (way, error) = (off(&before, &expected), off(&found, &expected));
    assert!(error < 0.05 * way, "weights went {way:.1e}, and are off by {error:.1e}");
    let error = off(&others[1], &others[0]);
    assert!(error < 2e-5, "the other network's gradients are off by {error:.1e}");
    Ok(())
}

/// Custom steps between captured ones: the graph must not outlive the memory that it reads.
#[test]
fn captured_steps_and_others_take_turns() -> Result<()> {
    let config = TrainConfig { accumulation: 1, ..training(Precision::Highest) };
    let devices = [Device::Cpu, gpu()];
    let mut runs = devices.clone().map(|device| trainer(config.clone(), &device).unwrap());
    let before = weights(&runs[0])?;
    for k in 0..12 {
        for (run, device) in runs.iter_mut().zip(&devices) {
            let x_0 = batch(k, device)?;
            if k == 6 {
                let t = Tensor::from_vec(vec![5u32, 400, 700, 999], 4, device)?;
                run.step_with(&x_0, &t, &Sampler::prior((4, 1, 8, 8), 7, device)?)?;
            } else {
                run.step(&x_0)?;
            }
        }
        let captured = runs[1].is_captured();
        assert_eq!(captured, (3..6).contains(&k) || k >= 10, "{k}: {:?}", runs[1]);
    }
    let [expected, found] = [weights(&runs[0])?, weights(&runs[1])?];
    let (way, error) = (off(&before, &expected), off(&found, &expected));
    assert!(error < 0.05 * way, "weights went {way:.1e}, and are off by {error:.1e}");
    Ok(())
}
