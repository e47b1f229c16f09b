//! The variational bound of a network that learns the variance. Nichol and Dhariwal 2021, section 3.1; the variance is
//! that of equation 15, and the gradient of the mean is stopped, as in their section 3.1.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::objective::Noised;
use crate::error::{Result, check_dims};
use crate::process::learned::LogVariances;

/// Half of the width of a pixel's bin, with 256 values from -1 to 1.
const HALF_BIN: f64 = 1.0 / 255.0;

/// Images at or beyond these values belong to the first and last bin, which are infinite.
const EDGE: f64 = 0.999;

/// Computes `factor` times the variational bound in bits per value, and its gradient with respect to the `variance` of
/// the output. Both are weighted for the batch.
///
/// The bound is the sum of the terms of all `T` timesteps, without that of `x_T`, which no weight changes. `T` times
/// the mean of the terms at uniform timesteps estimates it.
pub(super) fn weighted(
    batch: &Noised<'_>,
    prediction: &Tensor,
    variance: &Tensor,
    factor: f64,
) -> Result<(Tensor, Tensor)> {
    let dims = batch.x_0.dims();
    check_dims("the network's variance", variance.dims(), dims, "that of its input")?;
    let [x_0, x_t, output, v] =
        [&batch.x_0, &batch.x_t, prediction, variance].map(|x| -> Result<Vec<f64>> {
            let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            Ok(x.flatten_all()?.to_vec1()?)
        });
    let (x_0, x_t, output, v) = (x_0?, x_t?, output?, v?);
    let timesteps = batch.t.to_device(&Device::Cpu)?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    let schedule = batch.diffusion.schedule();
    let image = x_0.len() / timesteps.len().max(1);
    let images = timesteps.into_par_iter().enumerate().map(|(k, t)| {
        let bar = schedule.alpha_bar(t as usize)?;
        let before = t.checked_sub(1).map_or(Ok(1.0), |t| schedule.alpha_bar(t as usize))?;
        let [p, q] = batch.diffusion.x_0_factors(bar);
        let variances = LogVariances::of_training(schedule, t as usize)?;
        // The mean of q(x_{t-1} | x_t, x_0) depends on x_0 by this factor. Both means have the same x_t.
        let gain = before.sqrt() * (1.0 - bar / before) / (1.0 - bar);
        let (mut sum, mut slopes) = (0.0, Vec::with_capacity(image));
        for i in k * image..(k + 1) * image {
            let error = x_0[i] - (p * x_t[i] + q * output[i]);
            let log_variance = variances.at(v[i]);
            let (value, slope) = match t {
                0 => decoder(x_0[i], error, log_variance),
                _ => divergence(gain * error, variances.least, log_variance),
            };
            sum += value;
            slopes.push(slope * variances.slope());
        }
        Ok((sum, slopes))
    });
    let images: Vec<(f64, Vec<f64>)> = images.collect::<Result<_>>()?;
    let bits = schedule.steps() as f64 / (std::f64::consts::LN_2 * x_0.len() as f64);
    let loss = factor * bits * images.iter().map(|(sum, _)| sum).sum::<f64>();
    let slopes: Vec<f64> = images.into_iter().flat_map(|(_, slopes)| slopes).collect();
    let (dtype, device) = (variance.dtype(), variance.device());
    let place = |x: Tensor| x.to_dtype(dtype)?.to_device(device);
    let slopes = Tensor::from_vec(slopes, dims, &Device::Cpu)?;
    let loss = place(Tensor::new(loss, &Device::Cpu)?)?;
    batch.weighted(&loss, &place((slopes * (factor * bits))?)?)
}

/// Computes the divergence of the model's normal distribution from the posterior in nats, and its derivative with
/// respect to the model's logarithm of the variance. `distance` is that of their means.
fn divergence(distance: f64, log_posterior: f64, log_variance: f64) -> (f64, f64) {
    let ratio = libm::exp(log_posterior - log_variance);
    let square = distance * distance * libm::exp(-log_variance);
    let value = 0.5 * (log_variance - log_posterior - 1.0 + ratio + square);
    (value, 0.5 * (1.0 - ratio - square))
}

/// Computes the negative logarithm of the probability of a pixel's bin in nats, and its derivative with respect to the
/// logarithm of the variance. The mean is `x - error`. Ho et al. 2020, equation 13.
fn decoder(x: f64, error: f64, log_variance: f64) -> (f64, f64) {
    let inverse = libm::exp(-0.5 * log_variance);
    let a = if x < -EDGE { f64::NEG_INFINITY } else { (error - HALF_BIN) * inverse };
    let b = if x > EDGE { f64::INFINITY } else { (error + HALF_BIN) * inverse };
    // The distribution is symmetric. The tail on the left has small numbers instead of a difference from 1.
    let (a, b) = if a + b > 0.0 { (-b, -a) } else { (a, b) };
    let root = std::f64::consts::FRAC_1_SQRT_2;
    // The derivative of the bin's probability with respect to the logarithm is (a phi(a) - b phi(b)) / 2.
    let density = |z: f64, exponent: f64| {
        if z.is_infinite() {
            0.0
        } else {
            z * libm::exp(exponent) * root / std::f64::consts::PI.sqrt()
        }
    };
    if b >= 0.0 {
        let probability = 0.5 * (libm::erf(b * root) - libm::erf(a * root));
        let slope = 0.5 * (density(b, -0.5 * b * b) - density(a, -0.5 * a * a)) / probability;
        return (-libm::log(probability), slope);
    }
    // Both values without their common factor exp(-b² / 2), which may be 0 in f64.
    let fall = 0.5 * (b * b - a * a);
    let far = if a.is_infinite() { 0.0 } else { libm::exp(fall) * scaled_erfc(-a * root) };
    let probability = 0.5 * (scaled_erfc(-b * root) - far);
    let slope = 0.5 * (density(b, 0.0) - density(a, fall)) / probability;
    (0.5 * b * b - libm::log(probability), slope)
}

/// Computes `exp(x²) erfc(x)` for `x >= 0`.
fn scaled_erfc(x: f64) -> f64 {
    if x < 20.0 {
        return libm::exp(x * x) * libm::erfc(x);
    }
    // The asymptotic series, whose next term is less than 1e-12.
    let y = 1.0 / (2.0 * x * x);
    (1.0 - y * (1.0 - y * (3.0 - y * (15.0 - y * 105.0)))) / (x * std::f64::consts::PI.sqrt())
}
