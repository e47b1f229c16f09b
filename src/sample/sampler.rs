use std::fmt;

use candle_core::{DType, Device, Shape, Tensor};
use serde::{Deserialize, Serialize};

use crate::kernels::{clamp, combine, finiteness};
use crate::random::{Noise, Purpose};
use crate::{Denoiser, Diffusion, Error, Result};

/// The rule by which a sampler goes from one timestep to the next.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Solver {
    /// Ancestral sampling. Ho et al. 2020, algorithm 2.
    Ddpm {
        /// The variance of each step.
        variance: Variance,
    },
    /// Denoising diffusion implicit models. Song et al. 2021, equation 12.
    Ddim {
        /// From 0 (deterministic) to 1 (as much noise as ancestral sampling with
        /// [`Variance::Posterior`]).
        eta: f64,
    },
}

/// The fixed variance of an ancestral step; Ho et al. 2020, section 3.2.
///
/// The two variances give different results at any number of steps; neither is a more exact form of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// `beta_t`, exact if the data is standard normal noise. Also called "fixed large".
    Beta,
    /// `beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)`, exact if the data is a single point. Also called
    /// "fixed small".
    Posterior,
}

/// The settings of a [`Sampler`], which a checkpoint can hold.
///
/// ```
/// use ddpm::{Diffusion, SamplerConfig, Solver};
///
/// let config = SamplerConfig { solver: Solver::ddim(), steps: 50, clip_denoised: true };
/// let sampler = config.sampler(&Diffusion::ddpm())?;
/// assert_eq!(sampler.timesteps().len(), 50);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerConfig {
    /// The rule from one timestep to the next.
    pub solver: Solver,
    /// The number of sampling steps, from 1 to the schedule's number of timesteps; see [`Sampler::new`].
    pub steps: usize,
    /// Whether each predicted `x_0` is clipped; see [`Sampler::clip_denoised`].
    pub clip_denoised: bool,
}

impl SamplerConfig {
    /// The usual settings for quick samples: deterministic DDIM with 50 timesteps (all of a shorter schedule),
    /// with clipping.
    pub fn usual(diffusion: &Diffusion) -> Self {
        let steps = diffusion.schedule().steps().min(50);
        Self { solver: Solver::ddim(), steps, clip_denoised: true }
    }

    /// Creates the sampler with these settings.
    ///
    /// # Errors
    /// Returns the errors of [`Sampler::new`].
    pub fn sampler(&self, diffusion: &Diffusion) -> Result<Sampler> {
        Ok(Sampler::new(diffusion, self.solver, self.steps)?.clip_denoised(self.clip_denoised))
    }
}

impl Solver {
    /// Ancestral sampling with `sigma_t^2 = beta_t`.
    pub const fn ddpm() -> Self {
        Self::Ddpm { variance: Variance::Beta }
    }

    /// Deterministic DDIM.
    pub const fn ddim() -> Self {
        Self::Ddim { eta: 0.0 }
    }

    /// The update from the timestep with `alpha_bar` to the one with `alpha_bar_prev`.
    ///
    /// The betas are computed from the two, and are thus correct for any subset of the timesteps.
    fn update(self, t: usize, alpha_bar: f64, alpha_bar_prev: f64) -> Update {
        let (noise, noise_prev) = (1.0 - alpha_bar, 1.0 - alpha_bar_prev);
        let alpha = alpha_bar / alpha_bar_prev;
        let beta = 1.0 - alpha;
        let (x_0, x_t, z) = match self {
            // The mean of q(x_{t-1} | x_t, x_0): Ho et al. 2020, equation 7.
            Self::Ddpm { variance } => (
                alpha_bar_prev.sqrt() * beta / noise,
                alpha.sqrt() * noise_prev / noise,
                match variance {
                    // The last step returns the mean, because its image is the result and is not denoised again.
                    _ if alpha_bar_prev == 1.0 => 0.0,
                    Variance::Beta => beta.sqrt(),
                    Variance::Posterior => (beta * noise_prev / noise).sqrt(),
                },
            ),
            // sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps, with eps = (x_t - sqrt(abar) x_0) /
            // sqrt(1 - abar) written out, so that a clipped x_0 changes eps as well.
            Self::Ddim { eta } => {
                let sigma = eta * (beta * noise_prev / noise).sqrt();
                let eps = (noise_prev - sigma * sigma).max(0.0).sqrt() / noise.sqrt();
                (alpha_bar_prev.sqrt() - eps * alpha_bar.sqrt(), eps, sigma)
            }
        };
        Update { t, alpha_bar, x_0, x_t, z }
    }
}

/// The coefficients of a sampling step: `x <- x_0 * x̂_0 + x_t * x + z * noise`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Update {
    /// The timestep that the network receives.
    t: usize,
    alpha_bar: f64,
    x_0: f64,
    x_t: f64,
    z: f64,
}

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
    diffusion: Diffusion,
    /// From the noisiest timestep to the cleanest.
    updates: Vec<Update>,
    clip: bool,
    /// The number of a batch's first image.
    first: u32,
}

