use candle_core::{DType, Device, Shape, Tensor};

use super::interpolation::Interpolation;
use super::noise::{draw_planned, draw_prior};
use super::plan::{Level, PlannedStep};
use crate::backend;
use crate::error::{Result, check_dims};

/// The samples from which images begin, and the noise of their steps.
#[derive(Debug, Clone)]
pub(super) enum Start {
    /// Noise.
    Prior,
    /// A picture of the shape of an image, which is noised for each image.
    Picture(Tensor),
    Between(Interpolation),
}

impl Start {
    /// Returns the start of some of the images.
    pub fn narrow(&self, first: usize, len: usize) -> Result<Self> {
        Ok(match self {
            Self::Between(interpolation) => Self::Between(interpolation.narrow(first, len)?),
            other => other.clone(),
        })
    }

    /// Draws the samples at the level `at`, at which sampling begins, for images beginning with number `first`.
    ///
    /// # Errors
    /// Returns an error if the shape is not that of the images.
    pub fn draw(
        &self,
        at: Level,
        first: u32,
        shape: &Shape,
        seed: u64,
        device: &Device,
    ) -> Result<Tensor> {
        match self {
            Self::Prior => draw_prior(first, shape, seed, device),
            Self::Picture(picture) => {
                let eps = draw_prior(first, shape, seed, device)?;
                check_dims("the picture", picture.dims(), &shape.dims()[1..], "that of an image")?;
                let picture = picture.to_device(device)?.to_dtype(DType::F32)?.unsqueeze(0)?;
                let picture = picture.broadcast_as(shape)?.contiguous()?;
                backend::of(&eps).combine(&picture, at.signal(), &eps, at.noise())
            }
            Self::Between(interpolation) => interpolation.start(shape, device),
        }
    }

    /// Draws the noise of a step.
    pub fn noise(
        &self,
        step: &PlannedStep,
        first: u32,
        shape: &Shape,
        seed: u64,
        device: &Device,
    ) -> Result<Tensor> {
        let interpolated = match self {
            Self::Between(interpolation) => interpolation.noise(step, shape, device),
            _ => None,
        };
        interpolated.unwrap_or_else(|| draw_planned(step, first, shape, seed, device))
    }
}
