use candle_core::{D, Tensor};
use candle_nn::ops::softmax;
use candle_nn::{Init, VarBuilder};

use super::config::LucidrainsConfig;
use crate::engine::{Autograd, Engine};
use crate::error::Result;
use crate::kernels::op::activation::{Activation, VectorActivation};
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, GroupNorm, Linear, Sinusoids, phase_dtype, weight};

/// The normalisation of each pixel by the root mean square of its channels (Zhang and Sennrich 2019), with a factor for
/// each channel.
struct RmsNorm {
    /// The factors, (1, channels, 1, 1).
    g: Tensor,
}

impl RmsNorm {
    fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self { g: weight(&vb, &[1, channels, 1, 1], "g", Init::Const(1.0))? })
    }

    /// Normalises a map, multiplies it by `1 + scale` and adds `shift`. The vectors `by` hold the scales of the
    /// channels of an image, then their shifts.
    fn run(&self, x: &Tensor, by: Option<&Tensor>) -> Result<Tensor> {
        let channels = x.dim(3)?;
        // The package divides by the norm, or by 1e-12 if that is larger. The root of the bound has a finite gradient.
        let norm = x.sqr()?.sum_keepdim(3)?.maximum(1e-24)?.sqrt()?;
        let x = x.broadcast_div(&norm)?;
        let factors = (self.g.reshape((1, 1, 1, channels))? * (channels as f64).sqrt())?;
        let Some(by) = by else { return Ok(x.broadcast_mul(&factors)?) };
        let (scale, shift) = (by.narrow(3, 0, channels)?, by.narrow(3, channels, channels)?);
        let factors = factors.broadcast_mul(&(scale + 1.0)?)?;
        Ok(x.broadcast_mul(&factors)?.broadcast_add(&shift)?)
    }
}

/// The normalisation and activation of a residual block.
enum BlockNorm {
    Rms(RmsNorm),
    /// That of versions before 2.
    Group(GroupNorm),
}

impl BlockNorm {
    fn new(config: &LucidrainsConfig, channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(match config.resnet_block_groups {
            None => Self::Rms(RmsNorm::new(channels, vb)?),
            Some(groups) => {
                Self::Group(GroupNorm::grouped(channels, groups, 1e-5, Activation::Silu, vb)?)
            }
        })
    }

    fn run(&self, engine: &Autograd<'_>, x: &Tensor, by: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Rms(norm) => Ok(norm.run(x, by)?.silu()?),
            Self::Group(norm) => engine.modulated_norm(norm, x, by),
        }
    }
}

/// The embedding of the timestep: sinusoids, then Linear, GELU, Linear.
pub(super) struct TimeMlp {
    sinusoids: TimeSinusoids,
    hidden: Linear,
    output: Linear,
}

enum TimeSinusoids {
    Fixed(Sinusoids),
    /// The frequencies in revolutions per timestep.
    Learned(Tensor),
}

impl TimeMlp {
    pub fn new(config: &LucidrainsConfig, vb: VarBuilder) -> Result<Self> {
        let (sinusoids, length) = match config.learned_sinusoidal_dim {
            None => {
                let theta = config.sinusoidal_pos_emb_theta;
                (TimeSinusoids::Fixed(Sinusoids::with_theta(config.dim / 2, theta)), config.dim)
            }
            Some(dim) => {
                let init = Init::Randn { mean: 0.0, stdev: 1.0 };
                let weights = weight(&vb.pp("0"), &[dim / 2], "weights", init)?;
                (TimeSinusoids::Learned(weights), dim + 1)
            }
        };
        let dim = 4 * config.dim;
        Ok(Self {
            sinusoids,
            hidden: Linear::new(length, dim, vb.pp("1"))?,
            output: Linear::new(dim, dim, vb.pp("3"))?,
        })
    }

    /// Computes the embedding (batch, 1, 1, 4 dim) of `t` (batch), the timesteps of the engine.
    pub fn run(&self, engine: &Autograd<'_>, t: &Tensor) -> Result<Tensor> {
        let sinusoids = match &self.sinusoids {
            TimeSinusoids::Fixed(sinusoids) => engine.sinusoids(sinusoids)?,
            TimeSinusoids::Learned(frequencies) => learned(frequencies, t)?,
        };
        let hidden = engine.linear(VectorActivation::None, &self.hidden, &sinusoids)?;
        engine.linear(VectorActivation::Gelu, &self.output, &hidden)
    }
}

/// Computes `[t | sin | cos]` of `t` times each frequency: (batch, 1, 1, 1 + 2 frequencies).
fn learned(frequencies: &Tensor, t: &Tensor) -> Result<Tensor> {
    let exact = phase_dtype(t.device());
    let t = t.to_dtype(exact)?.unsqueeze(1)?;
    let dtype = frequencies.dtype();
    let frequencies = (frequencies.to_dtype(exact)? * std::f64::consts::TAU)?;
    let angles = t.broadcast_mul(&frequencies.unsqueeze(0)?)?;
    let all = Tensor::cat(&[&t, &angles.sin()?, &angles.cos()?], 1)?;
    Ok(all.to_dtype(dtype)?.unsqueeze(1)?.unsqueeze(1)?)
}

/// A residual block: two convolutions, of which the timestep modulates the first.
pub(super) struct ResBlock {
    mlp: Linear,
    convolutions: [Conv2d; 2],
    norms: [BlockNorm; 2],
    /// Not used if input and output have the same number of channels.
    res_conv: Option<Conv2d>,
    /// The probability of the dropout, and its number within the network.
    dropout: (f64, u16),
}

