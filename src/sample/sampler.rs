use std::fmt;

use candle_core::{Device, Shape, Tensor};

use super::finite::FiniteCheck;
use super::guidance::Guidance;
use super::noise::{NoiseSource, check_start, draw, like};
use super::plan::{Level, Plan, Stage};
use super::solver::Solver;
use super::spacing;
use crate::backend;
use crate::denoiser::{Condition, Denoiser};
use crate::error::{Error, Result};
use crate::process::Diffusion;
use crate::random::Purpose;

/// Draws images from a [`Denoiser`].
///
/// ```no_run
/// # use candle_core::Device;
/// use ddpm::{Checkpoint, Sampler, Solver, UNetConfig};
///
/// let checkpoint = Checkpoint::open("out/mnist/checkpoint")?;
/// let unet = checkpoint.ema::<UNetConfig>(&Device::Cpu)?;
/// let sampler = Sampler::new(checkpoint.diffusion(), Solver::ddim(), 50)?.clip_denoised(true);
/// let images = sampler.sample(&unet, (16, 1, 28, 28), 0, &Device::Cpu)?; // in [-1, 1]
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    pub(super) diffusion: Diffusion,
    pub(super) plan: Plan,
    clip: bool,
    /// The number of the first image of a batch, among those of a seed.
    first: u32,
    condition: Condition,
    guidance: Option<Guidance>,
}

impl Sampler {
    /// Creates a sampler of `steps` timesteps, spread evenly over the schedule with both ends included.
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `1..=T`, or if a setting of the solver is not in its range.
    pub fn new(diffusion: &Diffusion, solver: Solver, steps: usize) -> Result<Self> {
        let timesteps = spacing::even(diffusion.schedule().steps(), steps)?;
        Self::with_timesteps(diffusion, solver, &timesteps)
    }

    /// Creates a sampler of exactly these timesteps, which must be in increasing order.
    ///
    /// # Errors
    /// Returns an error if the list is empty, not strictly increasing, or contains a timestep of `T` or more, or if a
    /// setting of the solver is not in its range.
    pub fn with_timesteps(
        diffusion: &Diffusion,
        solver: Solver,
        timesteps: &[usize],
    ) -> Result<Self> {
        diffusion.validate()?;
        let bars = diffusion.schedule().alpha_bars();
        spacing::check(timesteps, bars.len())?;
        let timesteps: Vec<_> = timesteps.iter().rev().map(|&t| (t, bars[t])).collect();
        let plan = Plan::new(&timesteps, |levels, i| solver.stages(levels, i))?;
        Ok(Self::with_plan(diffusion, plan))
    }

    pub(super) fn with_plan(diffusion: &Diffusion, plan: Plan) -> Self {
        Self {
            diffusion: diffusion.clone(),
            plan,
            clip: false,
            first: 0,
            condition: Condition::None,
            guidance: None,
        }
    }

    /// Sets whether the predicted `x_0` of each step is clipped to [-1, 1] before it is used. The default is off, as
    /// in the formulae of the paper. Most implementations clip, which usually improves images with few steps.
    #[must_use]
    pub fn clip_denoised(self, clip: bool) -> Self {
        Self { clip, ..self }
    }

    /// Sets the number of the image, among those of a seed, with which a batch begins. The default is 0. Many images
    /// can thus be drawn in parts, with the memory of one part. [`steps_from`](Self::steps_from) ignores it.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use ddpm::nn::from_fn;
    /// # use ddpm::{Diffusion, Sampler, Solver};
    /// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
    /// # let device = Device::Cpu;
    /// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 5)?;
    /// let four = sampler.sample(&denoiser, (4, 1, 8, 8), 0, &device)?;
    /// let last = sampler.first_image(3).sample(&denoiser, (1, 1, 8, 8), 0, &device)?;
    /// let values = |images: Tensor| images.flatten_all()?.to_vec1::<f32>();
    /// assert_eq!(values(last)?, values(four.narrow(0, 3, 1)?)?);
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    #[must_use]
    pub fn first_image(self, first: u32) -> Self {
        Self { first, ..self }
    }

