use std::fmt;

use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;

use super::network::Architecture;
use super::time_embedding::TimeEmbedding;
use super::unet2d_blocks::{Attention2D, Blocks, ResBlock2D, Resize};
use super::unet2d_config::{DownBlockType, Resampling, UNet2DConfig, UpBlockType};
use crate::engine::{Engine, Graph, Model};
use crate::error::{Error, Result};
use crate::layers::{Conv2d, Embedding, GroupNorm, Sinusoids, weights_dtype};

/// The network of Ho et al. 2020 with its own skip connections: after the first convolution, after every residual block
/// with its attention, and after every halving of the size.
///
/// It computes what `UNet2DModel` of the Python library diffusers computes, from weights of the same names. Initial
/// weights have the distributions of PyTorch's defaults, as in that library. Ho et al. begin with zeros in the last
/// convolution of each block and of the network. `UNet2D` is the [`Graph`]; [`UNet2DConfig`] builds a [`Model`] of it.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ddpm::Denoiser;
/// use ddpm::nn::{Parameters, UNet2DConfig};
///
/// let config = UNet2DConfig {
///     sample_size: 8.into(),
///     block_out_channels: vec![8, 16, 16, 16],
///     norm_num_groups: 4,
///     ..UNet2DConfig::cifar10()
/// };
/// let unet = Parameters::new(0, DType::F32, &Device::Cpu).build(&config)?;
/// let x_t = Tensor::zeros((2, 3, 8, 8), DType::F32, &Device::Cpu)?;
/// let t = Tensor::new(&[10u32, 900], &Device::Cpu)?;
/// assert_eq!(unet.forward(&x_t, &t)?.dims(), [2, 3, 8, 8]);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Clone)]
pub struct UNet2D {
    config: UNet2DConfig,
    /// Computes `2 x - 1` of the images.
    center: Option<Conv2d>,
    time_embedding: TimeEmbedding,
    class_embedding: Option<Embedding>,
    conv_in: Conv2d,
    down_blocks: Vec<Level>,
    mid_block: Middle,
    up_blocks: Vec<Level>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl fmt::Debug for UNet2D {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UNet2D").field("config", &self.config).finish_non_exhaustive()
    }
}

impl UNet2D {
    /// Creates a network of this shape, with weights from `vb`. Weights that take gradients are shared with `vb`. All
    /// others are copied, so that later changes to them have no effect.
    ///
    /// # Errors
    /// Returns an error if the configuration is not [valid](UNet2DConfig::validate), if the dtype of `vb` is neither
    /// f32 nor f64, or if `vb` lacks a weight.
    pub fn new(config: &UNet2DConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let dims = &config.block_out_channels;
        let (first, last) = (dims[0], dims[dims.len() - 1]);
        let half = first / 2;
        let sinusoids = Sinusoids::with_divisor(half, half - config.freq_shift)
            .scaled(config.time_scale)
            .cosines_first(config.flip_sin_to_cos);
        let class_embedding = |vectors: usize| {
            let (dim, vb) = (config.time_dim(), vb.pp("class_embedding"));
            match config.null_class {
                true => Embedding::new(vectors - 1, dim, vb),
                false => Embedding::of_classes_only(vectors, dim, vb),
            }
        };
        let mut blocks = Blocks { config, layer: 0 };
        Ok(Self {
            config: config.clone(),
            center: config.center_input_sample.then(|| center(config, &vb)).transpose()?,
            time_embedding: TimeEmbedding::with_silu(
                sinusoids,
                config.time_dim(),
                vb.pp("time_embedding"),
            )?,
            class_embedding: config.num_class_embeds.map(class_embedding).transpose()?,
            conv_in: Conv2d::new(config.in_channels, first, 3, vb.pp("conv_in"))?,
            down_blocks: down_blocks(&mut blocks, &vb.pp("down_blocks"))?,
            mid_block: Middle::new(&mut blocks, last, &vb.pp("mid_block"))?,
            up_blocks: up_blocks(&mut blocks, &vb.pp("up_blocks"))?,
            conv_norm_out: blocks.activated_norm(first, vb.pp("conv_norm_out"))?,
            conv_out: Conv2d::new(first, config.out_channels, 3, vb.pp("conv_out"))?,
        })
    }

