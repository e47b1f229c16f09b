use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use crate::engine::{Autograd, Engine, Pass};
use crate::error::{Error, Result, check_dims, check_fraction};
use crate::kernels;
use crate::kernels::op::activation::{Activation, VectorActivation};
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, GroupNorm, Linear, MAX_CHANNELS, weights_dtype};
use crate::random::Dropout;

/// Two convolutions, each after GroupNorm and SiLU, with the time embedding added between them and
/// the input added at the end. Ho et al. 2020, appendix B.
///
/// Every GroupNorm has 8 groups. In a block with 8 output channels each channel is a group. The second GroupNorm then
/// subtracts the mean of each channel, and with it the time embedding, so the output does not depend on the timestep.
#[derive(Debug, Clone)]
pub struct ResBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Linear,
    norm2: GroupNorm,
    conv2: Conv2d,
    /// Present if the number of channels changes.
    shortcut: Option<Conv2d>,
    channels: usize,
    time_dim: usize,
    dtype: DType,
    /// The probability, and the number of this dropout within the network.
    dropout: Option<(f64, u16)>,
}

impl ResBlock {
    /// Creates a block from `input` to `output` channels, with a time embedding of `time_dim` values.
    ///
    /// # Errors
    /// Returns an error if a number of channels is not a multiple of 8 from 8 to 65536, if `time_dim` is not from 1 to
    /// 65536, if the dtype of `vb` is neither f32 nor f64, or if `vb` cannot supply a weight.
    pub fn new(input: usize, output: usize, time_dim: usize, vb: VarBuilder) -> Result<Self> {
        if !(1..=MAX_CHANNELS).contains(&time_dim) {
            return Err(Error::config("time_dim", time_dim, "from 1 to 65536"));
        }
        let dtype = weights_dtype(&vb)?;
        let (block1, block2) = (vb.pp("block1"), vb.pp("block2"));
        let shortcut = (input != output)
            .then(|| Conv2d::new(input, output, 1, vb.pp("shortcut")))
            .transpose()?;
        Ok(Self {
            norm1: GroupNorm::new(input, Activation::Silu, block1.pp("0"))?,
            conv1: Conv2d::new(input, output, 3, block1.pp("2"))?,
            time: Linear::new(time_dim, output, vb.pp("time_emb").pp("1"))?,
            norm2: GroupNorm::new(output, Activation::Silu, block2.pp("0"))?,
            conv2: Conv2d::new(output, output, 3, block2.pp("2"))?,
            shortcut,
            channels: input,
            time_dim,
            dtype,
            dropout: None,
        })
    }

    /// Sets the dropout of whole feature maps between the two halves, during training, with probability `p`. `layer`
    /// is the number of the dropout that determines the masks; each block of a network needs its own. A `p` of 0 drops
    /// nothing. Srivastava et al. 2014; dropping whole feature maps follows PyTorch's `Dropout2d`.
    ///
    /// # Errors
    /// Returns an error if `p` is not at least 0 and less than 1.
    pub fn with_dropout(self, p: f64, layer: u16) -> Result<Self> {
        check_fraction("dropout", p)?;
        Ok(Self { dropout: (p > 0.0).then_some((p, layer)), ..self })
    }

    /// Computes an output (batch, out, height, width) from `x` (batch, in, height, width) and `t_emb`
    /// (batch, time_dim), all of the dtype of the weights. Dropout is active if its masks are given.
    ///
    /// # Errors
    /// Returns an error if a shape or dtype does not fit.
    pub fn forward(&self, x: &Tensor, t_emb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        if x.rank() != 4 || x.dim(1)? != self.channels || x.elem_count() == 0 {
            let expected = format!("(batch, {}, height, width), none of them 0", self.channels);
            return Err(Error::shape("x", x.dims(), expected));
        }
        check_dims("t_emb", t_emb.dims(), &[x.dim(0)?, self.time_dim], "(batch, time_dim)")?;
        for (field, dtype) in [("dtype of x", x.dtype()), ("dtype of t_emb", t_emb.dtype())] {
            if dtype != self.dtype {
                let expected = format!("{}, that of the weights", self.dtype.as_str());
                return Err(Error::config(field, dtype.as_str(), expected));
            }
        }
        let (x, time) = (kernels::to_channels_last(x)?, t_emb.unsqueeze(1)?.unsqueeze(1)?);
        let engine = Autograd::new(Pass { dropout, ..Pass::default() }, self.dtype);
        Ok(kernels::to_channels_first(&self.run(&engine, &x, &time)?)?)
    }

    /// Computes [`forward`](Self::forward) with the maps of an engine: `x` (batch, height, width, in) and the time
    /// embedding `t_emb` (batch, 1, 1, time_dim).
    ///
    /// # Errors
    /// Returns an error if a shape does not fit.
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
        // Computed first, so that in the backward pass its gradient is added to that of the other path. The
        // opposite order would need memory for both gradients.
        let shortcut = match &self.shortcut {
            Some(shortcut) => &engine.conv(shortcut, x)?,
            None => x,
        };
        let time = engine.linear(VectorActivation::Silu, &self.time, t_emb)?;
        let mut h = engine.norm_conv_add(&self.norm1, &self.conv1, x, Add::per_image(&time))?;
        if let Some((p, layer)) = self.dropout {
            h = engine.drop_maps(&h, layer, p)?;
        }
        engine.norm_conv_add(&self.norm2, &self.conv2, &h, Add::residual(shortcut))
    }
}