impl Sampler {
    /// Creates a sampler of `steps` timesteps, spread evenly over the schedule with both ends included.
    ///
    /// # Errors
    /// Returns an error if `steps` is not in `1..=T`, or if `eta` of DDIM is not in [0, 1].
    pub fn new(diffusion: &Diffusion, solver: Solver, steps: usize) -> Result<Self> {
        let total = diffusion.schedule().steps();
        if !(1..=total).contains(&steps) {
            let expected = format!("from 1 to {total}, the schedule's number of timesteps");
            return Err(Error::config("sampling steps", steps, expected));
        }
        let timesteps: Vec<usize> = if steps == 1 {
            vec![total - 1]
        } else {
            // Ties are rounded to even, as in the respacing of Nichol and Dhariwal's code.
            let gap = (total - 1) as f64 / (steps - 1) as f64;
            (0..steps).map(|i| (i as f64 * gap).round_ties_even() as usize).collect()
        };
        Self::with_timesteps(diffusion, solver, &timesteps)
    }

    /// Creates a sampler of exactly these timesteps, which must be in increasing order.
    ///
    /// # Errors
    /// Returns an error if the list is empty, not strictly increasing, or contains a timestep of `T` or more, or if
    /// `eta` of DDIM is not in [0, 1].
    pub fn with_timesteps(
        diffusion: &Diffusion,
        solver: Solver,
        timesteps: &[usize],
    ) -> Result<Self> {
        let schedule = diffusion.schedule();
        if let Solver::Ddim { eta } = solver
            && !(0.0..=1.0).contains(&eta)
        {
            return Err(Error::config("eta", eta, "from 0 to 1"));
        }
        let all = schedule.steps();
        if timesteps.is_empty() {
            let expected = format!("one or more, strictly increasing and less than {all}");
            return Err(Error::config("timesteps", "[]", expected));
        }
        let fits = |i: usize| timesteps[i] < all && (i == 0 || timesteps[i - 1] < timesteps[i]);
        if let Some(i) = (0..timesteps.len()).find(|&i| !fits(i)) {
            let value = format!("{} at index {i}", timesteps[i]);
            let expected = format!("strictly increasing and less than {all}");
            return Err(Error::config("timesteps", value, expected));
        }
        let mut alpha_bar_prev = 1.0;
        let mut updates: Vec<Update> = timesteps
            .iter()
            .map(|&t| {
                let update = solver.update(t, schedule.alpha_bars()[t], alpha_bar_prev);
                alpha_bar_prev = schedule.alpha_bars()[t];
                update
            })
            .collect();
        updates.reverse();
        Ok(Self { diffusion: diffusion.clone(), updates, clip: false, first: 0 })
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
    /// # use ddpm::{Diffusion, Sampler, Solver, from_fn};
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

    /// The timesteps in the order of sampling, which is decreasing.
    pub fn timesteps(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.updates.iter().map(|update| update.t)
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
        denoiser: &impl Denoiser,
        shape: impl Into<Shape>,
        seed: u64,
        device: &Device,
    ) -> Result<Tensor> {
        let mut x = None;
        for step in self.steps(denoiser, shape, seed, device)? {
            x = Some(step?.x);
        }
        let x = x.ok_or_else(|| Error::config("timesteps", "[]", "one or more"))?;
        Ok(clamp(&x, -1.0, 1.0)?)
    }

    /// The sampling loop as an iterator, to observe it or to stop early. `x` of the last step is the image, which is
    /// not clamped.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use ddpm::{Diffusion, Sampler, Solver, from_fn};
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
    pub fn steps<'a, D: Denoiser>(
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
    /// At each timestep `t` that adds noise, the loop calls `z(t)` for standard normals of the shape of `x_T`, such
    /// as those of [`noise`](Self::noise). Deterministic DDIM adds no noise. Steps are computed in the dtype of
    /// `x_T`, even if the network has another dtype.
    ///
    /// # Errors
    /// Returns an error if `start` is a scalar or not of a floating-point dtype. The iterator returns
    /// - the errors of the denoiser and of `z`;
    /// - an error if the result of either has another shape than `x_T`, or no floating-point dtype;
    /// - [`Error::NonFiniteSample`] if a prediction or a sample is infinite or NaN. On the CPU the step in which this
    ///   occurs returns the error. On other devices each check would wait for the device, so the last step returns
    ///   the error.
    pub fn steps_from<'a, D: Denoiser>(
        &'a self,
        denoiser: &'a D,
        start: Tensor,
        z: impl FnMut(usize) -> Result<Tensor> + 'a,
    ) -> Result<Steps<'a, D>> {
        if start.rank() == 0 {
            return Err(no_batch("the start"));
        }
        check_float("dtype of the start", &start)?;
        let mut looks = Looks::default();
        looks.at("the start", self.updates[0].t, &start)?;
        Ok(Steps { sampler: self, denoiser, x: start, z: Box::new(z), next: 0, looks })
    }
}

