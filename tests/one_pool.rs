//! This test has its own process, because it counts the threads of the process.
#![cfg(target_os = "linux")]

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use ddpm::data::Images;
use ddpm::train::on_metrics;
use ddpm::{Diffusion, Result, Sampler, Solver, TrainConfig, Trainer, UNetConfig};

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// candle would start a second pool for elementwise operations on so many values.
#[test]
fn large_batches_start_no_second_pool_of_threads() -> Result<()> {
    const BATCH: usize = 32;
    let network = UNetConfig { hidden_dims: vec![8, 16, 16], ..UNetConfig::cifar10() };
    // Starts the pool, with more than one thread on any machine.
    rayon::ThreadPoolBuilder::new().num_threads(3).build_global().unwrap();
    let before = threads();
    assert!(before > 3);

    // One thread reads the next batch, and ends with `fit`.
    let images = Images::new((0..40 * 3072).map(|i| (i % 251) as u8).collect(), (3, 32, 32))?;
    let config = TrainConfig { batch_size: BATCH, steps: 3, ..TrainConfig::mnist() };
    let mut trainer = Trainer::new(network.clone(), config, Diffusion::ddpm(), &Device::Cpu)?;
    let mut most = 0;
    trainer.fit(
        &images,
        &mut on_metrics(|_| {
            most = most.max(threads());
            Ok(())
        }),
    )?;
    assert_eq!(most, before + 1);
    // The system lists a thread for a moment after it has ended.
    let end = Instant::now() + Duration::from_secs(10);
    while threads() > before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(threads(), before, "after training");

    for accumulation in [1, 2] {
        let config = TrainConfig { batch_size: BATCH, accumulation, ..TrainConfig::cifar10() };
        let mut trainer = Trainer::new(network.clone(), config, Diffusion::ddpm(), &Device::Cpu)?;
        let shape = (BATCH, 3, 32, 32);
        let x_0 = Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu)?;
        let eps = Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu)?;
        let t = Tensor::full(500u32, BATCH, &Device::Cpu)?;
        trainer.step_with(&x_0, &t, &eps)?;
        assert_eq!(threads(), before, "after a training step");
        let sampler = Sampler::new(trainer.diffusion(), Solver::ddpm(), 2)?;
        sampler.sample(&trainer.ema_model()?, shape, 0, &Device::Cpu)?;
        assert_eq!(threads(), before, "after sampling");
    }
    Ok(())
}
