use candle_nn::VarBuilder;

use crate::engine::Engine;
use crate::error::Result;
use crate::kernels::op::activation::Activation;
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, GroupNorm};

/// Self-attention with one head over all positions of a feature map, after GroupNorm, added to the map. Vaswani et al.
/// 2017; Ho et al. 2020, appendix B.
#[derive(Debug, Clone)]
pub struct Attention {
    norm: GroupNorm,
    qkv: Conv2d,
    proj: Conv2d,
}

impl Attention {
    /// Creates an attention over maps with this number of channels, a multiple of 8.
    ///
    /// # Errors
    /// Returns an error if `channels` is not a multiple of 8 from 8 to 65,536, if the dtype of `vb` is neither f32 nor
    /// f64, or if `vb` cannot supply a weight.
    pub fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm: GroupNorm::new(channels, Activation::None, vb.pp("norm"))?,
            qkv: Conv2d::new(channels, 3 * channels, 1, vb.pp("qkv"))?,
            proj: Conv2d::new(channels, channels, 1, vb.pp("proj"))?,
        })
    }

    /// Computes a map of the shape of `x`.
    ///
    /// # Errors
    /// Returns an error if `x` has a different number of channels.
    pub fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map) -> Result<E::Map> {
        engine.recomputable([x], |engine, [x]| {
            let qkv = engine.norm_conv(&self.norm, &self.qkv, x)?;
            let y = engine.attention(&qkv, 1)?;
            engine.conv_add(&self.proj, &y, Add::residual(x))
        })
    }
}
