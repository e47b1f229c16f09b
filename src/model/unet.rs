use std::fmt;

use candle_nn::VarBuilder;

use super::attention::Attention;
use super::network::Architecture;
use super::res_block::ResBlock;
use super::time_embedding::TimeEmbedding;
use super::unet_config::UNetConfig;
use crate::engine::{Engine, Graph, Model};
use crate::error::{Error, Result};
use crate::kernels::op::activation::Activation;
use crate::layers::{Conv2d, Embedding, GroupNorm};

/// The network of the paper: a U-Net (Ronneberger et al. 2015) of residual blocks with a time embedding, and with
/// self-attention at low resolution. Ho et al. 2020, appendix B.
///
/// There is one skip connection per level, taken before the size is halved. Weights have the names of the reference
/// implementation in PyTorch, so that files can be exchanged in both directions; see the chapter [the
/// network](crate::docs::network). `UNet` is the [`Graph`]; [`UNetConfig`] builds a [`Model`] of it.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ddpm::nn::Parameters;
/// use ddpm::{Denoiser, UNetConfig};
///
/// let config = UNetConfig { hidden_dims: vec![16, 32], ..UNetConfig::mnist() };
/// let unet = Parameters::new(0, DType::F32, &Device::Cpu).build(&config)?;
/// let x_t = Tensor::zeros((2, 1, 28, 28), DType::F32, &Device::Cpu)?;
/// let t = Tensor::new(&[10u32, 900], &Device::Cpu)?;
/// assert_eq!(unet.forward(&x_t, &t)?.dims(), [2, 1, 28, 28]);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Clone)]
pub struct UNet {
    config: UNetConfig,
    time_mlp: TimeEmbedding,
    class_embedding: Option<Embedding>,
    init_conv: Conv2d,
    down_blocks: Vec<DownBlock>,
    bottleneck: Bottleneck,
    up_blocks: Vec<UpBlock>,
    out_norm: GroupNorm,
    out_conv: Conv2d,
}

impl fmt::Debug for UNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UNet").field("config", &self.config).finish_non_exhaustive()
    }
}

impl UNet {
    /// Creates a network of this shape, with weights from `vb`. Weights that take gradients are shared with `vb`. All
    /// others are copied, so that later changes to them have no effect.
    ///
    /// # Errors
    /// Returns an error if the configuration is not [valid](UNetConfig::validate), if the dtype of `vb` is neither f32
    /// nor f64, or if `vb` lacks a weight.
    pub fn new(config: &UNetConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let dims = &config.hidden_dims;
        let attend = |level: usize| config.attention_levels.contains(&level);
        let mut blocks = Blocks { time_dim: config.time_dim, dropout: config.dropout, layer: 0 };

        let mut down_blocks = Vec::new();
        for level in 0..config.levels() {
            let (input, output, vb) =
                (dims[level], dims[level + 1], vb.pp(format!("down_blocks.{level}")));
            down_blocks.push(DownBlock {
                res1: blocks.res(input, output, vb.pp("res1"))?,
                res2: blocks.res(output, output, vb.pp("res2"))?,
                attn: attend(level).then(|| Attention::new(output, vb.pp("attn"))).transpose()?,
                downsample: Conv2d::new(output, output, 3, vb.pp("downsample"))?.downsampling(),
            });
        }

        let outputs = if config.learned_variance { 2 * config.channels } else { config.channels };
        let (middle, middle_vb) = (dims[config.levels()], vb.pp("bottleneck"));
        let bottleneck = Bottleneck {
            res1: blocks.res(middle, middle, middle_vb.pp("res1"))?,
            attn: Attention::new(middle, middle_vb.pp("attn"))?,
            res2: blocks.res(middle, middle, middle_vb.pp("res2"))?,
        };

        let mut up_blocks = Vec::new();
        for (i, level) in (0..config.levels()).rev().enumerate() {
            let (input, output, vb) =
                (dims[level + 1], dims[level], vb.pp(format!("up_blocks.{i}")));
            up_blocks.push(UpBlock {
                upsample: Conv2d::new(input, input, 3, vb.pp("upsample"))?.upsampling(),
                res1: blocks.res(2 * input, output, vb.pp("res1"))?,
                res2: blocks.res(output, output, vb.pp("res2"))?,
                attn: attend(level).then(|| Attention::new(output, vb.pp("attn"))).transpose()?,
            });
        }

        Ok(Self {
            config: config.clone(),
            time_mlp: TimeEmbedding::new(config.time_dim, vb.pp("time_mlp"))?,
            class_embedding: config
                .classes
                .map(|classes| Embedding::new(classes, config.time_dim, vb.pp("class_embedding")))
                .transpose()?,
            init_conv: Conv2d::new(config.channels, dims[0], 3, vb.pp("init_conv"))?,
            down_blocks,
            bottleneck,
            up_blocks,
            out_norm: GroupNorm::new(dims[0], Activation::Silu, vb.pp("out_norm"))?,
            out_conv: Conv2d::new(dims[0], outputs, 3, vb.pp("out_conv"))?,
        })
    }

