//! The blocks of [`UNet2D`](super::unet2d::UNet2D). Names of weights are those of diffusers.

use candle_nn::VarBuilder;

use super::unet2d_config::{TimeConditioning, UNet2DConfig};
use crate::engine::{Engine, Normed};
use crate::error::Result;
use crate::kernels::op::activation::{Activation, VectorActivation};
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, GroupNorm, Linear};

/// The builder of the blocks of a network, which numbers their dropouts.
pub(super) struct Blocks<'a> {
    pub config: &'a UNet2DConfig,
    /// The number of residual blocks so far.
    pub layer: u16,
}

impl Blocks<'_> {
    fn norm(&self, channels: usize, activation: Activation, vb: VarBuilder) -> Result<GroupNorm> {
        let UNet2DConfig { norm_num_groups, norm_eps, .. } = *self.config;
        GroupNorm::grouped(channels, norm_num_groups, norm_eps, activation, vb)
    }

    /// A normalisation followed by SiLU.
    pub fn activated_norm(&self, channels: usize, vb: VarBuilder) -> Result<GroupNorm> {
        self.norm(channels, Activation::Silu, vb)
    }

    /// A residual block that keeps the size.
    pub fn res(&mut self, input: usize, output: usize, vb: VarBuilder) -> Result<ResBlock2D> {
        self.resizing([input, output], Size::Same, vb)
    }

    fn resizing(
        &mut self,
        [input, output]: [usize; 2],
        size: Size,
        vb: VarBuilder,
    ) -> Result<ResBlock2D> {
        self.layer += 1;
        let conv1 = Conv2d::new(input, output, 3, vb.pp("conv1"))?;
        let modulates = self.config.resnet_time_scale_shift == TimeConditioning::ScaleShift;
        let values = if modulates { 2 * output } else { output };
        let shortcut = || Conv2d::new(input, output, 1, vb.pp("conv_shortcut"));
        let p = self.config.dropout;
        Ok(ResBlock2D {
            norm1: self.activated_norm(input, vb.pp("norm1"))?,
            conv1: if size == Size::Doubled { conv1.upsampling() } else { conv1 },
            time: Linear::new(self.config.time_dim(), values, vb.pp("time_emb_proj"))?,
            norm2: self.activated_norm(output, vb.pp("norm2"))?,
            conv2: Conv2d::new(output, output, 3, vb.pp("conv2"))?,
            shortcut: (input != output).then(shortcut).transpose()?,
            size,
            modulates,
            dropout: (p > 0.0).then_some((p, self.layer)),
        })
    }

    /// The attention of a level.
    pub fn attention(&self, channels: usize, vb: VarBuilder) -> Result<Attention2D> {
        self.attention_in_groups(channels, Some(self.config.norm_num_groups), vb)
    }

    /// An attention whose input is normalised in `groups` groups, or not at all.
    pub fn attention_in_groups(
        &self,
        channels: usize,
        groups: Option<usize>,
        vb: VarBuilder,
    ) -> Result<Attention2D> {
        let norm = |groups| {
            let eps = self.config.norm_eps;
            GroupNorm::grouped(channels, groups, eps, Activation::None, vb.pp("group_norm"))
        };
        let linear = |name: &str| Conv2d::pointwise(channels, channels, vb.pp(name));
        Ok(Attention2D {
            norm: groups.map(norm).transpose()?,
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: linear("to_out.0")?,
            heads: self.config.heads(channels),
        })
    }

    /// A block or convolution that halves the size.
    pub fn downsampler(&mut self, channels: usize, block: bool, vb: VarBuilder) -> Result<Resize> {
        if block {
            return Ok(Resize::Block(self.resizing([channels; 2], Size::Halved, vb)?.into()));
        }
        let conv = Conv2d::new(channels, channels, 3, vb.pp("conv"))?;
        Ok(Resize::Conv(match self.config.downsample_padding {
            0 => conv.downsampling_from_edge(),
            _ => conv.downsampling(),
        }))
    }

    /// A block or convolution that doubles the size.
    pub fn upsampler(&mut self, channels: usize, block: bool, vb: VarBuilder) -> Result<Resize> {
        if block {
            return Ok(Resize::Block(self.resizing([channels; 2], Size::Doubled, vb)?.into()));
        }
        Ok(Resize::Conv(Conv2d::new(channels, channels, 3, vb.pp("conv"))?.upsampling()))
    }
}

