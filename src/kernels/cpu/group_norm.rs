use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::elementwise::sigmoid;
use super::simd::{Isa, Simd, for_channels, simd_fn};
use super::values::{contiguous, on_cpu_in_f32, with_values, zeros};

/// The activation after a normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// The identity.
    None,
    /// `x / (1 + exp(-x))`.
    Silu,
}

/// Added to the variance, as in PyTorch.
pub(crate) const EPS: f64 = 1e-5;

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

/// A normalisation on the CPU: one image at a time, whose passes then find it in the cache. Statistics
/// are kept for the backward pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normalization<'a> {
    pub isa: Isa,
    pub groups: usize,
    pub activation: Activation,
    pub weight: &'a [f32],
    pub bias: &'a [f32],
}

impl Normalization<'_> {
    /// `y` from `x`, both `batch` images, whose statistics are given back.
    pub fn forward(&self, batch: usize, x: &[f32], y: &mut [f32]) -> Vec<Stats> {
        // Fewer images than threads: their pixels are shared as well.
        let shared = batch < rayon::current_num_threads();
        let image = x.len() / batch;
        let images = y.par_chunks_mut(image).zip(x.par_chunks(image));
        images
            .map(|(y, x)| {
                let stats = self.image_stats(x, shared);
                self.normalize(x, &stats, y, shared);
                stats
            })
            .collect()
    }

    /// `y` again.
    pub fn forward_again(&self, x: &[f32], stats: &[Stats], y: &mut [f32]) {
        let image = x.len() / stats.len();
        let images = y.par_chunks_mut(image).zip(x.par_chunks(image)).zip(stats);
        images.for_each(|((y, x), stats)| self.normalize(x, stats, y, false));
    }

    /// The gradients of `weight` and `bias`; that of `x`, and `more` of it from elsewhere, takes the
    /// place of `dy`.
    pub fn backward(
        &self,
        x: &[f32],
        stats: &[Stats],
        dy: &mut [f32],
        more: Option<&[f32]>,
    ) -> (Vec<f32>, Vec<f32>) {
        let image = x.len() / stats.len();
        let c = self.weight.len();
        let mut sums = vec![[0f64; 2]; stats.len() * c];
        dy.par_chunks_mut(image)
            .zip(x.par_chunks(image))
            .zip(sums.par_chunks_mut(c))
            .zip(stats)
            .enumerate()
            .for_each(|(k, (((dy, x), sums), stats))| {
                let affine = Affine::new(stats, self.weight, self.bias);
                let silu = self.activation == Activation::Silu;
                gradient_sums(self.isa, dy, x, &affine, silu, sums);
                for (sums, rstd) in sums.iter_mut().zip(&stats.rstd) {
                    sums[0] *= f64::from(*rstd);
                }
                let more = more.map(|more| &more[k * image..][..image]);
                let factors = self.factors(stats, sums, image / c);
                input_gradient(self.isa, dy, x, &stats.mean, &factors, more);
            });
        let (mut dweight, mut dbias) = (vec![0f64; c], vec![0f64; c]);
        for sums in sums.chunks(c) {
            for (i, [weight, bias]) in sums.iter().enumerate() {
                dweight[i] += weight;
                dbias[i] += bias;
            }
        }
        let rounded = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
        (rounded(dweight), rounded(dbias))
    }

    /// dx = rstd (weight dz - mean(weight dz) - n mean(weight dz n)), means over the group, with n = (x -
    /// mean) rstd: a sum of dz, x - mean and 1, each times a factor of its channel. From the gradients of
    /// weight and bias.
    fn factors(&self, stats: &Stats, sums: &[[f64; 2]], pixels: usize) -> [Vec<f32>; 3] {
        let c = self.weight.len();
        let group = c / self.groups;
        let values = (pixels * group) as f64;
        let mut factors = [vec![0f32; c], vec![0f32; c], vec![0f32; c]];
        for first in (0..c).step_by(group) {
            let channels = first..first + group;
            let mean = |k: usize| {
                let weighted = channels.clone().map(|i| sums[i][k] * f64::from(self.weight[i]));
                weighted.sum::<f64>() / values
            };
            let (mean_n, mean_dz) = (mean(0), mean(1));
            for i in channels.clone() {
                let rstd = f64::from(stats.rstd[i]);
                factors[0][i] = stats.rstd[i] * self.weight[i];
                factors[1][i] = (-rstd * rstd * mean_n) as f32;
                factors[2][i] = (-rstd * mean_dz) as f32;
            }
        }
        factors
    }

    /// Of each image.
    fn stats(&self, batch: usize, x: &[f32]) -> Vec<Stats> {
        x.par_chunks(x.len() / batch).map(|x| self.image_stats(x, false)).collect()
    }

    fn normalize(&self, x: &[f32], stats: &Stats, y: &mut [f32], shared: bool) {
        let span = SPAN * self.weight.len();
        let affine = Affine::new(stats, self.weight, self.bias);
        let silu = self.activation == Activation::Silu;
        let spans = y.par_chunks_mut(span).zip(x.par_chunks(span));
        spans.with_min_len(least(shared)).for_each(|(y, x)| {
            normalize(self.isa, y, x, &affine, silu);
        });
    }

    /// Of an image; its sums are shared by the threads where `shared`. In either case they are taken
    /// in the same order.
    fn image_stats(&self, x: &[f32], shared: bool) -> Stats {
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
}

