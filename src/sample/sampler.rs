use candle_core::{Device, Shape, Tensor};

use super::guidance::Guidance;
use super::inpainting::{self, Resampling};
use super::inversion;
use super::noise::{draw_prior, draw_step};
use super::plan::{Level, Plan, PlannedStep};
use super::solver::Solver;
use super::spacing::{self, Spacing};
use super::start::Start;
use super::steps::{Settings, Step, Steps};
use super::threshold::DynamicThreshold;
use crate::backend;
use crate::denoiser::{Condition, Denoiser};
use crate::error::{Error, Result};
use crate::process::Diffusion;

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
    pub(super) settings: Settings,
    pub(super) solver: Solver,
    /// The times at which steps begin, and the image.
    pub(super) levels: Vec<Level>,
    pub(super) resampling: Option<Resampling>,
    pub(super) plan: Plan,
    pub(super) start: Start,
    /// The number of the first image of a batch, among those of a seed.
    first: u32,
}

impl Sampler {
    /// Creates a sampler of `steps` timesteps, spread evenly over the schedule with both ends included.
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `1..=T`, or if a setting of the solver is not in its range.
    pub fn new(diffusion: &Diffusion, solver: Solver, steps: usize) -> Result<Self> {
        Self::with_spacing(diffusion, solver, Spacing::Even, steps)
    }

    /// Creates a sampler of `steps` times, chosen by `spacing`.
    ///
    /// ```
    /// use ddpm::sample::Spacing;
    /// use ddpm::{Diffusion, Sampler, Solver};
    ///
    /// let (solver, spacing) = (Solver::DpmSolver { order: 2 }, Spacing::Karras { rho: 7.0 });
    /// let sampler = Sampler::with_spacing(&Diffusion::ddpm(), solver, spacing, 20)?;
    /// let times: Vec<f64> = sampler.timesteps().collect();
    /// assert_eq!((times[0], times[19]), (999.0, 0.0));
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `1..=T`, or if a setting of the solver or the spacing is not in its range.
    pub fn with_spacing(
        diffusion: &Diffusion,
        solver: Solver,
        spacing: Spacing,
        steps: usize,
    ) -> Result<Self> {
        let times = spacing.times(diffusion.schedule(), steps)?;
        Self::with_times(diffusion, solver, &times)
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
        let times: Vec<f64> = timesteps.iter().map(|&t| t as f64).collect();
        Self::with_times(diffusion, solver, &times)
    }

    /// Creates a sampler of exactly these times, which must be in increasing order and may lie between two timesteps.
    /// There the log-SNR is [interpolated](crate::NoiseSchedule::log_snr), and the network receives the time in f32.
    ///
    /// # Errors
    /// Returns an error if the list is empty, not strictly increasing, or contains a time that is not in [0, T - 1], or
    /// if a setting of the solver is not in its range.
    pub fn with_times(diffusion: &Diffusion, solver: Solver, times: &[f64]) -> Result<Self> {
        diffusion.validate()?;
        let schedule = diffusion.schedule();
        spacing::check(times, schedule.steps())?;
        let levels = times.iter().rev().map(|&t| Level::new(schedule, t));
        let levels: Vec<Level> = levels.chain([Ok(Level::IMAGE)]).collect::<Result<_>>()?;
        let plan = plan_of(diffusion, solver, &levels, None)?;
        let settings = Settings {
            diffusion: diffusion.clone(),
            clip: false,
            threshold: None,
            condition: Condition::None,
            guidance: None,
            known: None,
        };
        let (resampling, start, first) = (None, Start::Prior, 0);
        Ok(Self { settings, solver, levels, resampling, plan, start, first })
    }

    /// Computes the plan again, after a change of a setting on which it depends.
    ///
    /// # Errors
    /// Returns an error if the levels are too close, or if resampling takes too many steps.
    pub(super) fn planned(self) -> Result<Self> {
        let plan = plan_of(&self.settings.diffusion, self.solver, &self.levels, self.resampling)?;
        Ok(Self { plan, ..self })
    }

    /// Sets whether the predicted `x_0` of each step is clipped to [-1, 1] before it is used. The default is off, as
    /// in the formulae of the paper. Most implementations clip, which usually improves images with few steps.
    #[must_use]
    pub fn clip_denoised(mut self, clip: bool) -> Self {
        self.settings.clip = clip;
        self
    }

