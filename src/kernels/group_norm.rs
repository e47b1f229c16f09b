use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::elementwise::sigmoid;
use super::simd::{Isa, simd_fn};
use super::values::{contiguous, on_cpu_in_f32, with_values};

/// What follows a normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    None,
    Silu,
}

/// Added to the variance, as in PyTorch.
const EPS: f64 = 1e-5;

/// Pixels that one thread takes at a time, where an image's are shared.
const SPAN: usize = 64;

/// Pixels whose sums are taken in f32.
const RUN: usize = 32;

/// How many spans a thread takes at least.
fn least(shared: bool) -> usize {
    if shared { 1 } else { usize::MAX }
}

/// Normalises each group of channels of each image to mean 0 and variance 1, then scales and
/// shifts each channel. Wu and He 2018.
///
/// `x` (batch, height, width, channels); `weight` and `bias` (channels).
pub(crate) fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    if on_cpu_in_f32(x) {
        let op = GroupNorm { isa: Isa::detect(), groups, activation };
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
    } else {
        composed(x, groups, weight, bias, activation)
    }
}

fn composed(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let x = x.reshape((b, h * w, groups, c / groups))?;
    let x = x.broadcast_sub(&x.mean_keepdim((1, 3))?)?;
    let variance = x.sqr()?.mean_keepdim((1, 3))?;
    let x = x.broadcast_div(&(variance + EPS)?.sqrt()?)?;
    let x = x.reshape((b, h, w, c))?.broadcast_mul(weight)?.broadcast_add(bias)?;
    match activation {
        Activation::None => Ok(x),
        Activation::Silu => x.silu(),
    }
}

/// A normalisation on the CPU: one image at a time, whose passes then find it in the cache. Nothing
/// is kept for the backward pass, which computes the statistics again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normalization<'a> {
    pub isa: Isa,
    pub groups: usize,
    pub activation: Activation,
    pub weight: &'a [f32],
    pub bias: &'a [f32],
}

impl Normalization<'_> {
    /// `y` from `x`, both `batch` images.
    pub fn forward(&self, batch: usize, x: &[f32], y: &mut [f32]) {
        let image = x.len() / batch;
        y.par_chunks_mut(image).zip(x.par_chunks(image)).for_each(|(y, x)| {
            let span = SPAN * self.weight.len();
            // Fewer images than threads: their pixels are shared as well.
            let shared = batch < rayon::current_num_threads();
            let stats = self.stats(x, shared);
            let silu = self.activation == Activation::Silu;
            let spans = y.par_chunks_mut(span).zip(x.par_chunks(span));
            spans.with_min_len(least(shared)).for_each(|(y, x)| {
                normalize(self.isa, y, x, &stats, self.weight, self.bias, silu);
            });
        });
    }

    /// Of an image; its sums are shared by the threads where `shared`. In either case they are taken
    /// in the same order.
    fn stats(&self, x: &[f32], shared: bool) -> Stats {
        let c = self.weight.len();
        let group = c / self.groups;
        let count = (x.len() / self.groups) as f64;
        let mut stats = Stats { mean: vec![0f32; c], rstd: vec![0f32; c] };
        let mut sums = vec![0f64; x.len().div_ceil(SPAN * c) * c];
        // Squares about the mean: the difference of two large sums would lose what it is after.
        for squares in [false, true] {
            let mean = &stats.mean;
            let spans = sums.par_chunks_mut(c).zip(x.par_chunks(SPAN * c));
            spans.with_min_len(least(shared)).for_each(|(sums, x)| {
                span_sums(self.isa, sums, x, mean, squares);
            });
            for first in (0..c).step_by(group) {
                let total: f64 = sums.chunks(c).flat_map(|sums| &sums[first..first + group]).sum();
                let value = total / count;
                match squares {
                    false => stats.mean[first..first + group].fill(value as f32),
                    true => {
                        stats.rstd[first..first + group].fill((1.0 / (value + EPS).sqrt()) as f32);
                    }
                }
            }
        }
        stats
    }

    /// The gradients of `weight` and `bias`; that of `x`, and `more` of it from elsewhere, takes the
    /// place of `dy`.
    pub fn backward(
        &self,
        batch: usize,
        x: &[f32],
        dy: &mut [f32],
        more: Option<&[f32]>,
    ) -> (Vec<f32>, Vec<f32>) {
        let image = x.len() / batch;
        let c = self.weight.len();
        let mut sums = vec![[0f32; 2]; batch * c];
        dy.par_chunks_mut(image)
            .zip(x.par_chunks(image))
            .zip(sums.par_chunks_mut(c))
            .enumerate()
            .for_each(|(k, ((dy, x), sums))| {
                let stats = self.stats(x, false);
                if self.activation == Activation::Silu {
                    through_silu(self.isa, dy, x, &stats, self.weight, self.bias);
                }
                let more = more.map(|more| &more[k * image..][..image]);
                image_backward(self.isa, x, dy, &stats, self.weight, self.groups, more, sums);
            });
        let (mut dweight, mut dbias) = (vec![0f32; c], vec![0f32; c]);
        for sums in sums.chunks(c) {
            for (i, [weight, bias]) in sums.iter().enumerate() {
                dweight[i] += weight;
                dbias[i] += bias;
            }
        }
        (dweight, dbias)
    }
}

