use std::fmt;

use candle_core::Tensor;

use super::finite::FiniteCheck;
use super::guidance::Guidance;
use super::inpainting::Known;
use super::noise::{NoiseSource, check_start, like};
use super::plan::{Level, Plan, PlannedStep, Stage};
use super::threshold::DynamicThreshold;
use crate::backend;
use crate::denoiser::{Condition, Denoiser};
use crate::error::{Error, Result};
use crate::process::Diffusion;

/// The settings of a loop, apart from its plan.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub diffusion: Diffusion,
    /// Whether predictions are clipped.
    pub clip: bool,
    pub threshold: Option<DynamicThreshold>,
    pub condition: Condition,
    pub guidance: Option<Guidance>,
    /// The known part of the images.
    pub known: Option<Known>,
}

/// The sampling loop; see [`Sampler::steps`](super::Sampler::steps). The first error ends it.
pub struct Steps<'a, D: ?Sized> {
    settings: &'a Settings,
    plan: Plan,
    denoiser: &'a D,
    x: Tensor,
    /// The predicted images that a later stage may need, newest first.
    predictions: Vec<Tensor>,
    /// The learned variance of the newest output, if the network has one.
    variance: Option<Tensor>,
    known: Option<Known>,
    z: Box<NoiseSource<'a>>,
    next: usize,
    finite: FiniteCheck,
}

impl<D: ?Sized> fmt::Debug for Steps<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steps")
            .field("settings", self.settings)
            .field("x", &self.x)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// The state of the sampling loop after a step.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Step {
    /// The number of steps before this one.
    pub index: usize,
    /// The time at which this step began, a timestep or between two. In an inversion, and in a step of
    /// [`inpaint`](super::Sampler::inpaint) that only adds noise, it is the time at which the step ended.
    pub t: f64,
    /// The sample after the step, which is less noisy than at `t`. After the last step it is the image. Shape and
    /// dtype are those of `x_T`.
    pub x: Tensor,
    /// The image that the network predicted from the sample before the step, clipped if the sampler clips. It has the
    /// same shape. If a solver evaluates the network more than once per step, it is the first prediction that the step
    /// used. In a step that only adds noise, it is the prediction of the previous step.
    pub x_0: Tensor,
}

impl<'a, D: Denoiser + ?Sized> Steps<'a, D> {
    /// Creates the loop of a plan, which begins with the sample `start`.
    ///
    /// # Errors
    /// Returns an error if `start` or the condition does not fit, or, on the CPU, if `start` is not finite.
    pub(super) fn new(
        settings: &'a Settings,
        plan: Plan,
        denoiser: &'a D,
        start: Tensor,
        z: impl FnMut(&PlannedStep) -> Result<Tensor> + 'a,
    ) -> Result<Self> {
        settings.condition.check(start.dims().first().copied().unwrap_or(0))?;
        check_start(&start)?;
        let mut finite = FiniteCheck::default();
        finite.add("the start", plan.steps[0].at.t, &start)?;
        let known = settings.known.as_ref().map(|known| known.like(&start)).transpose()?;
        let (z, predictions) = (Box::new(z), Vec::new());
        Ok(Self {
            settings,
            plan,
            denoiser,
            x: start,
            predictions,
            variance: None,
            known,
            z,
            next: 0,
            finite,
        })
    }

    /// Runs the stages of one step. Every solver is computed here.
    fn step(&mut self, index: usize) -> Result<Step> {
        let plan = self.plan.clone();
        let planned = &plan.steps[index];
        let t = planned.at.t;
        let (mut x, mut x_0, mut z) = (self.x.clone(), None, None);
        for stage in &planned.stages {
            if let Some(level) = stage.evaluate {
                // Predictions that no stage needs are dropped before the network needs memory.
                self.predictions.truncate(plan.predictions.saturating_sub(1));
                let [prediction, unclipped] = self.predict(&x, level)?;
                if plan.unclipped {
                    self.predictions.insert(0, unclipped.detach());
                }
                self.predictions.insert(0, prediction);
            }
            if stage.z != 0.0 && z.is_none() {
                z = Some(self.noise(planned)?);
            }
            x = self.combined(stage, z.as_ref())?;
            self.finite.add("the sample", t, &x)?;
            x = x.detach();
            if let Some(newest) = self.predictions.first_mut() {
                *newest = newest.detach();
                if !stage.x_0.is_empty() {
                    x_0.get_or_insert_with(|| newest.clone());
                }
            }
        }
        if let Some(known) = self.known.clone().filter(|_| planned.denoises()) {
            if planned.to.noise() != 0.0 && z.is_none() {
                z = Some(self.noise(planned)?);
            }
            x = known.restored(&x, planned.to, z.as_ref())?;
            self.finite.add("the sample", t, &x)?;
        }
        if index + 1 == plan.steps.len() {
            self.finite.read()?;
        }
        // A step that only adds noise follows one that predicted an image.
        let x_0 = x_0.or_else(|| self.predictions.first().cloned());
        let x_0 = x_0.ok_or_else(|| Error::config("predictions of a step", 0, "at least 1"))?;
        Ok(Step { index, t, x, x_0 })
    }

