mod convolution;

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::ops::{ConvGradients, Maps, Norm, NormedConvolution};
use super::place::Place;
use super::pool::{Buffer, Pool};
use crate::error::Result;
use crate::kernels::cpu::attention::Attention;
use crate::kernels::cpu::conv::algorithm::{Input, Math, Workspace};
use crate::kernels::cpu::dropout::drop_values;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::linear::{linear_forward, linear_input_gradient, linear_weight_gradient};
use crate::kernels::cpu::maps::{
    add_class, concatenate, repeat_pixels, scale_maps, split, sum_pixels, sums_by_class,
};
use crate::kernels::cpu::norm::modulated::Modulated;
use crate::kernels::cpu::norm::{Normalization, Stats};
use crate::kernels::cpu::reduce::sum_over_batch;
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::attention::AttentionShape;
use crate::kernels::op::conv::Add;
use crate::kernels::{
    add_values, to_channels_first, to_channels_last, with_values, with_values_mut,
};
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear, Sinusoids};
use crate::random::Dropout;

/// The f32 kernels of the CPU as a backend of networks.
pub(crate) struct Cpu<'p> {
    isa: Isa,
    math: Math,
    pool: &'p Arc<Pool>,
    workspace: RefCell<Workspace>,
    /// True if packed weights are not kept.
    repack: bool,
}

impl Drop for Cpu<'_> {
    fn drop(&mut self) {
        self.pool.give_back(self.workspace.take());
    }
}

impl<'p> Cpu<'p> {
    /// Prepares a pass.
    pub fn new(pool: &'p Arc<Pool>, place: &Place<'_>) -> Self {
        let &Place { precision, batch, recording, repack, .. } = place;
        pool.begin(batch, recording);
        let workspace = RefCell::new(pool.workspace());
        let isa = Isa::detect();
        // Networks return an error for F16 on the CPU.
        let math = Math::of(precision, isa);
        Self { isa, math, pool, workspace, repack }
    }

    /// Copies the values of a tensor to a buffer.
    fn copied(&self, x: &Tensor) -> Result<Buffer> {
        let mut values = self.take(x.elem_count())?;
        with_values([&x.contiguous()?], |[x]| values.copy_from_slice(x))?;
        Ok(values)
    }

    /// Creates the gradient of a weight, with values written by `write`.
    fn weight_gradient(&self, weight: &Tensor, write: impl FnOnce(&mut [f32])) -> Result<Tensor> {
        let gradient = self.pool.gradient(weight)?;
        with_values_mut(&gradient, write)?;
        Ok(gradient)
    }

    /// Calls `f` with the normalisation, and with its scales and shifts.
    fn normalization<R>(
        &self,
        norm: &Norm<'_, Buffer>,
        f: impl FnOnce(Normalization<'_>, Option<&[f32]>) -> R,
    ) -> Result<R> {
        let GroupNorm { weight, bias, config } = norm.layer;
        Ok(with_values([weight, bias], |[weight, bias]| {
            let plain = Normalization { isa: self.isa, config: *config, weight, bias };
            f(plain, norm.by.map(|by| &**by))
        })?)
    }
}

impl Maps for Cpu<'_> {
    type Buffer = Buffer;
    type Statistics = Vec<Stats>;
    type AttentionResults = ();

    fn images(&self, x: &Tensor) -> Result<Buffer> {
        self.copied(&to_channels_last(&x.to_dtype(DType::F32)?)?)
    }

    fn to_images(&self, dims: [usize; 4], map: &Buffer) -> Result<Tensor> {
        let map: &[f32] = map;
        Ok(to_channels_first(&Tensor::from_slice(map, &dims, &Device::Cpu)?)?)
    }

    fn sinusoids(&self, sinusoids: &Sinusoids, t: &Tensor) -> Result<Buffer> {
        self.copied(&sinusoids.values(t, DType::F32)?)
    }

    fn take(&self, len: usize) -> Result<Buffer> {
        self.pool.take(len)
    }

    fn add(&self, sum: &mut Buffer, more: &Buffer, _: usize) -> Result<()> {
        add_values(sum, more);
        Ok(())
    }

    fn convolve(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Buffer,
        add: Add<'_, Buffer>,
    ) -> Result<([usize; 4], Buffer)> {
        let plan = self.plan(conv, dims)?;
        Ok((plan.output(), self.convolved(conv, &plan, x.into(), add)?))
    }

    fn convolve_normed(
        &self,
        norm: Norm<'_, Buffer>,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Buffer,
        add: Add<'_, Buffer>,
    ) -> Result<Option<NormedConvolution<Buffer, Vec<Stats>>>> {
        let plan = self.plan(conv, dims)?;
        if !plan.normalizes() {
            return Ok(None);
        }
        let statistics = self.normalization(&norm, |norm, _| norm.stats(dims[0], x))?;
        let known = self.known(&norm, &statistics)?;
        let y = self.convolved(conv, &plan, Input { map: x, norm: Some(&known) }, add)?;
        Ok(Some((plan.output(), y, statistics)))
    }

