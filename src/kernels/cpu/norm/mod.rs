//! GroupNorm, with the activation that follows it.

mod known;
pub(crate) mod modulated;
mod passes;

use rayon::prelude::*;

pub(crate) use self::known::Known;
#[cfg(test)]
pub(crate) use self::passes::RUN;
pub(crate) use self::passes::Stats;
use self::passes::{Affine, SPAN, gradient_sums, input_gradient, normalize, span_sums};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::op::activation::Activation;
use crate::kernels::op::norm::NormConfig;

/// Returns the minimum number of spans per task.
fn least(shared: bool) -> usize {
    if shared { 1 } else { usize::MAX }
}

/// A normalisation of channels-last maps. It processes one image at a time, which then stays in the cache.
/// The backward pass reads the statistics of the forward pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normalization<'a> {
    pub isa: Isa,
    pub config: NormConfig,
    pub weight: &'a [f32],
    pub bias: &'a [f32],
}

impl Normalization<'_> {
    fn silu(&self) -> bool {
        self.config.activation == Activation::Silu
    }

    /// Writes `y` from `x`, both `batch` images, and returns the statistics of each image.
    pub(crate) fn forward(&self, batch: usize, x: &[f32], y: &mut [f32]) -> Vec<Stats> {
        // If there are fewer images than threads, the threads divide the pixels of each image.
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

    /// Returns the normalisation with the statistics of [`forward`](Self::forward) or [`stats`](Self::stats).
    pub(crate) fn known(&self, stats: &[Stats]) -> Known {
        let mut known = Known::new(self.isa, self.silu(), self.weight.len());
        stats.iter().for_each(|stats| known.push(stats, self.weight, self.bias));
        known
    }

    /// Returns the gradients of `weight` and `bias`, and replaces `dy` by the gradient of `x` plus `more`.
    pub(crate) fn backward(
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
                let scale: Vec<f32> = stats.scale(self.weight).collect();
                let affine = Affine::new(&stats.mean, &scale, self.bias);
                let silu = self.silu();
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

    /// Computes the factors of dz, x - mean and 1 in the gradient of x, for each channel, from the gradients
    /// of weight and bias.
    ///
    /// dx = rstd (weight dz - mean(weight dz) - n mean(weight dz n)), with means over the group and n = (x -
    /// mean) rstd.
    fn factors(&self, stats: &Stats, sums: &[[f64; 2]], pixels: usize) -> [Vec<f32>; 3] {
        let c = self.weight.len();
        let group = c / self.config.groups;
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

    /// Computes the statistics of each image.
    pub(crate) fn stats(&self, batch: usize, x: &[f32]) -> Vec<Stats> {
        let shared = batch < rayon::current_num_threads();
        x.par_chunks(x.len() / batch).map(|x| self.image_stats(x, shared)).collect()
    }

    fn normalize(&self, x: &[f32], stats: &Stats, y: &mut [f32], shared: bool) {
        let span = SPAN * self.weight.len();
        let scale: Vec<f32> = stats.scale(self.weight).collect();
        let affine = Affine::new(&stats.mean, &scale, self.bias);
        let silu = self.silu();
        let spans = y.par_chunks_mut(span).zip(x.par_chunks(span));
        spans.with_min_len(least(shared)).for_each(|(y, x)| {
            normalize(self.isa, y, x, affine.channels(), &affine, silu);
        });
    }

    /// Computes the statistics of an image. If `shared`, the threads divide its sums. The order of the sums
    /// is the same in either case.
    fn image_stats(&self, x: &[f32], shared: bool) -> Stats {
        let c = self.weight.len();
        let group = c / self.config.groups;
        let count = (x.len() / self.config.groups) as f64;
        let mut stats = Stats { mean: vec![0f32; c], rstd: vec![0f32; c] };
        let mut sums = vec![0f64; x.len().div_ceil(SPAN * c) * c];
        // Squares about the mean, because the difference of two large sums would lose accuracy.
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
                        stats.rstd[first..first + group]
                            .fill((1.0 / (value + self.config.eps).sqrt()) as f32);
                    }
                }
            }
        }
        stats
    }
}
