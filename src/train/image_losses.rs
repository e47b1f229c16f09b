//! The loss of each image of an update. An [`Objective`] computes the loss of a batch, so it is evaluated for one image
//! after the other. The order of the sums, and thus their rounding, is not that of the batch.

use candle_core::{DType, Device, Tensor};

use super::objective::{Noised, Objective};
use crate::denoiser::Output;
use crate::error::Result;

/// The losses of the images of an update, which may still be on the device.
#[derive(Debug, Clone)]
pub(super) struct ImageLosses {
    /// The timesteps (batch).
    pub t: Tensor,
    /// The loss of each image, weighted for the batch: their sum is the loss of the update, except for rounding.
    pub losses: Tensor,
    /// The weight of each image.
    pub weights: Vec<f64>,
    /// Number of timesteps of the process.
    pub timesteps: usize,
}

/// The loss of an image.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImageLoss {
    pub t: u32,
    /// The loss before weighting.
    pub loss: f32,
    pub weight: f64,
}

impl ImageLosses {
    /// Reads the losses. Waits for the device.
    pub fn read(&self) -> Result<Vec<ImageLoss>> {
        let on_cpu = |x: &Tensor| x.to_device(&Device::Cpu);
        let t = on_cpu(&self.t)?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        let losses = on_cpu(&self.losses)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let batch = losses.len() as f64;
        let images = t.into_iter().zip(losses).zip(&self.weights);
        Ok(images
            .map(|((t, loss), &weight)| ImageLoss {
                t,
                loss: (loss * batch / weight) as f32,
                weight,
            })
            .collect())
    }
}

/// The sums of the losses of each quartile of the timesteps.
#[derive(Debug, Default)]
pub(super) struct Quartiles([WeightedSum; 4]);

/// A sum of weighted losses, and the sum of their weights.
#[derive(Debug, Default)]
struct WeightedSum {
    losses: f64,
    weights: f64,
}

impl Quartiles {
    /// Adds the losses of an update. Waits for the device.
    pub fn add(&mut self, images: &ImageLosses) -> Result<()> {
        for ImageLoss { t, loss, weight } in images.read()? {
            let quartile = 4 * t as usize / images.timesteps.max(1);
            if let Some(sum) = self.0.get_mut(quartile) {
                sum.losses += weight * f64::from(loss);
                sum.weights += weight;
            }
        }
        Ok(())
    }

    /// Returns the mean loss of each quartile, weighted as if the timesteps were uniform.
    pub fn means(&self) -> [Option<f32>; 4] {
        let mean =
            |sum: &WeightedSum| (sum.weights > 0.0).then(|| (sum.losses / sum.weights) as f32);
        self.0.each_ref().map(mean)
    }
}

/// Evaluates the objective for each image, and multiplies its loss and its gradient by its weight. Returns the losses
/// (batch) and the gradient, both weighted for the batch.
///
/// # Errors
/// Returns the errors of the objective.
pub(super) fn evaluate(
    objective: &dyn Objective,
    batch: &Noised<'_>,
    output: &Output,
    weights: &[f64],
) -> Result<(Tensor, Output)> {
    let (mut losses, mut gradients, mut variances) = (Vec::new(), Vec::new(), Vec::new());
    for (k, weight) in weights.iter().enumerate() {
        let of_image = |x: &Tensor| x.narrow(0, k, 1);
        let image = Noised {
            x_0: of_image(&batch.x_0)?,
            eps: of_image(&batch.eps)?,
            t: of_image(&batch.t)?,
            x_t: of_image(&batch.x_t)?,
            classes: batch.classes.as_ref().map(of_image).transpose()?,
            share: batch.share * weight / weights.len() as f64,
            gradient_scale: batch.gradient_scale.clone(),
            ..*batch
        };
        let output = Output {
            prediction: of_image(&output.prediction)?,
            variance: output.variance.as_ref().map(of_image).transpose()?,
        };
        let (loss, gradient) = objective.loss(&image, &output)?;
        losses.push(loss);
        gradients.push(gradient.prediction);
        variances.extend(gradient.variance);
    }
    let mut gradient = Output::new(Tensor::cat(&gradients, 0)?);
    if !variances.is_empty() {
        gradient = gradient.with_variance(Tensor::cat(&variances, 0)?);
    }
    Ok((Tensor::stack(&losses, 0)?, gradient))
}