fn no_batch(what: &'static str) -> Error {
    let expected = "(batch, ...), such as (16, 1, 28, 28)".to_string();
    Error::Shape { what, found: vec![], expected }
}

fn check_float(field: &'static str, x: &Tensor) -> Result<()> {
    if x.dtype().is_float() {
        return Ok(());
    }
    Err(Error::config(field, x.dtype().as_str(), "a floating-point dtype"))
}

/// Checks the result of a denoiser or a source of noise for a sample `x`, and converts it to the dtype of `x`.
fn like(x: &Tensor, found: &Tensor, [what, dtype]: [&'static str; 2]) -> Result<Tensor> {
    if found.dims() != x.dims() {
        let expected = format!("{:?}, that of the sample", x.dims());
        return Err(Error::Shape { what, found: found.dims().to_vec(), expected });
    }
    check_float(dtype, found)?;
    Ok(found.to_dtype(x.dtype())?)
}

/// Detects values that are not finite: at once on the CPU, and on other devices by results that stay on the device
/// until they are read once.
#[derive(Default)]
struct Looks {
    /// The name of the tensor, its timestep, and the result of the check.
    unread: Vec<(&'static str, usize, Tensor)>,
}

impl Looks {
    fn at(&mut self, what: &'static str, t: usize, x: &Tensor) -> Result<()> {
        let found = finiteness(&x.detach())?;
        self.unread.push((what, t, found));
        if x.device().is_cpu() { self.read() } else { Ok(()) }
    }

    /// # Errors
    /// Returns an error that names the first tensor that is not finite.
    fn read(&mut self) -> Result<()> {
        for (what, t, found) in self.unread.drain(..) {
            if !found.to_dtype(DType::F32)?.to_scalar::<f32>()?.is_finite() {
                return Err(Error::NonFiniteSample { what, t });
            }
        }
        Ok(())
    }
}

/// Draws standard normals for images, beginning with number `first`.
fn draw(
    purpose: Purpose,
    step: u64,
    first: u32,
    shape: &Shape,
    seed: u64,
    device: &Device,
) -> Result<Tensor> {
    if shape.rank() == 0 {
        return Err(no_batch("sample"));
    }
    Noise::new(seed).normal(purpose, step, first, shape.dims(), device)
}

type NoiseSource<'a> = dyn FnMut(usize) -> Result<Tensor> + 'a;

/// The sampling loop; see [`Sampler::steps`]. The first error ends it.
pub struct Steps<'a, D> {
    sampler: &'a Sampler,
    denoiser: &'a D,
    x: Tensor,
    z: Box<NoiseSource<'a>>,
    next: usize,
    looks: Looks,
}

impl<D> fmt::Debug for Steps<'_, D> {
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
pub struct Step {
    /// The number of steps before this one.
    pub index: usize,
    /// The timestep at which this step began.
    pub t: usize,
    /// The sample after the step, which is less noisy than at `t`. After the last step it is the image. Shape and
    /// dtype are those of `x_T`.
    pub x: Tensor,
    /// The image that the network predicted from the sample before the step, clipped if the sampler clips. It has the
    /// same shape.
    pub x_0: Tensor,
}

impl<D: Denoiser> Steps<'_, D> {
    fn step(&mut self) -> Result<Step> {
        let (sampler, x, index) = (self.sampler, &self.x, self.next);
        let update = sampler.updates[index];
        let t = Tensor::from_vec(vec![update.t as u32; x.dim(0)?], x.dim(0)?, x.device())?;
        let names = ["the denoiser's output", "dtype of the denoiser's output"];
        let output = like(x, &self.denoiser.forward(x, &t)?, names)?;
        self.looks.at(names[0], update.t, &output)?;
        let mut x_0 = sampler.diffusion.x_0(x, &output, update.alpha_bar)?;
        if sampler.clip {
            x_0 = clamp(&x_0, -1.0, 1.0)?;
        }
        let mut next = combine(&x_0, update.x_0, x, update.x_t)?;
        if update.z != 0.0 {
            let z = like(x, &(self.z)(update.t)?, ["z", "dtype of z"])?;
            next = combine(&next, 1.0, &z, update.z)?;
        }
        self.looks.at("the sample", update.t, &next)?;
        if index + 1 == sampler.updates.len() {
            self.looks.read()?;
        }
        Ok(Step { index, t: update.t, x: next.detach(), x_0: x_0.detach() })
    }
}

impl<D: Denoiser> Iterator for Steps<'_, D> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.sampler.updates.len() {
            return None;
        }
        let step = self.step();
        match &step {
            Ok(step) => {
                self.x = step.x.clone();
                self.next += 1;
            }
            // An error ends the loop: the next x is unknown.
            Err(_) => self.next = self.sampler.updates.len(),
        }
        Some(step)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.sampler.updates.len() - self.next;
        (left, Some(left))
    }
}

impl<D: Denoiser> ExactSizeIterator for Steps<'_, D> {}
