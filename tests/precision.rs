//! The accuracy of each precision, compared with the same network in f64.
//!
//! ```sh cargo test --release --features f16 --test precision -- --nocapture
//! ```

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use ddpm::nn::{Architecture, Model};
use ddpm::nn::{Dropout, Parameters};
use ddpm::{
    Denoiser, Diffusion, Precision, Result, Sampler, Solver, TrainConfig, Trainer, UNet, UNetConfig,
};

mod passes;
use passes::gradients;

/// The smaller network of the presets, and one with attention at full size. The batch is small,
/// because f64 is slow.
fn networks() -> [(&'static str, UNetConfig); 2] {
    let attentive = UNetConfig {
        hidden_dims: vec![24, 40, 64],
        attention_levels: vec![0, 1],
        channels: 3,
        image_size: 16.into(),
        ..UNetConfig::mnist()
    };
    [("mnist", UNetConfig::mnist()), ("attentive", attentive)]
}

/// Builds the network with weights of this seed in this dtype, once trainable and once not.
fn build(config: &UNetConfig, dtype: DType) -> Result<(Parameters, Model<UNet>, Model<UNet>)> {
    // The values are drawn in f32 for every dtype, so they are the same.
    let parameters = Parameters::new(3, dtype, &Device::Cpu);
    let trainable = parameters.build(config)?;
    let weights: HashMap<String, Tensor> =
        parameters.vars().into_iter().map(|(k, v)| (k, v.as_detached_tensor())).collect();
    let frozen = config.build(VarBuilder::from_tensors(weights, dtype, &Device::Cpu))?;
    Ok((parameters, trainable, frozen))
}

fn relative(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let norm = |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    Ok(norm(&(found.to_dtype(DType::F64)? - expected)?)? / norm(expected)?)
}

/// Returns whether the CPU has AMX for bf16.
fn has_amx() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.contains("amx_bf16") && std::env::var_os("DDPM_MAX_CPU_ISA").is_none()
}

#[test]
fn errors_against_f64() -> Result<()> {
    for (name, config) in networks() {
        let (channels, height, width) = config.image_shape();
        let shape = (2, channels, height, width);
        let x = Sampler::prior(shape, 5, &Device::Cpu)?;
        let target = Sampler::prior(shape, 6, &Device::Cpu)?;
        let t = Tensor::new(&[40u32, 700], &Device::Cpu)?;
        let dropout = Dropout::new(0, 0);
        let (parameters, trainable, frozen) = build(&config, DType::F64)?;
        let x_64 = x.to_dtype(DType::F64)?;
        let expected = frozen.forward(&x_64, &t)?;
        let target_64 = target.to_dtype(DType::F64)?;
        let mut d_output = |y: &Tensor| Ok((y - &target_64)?);
        let exact = gradients(&trainable, &x_64, &t, &dropout, &mut d_output)?;
        let exact: HashMap<String, Tensor> = parameters
            .vars()
            .iter()
            .map(|(name, var)| (name.clone(), exact.get(var).expect("a gradient").clone()))
            .collect();

        // Rounding to 8 bits has an error of up to 2^-9 of a value, and the errors of a few dozen
        // layers add up. Three such products are accurate to about 2^-16. Larger tiles have about twice the error of
        // the smaller ones.
        let high = if has_amx() { (1e-4, 3e-4) } else { (6e-6, 1.2e-5) };
        let mut limits = vec![(Precision::Highest, 3e-6, 1e-5), (Precision::High, high.0, high.1)];
        if cfg!(feature = "f16") {
            limits.push((Precision::BF16, 2e-2, 6e-2));
        }
        let mut highest = None;
        for (precision, output_limit, gradient_limit) in limits {
            let (parameters, trainable, frozen) = build(&config, DType::F32)?;
            let frozen = frozen.with_precision(precision)?;
            let found = frozen.forward(&x, &t)?;
            let output = relative(&found, &expected)?;
            if precision == Precision::Highest {
                highest = Some(found);
            } else if let Some(highest) = &highest {
                let differs = (highest - &found)?.abs()?.sum_all()?.to_scalar::<f32>()? > 0.0;
                assert!(differs, "{name}: {precision} has the bits of highest");
            }
            let trainable = trainable.with_precision(precision)?;
            let mut d_output = |y: &Tensor| Ok((y - &target)?);
            let found = gradients(&trainable, &x, &t, &dropout, &mut d_output)?;
            // Of all gradients together, because the terms of a single one may nearly cancel.
            let (mut off, mut all) = (0.0, 0.0);
            for (name, var) in &parameters.vars() {
                let exact = &exact[name];
                let found = found.get(var).expect("a gradient").to_dtype(DType::F64)?;
                off += (found - exact)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
                all += exact.sqr()?.sum_all()?.to_scalar::<f64>()?;
            }
            let gradients = (off / all).sqrt();
            println!("{name}, {precision}: output off by {output:.1e}, gradients {gradients:.1e}");
            assert!(output < output_limit, "{name}, {precision}: output off by {output}");
            assert!(
                gradients < gradient_limit,
                "{name}, {precision}: gradients off by {gradients}"
            );
            if precision == Precision::BF16 {
                // The precision must change the output.
                assert!(output > 1e-4, "{name}, {precision}: output off by {output} only");
            }
        }
    }
    Ok(())
}

#[test]
fn what_a_build_or_network_lacks_is_refused() -> Result<()> {
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let (_, _, exact) = build(&config, DType::F64)?;
    let message = exact.with_precision(Precision::BF16).unwrap_err().to_string();
    let train = TrainConfig { precision: Precision::BF16, ..TrainConfig::mnist() };
    let trainer = Trainer::new(config, train, Diffusion::ddpm(), &Device::Cpu);
    if cfg!(feature = "f16") {
        assert!(message.contains("f32 weights on the CPU"), "{message}");
        assert_eq!(trainer?.config().precision, Precision::BF16);
    } else {
        for message in [message, trainer.unwrap_err().to_string()] {
            assert!(message.contains("precision is bf16"), "{message}");
            assert!(message.contains("needs the feature `f16`"), "{message}");
        }
    }
    Ok(())
}

#[test]
fn samples_repeat_bit_for_bit_in_each_precision() -> Result<()> {
    let config = UNetConfig { hidden_dims: vec![16, 24], ..UNetConfig::mnist() };
    let mut precisions = vec![Precision::Highest, Precision::High];
    if cfg!(feature = "f16") {
        precisions.push(Precision::BF16);
    }
    for precision in precisions {
        let (_, _, unet) = build(&config, DType::F32)?;
        let unet = unet.with_precision(precision)?;
        let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 2)?;
        let sample = |batch: usize| -> Result<Vec<f32>> {
            let images = sampler.sample(&unet, (batch, 1, 28, 28), 1, &Device::Cpu)?;
            Ok(images.narrow(0, 0, 1)?.flatten_all()?.to_vec1()?)
        };
        assert_eq!(sample(1)?, sample(3)?, "{precision}");
    }
    Ok(())
}