    /// The noise of a step.
    fn noise(&mut self, step: &PlannedStep) -> Result<Tensor> {
        like(&self.x, &(self.z)(step)?, ["z", "dtype of z"])
    }

    /// Computes the image that the network predicts from `x` at this level, after clipping and before.
    fn predict(&mut self, x: &Tensor, level: Level) -> Result<[Tensor; 2]> {
        let names = ["the denoiser's output", "dtype of the denoiser's output"];
        let t = timesteps_of(x, level.t)?;
        let (condition, guidance) = (&self.settings.condition, self.settings.guidance);
        let output = match guidance.filter(|guidance| guidance.applies(level.t)) {
            None => {
                let output = self.denoiser.denoise(x, &t, condition)?;
                self.variance = output.variance;
                like(x, &output.prediction, names)?
            }
            Some(guidance) => {
                let [output, baseline] = self.denoiser.denoise_with_baseline(x, &t, condition)?;
                self.variance = output.variance;
                let [output, baseline] =
                    [output.prediction, baseline.prediction].map(|output| like(x, &output, names));
                guidance.combine(&output?, &baseline?)?
            }
        };
        self.finite.add(names[0], level.t, &output)?;
        let x_0 = self.settings.diffusion.x_0(x, &output, level.alpha_bar)?;
        let clipped = match self.settings.threshold {
            // Its results are in [-1, 1].
            Some(threshold) => threshold.apply(&x_0)?,
            None if self.settings.clip => backend::of(&x_0).clamp(&x_0, -1.0, 1.0)?,
            None => x_0.clone(),
        };
        Ok([clipped, x_0])
    }

    /// Computes the result of a stage, term by term in the order that [`Stage`] defines.
    fn combined(&self, stage: &Stage, z: Option<&Tensor>) -> Result<Tensor> {
        let backend = backend::of(&self.x);
        let mut terms = self.predictions.iter().zip(&stage.x_0);
        let mut sum = match terms.next() {
            Some((newest, &factor)) => backend.combine(newest, factor, &self.x, stage.x)?,
            None => backend.combine(&self.x, stage.x, &self.x, 0.0)?,
        };
        for (older, &factor) in terms {
            sum = backend.combine(&sum, 1.0, older, factor)?;
        }
        let Some(z) = z.filter(|_| stage.z != 0.0) else { return Ok(sum) };
        let Some(variances) = stage.learned else { return backend.combine(&sum, 1.0, z, stage.z) };
        let Some(variance) = &self.variance else {
            let expected = "beta or posterior, because the network does not learn the variance";
            return Err(Error::config("variance", "learned", expected));
        };
        let names = ["the denoiser's variance", "dtype of the denoiser's variance"];
        let variance = like(&self.x, variance, names)?.detach();
        let std = variance.affine(0.5 * variances.slope(), 0.5 * variances.at(0.0))?.exp()?;
        backend.combine(&sum, 1.0, &(z * std)?, stage.z)
    }
}

/// The `t` of a batch whose images are all at the same time: u32 at a timestep of the schedule, f32 between two.
pub(crate) fn timesteps_of(x: &Tensor, t: f64) -> Result<Tensor> {
    let batch = x.dim(0)?;
    Ok(if t.fract() == 0.0 {
        Tensor::from_vec(vec![t as u32; batch], batch, x.device())?
    } else {
        Tensor::from_vec(vec![t as f32; batch], batch, x.device())?
    })
}

impl<D: Denoiser + ?Sized> Iterator for Steps<'_, D> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        let all = self.plan.steps.len();
        if self.next == all {
            return None;
        }
        let step = self.step(self.next);
        match &step {
            Ok(step) => {
                self.x = step.x.clone();
                self.next += 1;
            }
            // An error ends the loop, because the next x is unknown.
            Err(_) => self.next = all,
        }
        Some(step)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.plan.steps.len() - self.next;
        (left, Some(left))
    }
}

impl<D: Denoiser + ?Sized> ExactSizeIterator for Steps<'_, D> {}