    /// Sets the dynamic thresholding of the predicted `x_0` of each step, which replaces clipping. The default is none.
    /// On a GPU, each evaluation of the network then waits for the device.
    ///
    /// # Errors
    /// Returns an error if a setting of the threshold is not in its range.
    pub fn dynamic_threshold(mut self, threshold: DynamicThreshold) -> Result<Self> {
        self.settings.threshold = Some(threshold.check()?);
        Ok(self)
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
    pub fn condition(mut self, condition: Condition) -> Self {
        self.settings.condition = condition;
        self
    }

    /// Sets the guidance. It requires a condition and a network with [classes](Denoiser::classes), or
    /// [`Autoguidance`](super::Autoguidance). The default is none.
    ///
    /// # Errors
    /// Returns an error if a setting is not in its range.
    pub fn guidance(mut self, guidance: impl Into<Option<Guidance>>) -> Result<Self> {
        let guidance = guidance.into();
        guidance.as_ref().map_or(Ok(()), Guidance::validate)?;
        self.settings.guidance = guidance;
        Ok(self)
    }

    /// Returns the sampler of a part of a batch, with the conditions and the starts of its images.
    pub(crate) fn part(&self, first: usize, len: usize) -> Result<Self> {
        let start = self.start.narrow(first, len)?;
        let part = Self { start, ..self.clone() };
        Ok(part.condition(self.settings.condition.narrow(first, len)?))
    }

    /// The timesteps in the order of sampling, which is decreasing. Each is the beginning of one sampling step. With
    /// some [spacings](Spacing) they lie between two timesteps of the schedule. With the resampling of
    /// [`inpaint`](Self::inpaint) they also increase, because a step that only adds noise is listed with the time at
    /// which it ends.
    pub fn timesteps(&self) -> impl ExactSizeIterator<Item = f64> + '_ {
        self.plan.steps.iter().map(|step| step.at.t)
    }

    /// The number of network evaluations for one batch. Most solvers evaluate the network once per sampling step.
    pub fn evaluations(&self) -> usize {
        self.plan.evaluations()
    }

    /// Returns whether images depend only on their `x_T`, because no step adds noise.
    pub fn is_deterministic(&self) -> bool {
        self.settings.known.is_none() && !self.plan.steps.iter().any(PlannedStep::adds_noise)
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
        let x = last(self.steps(denoiser, shape, seed, device)?)?;
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
        let start = self.start.draw(self.plan.steps[0].at, first, &shape, seed, &device)?;
        Steps::new(&self.settings, self.plan.clone(), denoiser, start, move |step| {
            self.start.noise(step, first, &shape, seed, &device)
        })
    }

    /// Draws the `x_T` of the images of this seed, beginning with number 0: standard normals of shape (batch, ...).
    /// [`steps`](Self::steps) starts from them.
    ///
    /// # Errors
    /// Returns an error if the shape has no batch dimension.
    pub fn prior(shape: impl Into<Shape>, seed: u64, device: &Device) -> Result<Tensor> {
        draw_prior(0, &shape.into(), seed, device)
    }

    /// Draws the noise of this seed that [`steps`](Self::steps) adds in the step from `t`, a timestep or a time between
    /// two: standard normals of shape (batch, ...). Times that differ by `2^-36` or more have different noise.
    ///
    /// # Errors
    /// Returns an error if the shape has no batch dimension.
    pub fn noise(t: f64, shape: impl Into<Shape>, seed: u64, device: &Device) -> Result<Tensor> {
        draw_step(t, 0, &shape.into(), seed, device)
    }

