use serde::{Deserialize, Serialize};

use super::guidance::Guidance;
use super::sampler::Sampler;
use super::solver::Solver;
use super::spacing::Spacing;
use super::threshold::DynamicThreshold;
use super::unipc::BFunction;
use crate::error::Result;
use crate::process::Diffusion;

/// The settings of a [`Sampler`], which a checkpoint can hold.
///
/// ```
/// use ddpm::sample::SamplerConfig;
/// use ddpm::{Diffusion, Solver};
///
/// let config = SamplerConfig::new(Solver::ddim(), 50).clip_denoised(true);
/// let sampler = config.sampler(&Diffusion::ddpm())?;
/// assert_eq!(sampler.timesteps().len(), 50);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SamplerConfig {
    /// The rule from one timestep to the next.
    pub solver: Solver,
    /// The number of sampling steps, from 1 to the schedule's number of timesteps; see [`Sampler::new`].
    pub steps: usize,
    /// Whether each predicted `x_0` is clipped; see [`Sampler::clip_denoised`].
    pub clip_denoised: bool,
    /// The guidance, for networks with classes; see [`Sampler::guidance`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance: Option<Guidance>,
    /// The choice of the timesteps.
    #[serde(default, skip_serializing_if = "is_even")]
    pub spacing: Spacing,
    /// The dynamic thresholding of each predicted `x_0`; see [`Sampler::dynamic_threshold`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dynamic_threshold: Option<DynamicThreshold>,
}

/// A file without the field has the default. Settings with the default are written without the field, as by earlier
/// versions.
fn is_even(spacing: &Spacing) -> bool {
    *spacing == Spacing::Even
}

impl SamplerConfig {
    /// The settings of [`Sampler::new`] with this solver and number of sampling steps: without clipping.
    pub const fn new(solver: Solver, steps: usize) -> Self {
        let (spacing, dynamic_threshold, guidance) = (Spacing::Even, None, None);
        Self { solver, steps, clip_denoised: false, spacing, dynamic_threshold, guidance }
    }

    /// Sets whether each predicted `x_0` is clipped; see [`Sampler::clip_denoised`].
    #[must_use]
    pub const fn clip_denoised(self, clip: bool) -> Self {
        Self { clip_denoised: clip, ..self }
    }

    /// Sets the guidance; see [`Sampler::guidance`].
    #[must_use]
    pub const fn guidance(self, guidance: Option<Guidance>) -> Self {
        Self { guidance, ..self }
    }

    /// Sets the choice of the timesteps.
    #[must_use]
    pub const fn spacing(self, spacing: Spacing) -> Self {
        Self { spacing, ..self }
    }

    /// Sets the dynamic thresholding of each predicted `x_0`; see [`Sampler::dynamic_threshold`].
    #[must_use]
    pub const fn dynamic_threshold(self, threshold: DynamicThreshold) -> Self {
        Self { dynamic_threshold: Some(threshold), ..self }
    }

    /// The usual settings for quick samples: deterministic DDIM with 50 timesteps (all of a shorter schedule),
    /// with clipping.
    pub fn usual(diffusion: &Diffusion) -> Self {
        let steps = diffusion.schedule().steps().min(50);
        Self::new(Solver::ddim(), steps).clip_denoised(true)
    }

    /// The settings that this crate recommends for networks that predict [velocity](Diffusion::velocity):
    /// UniPC of order 2 with 20 timesteps, with clipping.
    pub const fn recommended() -> Self {
        Self::new(Solver::UniPc { order: 2, b: BFunction::Bh2 }, 20).clip_denoised(true)
    }

    /// Creates the sampler with these settings.
    ///
    /// # Errors
    /// Returns the errors of [`Sampler::with_spacing`] and [`Sampler::dynamic_threshold`].
    pub fn sampler(&self, diffusion: &Diffusion) -> Result<Sampler> {
        let sampler = Sampler::with_spacing(diffusion, self.solver, self.spacing, self.steps)?;
        let sampler = sampler.clip_denoised(self.clip_denoised).guidance(self.guidance)?;
        match self.dynamic_threshold {
            Some(threshold) => sampler.dynamic_threshold(threshold),
            None => Ok(sampler),
        }
    }
}