    /// The configuration of the network.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }
}

impl Graph for UNet {
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x_t: &E::Map) -> Result<E::Map> {
        let mut t_emb = self.time_mlp.run(engine)?;
        if let Some(embedding) = &self.class_embedding {
            t_emb = engine.add_class(embedding, &t_emb)?;
        }
        let mut x = engine.conv(&self.init_conv, x_t)?;
        let mut skips = Vec::with_capacity(self.down_blocks.len());
        for block in &self.down_blocks {
            let skip = block.run(engine, &x, &t_emb)?;
            x = engine.conv(&block.downsample, &skip)?;
            skips.push(skip);
        }
        x = self.bottleneck.run(engine, &x, &t_emb)?;
        for (block, skip) in self.up_blocks.iter().zip(skips.into_iter().rev()) {
            x = block.run(engine, &x, &skip, &t_emb)?;
        }
        engine.norm_conv(&self.out_norm, &self.out_conv, &x)
    }

    fn learns_variance(&self) -> bool {
        self.config.learned_variance
    }

    fn check_images(&self, channels: usize, height: usize, width: usize) -> Result<()> {
        let own = self.config.image_shape();
        if (channels, height, width) == own {
            return Ok(());
        }
        let expected = format!("(batch, {}, {}, {})", own.0, own.1, own.2);
        Err(Error::shape("the images", [channels, height, width], expected))
    }
}

impl Architecture for UNetConfig {
    const KIND: &'static str = "unet";
    type Model = Model<UNet>;

    fn build(&self, vb: VarBuilder) -> Result<Model<UNet>> {
        Model::new(UNet::new(self, vb)?)
    }
}

/// The settings of the residual blocks of a network, and the number of blocks so far.
struct Blocks {
    time_dim: usize,
    dropout: f64,
    layer: u16,
}

impl Blocks {
    fn res(&mut self, input: usize, output: usize, vb: VarBuilder) -> Result<ResBlock> {
        self.layer += 1;
        ResBlock::new(input, output, self.time_dim, vb)?.with_dropout(self.dropout, self.layer)
    }
}

#[derive(Debug, Clone)]
struct DownBlock {
    res1: ResBlock,
    res2: ResBlock,
    attn: Option<Attention>,
    downsample: Conv2d,
}

impl DownBlock {
    /// Computes the skip connection, which is also the input of the downsampling convolution.
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map, t_emb: &E::Map) -> Result<E::Map> {
        let x = self.res1.run(engine, x, t_emb)?;
        let x = self.res2.run(engine, &x, t_emb)?;
        attend(engine, &self.attn, x)
    }
}

#[derive(Debug, Clone)]
struct Bottleneck {
    res1: ResBlock,
    attn: Attention,
    res2: ResBlock,
}

