use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;

use super::*;
use crate::denoiser::{Condition, Denoiser, Trainable};
use crate::engine::Model;
use crate::model::{Parameters, UNet, UNetConfig};
use crate::process::Diffusion;
use crate::sample::{Sampler, Solver};

fn config() -> UNetConfig {
    UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![8, 16],
        time_dim: 12,
        attention_levels: vec![0],
        classes: Some(2),
        ..UNetConfig::mnist()
    }
}

fn precisions() -> Vec<Precision> {
    let halves = [Precision::BF16, Precision::F16];
    [Precision::Highest]
        .into_iter()
        .chain(halves.into_iter().filter(|_| cfg!(feature = "f16")))
        .collect()
}

/// Copies these weights to a network that does not change.
fn fixed(parameters: &Parameters, precision: Precision, device: &Device) -> Result<Model<UNet>> {
    let weights: BTreeMap<_, _> =
        parameters.vars().into_iter().map(|(k, v)| (k, v.as_detached_tensor())).collect();
    let weights = Parameters::frozen(Path::new("weights"), weights, DType::F32, device);
    weights.build(&config())?.with_precision(precision)
}

fn bits(x: &Tensor) -> Result<Vec<u32>> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

#[test]
fn captured_sampling_is_sampling_without_graphs() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for precision in precisions() {
        let parameters = Parameters::new(7, DType::F32, &device);
        let _: Model<UNet> = parameters.build(&config())?;
        let graphs = fixed(&parameters, precision, &device)?;
        let mut plain = fixed(&parameters, precision, &device)?;
        plain.set_recompute(true)?;
        let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 14)?.clip_denoised(true);
        // The third run begins with the graph of the first.
        for (seed, batch) in [(0, 3), (1, 2), (2, 3)] {
            let sample = |model: &Model<UNet>| -> Result<Vec<u32>> {
                bits(&sampler.sample(model, (batch, 1, 8, 8), seed, &device)?)
            };
            assert!(sample(&graphs)? == sample(&plain)?, "{precision}, seed {seed}");
        }
        assert!(cuda::is_captured(&graphs.pool().network));
        assert!(!cuda::is_captured(&plain.pool().network));
    }
    Ok(())
}

/// A pass of a network that was used before equals the first pass of a new network with the same weights.
#[test]
fn passes_use_the_weights_as_they_are() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for precision in precisions() {
        let parameters = Parameters::new(7, DType::F32, &device);
        let model: Model<UNet> = parameters.build(&config())?.with_precision(precision)?;
        let x = Sampler::prior((2, 1, 8, 8), 1, &device)?;
        let t = Tensor::new(&[3u32, 700], &device)?;
        let pass = |model: &Model<UNet>| -> Result<Vec<u32>> {
            let (dropout, mut output) = (Dropout::new(0, 0), None);
            let condition = Condition::classes(vec![1, 0])?;
            let gradients = model.gradients(&x, &t, &condition, &dropout, &mut |y| {
                output = Some(y.clone());
                Ok(y.clone())
            })?;
            let output = output.ok_or_else(|| Error::config("outputs", 0, "1"))?;
            drop(gradients);
            bits(&output.prediction)
        };
        let new = || -> Result<Vec<u32>> {
            let condition = Condition::classes(vec![1, 0])?;
            let fixed = fixed(&parameters, precision, &device)?;
            bits(&fixed.denoise(&x, &t, &condition)?.prediction)
        };
        let mut before = Vec::new();
        for route in 0..3 {
            for (name, var) in parameters.vars() {
                if !name.ends_with("weight") {
                    continue;
                }
                let (weight, same) = (var.as_detached_tensor(), var.copy()?);
                match route {
                    0 => {}
                    1 => var.set(&(same.to_device(&Device::Cpu)? * 1.25)?.to_device(&device)?)?,
                    // In place, as the updates and averages of the device.
                    _ => cuda::add_to(&weight, &same)?,
                }
            }
            let expected = new()?;
            assert!(expected != before, "{precision}, route {route}: nothing has changed");
            for k in 0..3 {
                assert!(pass(&model)? == expected, "{precision}, route {route}, pass {k}");
            }
            before = expected;
        }
    }
    Ok(())
}
