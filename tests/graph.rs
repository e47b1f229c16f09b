//! A network of the crate's layers other than the U-Net. It consists of its `run`, and has no code for its
//! computation.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use ddpm::data::Images;
use ddpm::nn::{
    Activation, Add, Architecture, Attention, Conv2d, Engine, Graph, GroupNorm, Linear, Model,
    VectorActivation,
};
use ddpm::nn::{Dropout, Parameters};
use ddpm::{Checkpoint, Denoiser, Diffusion, Precision, Result, Sampler, TrainConfig, Trainer};

mod passes;
mod small;
use small::{CONFIG, SmallConfig};

fn inputs(dtype: DType) -> Result<[Tensor; 3]> {
    let normal = |seed| -> Result<Tensor> {
        Ok(Sampler::prior((2, 3, 6, 10), seed, &Device::Cpu)?.to_dtype(dtype)?)
    };
    Ok([normal(1)?, normal(2)?, Tensor::new(&[5u32, 900], &Device::Cpu)?])
}

/// Returns the largest difference, relative to the largest value.
fn difference(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let expected = expected.to_dtype(DType::F64)?;
    let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    Ok(largest(&(found.to_dtype(DType::F64)? - &expected)?)? / largest(&expected)?.max(1e-3))
}

#[test]
fn the_kernels_compute_what_candle_computes_in_f64() -> Result<()> {
    let passes = |dtype, gradients_by_candle| -> Result<_> {
        let parameters = Parameters::new(3, dtype, &Device::Cpu);
        let model = parameters.build(&CONFIG)?;
        let ([x_t, target, t], dropout) = (inputs(dtype)?, Dropout::new(4, 2));
        let found = if gradients_by_candle {
            let y = passes::train(&model, &x_t, &t, &dropout)?;
            ((y - target)?.sqr()?.sum_all()? * 0.5)?.backward()?
        } else {
            passes::gradients(&model, &x_t, &t, &dropout, &mut |y| Ok((y - &target)?))?
        };
        let vars = parameters.vars();
        let gradients: Vec<(String, Tensor)> = vars
            .iter()
            .map(|(k, v)| (k.clone(), found.get(v).expect("a gradient").clone()))
            .collect();
        // The weights take no gradient here, so the kernels compute the forward pass.
        let weights = vars.into_iter().map(|(k, v)| (k, v.as_detached_tensor())).collect();
        let frozen = CONFIG.build(VarBuilder::from_tensors(weights, dtype, &Device::Cpu))?;
        Ok((frozen.forward(&x_t, &t)?, gradients))
    };
    let (exact_output, exact) = passes(DType::F64, true)?;
    let (output, gradients) = passes(DType::F32, false)?;
    assert!(difference(&output, &exact_output)? < 1e-5);
    for ((name, found), (_, expected)) in gradients.iter().zip(&exact) {
        let off = difference(found, expected)?;
        assert!(off < 2e-5, "{name}: {off}");
    }
    Ok(())
}

#[test]
fn it_has_every_precision_of_the_kernels() -> Result<()> {
    let model = Parameters::new(3, DType::F32, &Device::Cpu).build(&CONFIG)?;
    assert!(model.clone().with_precision(Precision::High).is_ok());
    let half = model.with_precision(Precision::BF16);
    assert_eq!(half.is_ok(), cfg!(feature = "f16"));
    Ok(())
}

#[test]
fn it_trains_is_saved_and_goes_on_bit_for_bit() -> Result<()> {
    let temp = tempfile::tempdir().unwrap();
    let images = Images::new((0..5 * 192).map(|i| (i * 7 % 256) as u8).collect(), (3, 8, 8))?;
    let config = |steps| TrainConfig { steps, batch_size: 2, ..TrainConfig::cifar10() };
    let trainer = |steps| Trainer::new(CONFIG, config(steps), Diffusion::ddpm(), &Device::Cpu);
    let mut whole = trainer(4)?;
    whole.fit(&images, &mut ())?;

    let mut first = trainer(2)?;
    first.fit(&images, &mut ())?;
    first.save(temp.path().join("run"))?;
    let dir = temp.path().join("run");
    let mut rest = Trainer::resume(&dir, CONFIG, config(4), Diffusion::ddpm(), &Device::Cpu)?;
    rest.fit(&images, &mut ())?;
    for (name, var) in whole.vars() {
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(var), values(&rest.vars()[name]), "{name}");
    }
    let checkpoint = Checkpoint::open(&dir)?;
    assert_eq!(checkpoint.architecture::<SmallConfig>()?.width, 16);
    Ok(())
}

/// A graph of one operation, with operands that do not fit.
struct Wrong {
    conv: Conv2d,
    wide: Conv2d,
    norm: GroupNorm,
    linear: Linear,
    case: usize,
}