    fn convolve_weight_gradients(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Buffer,
        dy: &Buffer,
        per_image: bool,
    ) -> Result<ConvGradients<Buffer>> {
        let plan = self.plan(conv, dims)?;
        self.weight_gradients(conv, &plan, x.into(), dy, per_image)
    }

    fn normed_weight_gradients(
        &self,
        (norm, statistics): (Norm<'_, Buffer>, &Vec<Stats>),
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Buffer,
        dy: &Buffer,
        per_image: bool,
    ) -> Result<Option<ConvGradients<Buffer>>> {
        let plan = self.plan(conv, dims)?;
        if !plan.weight_gradient_normalizes() {
            return Ok(None);
        }
        let known = self.known(&norm, statistics)?;
        let x = Input { map: x, norm: Some(&known) };
        self.weight_gradients(conv, &plan, x, dy, per_image).map(Some)
    }

    fn convolve_input_gradient(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        dy: &Buffer,
        dx: &mut Buffer,
        accumulate: bool,
    ) -> Result<()> {
        let plan = self.plan(conv, dims)?;
        with_values([&conv.weight], |[weight]| {
            plan.input_gradient(dy, weight, dx, accumulate, &mut self.workspace.borrow_mut());
        })?;
        Ok(())
    }

    fn normalize(
        &self,
        norm: Norm<'_, Buffer>,
        dims: [usize; 4],
        x: &Buffer,
    ) -> Result<(Buffer, Vec<Stats>)> {
        let mut n = self.take(x.len())?;
        let statistics = self.normalization(&norm, |norm, by| match by {
            None => norm.forward(dims[0], x, &mut n),
            Some(by) => Modulated { norm, by }.forward(x, &mut n),
        })?;
        Ok((n, statistics))
    }

    fn normalize_again(
        &self,
        norm: Norm<'_, Buffer>,
        _: [usize; 4],
        x: &Buffer,
        statistics: &Vec<Stats>,
    ) -> Result<Buffer> {
        let mut n = self.take(x.len())?;
        self.known(&norm, statistics)?.write(x, &mut n);
        Ok(n)
    }

    fn normalize_backward(
        &self,
        norm: Norm<'_, Buffer>,
        _: [usize; 4],
        x: &Buffer,
        statistics: &Vec<Stats>,
        d: &mut Buffer,
        more: Option<&Buffer>,
    ) -> Result<([Tensor; 2], Option<Buffer>)> {
        let more = more.map(|values| &**values);
        let mut dby = norm.by.map(|by| self.take(by.len())).transpose()?;
        let (weight, bias) = self.normalization(&norm, |norm, by| match (by, &mut dby) {
            (Some(by), Some(dby)) => Modulated { norm, by }.backward(x, statistics, d, more, dby),
            _ => norm.backward(x, statistics, d, more),
        })?;
        let weights = [
            self.weight_gradient(&norm.layer.weight, |d| d.copy_from_slice(&weight))?,
            self.weight_gradient(&norm.layer.bias, |d| d.copy_from_slice(&bias))?,
        ];
        Ok((weights, dby))
    }

    fn linear(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &Buffer,
    ) -> Result<Buffer> {
        let mut y = self.take(batch * linear.bias.elem_count())?;
        with_values([&linear.weight, &linear.bias], |[weight, bias]| {
            linear_forward(self.isa, &activated(f, x), weight, bias, &mut y);
        })?;
        Ok(y)
    }

    fn linear_backward(
        &self,
        f: VectorActivation,
        linear: &Linear,
        _: usize,
        x: &Buffer,
        dy: &Buffer,
    ) -> Result<(Buffer, [Tensor; 2])> {
        let output = linear.bias.elem_count();
        let mut dx = self.take(x.len())?;
        with_values([&linear.weight], |[weight]| {
            linear_input_gradient(self.isa, weight, output, dy, &mut dx);
        })?;
        dx.iter_mut().zip(&**x).for_each(|(dx, &x)| *dx *= f.derivative(x));
        let weight = self.weight_gradient(&linear.weight, |d| {
            linear_weight_gradient(self.isa, &activated(f, x), output, dy, d);
        })?;
        let bias = self.weight_gradient(&linear.bias, |d| sum_over_batch(dy, d))?;
        Ok((dx, [weight, bias]))
    }

    fn add_class(&self, embedding: &Embedding, classes: &Tensor, x: &Buffer) -> Result<Buffer> {
        let (mut y, dim, classes) = (self.take(x.len())?, embedding.dim(), classes.to_vec1()?);
        y.copy_from_slice(x);
        with_values([&embedding.weight], |[table]| {
            add_class(table, dim, &classes, &mut y);
        })?;
        Ok(y)
    }

    fn add_class_backward(
        &self,
        embedding: &Embedding,
        classes: &Tensor,
        dy: &Buffer,
    ) -> Result<Tensor> {
        let classes = classes.to_vec1()?;
        self.weight_gradient(&embedding.weight, |d| sums_by_class(dy, embedding.dim(), &classes, d))
    }

    fn mask(&self, dropout: &Dropout, layer: u16, dims: [usize; 4], p: f64) -> Result<Buffer> {
        let [batch, _, _, channels] = dims;
        let mut mask = self.take(batch * channels)?;
        mask.fill(1.0);
        drop_values(self.isa, (dropout, layer, p), batch, &mut mask);
        Ok(mask)
    }

    fn scale_maps(&self, dims: [usize; 4], x: &Buffer, mask: &Buffer) -> Result<Buffer> {
        let mut y = self.take(x.len())?;
        scale_maps(x, mask, dims[3], &mut y);
        Ok(y)
    }

    fn drop_values(
        &self,
        dims: [usize; 4],
        x: &mut Buffer,
        dropout: &Dropout,
        layer: u16,
        p: f64,
    ) -> Result<()> {
        drop_values(self.isa, (dropout, layer, p), dims[0], x);
        Ok(())
    }

    fn repeat_pixels(&self, [_, _, w, c]: [usize; 4], x: &Buffer, factor: f32) -> Result<Buffer> {
        let mut y = self.take(4 * x.len())?;
        repeat_pixels(x, (w, c), factor, &mut y);
        Ok(y)
    }

    fn sum_pixels(&self, [_, _, w, c]: [usize; 4], x: &Buffer, factor: f32) -> Result<Buffer> {
        let mut y = self.take(x.len() / 4)?;
        sum_pixels(x, (w, c), factor, &mut y);
        Ok(y)
    }

    fn concatenate(
        &self,
        pixels: usize,
        channels: [usize; 2],
        maps: [&Buffer; 2],
    ) -> Result<Buffer> {
        let mut y = self.take(pixels * (channels[0] + channels[1]))?;
        concatenate(maps.map(|map| &**map), channels, &mut y);
        Ok(y)
    }

    fn split(&self, pixels: usize, channels: [usize; 2], map: &Buffer) -> Result<[Buffer; 2]> {
        let mut a = self.take(pixels * channels[0])?;
        let mut b = self.take(pixels * channels[1])?;
        split(map, channels, [&mut a, &mut b]);
        Ok([a, b])
    }

    fn attention(&self, _: usize, shape: AttentionShape, qkv: &Buffer) -> Result<(Buffer, ())> {
        let mut y = self.take(qkv.len() / 3)?;
        Attention { isa: self.isa, shape }.forward(qkv, &mut y);
        Ok((y, ()))
    }

    fn attention_backward(
        &self,
        _: usize,
        shape: AttentionShape,
        qkv: &Buffer,
        (): &(),
        dy: &Buffer,
    ) -> Result<Buffer> {
        let mut d = self.take(qkv.len())?;
        Attention { isa: self.isa, shape }.backward(qkv, dy, &mut d);
        Ok(d)
    }
}

fn activated(f: VectorActivation, x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| f.value(x)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::precision::Precision;

    #[test]
    fn weights_are_kept_packed_unless_each_pass_packs_them() -> Result<()> {
        let pool = Arc::new(Pool::default());
        let (weight, bias) = (
            Tensor::rand(-1f32, 1.0, (5, 7, 3, 3), &Device::Cpu)?,
            Tensor::ones(5, DType::F32, &Device::Cpu)?,
        );
        let dims = [2, 6, 5, 7];
        let mut x = pool.take(dims.iter().product())?;
        x.iter_mut().zip(1u16..).for_each(|(x, k)| *x = f32::from(k));
        let pass = |repack| -> Result<(Vec<f32>, bool)> {
            let conv = Conv2d::with_weights(weight.clone(), bias.clone());
            let place = Place {
                device: &Device::Cpu,
                precision: Precision::Highest,
                batch: 2,
                recording: false,
                fixed: false,
                repack,
            };
            let mut found = Vec::new();
            for _ in 0..2 {
                let (_, y) = Cpu::new(&pool, &place).convolve(&conv, dims, &x, Add::NOTHING)?;
                found.extend_from_slice(&y);
            }
            Ok((found, conv.packed.is_empty()))
        };
        let (kept, repacked) = (pass(false)?, pass(true)?);
        assert!(!kept.1 && repacked.1);
        assert_eq!(kept.0, repacked.0);
        Ok(())
    }
}