impl ResBlock {
    pub fn new(
        config: &LucidrainsConfig,
        [input, output]: [usize; 2],
        layer: u16,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (first, second) = (vb.pp("block1"), vb.pp("block2"));
        let norm = |vb: &VarBuilder| BlockNorm::new(config, output, vb.pp("norm"));
        let res_conv = || Conv2d::new(input, output, 1, vb.pp("res_conv"));
        Ok(Self {
            mlp: Linear::new(4 * config.dim, 2 * output, vb.pp("mlp.1"))?,
            convolutions: [
                Conv2d::new(input, output, 3, first.pp("proj"))?,
                Conv2d::new(output, output, 3, second.pp("proj"))?,
            ],
            norms: [norm(&first)?, norm(&second)?],
            res_conv: (input != output).then(res_conv).transpose()?,
            dropout: (config.dropout, layer),
        })
    }

    pub fn run(&self, engine: &Autograd<'_>, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let ([first, second], [norm, last_norm]) = (&self.convolutions, &self.norms);
        let by = engine.linear(VectorActivation::Silu, &self.mlp, time)?;
        let h = norm.run(engine, &engine.conv(first, x)?, Some(&by))?;
        let h = match self.dropout {
            (0.0, _) => h,
            (p, layer) => engine.drop_values(&h, layer, p)?,
        };
        let h = last_norm.run(engine, &engine.conv(second, &h)?, None)?;
        match &self.res_conv {
            Some(conv) => engine.conv_add(conv, x, Add::residual(&h)),
            None => Ok((h + x)?),
        }
    }
}

/// An attention over all pixels and some learned keys and values, added to the map.
pub(super) struct Attention {
    norm: RmsNorm,
    /// Keys and values: (2, heads, values of a key, keys) in linear attention, otherwise (2, heads, keys, values of a
    /// key).
    mem_kv: Tensor,
    to_qkv: Conv2d,
    to_out: Conv2d,
    /// The normalisation of the output of a linear attention. Softmax attention has none.
    out_norm: Option<RmsNorm>,
}

/// The heads of an attention.
pub(super) struct Heads {
    pub count: usize,
    /// The number of channels of a head.
    pub dim: usize,
    /// True for softmax attention, false for linear attention.
    pub full: bool,
}

impl Attention {
    pub fn new(channels: usize, heads: Heads, keys: usize, vb: VarBuilder) -> Result<Self> {
        let Heads { count, dim, full } = heads;
        let shape = if full { [2, count, keys, dim] } else { [2, count, dim, keys] };
        let out = vb.pp("to_out");
        let (conv, out_norm) = match full {
            true => (out, None),
            false => (out.pp("0"), Some(RmsNorm::new(channels, out.pp("1"))?)),
        };
        Ok(Self {
            norm: RmsNorm::new(channels, vb.pp("norm"))?,
            mem_kv: weight(&vb, &shape, "mem_kv", Init::Randn { mean: 0.0, stdev: 1.0 })?,
            to_qkv: Conv2d::without_bias(channels, 3 * count * dim, 1, vb.pp("to_qkv"))?,
            to_out: Conv2d::new(count * dim, channels, 1, conv)?,
            out_norm,
        })
    }

    pub fn run(&self, engine: &Autograd<'_>, x: &Tensor) -> Result<Tensor> {
        let (batch, h, w, _) = x.dims4()?;
        let (_, heads, ..) = self.mem_kv.dims4()?;
        let qkv = engine.conv(&self.to_qkv, &self.norm.run(x, None)?)?;
        let qkv = qkv.reshape((batch, h * w, 3, heads, ()))?;
        // The parts are (batch, heads, pixels, channels), the keys (batch, heads, channels, keys and pixels).
        let part = |i| qkv.get_on_dim(2, i)?.transpose(1, 2);
        let memory = |i, transposed| {
            let part = self.mem_kv.get(i)?;
            let part = if transposed { part.t()? } else { part };
            let (heads, a, b) = part.dims3()?;
            part.unsqueeze(0)?.expand((batch, heads, a, b))
        };
        let full = self.out_norm.is_none();
        let q = part(0)?.contiguous()?;
        let k = Tensor::cat(&[memory(0, full)?, part(1)?.t()?], 3)?.contiguous()?;
        let v = Tensor::cat(&[memory(1, !full)?, part(2)?], 2)?.contiguous()?;
        let scale = (q.dim(3)? as f64).sqrt().recip();
        let y = match full {
            true => softmax(&(q * scale)?.matmul(&k)?, D::Minus1)?.matmul(&v)?,
            // Without a softmax of products, keys and values can be multiplied first. Shen et al. 2021, equation 5.
            false => {
                let context = softmax(&k, D::Minus1)?.matmul(&v)?;
                (softmax(&q, D::Minus1)? * scale)?.matmul(&context)?
            }
        };
        let y = y.transpose(1, 2)?.reshape((batch, h, w, ()))?;
        match &self.out_norm {
            None => engine.conv_add(&self.to_out, &y, Add::residual(x)),
            Some(norm) => Ok((norm.run(&engine.conv(&self.to_out, &y)?, None)? + x)?),
        }
    }
}

/// Moves each two by two pixels into the channels of one: (batch, h, w, channels) becomes (batch, h / 2, w / 2, 4
/// channels).
pub(super) fn unshuffle(x: &Tensor) -> Result<Tensor> {
    let (batch, h, w, channels) = x.dims4()?;
    let x = x.reshape(&[batch, h / 2, 2, w / 2, 2, channels][..])?;
    Ok(x.permute([0, 1, 3, 5, 2, 4])?.reshape((batch, h / 2, w / 2, 4 * channels))?)
}
