use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::layers::{Conv2d, GroupNorm};
use crate::Result;
use crate::kernels::{self, Activation};

/// Self-attention with one head over all positions of a channels-last feature map, added to it.
#[derive(Debug, Clone)]
pub(super) struct Attention {
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

    pub fn forward_maps(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let qkv = self.qkv.forward(&self.norm.forward(x)?)?.reshape((b, h * w, 3 * c))?;
        let part = |i| qkv.narrow(2, i * c, c)?.contiguous();
        let y = kernels::attention(&part(0)?, &part(1)?, &part(2)?)?;
        Ok((x + self.proj.forward(&y.reshape((b, h, w, c))?)?)?)
    }
}
