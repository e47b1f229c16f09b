//! Inpainting by RePaint. Lugmayr et al. 2022, [RePaint](https://arxiv.org/abs/2201.09865).

use candle_core::{DType, Tensor};

use super::plan::{Level, Stage};
use crate::backend;
use crate::error::{Error, Result, check_dims};
use crate::process::NoiseSchedule;

/// The resampling of [`Sampler::inpaint`](super::Sampler::inpaint). Lugmayr et al. 2022, section 4.2.
///
/// The input of a step combines the filled pixels of the previous step with new noise in the known pixels. Resampling
/// adds noise again and repeats the steps, so that the filled pixels fit the known ones.
///
/// The default is that of the paper, which has 250 sampling steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resampling {
    /// The number of sampling steps that are repeated at a time, at least 1. If the sampler has no more steps than
    /// this, no step is repeated.
    pub jump: usize,
    /// The number of times that each of these parts is computed, at least 1. With 1 there is no resampling.
    pub count: usize,
}

impl Default for Resampling {
    fn default() -> Self {
        Self { jump: 10, count: 10 }
    }
}

impl Resampling {
    /// The largest number of steps of a plan.
    const MOST: usize = NoiseSchedule::MAX_STEPS;

    /// Returns the levels of a sampler in the order in which resampling visits them. From every `jump`-th level,
    /// counted from the last timestep, the order returns to the level `jump` places earlier.
    ///
    /// # Errors
    /// Returns an error if a setting is 0, or if there are too many steps.
    pub(super) fn path(self, levels: &[Level]) -> Result<Vec<Level>> {
        let Self { jump, count } = self;
        let positive = |field, value| match value {
            0 => Err(Error::config(field, 0, "at least 1")),
            _ => Ok(()),
        };
        positive("jump", jump)?;
        positive("count", count)?;
        let steps = levels.len() - 1;
        let returns = |k: usize| k.is_multiple_of(jump) && jump < steps - k;
        let jumps = (0..steps).filter(|&k| returns(k)).count();
        let added = (count - 1).saturating_mul(jumps).saturating_mul(jump.saturating_add(1));
        if added > Self::MOST - steps {
            let expected = format!("small enough for at most {} sampling steps", Self::MOST);
            return Err(Error::config("count", count, expected));
        }
        // The number of a level, counted from the last timestep.
        let level = |k: usize| levels[steps - 1 - k];
        let mut path = Vec::with_capacity(steps + added + 1);
        for k in (0..steps).rev() {
            path.push(level(k));
            if returns(k) {
                (1..count).for_each(|_| path.extend((k..=k + jump).rev().map(level)));
            }
        }
        path.push(levels[steps]);
        Ok(path)
    }
}

/// The step from `from` to the noisier level `to`: a sample of `q(x_to | x_from)`, which combines several forward steps
/// of the process. Ho et al. 2020, equation 2.
pub(super) fn noising(from: Level, to: Level) -> Vec<Stage> {
    let alpha = to.alpha_bar / from.alpha_bar;
    let (x, z) = (alpha.sqrt(), (1.0 - alpha).sqrt());
    vec![Stage { evaluate: None, x_0: vec![], x, z, learned: None }]
}

/// A picture with a known part.
#[derive(Debug, Clone)]
pub(super) struct Known {
    picture: Tensor,
    /// 1 at the pixels that are filled, and 0 at the known ones.
    filled: Tensor,
}

impl Known {
    /// `picture` has the shape of an image. `filled` has the same shape, except for dimensions of 1.
    ///
    /// # Errors
    /// Returns an error if the shapes do not fit, or if `filled` has other values than 0 and 1.
    pub fn new(picture: &Tensor, filled: &Tensor) -> Result<Self> {
        let fits = filled.rank() == picture.rank()
            && filled.dims().iter().zip(picture.dims()).all(|(&f, &p)| f == p || f == 1);
        if !fits {
            let expected = format!("{:?}, that of the picture, or 1 per dimension", picture.dims());
            return Err(Error::shape("the mask", filled.dims(), expected));
        }
        let values = filled.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        if let Some(value) = values.into_iter().find(|&value| value != 0.0 && value != 1.0) {
            return Err(Error::config("the mask", value, "0 (known) or 1 (filled)"));
        }
        let filled = filled.to_dtype(DType::U8)?.broadcast_as(picture.shape())?;
        Ok(Self { picture: picture.clone(), filled })
    }

    /// The known part of each image of a batch `x`, with its dtype and on its device.
    ///
    /// # Errors
    /// Returns an error if the images have another shape than the picture.
    pub fn like(&self, x: &Tensor) -> Result<Self> {
        let image = x.dims().get(1..).unwrap_or_default();
        check_dims("the picture", self.picture.dims(), image, "that of an image")?;
        let batch = |part: &Tensor| {
            part.to_device(x.device())?.unsqueeze(0)?.broadcast_as(x.shape())?.contiguous()
        };
        let picture = batch(&self.picture.to_dtype(x.dtype())?)?;
        Ok(Self { picture, filled: batch(&self.filled)? })
    }

    /// Replaces the known part of `x` by the picture, noised to this level: Lugmayr et al. 2022, equation 8. At the
    /// level of the image, the known part is the picture itself.
    ///
    /// The filled part of `x` depends on the same noise `z` if the solver adds noise. No pixel is in both parts, so the
    /// noise of a pixel is used once.
    pub fn restored(&self, x: &Tensor, level: Level, z: Option<&Tensor>) -> Result<Tensor> {
        let known = match z.filter(|_| level.noise() != 0.0) {
            Some(z) => {
                let backend = backend::of(x);
                backend.combine(&self.picture, level.signal(), z, level.noise())?
            }
            None => self.picture.clone(),
        };
        Ok(self.filled.where_cond(x, &known)?)
    }
}