/// What is done to each channel `x` of an image: `z = (x - mean) scale + bias`. The mean is taken off
/// first: as a part of the bias, a large one would cancel out with a loss.
struct Affine<'a> {
    mean: &'a [f32],
    scale: Vec<f32>,
    bias: &'a [f32],
}

impl<'a> Affine<'a> {
    fn new(stats: &'a Stats, weight: &[f32], bias: &'a [f32]) -> Self {
        let scale: Vec<f32> = weight.iter().zip(&stats.rstd).map(|(w, r)| w * r).collect();
        assert!(stats.mean.len() == scale.len() && bias.len() == scale.len());
        Self { mean: &stats.mean, scale, bias }
    }

    fn channels(&self) -> usize {
        self.scale.len()
    }

    /// The distances from the mean of the channels from `first` on, and those normalised.
    ///
    /// # Safety
    /// There must be a vector of channels from `first` on.
    #[inline(always)]
    unsafe fn apply<S: Simd>(&self, x: S, first: usize) -> (S, S) {
        // SAFETY: all three have as many channels.
        unsafe {
            let n = x.sub(S::load(self.mean.as_ptr().add(first)));
            let scale = S::load(self.scale.as_ptr().add(first));
            (n, n.mul(scale).add(S::load(self.bias.as_ptr().add(first))))
        }
    }
}

simd_fn! {
    /// `y = silu(z)`, or without the activation, of the normalised `z`.
    fn normalize<S>(y: &mut [f32], x: &[f32], affine: &Affine<'_>, silu: bool) {
        let c = affine.channels();
        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            let (y, x) = (y.as_mut_ptr(), x.as_ptr());
            // SAFETY: `y` and `x` are a pixel's channels.
            unsafe {
                for_channels!(i in c, normalize_channels::<S>(y, x, affine, i, silu));
            }
        }
    }
}

/// # Safety
/// There must be a vector of channels from `first` on.
#[inline(always)]
unsafe fn normalize_channels<S: Simd>(
    y: *mut f32,
    x: *const f32,
    affine: &Affine<'_>,
    first: usize,
    silu: bool,
) {
    // SAFETY: passed on.
    unsafe {
        let (_, z) = affine.apply(S::load(x.add(first)), first);
        let value = if silu { z.mul(sigmoid(z)) } else { z };
        value.store(y.add(first));
    }
}

