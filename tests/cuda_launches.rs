//! The number of kernels that a training step launches on a CUDA device. The libraries of `tests/stand-in-cuda` record
//! each launch in the file that `STAND_IN_LAUNCHES` names. Without this variable, the test checks nothing.
//!
//! This is the only test of its program, because other tests launch kernels.
#![cfg(feature = "cuda")]

use std::collections::BTreeMap;

use candle_core::Device;
use ddpm::data::Images;
use ddpm::train::AdamConfig;
use ddpm::{Diffusion, Precision, Result, TrainConfig, Trainer, UNetConfig};

/// The launches since the file was last emptied, by the name of the kernel.
fn launches(path: &std::ffi::OsStr) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for line in std::fs::read_to_string(path).unwrap_or_default().lines() {
        *counts.entry(line.to_owned()).or_default() += 1;
    }
    counts
}

/// Networks of the paper with few channels and small images. The number of launches depends on neither.
fn small(config: UNetConfig, image_size: usize) -> UNetConfig {
    let width = |dim: &usize| dim / config.hidden_dims[0] * 8;
    let hidden_dims = config.hidden_dims.iter().map(width).collect();
    UNetConfig { image_size: image_size.into(), hidden_dims, time_dim: 16, ..config }
}

#[test]
fn a_step_launches_few_kernels() -> Result<()> {
    let Some(path) = std::env::var_os("STAND_IN_LAUNCHES") else { return Ok(()) };
    let device = Device::new_cuda(0)?;
    let half = if cfg!(feature = "f16") { Precision::F16 } else { Precision::Highest };
    for (name, network, own, libraries, attentions) in [
        ("CIFAR-10", small(UNetConfig::cifar10(), 8), 228, 137, 3),
        ("MNIST", small(UNetConfig::mnist(), 8), 145, 95, 1),
    ] {
        // In f32, attention needs products of a library.
        let libraries = libraries + if half == Precision::F16 { 0 } else { 7 * attentions };
        let channels = network.channels;
        let values = (0..channels * 64 * 8).map(|i| (i * 7 % 251) as u8).collect();
        let images = Images::new(values, (channels, 8, 8))?;
        let config = TrainConfig {
            optimizer: AdamConfig::adamw(1e-3, 0.1),
            batch_size: 2,
            clip_norm: Some(1.0),
            precision: half,
            ..TrainConfig::mnist()
        };
        let mut run = Trainer::new(network, config, Diffusion::ddpm(), &device)?;
        for step in 0..2 {
            // The first step also prepares what all steps share.
            let _ = std::fs::write(&path, "");
            let batch = run.next_batch(&images)?;
            run.step(&batch)?;
            assert!(!run.is_captured(), "step {step}");
        }
        let counts = launches(&path);
        let library = counts.get("library").copied().unwrap_or(0);
        let kernels = counts.values().sum::<usize>() - library;
        assert!(kernels > 0 && library > 0, "{name}: {counts:?}");
        assert!(
            kernels <= own && library <= libraries,
            "{name}: {kernels} and {library}, {counts:#?}"
        );
    }
    Ok(())
}