    /// Sets the condition on which the denoiser predicts, with an entry for each image of a batch. The default is
    /// [`Condition::None`].
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use ddpm::nn::{Condition, Denoiser, Output};
    /// # use ddpm::process::Prediction;
    /// # use ddpm::{Diffusion, NoiseSchedule, Result, Sampler, Solver};
    /// /// Predicts an even image, as bright as its class.
    /// struct Classes;
    ///
    /// impl Denoiser for Classes {
    ///     fn denoise(&self, x_t: &Tensor, _t: &Tensor, condition: &Condition) -> Result<Output> {
    ///         let Condition::Classes(classes) = condition else { panic!("no classes") };
    ///         let grey = (classes.to_dtype(x_t.dtype())? * 0.25)?.reshape(((), 1, 1, 1))?;
    ///         Ok(Output::new(x_t.zeros_like()?.broadcast_add(&grey)?))
    ///     }
    /// }
    ///
    /// let diffusion = Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Sample);
    /// let classes = Condition::Classes(Tensor::new(&[0u32, 2], &Device::Cpu)?);
    /// let sampler = Sampler::new(&diffusion, Solver::ddim(), 10)?.condition(classes);
    /// let images = sampler.sample(&Classes, (2, 1, 1, 1), 0, &Device::Cpu)?;
    /// let images = images.flatten_all()?.to_vec1::<f32>()?;
    /// assert!(images[0].abs() < 1e-5 && (images[1] - 0.5).abs() < 1e-5);
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    #[must_use]
    pub fn condition(self, condition: Condition) -> Self {
        Self { condition, ..self }
    }

    /// Sets the guidance. It requires a condition and a network with [classes](Denoiser::classes), or
    /// [`Autoguidance`](super::Autoguidance). The default is none.
    ///
    /// # Errors
    /// Returns an error if a setting is not in its range.
    pub fn guidance(self, guidance: impl Into<Option<Guidance>>) -> Result<Self> {
        let guidance = guidance.into();
        guidance.as_ref().map_or(Ok(()), Guidance::validate)?;
        Ok(Self { guidance, ..self })
    }

    /// The sampler of a part of a batch, with the conditions of its images.
    pub(crate) fn part(&self, first: usize, len: usize) -> Result<Self> {
        Ok(Self { condition: self.condition.narrow(first, len)?, ..self.clone() })
    }

    /// The timesteps in the order of sampling, which is decreasing. Each is the beginning of one sampling step.
    pub fn timesteps(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.plan.steps.iter().map(|step| step.t)
    }

    /// The number of network evaluations for one batch. Most solvers evaluate the network once per sampling step.
    pub fn evaluations(&self) -> usize {
        self.plan.evaluations()
    }

    /// Draws images of this shape (batch, channels, height, width), clamped to [-1, 1].
    ///
    /// Image `k` depends on the seed and on `k`, but not on the batch size. With the U-Net on the CPU it is identical
    /// in each bit. Elsewhere it may differ by rounding in the network.
    ///
    /// # Errors
    /// Returns the errors of [`steps`](Self::steps) and of its iterator.
    pub fn sample(
        &self,
        denoiser: &(impl Denoiser + ?Sized),
        shape: impl Into<Shape>,
        seed: u64,
        device: &Device,
    ) -> Result<Tensor> {
        let mut x = None;
        for step in self.steps(denoiser, shape, seed, device)? {
            x = Some(step?.x);
        }
        let x = x.ok_or_else(|| Error::config("timesteps", "[]", "one or more"))?;
        backend::of(&x).clamp(&x, -1.0, 1.0)
    }

    /// The sampling loop as an iterator, to observe it or to stop early. `x` of the last step is the image, which is
    /// not clamped.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use ddpm::nn::from_fn;
    /// # use ddpm::{Diffusion, Sampler, Solver};
    /// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
    /// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 5)?;
    /// for step in sampler.steps(&denoiser, (1, 1, 8, 8), 0, &Device::Cpu)? {
    ///     let step = step?;
    ///     println!("left timestep {}: {:?}", step.t, step.x);
    /// }
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if the shape has no batch dimension. The iterator returns the errors of that of
    /// [`steps_from`](Self::steps_from).
    pub fn steps<'a, D: Denoiser + ?Sized>(
        &'a self,
        denoiser: &'a D,
        shape: impl Into<Shape>,
        seed: u64,
        device: &Device,
    ) -> Result<Steps<'a, D>> {
        let (shape, device, first) = (shape.into(), device.clone(), self.first);
        let start = draw(Purpose::Prior, 0, first, &shape, seed, &device)?;
        let z = move |t| draw(Purpose::Sampling, t as u64, first, &shape, seed, &device);
        self.steps_from(denoiser, start, z)
    }

    /// Draws the `x_T` of the images of this seed, beginning with number 0: standard normals of shape (batch, ...).
    /// [`steps`](Self::steps) starts from them.
    ///
    /// # Errors
    /// Returns an error if the shape has no batch dimension.
    pub fn prior(shape: impl Into<Shape>, seed: u64, device: &Device) -> Result<Tensor> {
        draw(Purpose::Prior, 0, 0, &shape.into(), seed, device)
    }

    /// Draws the noise of this seed that [`steps`](Self::steps) adds in the step from timestep `t`: standard normals
    /// of shape (batch, ...).
    ///
    /// # Errors
    /// Returns an error if the shape has no batch dimension.
    pub fn noise(t: usize, shape: impl Into<Shape>, seed: u64, device: &Device) -> Result<Tensor> {
        draw(Purpose::Sampling, t as u64, 0, &shape.into(), seed, device)
    }

    /// The sampling loop with a given `x_T` (`start`, of shape (batch, ...)) and a given source of noise.
    ///
    /// In each step that adds noise, the loop calls `z(t)` once, where `t` is the timestep at which the step begins. It
    /// must return standard normals of the shape of `x_T`, such as those of [`noise`](Self::noise). Deterministic
    /// solvers add no noise. Steps are computed in the dtype of `x_T`, even if the network has another dtype.
    ///
    /// # Errors
    /// Returns an error if `start` is a scalar or not of a floating-point dtype. The iterator returns
    /// - the errors of the denoiser and of `z`;
    /// - an error if the result of either has another shape than `x_T`, or no floating-point dtype;
    /// - [`Error::NonFiniteSample`] if a prediction or a sample is infinite or NaN. On the CPU the step in which this
    ///   occurs returns the error. On other devices each check would wait for the device, so the last step returns
    ///   the error.
    pub fn steps_from<'a, D: Denoiser + ?Sized>(
        &'a self,
        denoiser: &'a D,
        start: Tensor,
        z: impl FnMut(usize) -> Result<Tensor> + 'a,
    ) -> Result<Steps<'a, D>> {
        self.condition.check(start.dims().first().copied().unwrap_or(0))?;
        check_start(&start)?;
        let mut finite = FiniteCheck::default();
        finite.add("the start", self.plan.steps[0].t, &start)?;
        let (z, predictions) = (Box::new(z), Vec::new());
        let variance = None;
        Ok(Steps { sampler: self, denoiser, x: start, predictions, variance, z, next: 0, finite })
    }
}

