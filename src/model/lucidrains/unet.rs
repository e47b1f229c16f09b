use std::fmt;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use super::blocks::{Attention, Heads, ResBlock, TimeMlp, unshuffle};
use super::config::LucidrainsConfig;
use crate::denoiser::{Condition, Denoiser, Output, Trainable};
use crate::engine::{Autograd, Engine, Pass};
use crate::error::{Error, Result, check_float};
use crate::kernels;
use crate::layers::{Conv2d, weights_dtype};
use crate::model::network::Architecture;
use crate::process::check_timesteps;
use crate::random::Dropout;

/// The U-Net of the Python package denoising-diffusion-pytorch, whose author is known as lucidrains.
///
/// It computes what `Unet` of versions 1.9 to 2.3 of that package computes without self-conditioning, from weights of
/// the same names. Each level has two residual blocks, and an attention that is linear (Shen et al. 2021, [Efficient
/// Attention](https://arxiv.org/abs/1812.01243)) or the usual one. Both have learned keys and values.
///
/// The network runs on candle tensors, and candle differentiates it. Convolutions and linear layers use the crate's
/// kernels on the CPU. It is slower than a [`Graph`](crate::nn::Graph), and has no half precision.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use ddpm::Denoiser;
/// use ddpm::nn::{LucidrainsConfig, Parameters};
///
/// let config = LucidrainsConfig::new(8, 4);
/// let unet = Parameters::new(0, DType::F32, &Device::Cpu).build(&config)?;
/// let x_t = Tensor::zeros((2, 3, 8, 8), DType::F32, &Device::Cpu)?;
/// let t = Tensor::new(&[10u32, 900], &Device::Cpu)?;
/// assert_eq!(unet.forward(&x_t, &t)?.dims(), [2, 3, 8, 8]);
/// # Ok::<(), ddpm::Error>(())
/// ```
pub struct LucidrainsUNet {
    config: LucidrainsConfig,
    init_conv: Conv2d,
    time_mlp: TimeMlp,
    downs: Vec<Level>,
    mid_block1: ResBlock,
    mid_attn: Attention,
    mid_block2: ResBlock,
    ups: Vec<Level>,
    final_res_block: ResBlock,
    final_conv: Conv2d,
    dtype: DType,
}

impl fmt::Debug for LucidrainsUNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LucidrainsUNet").field("config", &self.config).finish_non_exhaustive()
    }
}

/// A level of the down path or of the up path.
struct Level {
    blocks: [ResBlock; 2],
    attention: Attention,
    /// True if pixels are moved into channels before `resize`.
    unshuffles: bool,
    /// Changes the number of channels. On the up path it also doubles the size, except at the full size.
    resize: Conv2d,
}

/// Creates the blocks of a network.
struct Blocks<'a> {
    config: &'a LucidrainsConfig,
    /// The number of residual blocks so far.
    count: u16,
}

impl Blocks<'_> {
    fn res(&mut self, channels: [usize; 2], vb: VarBuilder) -> Result<ResBlock> {
        self.count += 1;
        ResBlock::new(self.config, channels, self.count - 1, vb)
    }

    fn attention(
        &self,
        level: usize,
        full: bool,
        channels: usize,
        vb: VarBuilder,
    ) -> Result<Attention> {
        let LucidrainsConfig { attn_heads, attn_dim_head, num_mem_kv, .. } = self.config;
        let heads = Heads { count: attn_heads[level], dim: attn_dim_head[level], full };
        Attention::new(channels, heads, *num_mem_kv, vb)
    }

    /// Creates the part of `level` on a path whose residual blocks have these channels.
    fn level(
        &mut self,
        level: usize,
        channels: [usize; 2],
        resize: Conv2d,
        vb: VarBuilder,
    ) -> Result<Level> {
        let blocks = [self.res(channels, vb.pp("0"))?, self.res(channels, vb.pp("1"))?];
        let full = self.config.full_attn[level];
        let attention = self.attention(level, full, channels[1], vb.pp("2"))?;
        Ok(Level { blocks, attention, unshuffles: false, resize })
    }
}

