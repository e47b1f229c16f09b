//! Training does not wait for a CUDA device. The libraries of `tests/stand-in-cuda` record each wait in the
//! file that `STAND_IN_WAITS` names. Without this variable, the test checks nothing.
//!
//! This is the only test of its program, because other tests wait.
#![cfg(feature = "cuda")]

use candle_core::Device;
use ddpm::data::Images;
use ddpm::train::{AdamConfig, MuonConfig};
use ddpm::{Diffusion, Precision, Result, TrainConfig, Trainer, UNetConfig};

fn waits() -> Option<String> {
    let path = std::env::var_os("STAND_IN_WAITS")?;
    Some(std::fs::read_to_string(path).unwrap_or_default())
}

#[test]
fn steps_do_not_wait() -> Result<()> {
    if waits().is_none() {
        return Ok(());
    }
    let device = Device::new_cuda(0)?;
    let images = Images::new((0..64 * 40).map(|i| (i * 7 % 251) as u8).collect(), (1, 8, 8))?;
    let network = UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![8, 16],
        time_dim: 12,
        dropout: 0.1,
        ..UNetConfig::mnist()
    };
    let half = if cfg!(feature = "f16") { Precision::F16 } else { Precision::Highest };
    let muon = Some(MuonConfig::default());
    for (precision, accumulation, muon) in [
        (Precision::Highest, 1, None),
        (half, 1, None),
        (Precision::Highest, 2, None),
        (half, 1, muon),
    ] {
        let config = TrainConfig {
            optimizer: AdamConfig::adamw(1e-3, 0.1),
            muon,
            batch_size: 4,
            accumulation,
            clip_norm: Some(1.0),
            // The learning rate also changes from step to step.
            warmup_steps: 1000,
            precision,
            ..TrainConfig::mnist()
        };
        let mut run = Trainer::new(network.clone(), config, Diffusion::ddpm(), &device)?;
        let steps = |run: &mut Trainer<_>, count| -> Result<()> {
            (0..count).try_for_each(|_| {
                let batch = run.next_batch(&images)?;
                run.step(&batch).map(drop)
            })
        };
        steps(&mut run, 12)?;
        assert_eq!(run.is_captured(), accumulation == 1, "{run:?}");
        let before = waits();
        steps(&mut run, 10)?;
        assert_eq!(waits(), before, "{precision}, accumulation {accumulation}");
        // Checks that a wait is recorded.
        device.synchronize()?;
        assert_ne!(waits(), before);
    }
    Ok(())
}