/// The sampling loop; see [`Sampler::steps`]. The first error ends it.
pub struct Steps<'a, D: ?Sized> {
    sampler: &'a Sampler,
    denoiser: &'a D,
    x: Tensor,
    /// The predicted images that a later stage may need, newest first.
    predictions: Vec<Tensor>,
    /// The learned variance of the newest output, if the network has one.
    variance: Option<Tensor>,
    z: Box<NoiseSource<'a>>,
    next: usize,
    finite: FiniteCheck,
}

impl<D: ?Sized> fmt::Debug for Steps<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steps")
            .field("sampler", self.sampler)
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
    /// The timestep at which this step began.
    pub t: usize,
    /// The sample after the step, which is less noisy than at `t`. After the last step it is the image. Shape and
    /// dtype are those of `x_T`.
    pub x: Tensor,
    /// The image that the network predicted from the sample before the step, clipped if the sampler clips. It has the
    /// same shape. If a solver evaluates the network more than once per step, it is the first prediction that the step
    /// used.
    pub x_0: Tensor,
}

impl<D: Denoiser + ?Sized> Steps<'_, D> {
    /// Runs the stages of one step. Every solver is computed here.
    fn step(&mut self, index: usize) -> Result<Step> {
        let plan = &self.sampler.plan;
        let (t, stages) = (plan.steps[index].t, &plan.steps[index].stages);
        let (mut x, mut x_0, mut z) = (self.x.clone(), None, None);
        for stage in stages {
            if let Some(level) = stage.evaluate {
                // Predictions that no stage needs are dropped before the network needs memory.
                self.predictions.truncate(plan.predictions.saturating_sub(1));
                let prediction = self.predict(&x, level)?;
                self.predictions.insert(0, prediction);
            }
            if stage.z != 0.0 && z.is_none() {
                z = Some(like(&self.x, &(self.z)(t)?, ["z", "dtype of z"])?);
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
        if index + 1 == plan.steps.len() {
            self.finite.read()?;
        }
        let x_0 = x_0.ok_or_else(|| Error::config("predictions of a step", 0, "at least 1"))?;
        Ok(Step { index, t, x, x_0 })
    }

    /// Computes the image that the network predicts from `x` at this level.
    fn predict(&mut self, x: &Tensor, level: Level) -> Result<Tensor> {
        let names = ["the denoiser's output", "dtype of the denoiser's output"];
        let t = timesteps_of(x, level.t)?;
        let (condition, guidance) = (&self.sampler.condition, self.sampler.guidance);
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
        // Between two timesteps, the error names the less noisy one.
        self.finite.add(names[0], level.t as usize, &output)?;
        let x_0 = self.sampler.diffusion.x_0(x, &output, level.alpha_bar)?;
        Ok(if self.sampler.clip { backend::of(&x_0).clamp(&x_0, -1.0, 1.0)? } else { x_0 })
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
fn timesteps_of(x: &Tensor, t: f64) -> Result<Tensor> {
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
        let all = self.sampler.plan.steps.len();
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
        let left = self.sampler.plan.steps.len() - self.next;
        (left, Some(left))
    }
}

impl<D: Denoiser + ?Sized> ExactSizeIterator for Steps<'_, D> {}