impl Graph for Wrong {
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map) -> Result<E::Map> {
        let half = || engine.conv(&self.wide, x);
        match self.case {
            0 => engine.conv(&self.conv, &half()?),
            1 => engine.conv_add(&self.conv, x, Add::residual(&half()?)),
            2 => engine.conv_add(&self.conv, x, Add::per_image(x)),
            3 => engine.norm_conv(&self.norm, &self.conv, x),
            4 => engine.linear(VectorActivation::None, &self.linear, x),
            5 => engine.concatenate(x, &half()?),
            6 => engine.attention(&half()?, 1),
            7 => engine.attention(x, 2),
            8 => engine.attention(x, 0),
            9 => engine.pool(&half()?),
            10 => {
                let y = engine.conv(&self.conv, x)?;
                engine.modulated_norm(&self.norm, &y, Some(x))
            }
            11 => engine.drop_values(x, 0, -0.1),
            _ => engine.drop_maps(x, 0, 1.0),
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors_with_and_without_kernels() -> Result<()> {
    let expected = [
        "the input of a convolution has shape [2, 3, 5, 16]; it must be (batch, height, width, 3)",
        "the map added to a convolution has shape [2, 3, 5, 16]; it must be (2, 6, 10, 8)",
        "the map of vectors added to a convolution has shape [2, 6, 10, 3]; it must be (2, 1, 1, 8)",
        "the input of a normalisation has shape [2, 6, 10, 3]; it must be (batch, height, width, 8)",
        "the input of a linear layer has shape [2, 6, 10, 3]; it must be (batch, 1, 1, 4)",
        "the second map of a concatenation has shape [2, 3, 5, 16]; it must be (2, 6, 10, channels), as the first",
        "the map of queries, keys and values has shape [2, 3, 5, 16]; it must be (batch, height, width, 3 channels)",
        "the map of queries, keys and values has shape [2, 6, 10, 3]; it must be (batch, height, width, 3 channels), \
         with channels for 2 heads",
        "heads is 0; it must be at least 1",
        "the map to be pooled has shape [2, 3, 5, 16]; it must be (batch, even height, even width, channels)",
        "the map of scales and shifts has shape [2, 6, 10, 3]; it must be (2, 1, 1, 16)",
        "dropout is -0.1; it must be at least 0 and less than 1",
        "dropout is 1; it must be at least 0 and less than 1",
    ];
    for (case, expected) in expected.into_iter().enumerate() {
        let parameters = Parameters::new(0, DType::F32, &Device::Cpu);
        let build = |vb: VarBuilder| {
            Model::new(Wrong {
                conv: Conv2d::new(3, 8, 3, vb.pp("conv"))?,
                wide: Conv2d::new(3, 16, 3, vb.pp("wide"))?.downsampling(),
                norm: GroupNorm::new(8, Activation::None, vb.pp("norm"))?,
                linear: Linear::new(4, 4, vb.pp("linear"))?,
                case,
            })
        };
        let model = build(parameters.builder())?;
        let [x_t, _, t] = inputs(DType::F32)?;
        let dropout = Dropout::new(0, 0);
        let by_candle = passes::train(&model, &x_t, &t, &dropout).map(drop);
        let by_kernels = passes::gradients(&model, &x_t, &t, &dropout, &mut |y| Ok(y.clone()));
        for result in [by_candle, by_kernels.map(drop)] {
            assert_eq!(result.unwrap_err().to_string(), expected);
        }
    }
    Ok(())
}

#[test]
fn layers_of_impossible_sizes_are_refused() {
    let vb = Parameters::new(0, DType::F32, &Device::Cpu).builder();
    for (result, expected) in [
        (
            Conv2d::new(0, 8, 3, vb.pp("a")).map(drop),
            "input channels is 0; it must be from 1 to 65536",
        ),
        (
            Conv2d::new(8, 0, 3, vb.pp("a")).map(drop),
            "output channels is 0; it must be from 1 to 65536",
        ),
        (Conv2d::new(8, 8, 2, vb.pp("a")).map(drop), "kernel is 2; it must be odd, from 1 to 31"),
        (
            GroupNorm::new(12, Activation::None, vb.pp("a")).map(drop),
            "channels is 12; it must be a multiple of 8, from 8 to 65536",
        ),
        (Linear::new(0, 1, vb.pp("a")).map(drop), "input length is 0; it must be from 1 to 262144"),
        (
            Conv2d::pointwise(0, 8, vb.pp("a")).map(drop),
            "input channels is 0; it must be from 1 to 65536",
        ),
        (
            GroupNorm::grouped(12, 0, 1e-6, Activation::None, vb.pp("a")).map(drop),
            "groups is 0; it must be from 1 to 65536",
        ),
        (
            GroupNorm::grouped(12, 5, 1e-6, Activation::None, vb.pp("a")).map(drop),
            "channels is 12; it must be a multiple of 5, from 5 to 65536",
        ),
        (
            GroupNorm::grouped(12, 4, 0.0, Activation::None, vb.pp("a")).map(drop),
            "eps is 0; it must be positive and finite",
        ),
        (
            Attention::new(4, vb.pp("a")).map(drop),
            "channels is 4; it must be a multiple of 8, from 8 to 65536",
        ),
    ] {
        assert_eq!(result.unwrap_err().to_string(), expected);
    }
}
