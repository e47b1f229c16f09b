use std::fmt;

use candle_core::Tensor;

use super::weighting::Weighting;
use crate::backend::{self, Backend};
use crate::data::loader::Batch;
use crate::denoiser::Output;
use crate::error::Result;
use crate::kernels::op::loss::Loss;
use crate::process::diffusion::Diffusion;

/// The training objective: a loss function of the network's output.
pub trait Objective: fmt::Debug + Send + Sync {
    /// Computes the loss of the network's `output` for `batch`, a scalar, and its gradient with respect to each part of
    /// `output`.
    ///
    /// The loss is a mean over the images. Both results must be weighted for the batch, with [`Noised::mean_square`] or
    /// [`Noised::weighted`].
    ///
    /// If the loss of each image is needed, the objective is evaluated for one image after the other. With
    /// [`TimestepSampling::Importance`](super::TimestepSampling::Importance) the sums of these results replace those of
    /// the batch. With [`TrainConfig::loss_quartiles`](super::TrainConfig::loss_quartiles) they are only reported, so
    /// results must not depend on the number of calls.
    ///
    /// The call may run on any of the threads that share the work, so it must not wait for other threads, or hold a
    /// lock across tensor operations.
    ///
    /// # Errors
    /// Returns an error if an operation fails. An error ends the update.
    fn loss(&self, batch: &Noised<'_>, output: &Output) -> Result<(Tensor, Output)>;

    /// Returns whether an update with this objective may be captured as a CUDA graph.
    ///
    /// This is allowed if [`loss`](Self::loss) launches the same work for every batch of a shape, does not use
    /// [`Noised::classes`], and does not copy data to or from the device. The default is `false`.
    fn is_repeatable(&self) -> bool {
        false
    }
}

/// The noised images of an update, or of a part of it. All tensors have the shape (batch, ...) of `x_0`, except for `t`
/// and `classes`, which have the shape (batch).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Noised<'a> {
    /// The process.
    pub diffusion: &'a Diffusion,
    /// The images.
    pub x_0: Tensor,
    /// The noise.
    pub eps: Tensor,
    /// The timesteps.
    pub t: Tensor,
    /// The noised images, which are the input of the network.
    pub x_t: Tensor,
    /// The classes of the images, if they have any.
    pub classes: Option<Tensor>,
    /// The fraction of these images in the whole batch, from 0 to 1, multiplied by their weight.
    pub(super) share: f64,
    /// The factor of the loss's gradient, a scalar. `None` if gradients are not scaled.
    pub(super) gradient_scale: Option<Tensor>,
    pub(super) backend: &'static dyn Backend,
}

impl<'a> Noised<'a> {
    /// Adds the noise `eps` at the timesteps `t` to a whole batch.
    pub(super) fn new(
        diffusion: &'a Diffusion,
        batch: &Batch,
        t: &Tensor,
        eps: &Tensor,
    ) -> Result<Self> {
        let x_0 = &batch.images;
        Ok(Self {
            x_t: diffusion.q_sample(x_0, t, eps)?,
            classes: batch.classes.clone(),
            share: 1.0,
            gradient_scale: None,
            backend: backend::of(x_0),
            x_0: x_0.clone(),
            eps: eps.clone(),
            t: t.clone(),
            diffusion,
        })
    }
}

impl Noised<'_> {
    /// Computes the output that the network should have, as the process defines it.
    ///
    /// # Errors
    /// Returns the errors of [`Diffusion::target`].
    pub fn target(&self) -> Result<Tensor> {
        self.diffusion.target(&self.x_0, &self.t, &self.eps)
    }

    /// Computes the mean of `(output - target)²` and its gradient, weighted for the batch.
    ///
    /// # Errors
    /// Returns an error if the two do not have the same shape.
    pub fn mean_square(&self, output: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let scale = self.share / target.elem_count() as f64;
        self.backend.squared_error(output, target, scale, self.gradient_scale.as_ref())
    }

    /// Computes the mean of `weight (output - target)²` and its gradient, weighted for the batch.
    pub(super) fn weighted_mean_square(
        &self,
        output: &Tensor,
        target: &Tensor,
        weighting: Weighting,
    ) -> Result<(Tensor, Tensor)> {
        // The square of an error with the factor √weight, and its gradient with that factor once more. Every device has
        // kernels for both.
        let root = |bar: f64| self.weight(weighting, bar).sqrt();
        let mixed = |x: &Tensor, y: &Tensor, factors: &dyn Fn(f64) -> [f64; 2]| {
            self.backend.mix(x, y, &self.t, self.diffusion.rates(factors))
        };
        let error = mixed(output, target, &|bar| [root(bar), -root(bar)])?;
        let none = self.backend.combine(&error, 0.0, &error, 0.0)?;
        let (loss, gradient) = self.mean_square(&error, &none)?;
        Ok((loss, mixed(&gradient, &gradient, &|bar| [root(bar), 0.0])?))
    }

    /// Computes the mean of `weight loss(output - target)` and its gradient, weighted for the batch.
    pub(super) fn mean_loss(
        &self,
        loss: Loss,
        output: &Tensor,
        target: &Tensor,
        weighting: Weighting,
    ) -> Result<(Tensor, Tensor)> {
        let error = self.backend.combine(output, 1.0, target, -1.0)?;
        let ones = Tensor::ones(self.t.dims(), error.dtype(), error.device())?;
        let factors = |bar| [self.weight(weighting, bar), 0.0];
        let weights = self.backend.mix(&ones, &ones, &self.t, self.diffusion.rates(&factors))?;
        let scale = self.share / target.elem_count() as f64;
        self.backend.loss(loss, [&error, &weights], scale, self.gradient_scale.as_ref())
    }

    fn weight(&self, weighting: Weighting, alpha_bar: f64) -> f64 {
        weighting.weight(alpha_bar / (1.0 - alpha_bar), self.diffusion.prediction())
    }

    /// Weights a loss and its gradient for the batch. Both are multiplied by the fraction of these images in the whole
    /// batch. The gradient is also multiplied by the gradient scale, if there is one.
    ///
    /// # Errors
    /// Returns an error if an operation fails.
    pub fn weighted(&self, loss: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
        let (loss, mut gradient) = ((loss * self.share)?, (gradient * self.share)?);
        if let Some(scale) = &self.gradient_scale {
            gradient = gradient.broadcast_mul(&scale.to_dtype(gradient.dtype())?)?;
        }
        Ok((loss, gradient))
    }
}
