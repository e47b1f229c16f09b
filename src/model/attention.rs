use candle_nn::VarBuilder;

use crate::Result;
use crate::engine::{Add, Engine};
use crate::engine::{Conv2d, GroupNorm};
use crate::kernels::Activation;

/// Self-attention with one head over all positions of a feature map, added to it.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    norm: GroupNorm,
    qkv: Conv2d,
    proj: Conv2d,
}

impl Attention {
    pub fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm: GroupNorm::new(channels, Activation::None, vb.pp("norm"))?,
            qkv: Conv2d::new(channels, 3 * channels, 1, vb.pp("qkv"))?,
            proj: Conv2d::new(channels, channels, 1, vb.pp("proj"))?,
        })
    }

    pub fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map) -> Result<E::Map> {
        let qkv = engine.norm_conv(&self.norm, &self.qkv, x, Add::NOTHING)?;
        let y = engine.attention(&qkv)?;
        engine.conv(&self.proj, &y, Add { residual: Some(x), ..Add::NOTHING })
    }
}
