//! Gradient scaling, with a network whose gradients overflow on purpose: the order of unscaling,
//! checking, clipping and skipping.
#![cfg(feature = "f16")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};
use ddpm::nn::{Architecture, Dropout, Parameters};
use ddpm::nn::{Condition, Output, Trainable};
use ddpm::train::{AdamW, Ema, GradScalerConfig, clip_grad_norm, gradients};
use ddpm::{
    Denoiser, Diffusion, Error, Precision, Result, Sampler, TrainConfig, Trainer, UNetConfig,
};
use serde::{Deserialize, Serialize};

mod passes;

/// One weight for each of four channels, multiplied in f16. Gradients beyond 65504 are infinite.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Half;

struct HalfModel(Tensor);

impl Architecture for Half {
    const KIND: &'static str = "half";
    type Model = HalfModel;

    fn build(&self, vb: VarBuilder) -> Result<HalfModel> {
        Ok(HalfModel(vb.get_with_hints((1, 4, 1, 1), "w", Init::Const(0.5))?))
    }
}

impl Denoiser for HalfModel {
    fn denoise(&self, x_t: &Tensor, _: &Tensor, _: &Condition) -> Result<Output> {
        let y = x_t.to_dtype(DType::F16)?.broadcast_mul(&self.0.to_dtype(DType::F16)?)?;
        Ok(Output::new(y.to_dtype(DType::F32)?))
    }
}

impl Trainable for HalfModel {
    fn set_precision(&mut self, _: Precision) -> Result<()> {
        Ok(())
    }
}

const SHAPE: (usize, usize, usize, usize) = (2, 4, 4, 4);

fn config() -> TrainConfig {
    TrainConfig {
        precision: Precision::F16,
        grad_scaler: GradScalerConfig { growth_interval: 3, ..Default::default() },
        clip_norm: Some(0.1),
        batch_size: SHAPE.0,
        ..TrainConfig::cifar10()
    }
}

fn trainer(config: TrainConfig) -> Trainer<Half> {
    Trainer::new(Half, config, Diffusion::ddpm(), &Device::Cpu).unwrap()
}

/// The arguments of update `k`: images of this size, nearly without noise.
fn batch(k: u64, size: f64) -> Result<[Tensor; 3]> {
    let x_0 = (Sampler::prior(SHAPE, k, &Device::Cpu)? * size)?;
    let eps = Sampler::prior(SHAPE, k + 1000, &Device::Cpu)?;
    Ok([x_0, Tensor::zeros(SHAPE.0, DType::U32, &Device::Cpu)?, eps])
}

/// Sizes of ten batches. The gradients of size 3 overflow at scales above 16384.
const SIZES: [f64; 10] = [1.0, 1.0, 3.0, 3.0, 3.0, 1.0, 3.0, 1.0, 1.0, 3.0];

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Powers of two change only the exponent of a product. Scaled and unscaled gradients therefore equal
/// those that were never scaled. The update uses gradients that are unscaled before they are clipped.
#[test]
fn updates_are_those_of_unscaled_gradients_and_overflows_are_skipped() -> Result<()> {
    let config = config();
    let mut trainer = trainer(config.clone());

    let parameters = Parameters::new(config.seed, DType::F32, &Device::Cpu);
    let model = parameters.build(&Half)?;
    let vars = parameters.vars();
    let mut adam = AdamW::new(config.optimizer, &vars)?;
    let mut ema = Ema::new(config.ema.unwrap(), &vars)?;

    let mut scales = Vec::new();
    for (k, size) in SIZES.into_iter().enumerate() {
        let [x_0, t, eps] = batch(k as u64, size)?;
        let update = trainer.step_with(&x_0, &t, &eps)?;
        scales.push(trainer.grad_scaler()?.unwrap().scale());
        let norm = update.grad_norm.to_scalar::<f32>()?;
        if !norm.is_finite() {
            continue;
        }

        let x_t = trainer.diffusion().q_sample(&x_0, &t, &eps)?;
        let output = passes::train(&model, &x_t, &t, &Dropout::new(config.seed, k as u64))?;
        let loss = (output - &eps)?.sqr()?.mean_all()?;
        let mut found: BTreeMap<_, _> = gradients(&loss, &vars)?;
        let expected = clip_grad_norm(&mut found, 0.1)?.to_scalar::<f32>()?;
        assert!((norm / expected - 1.0).abs() < 1e-6, "{norm}, not {expected}");
        assert!(expected > 0.1, "nothing to clip in update {k}");
        adam.step(&found, config.learning_rate(k as u64))?;
        ema.update(&vars)?;
    }
    let k = 1024.0;
    // Overflows in updates 2, 3 and, after the growth, not before the last.
    assert_eq!(scales, [64, 64, 32, 16, 16, 16, 32, 32, 32, 16].map(|n| f64::from(n) * k));
    let skipped = trainer.grad_scaler()?.unwrap().skipped();
    assert_eq!((skipped, trainer.steps()), (3, 10));
    assert_eq!(adam.steps(), 7);
    assert_eq!(trainer.ema().unwrap().updates(), 7);

    // The kernel rounds in a different order than the formulae.
    let near = |a: &Tensor, b: &Tensor| {
        let pairs = values(a).into_iter().zip(values(b));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-6
    };
    assert!(near(&trainer.vars()["w"], &vars["w"]));
    assert!(near(&trainer.ema().unwrap().averages()["w"], &ema.averages()["w"]));
    Ok(())
}

