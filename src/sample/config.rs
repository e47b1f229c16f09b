use serde::{Deserialize, Serialize};

use super::guidance::Guidance;
use super::sampler::Sampler;
use super::solver::Solver;
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
}

impl SamplerConfig {
    /// The settings of [`Sampler::new`] with this solver and number of sampling steps: without clipping.
    pub const fn new(solver: Solver, steps: usize) -> Self {
        Self { solver, steps, clip_denoised: false, guidance: None }
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

    /// The usual settings for quick samples: deterministic DDIM with 50 timesteps (all of a shorter schedule),
    /// with clipping.
    pub fn usual(diffusion: &Diffusion) -> Self {
        let steps = diffusion.schedule().steps().min(50);
        Self::new(Solver::ddim(), steps).clip_denoised(true)
    }

    /// Creates the sampler with these settings.
    ///
    /// # Errors
    /// Returns the errors of [`Sampler::new`].
    pub fn sampler(&self, diffusion: &Diffusion) -> Result<Sampler> {
        let sampler = Sampler::new(diffusion, self.solver, self.steps)?;
        sampler.clip_denoised(self.clip_denoised).guidance(self.guidance)
    }
}
