use candle_core::{DType, Tensor};

use super::graph::{Engine, Normed, Sealed};
use super::pass::Pass;
use super::shapes;
use crate::error::{Result, check_fraction};
use crate::kernels;
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear, Sinusoids};

/// The engine on candle tensors. It runs on every device and in f64, and candle can differentiate it.
pub(crate) struct Autograd<'a> {
    pass: Pass<'a>,
    /// The dtype of the weights.
    dtype: DType,
}

impl<'a> Autograd<'a> {
    pub fn new(pass: Pass<'a>, dtype: DType) -> Self {
        Self { pass, dtype }
    }
}

impl Sealed for Autograd<'_> {}

impl Engine<'_> for Autograd<'_> {
    type Map = Tensor;

    fn conv_add(&self, conv: &Conv2d, x: &Tensor, add: Add<'_, Tensor>) -> Result<Tensor> {
        let dims = |map: Option<&Tensor>| map.map(Tensor::dims4).transpose();
        let (per_image, residual) = (dims(add.per_image)?, dims(add.residual)?);
        shapes::conv(conv, x.dims4()?, per_image, residual)?;
        let packed = (!conv.weight.track_op()).then_some(&conv.packed);
        let mut y = kernels::conv2d(x, &conv.weight, &conv.bias, conv.scale, packed)?;
        if let Some(values) = add.per_image {
            y = y.broadcast_add(values)?;
        }
        if let Some(residual) = add.residual {
            y = (residual + y)?;
        }
        Ok(y)
    }

    fn normed_conv_add(
        &self,
        Normed { norm, by, dropout }: Normed<'_, '_, Tensor>,
        conv: &Conv2d,
        x: &Tensor,
        add: Add<'_, Tensor>,
    ) -> Result<Tensor> {
        let mut n = self.modulated_norm(norm, x, by)?;
        if let Some((p, layer)) = dropout {
            n = self.drop_values(&n, layer, p)?;
        }
        self.conv_add(conv, &n, add)
    }

    fn modulated_norm(&self, norm: &GroupNorm, x: &Tensor, by: Option<&Tensor>) -> Result<Tensor> {
        shapes::modulated_norm(norm, x.dims4()?, by.map(Tensor::dims4).transpose()?)?;
        let GroupNorm { weight, bias, config } = norm;
        Ok(match by {
            None => kernels::group_norm(x, weight, bias, *config)?,
            Some(by) => kernels::modulated_group_norm(x, weight, bias, by, *config)?,
        })
    }

    fn linear(&self, f: VectorActivation, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        shapes::linear(linear, x.dims4()?)?;
        let x = kernels::activated(f, &x.flatten_from(1)?)?;
        Ok(kernels::linear(&x, &linear.weight, &linear.bias)?.unsqueeze(1)?.unsqueeze(1)?)
    }

    fn add_class(&self, embedding: &Embedding, x: &Tensor) -> Result<Tensor> {
        shapes::embedding(embedding, x.dims4()?)?;
        let rows = embedding.weight.index_select(self.pass.classes()?, 0)?;
        Ok((x + rows.unsqueeze(1)?.unsqueeze(1)?)?)
    }

    fn drop_maps(&self, x: &Tensor, layer: u16, p: f64) -> Result<Tensor> {
        check_fraction("dropout", p)?;
        let Some(dropout) = self.pass.dropout else { return Ok(x.clone()) };
        let (batch, _, _, channels) = x.dims4()?;
        let mask = dropout.mask(layer, batch, channels, p, x.dtype(), x.device())?;
        Ok(x.broadcast_mul(&mask.unsqueeze(1)?.unsqueeze(1)?)?)
    }

    fn drop_values(&self, x: &Tensor, layer: u16, p: f64) -> Result<Tensor> {
        let (batch, h, w, channels) = x.dims4()?;
        let values = x.reshape((batch, 1, 1, h * w * channels))?;
        Ok(self.drop_maps(&values, layer, p)?.reshape(x.dims())?)
    }

    fn concatenate(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        shapes::concatenation(a.dims4()?, b.dims4()?)?;
        Ok(Tensor::cat(&[a, b], 3)?)
    }

    fn attention(&self, qkv: &Tensor, heads: usize) -> Result<Tensor> {
        shapes::attention(qkv.dims4()?, heads)?;
        let (b, h, w, c) = qkv.dims4()?;
        let y = kernels::attention(&qkv.reshape((b, h * w, c))?, heads)?;
        Ok(y.reshape((b, h, w, c / 3))?)
    }

    fn pool(&self, x: &Tensor) -> Result<Tensor> {
        shapes::pooling(x.dims4()?)?;
        Ok(kernels::average_pixels(x)?)
    }

    fn upsample(&self, x: &Tensor) -> Result<Tensor> {
        Ok(kernels::upsample_nearest_2x(x)?)
    }

    fn sinusoids(&self, sinusoids: &Sinusoids) -> Result<Tensor> {
        let values = sinusoids.values(self.pass.timesteps()?, self.dtype)?;
        Ok(values.unsqueeze(1)?.unsqueeze(1)?)
    }
}