#[test]
fn a_skipped_update_changes_nothing_but_the_scale() -> Result<()> {
    let mut trainer = trainer(config());
    let before = values(&trainer.vars()["w"]);
    let [x_0, t, eps] = batch(0, 100.0)?;
    let update = trainer.step_with(&x_0, &t, &eps)?;
    assert!(!update.grad_norm.to_scalar::<f32>()?.is_finite());
    assert!(update.loss.to_scalar::<f32>()?.is_finite());
    assert_eq!(values(&trainer.vars()["w"]), before);
    assert_eq!(values(&trainer.ema().unwrap().averages()["w"]), before);
    assert_eq!((trainer.ema().unwrap().updates(), trainer.steps()), (0, 1));
    // An overflow is not an error: the next update has another scale.
    let dir = tempfile::tempdir().unwrap();
    trainer.save(dir.path().join("checkpoint")).map(drop)
}

#[test]
fn overflow_at_the_least_scale_is_an_error() -> Result<()> {
    let scaler = GradScalerConfig { initial_scale: 8.0, min_scale: 4.0, ..Default::default() };
    let mut trainer = trainer(TrainConfig { grad_scaler: scaler, ..config() });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    // 1e4 squared is beyond f16, but 1e4 is not.
    for step in 1..=2 {
        trainer.save(&path)?;
        let [x_0, t, eps] = batch(step, 1e4)?;
        trainer.step_with(&x_0, &t, &eps)?;
    }
    match trainer.save(&path) {
        Err(Error::NonFinite { what, step: 1, .. }) if what == "gradient norm" => Ok(()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_resumed_run_keeps_its_scale() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let mut unbroken = trainer(config());
    for (k, size) in SIZES.into_iter().enumerate() {
        let [x_0, t, eps] = batch(k as u64, size)?;
        unbroken.step_with(&x_0, &t, &eps)?;
    }
    let mut run = trainer(config());
    for (k, size) in SIZES.into_iter().enumerate() {
        run.save(&path)?;
        run = Trainer::resume(&path, Half, config(), Diffusion::ddpm(), &Device::Cpu)?;
        let [x_0, t, eps] = batch(k as u64, size)?;
        run.step_with(&x_0, &t, &eps)?;
    }
    assert_eq!(run.grad_scaler()?.unwrap().scale(), unbroken.grad_scaler()?.unwrap().scale());
    assert_eq!(run.grad_scaler()?.unwrap().skipped(), 3);
    assert_eq!(values(&run.vars()["w"]), values(&unbroken.vars()["w"]));
    let averages = |trainer: &Trainer<Half>| values(&trainer.ema().unwrap().averages()["w"]);
    assert_eq!(averages(&run), averages(&unbroken));
    Ok(())
}

#[test]
fn f16_is_refused_where_it_is_not_supported() {
    let config = TrainConfig { precision: Precision::F16, ..TrainConfig::mnist() };
    let trainer = Trainer::new(UNetConfig::mnist(), config, Diffusion::ddpm(), &Device::Cpu);
    let message = trainer.unwrap_err().to_string();
    assert!(message.contains("f16 is for CUDA devices (feature `cuda`)"), "{message}");
}