simd_fn! {
    /// `y = silu(z)`, or without the activation, of the normalised `z`.
    fn normalize<S>(
        y: &mut [f32],
        x: &[f32],
        stats: &Stats,
        weight: &[f32],
        bias: &[f32],
        silu: bool,
    ) {
        let c = weight.len();
        let (mean, scale) = (&stats.mean, stats.scale(weight));
        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            for ((((y, x), mean), scale), bias) in
                y.iter_mut().zip(x).zip(mean).zip(&scale).zip(bias)
            {
                let z = (x - mean) * scale + bias;
                *y = if silu { z * sigmoid(z) } else { z };
            }
        }
    }
}

simd_fn! {
    /// From the gradient of `silu(z)` to that of `z`, where `z` is the normalised `x`.
    fn through_silu<S>(
        dz: &mut [f32], x: &[f32], stats: &Stats, weight: &[f32], bias: &[f32],
    ) {
        let c = weight.len();
        let (mean, scale) = (&stats.mean, stats.scale(weight));
        for (dz, x) in dz.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            for ((((dz, x), mean), scale), bias) in
                dz.iter_mut().zip(x).zip(mean).zip(&scale).zip(bias)
            {
                let z = (x - mean) * scale + bias;
                let s = sigmoid(z);
                *dz *= s * (1.0 + z * (1.0 - s));
            }
        }
    }
}

simd_fn! {
    /// From `dz` to `dx` and `more` of it, in its place; and the sums over pixels that are the
    /// gradients of `weight` and `bias`.
    fn image_backward<S>(
        x: &[f32],
        dz: &mut [f32],
        stats: &Stats,
        weight: &[f32],
        groups: usize,
        more: Option<&[f32]>,
        sums: &mut [[f32; 2]],
    ) {
        let c = weight.len();
        let Stats { mean, rstd } = stats;
        // Sums in short runs, as in `span_sums`.
        let mut totals = vec![0f64; 2 * c];
        let mut run = vec![0f32; 2 * c];
        for (dz, x) in dz.chunks(RUN * c).zip(x.chunks(RUN * c)) {
            run.fill(0.0);
            let (sum_n, sum) = run.split_at_mut(c);
            for (dz, x) in dz.chunks_exact(c).zip(x.chunks_exact(c)) {
                for i in 0..c {
                    sum_n[i] += dz[i] * (x[i] - mean[i]);
                    sum[i] += dz[i];
                }
            }
            totals.iter_mut().zip(&run).for_each(|(total, run)| *total += f64::from(*run));
        }
        for i in 0..c {
            sums[i] = [totals[i] as f32 * rstd[i], totals[c + i] as f32];
        }
        // dx = rstd (weight dz - mean(weight dz) - n mean(weight dz n)), means over the group, with
        // n = (x - mean) rstd: a sum of dz, x and 1, each times a factor of its channel.
        let group = c / groups;
        let count = (x.len() / groups) as f32;
        let [mut by_dz, mut by_x, mut constant] = [vec![0f32; c], vec![0f32; c], vec![0f32; c]];
        for first in (0..c).step_by(group) {
            let channels = first..first + group;
            let weighted =
                |k: usize| channels.clone().map(|i| sums[i][k] * weight[i]).sum::<f32>() / count;
            let (mean_n, mean_dz) = (weighted(0), weighted(1));
            for i in channels {
                by_dz[i] = rstd[i] * weight[i];
                by_x[i] = -rstd[i] * rstd[i] * mean_n;
                constant[i] = -rstd[i] * mean_dz;
            }
        }
        for (k, (dz, x)) in dz.chunks_exact_mut(c).zip(x.chunks_exact(c)).enumerate() {
            for i in 0..c {
                dz[i] = by_dz[i] * dz[i] + by_x[i] * (x[i] - mean[i]) + constant[i];
            }
            if let Some(more) = more {
                dz.iter_mut().zip(&more[k * c..]).for_each(|(dx, more)| *dx += more);
            }
        }
    }
}