simd_fn! {
    /// From the gradient of `silu(z)`, if it is one, to that of `z`, in its place; and its sums over an
    /// image's pixels, times the distance from the mean and plain.
    fn gradient_sums<S>(
        dz: &mut [f32], x: &[f32], affine: &Affine<'_>, silu: bool, sums: &mut [[f64; 2]],
    ) {
        let c = affine.channels();
        sums.fill([0.0; 2]);
        // Short runs in f32, then f64.
        let mut run = vec![0f32; 2 * c];
        for (dz, x) in dz.chunks_mut(RUN * c).zip(x.chunks(RUN * c)) {
            run.fill(0.0);
            for (dz, x) in dz.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                let (dz, x, run) = (dz.as_mut_ptr(), x.as_ptr(), run.as_mut_ptr());
                // SAFETY: `dz` and `x` are a pixel's channels, `run` twice as many values.
                unsafe {
                    for_channels!(i in c, add_gradient::<S>(dz, x, affine, i, silu, run));
                }
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                sums[0] += f64::from(run[i]);
                sums[1] += f64::from(run[c + i]);
            }
        }
    }
}

/// # Safety
/// There must be a vector of channels from `first` on.
#[inline(always)]
unsafe fn add_gradient<S: Simd>(
    dz: *mut f32,
    x: *const f32,
    affine: &Affine<'_>,
    first: usize,
    silu: bool,
    run: *mut f32,
) {
    // SAFETY: passed on.
    unsafe {
        let (n, z) = affine.apply(S::load(x.add(first)), first);
        let mut d = S::load(dz.add(first));
        if silu {
            let one = S::splat(1.0);
            let s = sigmoid(z);
            d = d.mul(s.mul(one.add(z.mul(one.sub(s)))));
            d.store(dz.add(first));
        }
        let (by_n, plain) = (run.add(first), run.add(affine.channels() + first));
        d.mul_add(n, S::load(by_n)).store(by_n);
        d.add(S::load(plain)).store(plain);
    }
}

simd_fn! {
    /// From `dz` to `dx` and `more` of it, in its place: `dz`, the distance of `x` from the mean and 1,
    /// each times a factor of the channel.
    fn input_gradient<S>(
        dz: &mut [f32], x: &[f32], mean: &[f32], factors: &[Vec<f32>; 3], more: Option<&[f32]>,
    ) {
        let c = mean.len();
        assert!(factors.iter().all(|factors| factors.len() == c));
        assert!(more.is_none_or(|more| more.len() == dz.len()));
        let factors = [&factors[0], &factors[1], &factors[2]].map(|values| values.as_ptr());
        for (pixel, (dz, x)) in dz.chunks_exact_mut(c).zip(x.chunks_exact(c)).enumerate() {
            let more = more.map(|more| more[pixel * c..].as_ptr());
            let (dz, x, mean) = (dz.as_mut_ptr(), x.as_ptr(), mean.as_ptr());
            // SAFETY: all have a pixel's channels.
            unsafe {
                for_channels!(i in c, input_channels::<S>(dz, x, mean, factors, more, i));
            }
        }
    }
}

/// # Safety
/// There must be a vector of channels from `first` on.
#[inline(always)]
unsafe fn input_channels<S: Simd>(
    dz: *mut f32,
    x: *const f32,
    mean: *const f32,
    factors: [*const f32; 3],
    more: Option<*const f32>,
    first: usize,
) {
    // SAFETY: passed on.
    unsafe {
        let [by_dz, by_n, constant] = [
            S::load(factors[0].add(first)),
            S::load(factors[1].add(first)),
            S::load(factors[2].add(first)),
        ];
        let n = S::load(x.add(first)).sub(S::load(mean.add(first)));
        let mut dx = by_dz.mul_add(S::load(dz.add(first)), by_n.mul_add(n, constant));
        if let Some(more) = more {
            dx = dx.add(S::load(more.add(first)));
        }
        dx.store(dz.add(first));
    }
}

/// Mean and 1 / standard deviation of each channel's group, in an image.
#[derive(Debug)]
pub(crate) struct Stats {
    mean: Vec<f32>,
    rstd: Vec<f32>,
}