impl LucidrainsUNet {
    /// Creates a network of this shape, with weights from `vb`. Weights that take gradients are shared with `vb`. All
    /// others are copied, so that later changes to them have no effect.
    ///
    /// # Errors
    /// Returns an error if the configuration is not [valid](LucidrainsConfig::validate), if the dtype of `vb` is
    /// neither f32 nor f64, or if `vb` lacks a weight. Returns an error if `DDPM_MAX_CPU_ISA` is set to an unknown
    /// value.
    pub fn new(config: &LucidrainsConfig, vb: VarBuilder) -> Result<Self> {
        kernels::check_limit()?;
        config.validate()?;
        let LucidrainsConfig { channels, init_dim, dim, ref dim_mults, .. } = *config;
        let ends: Vec<usize> = dim_mults.iter().map(|mult| mult * dim).collect();
        let begins: Vec<usize> = [init_dim].iter().chain(&ends).copied().take(ends.len()).collect();
        let last = ends.len() - 1;
        let mut blocks = Blocks { config, count: 0 };
        let (mut downs, mut ups) = (vec![], vec![]);
        for (i, (&begin, &end)) in begins.iter().zip(&ends).enumerate() {
            let vb = vb.pp("downs").pp(i);
            let resize = match i == last {
                true => Conv2d::new(begin, end, 3, vb.pp("3"))?,
                false => Conv2d::new(4 * begin, end, 1, vb.pp("3.1"))?,
            };
            let level = blocks.level(i, [begin, begin], resize, vb)?;
            downs.push(Level { unshuffles: i != last, ..level });
        }
        let middle = ends[last];
        let mid_block1 = blocks.res([middle, middle], vb.pp("mid_block1"))?;
        let mid_attn = blocks.attention(last, true, middle, vb.pp("mid_attn"))?;
        let mid_block2 = blocks.res([middle, middle], vb.pp("mid_block2"))?;
        for (i, (&begin, &end)) in begins.iter().zip(&ends).enumerate().rev() {
            let vb = vb.pp("ups").pp(last - i);
            let resize = match i == 0 {
                true => Conv2d::new(end, begin, 3, vb.pp("3"))?,
                false => Conv2d::new(end, begin, 3, vb.pp("3.1"))?.upsampling(),
            };
            ups.push(blocks.level(i, [end + begin, end], resize, vb)?);
        }
        let outputs = if config.learned_variance { 2 * channels } else { channels };
        Ok(Self {
            config: config.clone(),
            init_conv: Conv2d::new(channels, init_dim, 7, vb.pp("init_conv"))?,
            time_mlp: TimeMlp::new(config, vb.pp("time_mlp"))?,
            downs,
            mid_block1,
            mid_attn,
            mid_block2,
            ups,
            final_res_block: blocks.res([2 * init_dim, init_dim], vb.pp("final_res_block"))?,
            final_conv: Conv2d::new(init_dim, outputs, 1, vb.pp("final_conv"))?,
            dtype: weights_dtype(&vb)?,
        })
    }

    /// The configuration of the network.
    pub fn config(&self) -> &LucidrainsConfig {
        &self.config
    }

    /// # Errors
    /// Returns an error if the shapes or dtypes of `x_t` and `t` do not fit the network.
    fn check(&self, x_t: &Tensor, t: &Tensor) -> Result<()> {
        let (channels, divisor) = (self.config.channels, self.config.divisor());
        match *x_t.dims() {
            [batch, c, h, w] if c == channels && [h, w].iter().all(|n| n % divisor == 0) => {
                if x_t.elem_count() == 0 {
                    return Err(Error::shape("x_t", x_t.dims(), "a batch of at least one image"));
                }
                check_float("dtype of x_t", x_t.dtype())?;
                check_timesteps(t, batch, None)
            }
            _ => {
                let expected = format!(
                    "(batch, {channels}, height, width), with sizes that are multiples of {divisor}"
                );
                Err(Error::shape("x_t", x_t.dims(), expected))
            }
        }
    }

    fn run(&self, x_t: &Tensor, t: &Tensor, dropout: Option<&Dropout>) -> Result<Output> {
        self.check(x_t, t)?;
        let engine = &Autograd::new(Pass { t: Some(t), classes: None, dropout }, self.dtype);
        let time = &self.time_mlp.run(engine, t)?;
        let x = kernels::to_channels_last(&x_t.to_dtype(self.dtype)?)?;
        let first = engine.conv(&self.init_conv, &x)?;
        let (mut x, mut skips) = (first.clone(), vec![]);
        for Level { blocks: [block1, block2], attention, unshuffles, resize } in &self.downs {
            x = block1.run(engine, &x, time)?;
            skips.push(x.clone());
            x = attention.run(engine, &block2.run(engine, &x, time)?)?;
            skips.push(x.clone());
            x = engine.conv(resize, &if *unshuffles { unshuffle(&x)? } else { x })?;
        }
        x = self.mid_block1.run(engine, &x, time)?;
        x = self.mid_attn.run(engine, &x)?;
        x = self.mid_block2.run(engine, &x, time)?;
        let mut skips = skips.into_iter().rev();
        for Level { blocks, attention, resize, .. } in &self.ups {
            for (block, skip) in blocks.iter().zip(skips.by_ref()) {
                x = block.run(engine, &engine.concatenate(&x, &skip)?, time)?;
            }
            x = engine.conv(resize, &attention.run(engine, &x)?)?;
        }
        x = self.final_res_block.run(engine, &engine.concatenate(&x, &first)?, time)?;
        let y = kernels::to_channels_first(&engine.conv(&self.final_conv, &x)?)?;
        let y = y.to_dtype(x_t.dtype())?;
        match self.config.learned_variance {
            true => Output::divided(&y),
            false => Ok(Output::new(y)),
        }
    }
}

impl Denoiser for LucidrainsUNet {
    fn denoise(&self, x_t: &Tensor, t: &Tensor, condition: &Condition) -> Result<Output> {
        if let Condition::Classes(_) = condition {
            let expected = "no condition, because the network has no classes";
            return Err(Error::config("condition", "classes", expected));
        }
        self.run(x_t, t, None)
    }
}

impl Trainable for LucidrainsUNet {
    fn denoise_train(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        _: &Condition,
        dropout: &Dropout,
    ) -> Result<Output> {
        self.run(x_t, t, Some(dropout))
    }
}

impl Architecture for LucidrainsConfig {
    const KIND: &'static str = "lucidrains_unet";
    const OUTER_LAYERS: &'static [&'static str] = &["init_conv.", "final_conv."];
    type Model = LucidrainsUNet;

    fn build(&self, vb: VarBuilder) -> Result<LucidrainsUNet> {
        LucidrainsUNet::new(self, vb)
    }
}
