//! Steps reuse the memory of earlier ones. This test has its own process, because faults are counted
//! for all threads of a process.
#![cfg(target_os = "linux")]

use std::fs;

use candle_core::Device;
use ddpm::{Diffusion, Sampler, TrainConfig, Trainer, UNetConfig};

/// Returns the number of page faults of the process that required no file to be read.
fn minor_faults() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    // The name before the fields may contain spaces.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().nth(7).unwrap().parse().unwrap()
}

#[test]
fn steps_touch_almost_no_new_memory() {
    for (name, network, batch) in
        [("mnist", UNetConfig::mnist(), 8), ("cifar10", UNetConfig::cifar10(), 2)]
    {
        let (channels, size, _) = network.image_shape();
        let config =
            TrainConfig { batch_size: batch, clip_norm: Some(1.0), ..TrainConfig::mnist() };
        let mut trainer = Trainer::new(network, config, Diffusion::ddpm(), &Device::Cpu).unwrap();
        let images = Sampler::prior((batch, channels, size, size), 0, &Device::Cpu).unwrap();
        let mut steps = |count: u64| {
            let before = minor_faults();
            (0..count).for_each(|_| drop(trainer.step(&images).unwrap()));
            (minor_faults() - before) / count
        };
        let first = steps(4);
        let later = steps(4);
        assert!(later < 100, "{name}: {later} pages a step, after {first}");
    }
}