simd_fn! {
    /// Sums over a span's pixels, for each channel, of the distances from its mean or their squares.
    fn span_sums<S>(sums: &mut [f64], x: &[f32], mean: &[f32], squares: bool) {
        let c = mean.len();
        sums.fill(0.0);
        // Short runs in f32, then f64.
        let mut run = vec![0f32; c];
        for x in x.chunks(RUN * c) {
            run.fill(0.0);
            for x in x.chunks_exact(c) {
                let (run, x, mean) = (run.as_mut_ptr(), x.as_ptr(), mean.as_ptr());
                // SAFETY: all have a pixel's channels.
                unsafe {
                    for_channels!(i in c, add_distances::<S>(run.add(i), x.add(i), mean.add(i), squares));
                }
            }
            sums.iter_mut().zip(&run).for_each(|(sum, run)| *sum += f64::from(*run));
        }
    }
}

/// # Safety
/// Each must be good for a vector.
#[inline(always)]
unsafe fn add_distances<S: Simd>(sums: *mut f32, x: *const f32, mean: *const f32, squares: bool) {
    // SAFETY: passed on.
    unsafe {
        let (sum, n) = (S::load(sums), S::load(x).sub(S::load(mean)));
        let sum = if squares { n.mul_add(n, sum) } else { sum.add(n) };
        sum.store(sums);
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
        let mut y = zeros(x.len())?;
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
            let norm = self.with(weight, bias);
            let (dweight, dbias) = norm.backward(x, &norm.stats(batch, x), &mut dx, None);
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
    use super::*;
    use crate::kernels::tests::{self as rounding, Normals, in_each_isa, value_and_gradients};
    use crate::random_inputs::inputs;
    use candle_core::DType;
    use proptest::prelude::*;

    fn agrees_with_its_composition(
        (batch, h, w): (usize, usize, usize),
        (groups, group): (usize, usize),
        activation: Activation,
        mean: f64,
        normals: Normals,
    ) {
        let dims = [batch, h, w, groups * group];
        let x = (normals.tensor(0, &dims) + mean).unwrap();
        let [weight, bias] = [1, 2].map(|k| normals.tensor(k, &dims[3..]));
        let norm =
            rounding::Normalization { groups, weight: &weight, bias: &bias, activation, run: RUN };
        let bounds = norm.bounds(&x, &normals.gradient(&dims)).unwrap();
        let (inputs, dy) = ([x, weight, bias], |y: &[usize]| normals.gradient(y));
        let exact = value_and_gradients(DType::F64, &inputs, dy, |v| {
            composed(&v[0], groups, &v[1], &v[2], activation)
        });
        let kernel =
            |isa, v: &[Tensor]| v[0].apply_op3(&v[1], &v[2], GroupNorm { isa, groups, activation });
        in_each_isa(&inputs, dy, kernel, &exact.unwrap(), &bounds);
    }

    /// They have a deviation of 0, and gradients that are nothing but rounding.
    #[test]
    fn groups_of_one_value_agree() {
        for activation in [Activation::None, Activation::Silu] {
            for mean in [0.0, 30.0] {
                agrees_with_its_composition((3, 1, 1), (5, 1), activation, mean, Normals(5));
            }
        }
    }

    /// The weight's gradient nearly cancels. The error of the mean, times the sum of the gradients of all outputs,
    /// is more than 4e-5 of it.
    #[test]
    fn a_gradient_that_nearly_cancels_agrees() {
        agrees_with_its_composition((3, 3, 6), (1, 1), Activation::None, 30.0, Normals(34153));
    }

    proptest! {
        #![proptest_config(inputs(64))]

        #[test]
        fn kernel_agrees_with_its_composition(
            (batch, h, w) in (1usize..6, 1usize..12, 1usize..12),
            (groups, group) in (1usize..9, 1usize..5),
            silu: bool,
            mean in prop_oneof![Just(0f64), Just(30.0)],
            seed: u64,
        ) {
            let activation = if silu { Activation::Silu } else { Activation::None };
            agrees_with_its_composition((batch, h, w), (groups, group), activation, mean, Normals(seed));
        }
    }
}