    /// The sampling loop with a given `x_T` (`start`, of shape (batch, ...)) and a given source of noise.
    ///
    /// In each step that adds noise, the loop calls `z(t)` once, where `t` is the time at which the step begins. It
    /// must return standard normals of the shape of `x_T`, such as those of [`noise`](Self::noise). The loop of a
    /// [deterministic](Self::is_deterministic) sampler never calls it. Steps are computed in the dtype of `x_T`, even
    /// if the network has another dtype.
    ///
    /// With [`inpaint`](Self::inpaint), every step except the last needs noise, also with a deterministic
    /// solver: the known pixels are noised. A step that only adds noise receives the time at which it ends. Resampling
    /// therefore calls `z` several times with the same `t`, and each call must return new noise. [`noise`](Self::noise)
    /// returns the same noise for the same arguments, so each call needs another seed:
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use ddpm::nn::from_fn;
    /// # use ddpm::sample::Resampling;
    /// # use ddpm::{Diffusion, Sampler, Solver};
    /// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
    /// # let (device, shape) = (Device::Cpu, (1, 1, 8, 8));
    /// # let picture = Tensor::zeros((1, 8, 8), DType::F32, &device)?;
    /// # let filled = Tensor::ones((1, 1, 1), DType::U8, &device)?;
    /// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 3)?; // eta 0
    /// let resampling = Resampling { jump: 1, count: 2 };
    /// let sampler = sampler.inpaint(&picture, &filled, resampling)?;
    /// let (start, mut calls) = (Sampler::prior(shape, 7, &device)?, 0);
    /// let z = |t| {
    ///     calls += 1;
    ///     Sampler::noise(t, shape, calls, &device)
    /// };
    /// let image = sampler.steps_from(&denoiser, start, z)?.last().expect("a step")?.x;
    /// assert_eq!(calls, 6); // of 7 steps
    /// # Ok::<(), ddpm::Error>(())
    /// ```
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
        mut z: impl FnMut(f64) -> Result<Tensor> + 'a,
    ) -> Result<Steps<'a, D>> {
        let z = move |step: &PlannedStep| z(step.at.t);
        Steps::new(&self.settings, self.plan.clone(), denoiser, start, z)
    }

    /// Computes the noise of images, of shape (batch, ...), by DDIM inversion: the loop of
    /// [`invert_steps`](Self::invert_steps).
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use ddpm::nn::from_fn;
    /// # use ddpm::{Diffusion, Sampler, Solver};
    /// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok((x_t * 0.01)?));
    /// # let images = Tensor::new(&[[[[0.5f32, -0.2]]]], &Device::Cpu)?;
    /// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 100)?;
    /// let noise = sampler.invert(&denoiser, images.clone())?;
    /// // Sampling without noise leads back to nearly the same images.
    /// let steps = sampler.steps_from(&denoiser, noise, |_| unreachable!())?;
    /// let again = steps.last().expect("a step")?.x;
    /// assert!((again - images)?.abs()?.max_all()?.to_scalar::<f32>()? < 0.01);
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns the errors of [`invert_steps`](Self::invert_steps) and of its iterator.
    pub fn invert(&self, denoiser: &(impl Denoiser + ?Sized), images: Tensor) -> Result<Tensor> {
        last(self.invert_steps(denoiser, images)?)
    }

    /// DDIM inversion as an iterator. Computes, without random numbers, the noise from which deterministic solvers
    /// sample the images. Dhariwal and Nichol 2021, appendix F.
    ///
    /// It goes through the timesteps of this sampler in increasing order, whatever the solver. The predicted `x_0` is
    /// clipped as in sampling. A step to timestep `t` evaluates the network at `t`, for the sample before the step. The
    /// network knows no time of the image, and sampling from `t` uses the noise predicted at `t` as well. This is the
    /// inversion of diffusers for networks that predict noise. For other networks, the noise that they imply takes the
    /// place of the predicted noise, so that equivalent networks give the same result.
    ///
    /// # Errors
    /// Returns the errors of [`steps_from`](Self::steps_from) with the images as its start.
    pub fn invert_steps<'a, D: Denoiser + ?Sized>(
        &'a self,
        denoiser: &'a D,
        images: Tensor,
    ) -> Result<Steps<'a, D>> {
        let levels: Vec<Level> = self.levels.iter().rev().copied().collect();
        let stages = |levels: &[Level], i: usize| Ok(inversion::stages(levels[i], levels[i + 1]));
        let plan = Plan::new(&levels, stages)?;
        let no_noise =
            |_: &PlannedStep| Err(Error::config("noise of an inversion", "asked for", "none"));
        Steps::new(&self.settings, plan, denoiser, images, no_noise)
    }
}

/// The plan of a solver along these levels.
fn plan_of(
    diffusion: &Diffusion,
    solver: Solver,
    levels: &[Level],
    resampling: Option<Resampling>,
) -> Result<Plan> {
    let path = resampling.map(|resampling| resampling.path(levels)).transpose()?;
    let plan =
        Plan::new(path.as_deref().unwrap_or(levels), |path, i| match path[i].t < path[i + 1].t {
            true => Ok(inpainting::noising(path[i], path[i + 1])),
            false => solver.stages(diffusion.schedule(), path, i),
        })?;
    Ok(Plan { unclipped: solver.needs_unclipped(), ..plan })
}

/// The sample after the last step.
fn last(steps: impl Iterator<Item = Result<Step>>) -> Result<Tensor> {
    let mut x = None;
    for step in steps {
        x = Some(step?.x);
    }
    x.ok_or_else(|| Error::config("timesteps", "[]", "one or more"))
}