impl Bottleneck {
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map, t_emb: &E::Map) -> Result<E::Map> {
        let x = self.res1.run(engine, x, t_emb)?;
        let x = self.attn.run(engine, &x)?;
        self.res2.run(engine, &x, t_emb)
    }
}

#[derive(Debug, Clone)]
struct UpBlock {
    upsample: Conv2d,
    res1: ResBlock,
    res2: ResBlock,
    attn: Option<Attention>,
}

impl UpBlock {
    fn run<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        x: &E::Map,
        skip: &E::Map,
        t_emb: &E::Map,
    ) -> Result<E::Map> {
        let x = engine.conv(&self.upsample, x)?;
        let x = engine.recomputable([&x, skip, t_emb], |engine, [x, skip, t_emb]| {
            self.res1.run(engine, &engine.concatenate(x, skip)?, t_emb)
        })?;
        let x = self.res2.run(engine, &x, t_emb)?;
        attend(engine, &self.attn, x)
    }
}

fn attend<'n, E: Engine<'n>>(
    engine: &E,
    attention: &'n Option<Attention>,
    x: E::Map,
) -> Result<E::Map> {
    match attention {
        Some(attention) => attention.run(engine, &x),
        None => Ok(x),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::denoiser::{Condition, Output, Trainable};
    use crate::model::Parameters;
    use crate::precision::Precision;
    use crate::random::Dropout;
    use crate::sample::Sampler;

    /// Runs the arithmetic of [`Precision::High`] on a CPU with AMX, also on machines without it. The reference is
    /// `Highest`, whose own error is ten times smaller, as `tests/precision.rs` checks.
    #[test]
    fn three_bf16_products_are_good_to_16_bits() -> Result<()> {
        let attentive = UNetConfig {
            hidden_dims: vec![24, 40, 64],
            attention_levels: vec![0, 1],
            channels: 3,
            image_size: 16.into(),
            ..UNetConfig::mnist()
        };
        for (name, config) in [("mnist", UNetConfig::mnist()), ("attentive", attentive)] {
            let ((channels, height, width), device) = (config.image_shape(), &Device::Cpu);
            let shape = (2, channels, height, width);
            let [x, target] = [5, 6].map(|seed| Sampler::prior(shape, seed, device));
            let (x, target, t) = (x?, target?, Tensor::new(&[40u32, 700], &Device::Cpu)?);
            // Computes the output and all gradients.
            let pass = |precision| -> Result<[Vec<f32>; 2]> {
                let parameters = Parameters::new(3, DType::F32, &Device::Cpu);
                let unet = parameters.build(&config)?.with_precision(precision)?;
                let mut output = Vec::new();
                let mut d_output = |y: &Output| {
                    output = y.prediction.flatten_all()?.to_vec1()?;
                    Ok(Output::new((&y.prediction - &target)?))
                };
                let dropout = Dropout::new(0, 0);
                let found = unet.gradients(&x, &t, &Condition::None, &dropout, &mut d_output)?;
                let gradients = parameters.vars().into_values().map(|var| {
                    let gradient = found.get(&var).expect("a gradient");
                    Ok(gradient.flatten_all()?.to_vec1::<f32>()?)
                });
                let gradients: Result<Vec<_>> = gradients.collect();
                Ok([output, gradients?.concat()])
            };
            let (exact, high) = (pass(Precision::Highest)?, pass(Precision::High)?);
            let errors = [0, 1].map(|i| {
                let square = |x: f32| f64::from(x) * f64::from(x);
                let off: f64 = exact[i].iter().zip(&high[i]).map(|(a, b)| square(a - b)).sum();
                (off / exact[i].iter().map(|&x| square(x)).sum::<f64>()).sqrt()
            });
            // About 2.2e-5 and 3.2e-5.
            for (off, most) in errors.into_iter().zip([4e-5, 6e-5]) {
                // An error below the lower limit would mean that the products were computed in f32.
                assert!((5e-6..most).contains(&off), "{name}: {errors:?}");
            }
        }
        Ok(())
    }
}