/// The size of a block's output, compared with that of its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    Same,
    Halved,
    Doubled,
}

/// Two convolutions, each after a normalisation and SiLU, with the input added at the end. Ho et al. 2020, appendix B.
/// A block that changes the size resizes the input of both paths: Dhariwal and Nichol 2021, section 3, after Brock et
/// al. 2018.
#[derive(Debug, Clone)]
pub(super) struct ResBlock2D {
    norm1: GroupNorm,
    /// Upsamples if the block doubles the size.
    conv1: Conv2d,
    time: Linear,
    norm2: GroupNorm,
    conv2: Conv2d,
    /// Present if the number of channels changes.
    shortcut: Option<Conv2d>,
    size: Size,
    /// Whether the time embedding modulates the second normalisation. Otherwise it is added to the first convolution.
    modulates: bool,
    /// The probability, and the number of this dropout within the network.
    dropout: Option<(f64, u16)>,
}

impl ResBlock2D {
    pub fn run<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        x: &E::Map,
        t_emb: &E::Map,
    ) -> Result<E::Map> {
        engine.recomputable([x, t_emb], |engine, [x, t_emb]| self.compute(engine, x, t_emb))
    }

    fn compute<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        x: &E::Map,
        t_emb: &E::Map,
    ) -> Result<E::Map> {
        // Computed first, so that in the backward pass its gradient is added to that of the other path.
        let mut shortcut = match self.size {
            Size::Same => x.clone(),
            Size::Halved => engine.pool(x)?,
            Size::Doubled => engine.upsample(x)?,
        };
        if let Some(conv) = &self.shortcut {
            shortcut = engine.conv(conv, &shortcut)?;
        }
        let time = engine.linear(VectorActivation::Silu, &self.time, t_emb)?;
        let (add, by) = match self.modulates {
            true => (Add::NOTHING, Some(&time)),
            false => (Add::per_image(&time), None),
        };
        let h = match self.size {
            Size::Halved => {
                let n = engine.norm(&self.norm1, x)?;
                engine.conv_add(&self.conv1, &engine.pool(&n)?, add)?
            }
            Size::Same | Size::Doubled => engine.norm_conv_add(&self.norm1, &self.conv1, x, add)?,
        };
        let normed = Normed { norm: &self.norm2, by, dropout: self.dropout };
        engine.normed_conv_add(normed, &self.conv2, &h, Add::residual(&shortcut))
    }
}

/// Self-attention over all positions of a feature map, added to the map. Vaswani et al. 2017.
#[derive(Debug, Clone)]
pub(super) struct Attention2D {
    norm: Option<GroupNorm>,
    to_q: Conv2d,
    to_k: Conv2d,
    to_v: Conv2d,
    to_out: Conv2d,
    heads: usize,
}

impl Attention2D {
    pub fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map) -> Result<E::Map> {
        // Normalised map, queries, keys, values and their attention take five times the memory of the map.
        engine.recomputed([x], |engine, [x]| {
            let n = match &self.norm {
                Some(norm) => &engine.norm(norm, x)?,
                None => x,
            };
            let q = engine.conv(&self.to_q, n)?;
            let qk = engine.concatenate(&q, &engine.conv(&self.to_k, n)?)?;
            let qkv = engine.concatenate(&qk, &engine.conv(&self.to_v, n)?)?;
            let y = engine.attention(&qkv, self.heads)?;
            engine.conv_add(&self.to_out, &y, Add::residual(x))
        })
    }
}

/// The change of the size between two levels.
#[derive(Debug, Clone)]
pub(super) enum Resize {
    Conv(Conv2d),
    Block(Box<ResBlock2D>),
}

impl Resize {
    pub fn run<'n, E: Engine<'n>>(
        &'n self,
        engine: &E,
        x: &E::Map,
        t_emb: &E::Map,
    ) -> Result<E::Map> {
        match self {
            Self::Conv(conv) => engine.conv(conv, x),
            Self::Block(block) => block.run(engine, x, t_emb),
        }
    }
}
