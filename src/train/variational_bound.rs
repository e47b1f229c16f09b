//! The variational bound of a network that learns the variance. Nichol and Dhariwal 2021, section 3.1; the variance is
//! that of equation 15, and the gradient of the mean is stopped, as in their section 3.1.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::objective::Noised;
use crate::error::{Result, check_dims};
use crate::process::bound::{decoder, divergence};
use crate::process::learned::LogVariances;

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
