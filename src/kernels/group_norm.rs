use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::values::{contiguous, on_cpu_in_f32, with_values};

/// What follows a normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    None,
    Silu,
}

/// Added to the variance, as in PyTorch.
const EPS: f64 = 1e-5;

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
        let op = GroupNorm { groups, activation };
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

/// On the CPU: one image at a time, whose passes then find it in the cache. Nothing is kept for the
/// backward pass, which computes the statistics again.
struct GroupNorm {
    groups: usize,
    activation: Activation,
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
        let (_, h, w, c) = x_layout.shape().dims4()?;
        let x = contiguous(x, x_layout)?;
        let weight = contiguous(weight, weight_layout)?;
        let bias = contiguous(bias, bias_layout)?;
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(h * w * c).zip(x.par_chunks(h * w * c)).for_each(|(y, x)| {
            let stats = Stats::of(x, c, self.groups);
            // z = scale x + shift
            let scale: Vec<f32> = weight.iter().zip(&stats.rstd).map(|(w, r)| w * r).collect();
            let shift: Vec<f32> =
                bias.iter().zip(&scale).zip(&stats.mean).map(|((b, s), m)| b - s * m).collect();
            for (y, x) in y.chunks_mut(c).zip(x.chunks(c)) {
                for i in 0..c {
                    y[i] = scale[i] * x[i] + shift[i];
                }
                if self.activation == Activation::Silu {
                    y.iter_mut().for_each(|z| *z *= sigmoid(*z));
                }
            }
        });
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
        let (_, h, w, c) = x.dims4()?;
        let dy = dy.contiguous()?;
        let (dx, dweight, dbias) = with_values([x, weight, bias, &dy], |[x, weight, bias, dy]| {
            let mut dx = vec![0f32; x.len()];
            let image = h * w * c;
            let sums: Vec<_> = dx
                .par_chunks_mut(image)
                .zip(x.par_chunks(image).zip(dy.par_chunks(image)))
                .map(|(dx, (x, dy))| self.image_backward(dx, x, dy, weight, bias))
                .collect();
            let (mut dweight, mut dbias) = (vec![0f32; c], vec![0f32; c]);
            for (weight, bias) in sums {
                dweight.iter_mut().zip(weight).for_each(|(sum, d)| *sum += d);
                dbias.iter_mut().zip(bias).for_each(|(sum, d)| *sum += d);
            }
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

impl GroupNorm {
    /// Fills `dx`; gives the image's part of the gradients of weight and bias.
    fn image_backward(
        &self,
        dx: &mut [f32],
        x: &[f32],
        dy: &[f32],
        weight: &[f32],
        bias: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let c = weight.len();
        let Stats { mean, rstd } = Stats::of(x, c, self.groups);
        // With n = (x - mean) rstd and z = weight n + bias: dz, its sum and that of dz n.
        let (mut sum, mut sum_n) = (vec![0f32; c], vec![0f32; c]);
        for ((dz, x), dy) in dx.chunks_mut(c).zip(x.chunks(c)).zip(dy.chunks(c)) {
            dz.copy_from_slice(dy);
            if self.activation == Activation::Silu {
                for i in 0..c {
                    let z = weight[i] * (x[i] - mean[i]) * rstd[i] + bias[i];
                    let s = sigmoid(z);
                    dz[i] *= s * (1.0 + z * (1.0 - s));
                }
            }
            for i in 0..c {
                sum[i] += dz[i];
                sum_n[i] += dz[i] * (x[i] - mean[i]) * rstd[i];
            }
        }
        // dx = rstd (weight dz - mean(weight dz) - n mean(weight dz n)), means over the group.
        let group = c / self.groups;
        let count = (x.len() / self.groups) as f32;
        let group_mean = |sum: &[f32]| -> Vec<f32> {
            let weighted: Vec<f32> = sum.iter().zip(weight).map(|(s, w)| s * w).collect();
            weighted
                .chunks(group)
                .flat_map(|g| std::iter::repeat_n(g.iter().sum::<f32>() / count, group))
                .collect()
        };
        let (a, b) = (group_mean(&sum), group_mean(&sum_n));
        for (dz, x) in dx.chunks_mut(c).zip(x.chunks(c)) {
            for i in 0..c {
                let n = (x[i] - mean[i]) * rstd[i];
                dz[i] = rstd[i] * (weight[i] * dz[i] - a[i] - n * b[i]);
            }
        }
        (sum_n, sum)
    }
}

/// Mean and 1 / standard deviation of each channel's group.
struct Stats {
    mean: Vec<f32>,
    rstd: Vec<f32>,
}

impl Stats {
    fn of(x: &[f32], c: usize, groups: usize) -> Self {
        let group = c / groups;
        let count = (x.len() / groups) as f64;
        let per_channel = |f: &dyn Fn(f64) -> f64, sums: Vec<f64>| -> Vec<f32> {
            sums.chunks(group)
                .flat_map(|g| std::iter::repeat_n(f(g.iter().sum::<f64>() / count) as f32, group))
                .collect()
        };
        let mean = per_channel(&|mean| mean, sums(x, c, |x, _| x));
        // About the mean: the difference of two large sums would lose what it is after.
        let squares = sums(x, c, |x, i| (x - mean[i]) * (x - mean[i]));
        let rstd = per_channel(&|variance| 1.0 / (variance + EPS).sqrt(), squares);
        Self { mean, rstd }
    }
}

/// Sums over all pixels for each channel: short runs in f32, which vectorise, then f64.
fn sums(x: &[f32], c: usize, f: impl Fn(f32, usize) -> f32) -> Vec<f64> {
    let mut total = vec![0f64; c];
    let mut run = vec![0f32; c];
    for pixels in x.chunks(32 * c) {
        run.fill(0.0);
        for x in pixels.chunks(c) {
            for i in 0..c {
                run[i] += f(x[i], i);
            }
        }
        total.iter_mut().zip(&run).for_each(|(total, run)| *total += f64::from(*run));
    }
    total
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

#[cfg(test)]
mod tests {
    use super::super::tests::agrees;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn kernel_agrees_with_its_composition(
            (batch, h, w) in (1usize..6, 1usize..12, 1usize..12),
            (groups, group) in (1usize..9, 1usize..5),
            silu: bool,
        ) {
            // A group of one value has variance 0 and a gradient that is all rounding.
            prop_assume!(h * w * group > 3);
            let c = groups * group;
            let activation = if silu { Activation::Silu } else { Activation::None };
            agrees(
                &[vec![batch, h, w, c], vec![c], vec![c]],
                |v| group_norm(&v[0], groups, &v[1], &v[2], activation),
                |v| composed(&v[0], groups, &v[1], &v[2], activation),
            );
        }
    }
}
