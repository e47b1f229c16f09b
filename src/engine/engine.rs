use std::cell::Cell;

use candle_core::Tensor;

use super::layers::{Conv2d, GROUPS, GroupNorm, Linear};
use crate::kernels;
use crate::{Dropout, Result};

/// What computes a network: its operations on channels-last feature maps. The network is written
/// once, for all of them.
///
/// [`Autograd`] composes candle's tensors, which runs everywhere and can be differentiated with
/// whatever else a user computes; [`Tape`](super::tape::Tape) is the fast way, by the kernels of a
/// [`Backend`](super::backend::Backend). `'n` is the network's lifetime.
pub(crate) trait Engine<'n> {
    /// A feature map (batch, height, width, channels), or a batch of vectors (batch, 1, 1, n).
    type Map: Clone;

    /// The convolution, and what is added to it.
    fn conv(&self, conv: &'n Conv2d, x: &Self::Map, add: Add<'_, Self::Map>) -> Result<Self::Map>;

    /// The convolution of the normalised map, and what is added to it.
    fn norm_conv(
        &self,
        norm: &'n GroupNorm,
        conv: &'n Conv2d,
        x: &Self::Map,
        add: Add<'_, Self::Map>,
    ) -> Result<Self::Map>;

    /// The linear layer of the activated vectors.
    fn linear(&self, f: VectorActivation, linear: &'n Linear, x: &Self::Map) -> Result<Self::Map>;

    /// Without the channels that the network's `layer`-th dropout drops, with probability `p`.
    fn drop_maps(&self, x: &Self::Map, dropout: &Dropout, layer: u16, p: f64) -> Result<Self::Map>;

    /// The channels of both, one after the other.
    fn concatenate(&self, a: &Self::Map, b: &Self::Map) -> Result<Self::Map>;

    /// Attention of all pixels to all, from their q, k and v, side by side in `qkv`.
    fn attention(&self, qkv: &Self::Map) -> Result<Self::Map>;
}

/// What is added to a convolution's output.
pub(crate) struct Add<'a, M> {
    /// To each pixel of an image: (batch, 1, 1, channels).
    pub per_image: Option<&'a M>,
    /// A map of the output's shape.
    pub residual: Option<&'a M>,
}

impl<M> Add<'_, M> {
    pub const NOTHING: Self = Self { per_image: None, residual: None };
}

/// What a linear layer's input goes through before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VectorActivation {
    None,
    Silu,
    Gelu,
}

impl VectorActivation {
    pub fn value(self, x: f32) -> f32 {
        let x = f64::from(x);
        let y = match self {
            Self::None => x,
            Self::Silu => x / (1.0 + libm::exp(-x)),
            Self::Gelu => x * normal_below(x),
        };
        y as f32
    }

    pub fn derivative(self, x: f32) -> f32 {
        let x = f64::from(x);
        let dy = match self {
            Self::None => 1.0,
            Self::Silu => {
                let s = 1.0 / (1.0 + libm::exp(-x));
                s * (1.0 + x * (1.0 - s))
            }
            Self::Gelu => {
                let density = libm::exp(-0.5 * x * x) / (2.0 * std::f64::consts::PI).sqrt();
                normal_below(x) + x * density
            }
        };
        dy as f32
    }
}

/// The probability that a standard normal lies below `x`.
fn normal_below(x: f64) -> f64 {
    0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// Computes with candle's tensors, on any device, with candle's gradients.
pub(crate) struct Autograd;

impl Engine<'_> for Autograd {
    type Map = Tensor;

    fn conv(&self, conv: &Conv2d, x: &Tensor, add: Add<'_, Tensor>) -> Result<Tensor> {
        let mut y = kernels::conv2d(x, &conv.weight, &conv.bias, conv.scale)?;
        if let Some(values) = add.per_image {
            y = y.broadcast_add(values)?;
        }
        if let Some(residual) = add.residual {
            y = (residual + y)?;
        }
        Ok(y)
    }

    fn norm_conv(
        &self,
        norm: &GroupNorm,
        conv: &Conv2d,
        x: &Tensor,
        add: Add<'_, Tensor>,
    ) -> Result<Tensor> {
        let GroupNorm { weight, bias, activation } = norm;
        let x = kernels::group_norm(x, GROUPS, weight, bias, *activation)?;
        self.conv(conv, &x, add)
    }

    fn linear(&self, f: VectorActivation, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        let x = x.flatten_from(1)?;
        let x = match f {
            VectorActivation::None => x,
            VectorActivation::Silu => x.silu()?,
            VectorActivation::Gelu => x.gelu_erf()?,
        };
        Ok(kernels::linear(&x, &linear.weight, &linear.bias)?.unsqueeze(1)?.unsqueeze(1)?)
    }

    fn drop_maps(&self, x: &Tensor, dropout: &Dropout, layer: u16, p: f64) -> Result<Tensor> {
        let (batch, _, _, channels) = x.dims4()?;
        let mask = dropout.mask(layer, batch, channels, p, x.dtype(), x.device())?;
        Ok(x.broadcast_mul(&mask.unsqueeze(1)?.unsqueeze(1)?)?)
    }

    fn concatenate(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(Tensor::cat(&[a, b], 3)?)
    }

    fn attention(&self, qkv: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = qkv.dims4()?;
        let (qkv, c) = (qkv.reshape((b, h * w, c))?, c / 3);
        let part = |i| qkv.narrow(2, i * c, c)?.contiguous();
        let y = kernels::attention(&part(0)?, &part(1)?, &part(2)?)?;
        Ok(y.reshape((b, h, w, c))?)
    }
}

/// Computes nothing, but sees every weight of a network.
#[derive(Default)]
pub(crate) struct Survey {
    /// Whether any takes gradients.
    pub trainable: Cell<bool>,
    /// Whether any is computed from others that take gradients.
    pub derived: Cell<bool>,
}

impl Survey {
    fn see(&self, weights: [&Tensor; 2]) {
        for weight in weights {
            self.trainable.set(self.trainable.get() || weight.track_op());
            self.derived.set(self.derived.get() || weight.track_op() && !weight.is_variable());
        }
    }
}

impl Engine<'_> for Survey {
    type Map = ();

    fn conv(&self, conv: &Conv2d, _: &(), _: Add<'_, ()>) -> Result<()> {
        self.see([&conv.weight, &conv.bias]);
        Ok(())
    }

    fn norm_conv(&self, norm: &GroupNorm, conv: &Conv2d, x: &(), add: Add<'_, ()>) -> Result<()> {
        self.see([&norm.weight, &norm.bias]);
        self.conv(conv, x, add)
    }

    fn linear(&self, _: VectorActivation, linear: &Linear, _: &()) -> Result<()> {
        self.see([&linear.weight, &linear.bias]);
        Ok(())
    }

    fn drop_maps(&self, _: &(), _: &Dropout, _: u16, _: f64) -> Result<()> {
        Ok(())
    }

    fn concatenate(&self, _: &(), _: &()) -> Result<()> {
        Ok(())
    }

    fn attention(&self, _: &()) -> Result<()> {
        Ok(())
    }
}