    /// The configuration of the network.
    pub fn config(&self) -> &UNet2DConfig {
        &self.config
    }
}

/// Creates the convolution with a kernel of one pixel that computes `2 x - 1`. Its weights do not change. They are
/// computed on the CPU, so that no kernels of candle run on the device.
fn center(config: &UNet2DConfig, vb: &VarBuilder) -> Result<Conv2d> {
    let (dtype, device, channels) = (weights_dtype(vb)?, vb.device(), config.in_channels);
    let weight = (Tensor::eye(channels, dtype, &Device::Cpu)? * 2.0)?.to_device(device)?;
    let bias = Tensor::full(-1.0, channels, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?;
    Ok(Conv2d::with_weights(weight, bias))
}

/// Creates the levels of the down path.
fn down_blocks(blocks: &mut Blocks, vb: &VarBuilder) -> Result<Vec<Level>> {
    let config = blocks.config;
    let dims = &config.block_out_channels;
    let mut levels = Vec::new();
    for (i, kind) in config.down_block_types.iter().enumerate() {
        let (vb, channels) = (vb.pp(i), dims[i]);
        let before = if i == 0 { channels } else { dims[i - 1] };
        let inputs = (0..config.layers_per_block).map(|j| if j == 0 { before } else { channels });
        let attends = *kind == DownBlockType::Attention;
        let mut level = Level::new(blocks, inputs, (channels, attends), &vb)?;
        if i + 1 < dims.len() {
            let block = match kind {
                DownBlockType::Plain => false,
                DownBlockType::Attention => config.downsample_type == Resampling::Resnet,
                DownBlockType::Resnet => true,
            };
            level.resize = Some(blocks.downsampler(channels, block, vb.pp("downsamplers.0"))?);
        }
        levels.push(level);
    }
    Ok(levels)
}

/// Creates the levels of the up path, beginning with the smallest size.
fn up_blocks(blocks: &mut Blocks, vb: &VarBuilder) -> Result<Vec<Level>> {
    let config = blocks.config;
    let dims = &config.block_out_channels;
    let mut levels = Vec::new();
    for (i, kind) in config.up_block_types.iter().enumerate() {
        let level = dims.len() - 1 - i;
        let (vb, channels) = (vb.pp(i), dims[level]);
        let before = if i == 0 { channels } else { dims[level + 1] };
        // The last skip of a level is the output of the level above on the down path, or of the first convolution.
        let above = dims[level.saturating_sub(1)];
        let inputs = (0..=config.layers_per_block).map(|j| {
            let skip = if j == config.layers_per_block { above } else { channels };
            skip + if j == 0 { before } else { channels }
        });
        let attends = *kind == UpBlockType::Attention;
        let mut block = Level::new(blocks, inputs, (channels, attends), &vb)?;
        if level > 0 {
            let by_block = match kind {
                UpBlockType::Plain => false,
                UpBlockType::Attention => config.upsample_type == Resampling::Resnet,
                UpBlockType::Resnet => true,
            };
            block.resize = Some(blocks.upsampler(channels, by_block, vb.pp("upsamplers.0"))?);
        }
        levels.push(block);
    }
    Ok(levels)
}

impl Graph for UNet2D {
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x_t: &E::Map) -> Result<E::Map> {
        let mut t_emb = self.time_embedding.run(engine)?;
        if let Some(embedding) = &self.class_embedding {
            t_emb = engine.add_class(embedding, &t_emb)?;
        }
        let x_t = match &self.center {
            Some(center) => &engine.conv(center, x_t)?,
            None => x_t,
        };
        let mut x = engine.conv(&self.conv_in, x_t)?;
        let mut skips = vec![x.clone()];
        for level in &self.down_blocks {
            for block in &level.blocks {
                x = block.run(engine, &x, &t_emb)?;
                skips.push(x.clone());
            }
            if let Some(resize) = &level.resize {
                x = resize.run(engine, &x, &t_emb)?;
                skips.push(x.clone());
            }
        }
        x = self.mid_block.run(engine, &x, &t_emb)?;
        let mut skips = skips.into_iter().rev();
        for level in &self.up_blocks {
            for (block, skip) in level.blocks.iter().zip(skips.by_ref()) {
                x = engine.recomputable([&x, &skip, &t_emb], |engine, [x, skip, t_emb]| {
                    block.run(engine, &engine.concatenate(x, skip)?, t_emb)
                })?;
            }
            if let Some(resize) = &level.resize {
                x = resize.run(engine, &x, &t_emb)?;
            }
        }
        engine.norm_conv(&self.conv_norm_out, &self.conv_out, &x)
    }

    fn learns_variance(&self) -> bool {
        self.config.learns_variance()
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

impl Architecture for UNet2DConfig {
    const KIND: &'static str = "unet2d";
    const OUTER_LAYERS: &'static [&'static str] = &["conv_in.", "conv_out.", "class_embedding."];
    type Model = Model<UNet2D>;

    fn build(&self, vb: VarBuilder) -> Result<Model<UNet2D>> {
        Model::new(UNet2D::new(self, vb)?)
    }
}

/// The blocks of one size on a path, and the change of the size after them.
#[derive(Debug, Clone)]
struct Level {
    blocks: Vec<Block>,
    resize: Option<Resize>,
}

impl Level {
    /// Creates a block from each of these numbers of channels to `channels`, followed by attention if `attends` is
    /// true.
    fn new(
        blocks: &mut Blocks,
        inputs: impl Iterator<Item = usize>,
        (channels, attends): (usize, bool),
        vb: &VarBuilder,
    ) -> Result<Self> {
        let (resnets, attentions) = (vb.pp("resnets"), vb.pp("attentions"));
        let block = |(j, input)| {
            let attention = |j| blocks.attention(channels, attentions.pp(j));
            let attention = attends.then(|| attention(j)).transpose()?;
            Ok(Block { res: blocks.res(input, channels, resnets.pp(j))?, attention })
        };
        let blocks = inputs.enumerate().map(block).collect::<Result<_>>()?;
        Ok(Self { blocks, resize: None })
    }
}

/// A residual block, and the attention after it.
#[derive(Debug, Clone)]
struct Block {
    res: ResBlock2D,
    attention: Option<Attention2D>,
}

impl Block {
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map, t_emb: &E::Map) -> Result<E::Map> {
        let x = self.res.run(engine, x, t_emb)?;
        match &self.attention {
            Some(attention) => attention.run(engine, &x),
            None => Ok(x),
        }
    }
}

/// The blocks at the smallest size.
#[derive(Debug, Clone)]
struct Middle {
    first: Block,
    last: ResBlock2D,
}

impl Middle {
    fn new(blocks: &mut Blocks, channels: usize, vb: &VarBuilder) -> Result<Self> {
        let (resnets, groups) = (vb.pp("resnets"), blocks.config.middle_groups());
        let attention = || blocks.attention_in_groups(channels, groups, vb.pp("attentions.0"));
        let attention = blocks.config.add_attention.then(attention).transpose()?;
        let res = blocks.res(channels, channels, resnets.pp(0))?;
        let last = blocks.res(channels, channels, resnets.pp(1))?;
        Ok(Self { first: Block { res, attention }, last })
    }

    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map, t_emb: &E::Map) -> Result<E::Map> {
        let x = self.first.run(engine, x, t_emb)?;
        self.last.run(engine, &x, t_emb)
    }
}