/// Mean and 1 / standard deviation of each channel's group.
struct Stats {
    mean: Vec<f32>,
    rstd: Vec<f32>,
}

impl Stats {
    /// What each channel's distance from the mean is multiplied with. The mean is taken off before:
    /// as a part of the bias, a large one would cancel out with a loss.
    #[inline(always)]
    fn scale(&self, weight: &[f32]) -> Vec<f32> {
        weight.iter().zip(&self.rstd).map(|(w, r)| w * r).collect()
    }
}

simd_fn! {
    /// Sums over a span's pixels, for each channel, of the distances from its mean or their squares.
    fn span_sums<S>(sums: &mut [f64], x: &[f32], mean: &[f32], squares: bool) {
        let c = mean.len();
        sums.fill(0.0);
        // Short runs in f32, which vectorise, then f64.
        let mut run = vec![0f32; c];
        for pixels in x.chunks(RUN * c) {
            run.fill(0.0);
            for x in pixels.chunks_exact(c) {
                for ((run, x), mean) in run.iter_mut().zip(x).zip(mean) {
                    let x = x - mean;
                    *run += if squares { x * x } else { x };
                }
            }
            sums.iter_mut().zip(&run).for_each(|(sum, run)| *sum += f64::from(*run));
        }
    }
}

struct GroupNorm {
    isa: Isa,
    groups: usize,
    activation: Activation,
}

impl GroupNorm {
    fn with<'a>(&self, weight: &'a [f32], bias: &'a [f32]) -> Normalization<'a> {
        let Self { isa, groups, activation } = *self;
        Normalization { isa, groups, activation, weight, bias }
    }
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, ..) = x_layout.shape().dims4()?;
        let x = contiguous(x, x_layout)?;
        let norm = self.with(contiguous(weight, weight_layout)?, contiguous(bias, bias_layout)?);
        let mut y = vec![0f32; x.len()];
        norm.forward(batch, x, &mut y);
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (batch, _, _, c) = x.dims4()?;
        let dy = dy.contiguous()?;
        let (dx, dweight, dbias) = with_values([x, weight, bias, &dy], |[x, weight, bias, dy]| {
            let mut dx = dy.to_vec();
            let (dweight, dbias) = self.with(weight, bias).backward(batch, x, &mut dx, None);
            Ok((dx, dweight, dbias))
        })?;
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dweight, c, device)?),
            Some(Tensor::from_vec(dbias, c, device)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::agrees_within;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn kernel_agrees_with_its_composition(
            (batch, h, w) in (1usize..6, 1usize..12, 1usize..12),
            (groups, group) in (1usize..9, 1usize..5),
            silu: bool,
            mean in prop_oneof![Just(0f64), Just(30.0)],
        ) {
            // A group of one value has variance 0 and a gradient that is all rounding.
            prop_assume!(h * w * group > 3);
            let c = groups * group;
            let activation = if silu { Activation::Silu } else { Activation::None };
            for isa in Isa::available() {
                // With a mean, f32 cannot hold `x` itself better than to 2e-6 of its deviation.
                agrees_within(
                    if mean == 0.0 { 2e-6 } else { 1e-5 },
                    &[vec![batch, h, w, c], vec![c], vec![c]],
                    |v| {
                        let op = GroupNorm { isa, groups, activation };
                        (&v[0] + mean)?.apply_op3(&v[1], &v[2], op)
                    },
                    |v| composed(&(&v[0] + mean)?, groups, &v[1], &v[2], activation),
                );
            }
        }
    }
}
