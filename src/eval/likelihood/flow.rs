use std::ops::ControlFlow;

use candle_core::{Tensor, Var};

use super::request::{Evaluated, Request, Use, host, report};
use super::trace::Trace;
use crate::backend;
use crate::data::Batch;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::Diffusion;
use crate::process::bound::HALF_BIN;
use crate::sample::timesteps_of;

/// Computes the likelihood of images by the probability-flow ODE. Song et al. 2021, [Score-Based Generative Modeling
/// through SDEs](https://arxiv.org/abs/2011.13456), section 4.3 and equation 39.
///
/// The ODE leads from the images, as samples of timestep 0, to standard normals at the last timestep. In the log-SNR
/// `l`, with `a = sqrt(alpha_bar)`, it is `dx/dl = a (x_0 - a x) / 2` for the predicted `x_0`. The logarithm of the
/// density of an image is that of its normal, plus the integral of the divergence of the right-hand side. The steps have
/// equal distances of the [log-SNR](crate::NoiseSchedule::log_snr), so the network is evaluated at times between
/// timesteps, too.
///
/// The divergence follows from candle's gradient of the network's output with respect to its input. A [`Model`], such as
/// the [`UNet`](crate::UNet), has this gradient on every device. A closure has it if it is composed of candle's
/// operations. An output without a gradient is an error, even if it is constant.
///
/// [`Model`]: crate::nn::Model
///
/// ```
/// use std::ops::ControlFlow;
///
/// use candle_core::{DType, Device, Tensor};
/// use ddpm::eval::{ProbabilityFlow, Trace};
/// use ddpm::nn::from_fn;
/// use ddpm::{Diffusion, NoiseSchedule};
/// use ddpm::process::Prediction;
///
/// // If the data is standard normal noise, so is every x_t, and its velocity is 0.
/// let diffusion = Diffusion::new(NoiseSchedule::cosine(1000)?, Prediction::Velocity);
/// let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok((x_t - x_t)?));
/// let images = Tensor::zeros((2, 1, 2, 2), DType::F32, &Device::Cpu)?;
/// let flow = ProbabilityFlow::new(&diffusion, 4, 0)?.trace(Trace::Exact)?.dequantised(false);
/// let found = flow.evaluate(&denoiser, images, |_| Ok(ControlFlow::Continue(())))?;
/// let expected = -0.5 * 4.0 * std::f64::consts::TAU.ln();
/// assert!((found.expect("not stopped")[0].log_density - expected).abs() < 1e-9);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ProbabilityFlow {
    diffusion: Diffusion,
    steps: usize,
    integrator: Integrator,
    trace: Trace,
    dequantised: bool,
    seed: u64,
}

/// A solver of an ODE with steps of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Integrator {
    /// Heun's method of order 2, with two evaluations of the network per step.
    Heun,
    /// The classical Runge-Kutta method of order 4, with four evaluations of the network per step, and the default.
    #[default]
    RungeKutta,
}

impl Integrator {
    /// The stages of a step. A stage is evaluated at the share `.0` of the step, after a step of this size along the
    /// slope of the previous stage. Its slope has the weight `.1` in the result.
    fn stages(self) -> &'static [(f64, f64)] {
        match self {
            Self::Heun => &[(0.0, 0.5), (1.0, 0.5)],
            Self::RungeKutta => {
                &[(0.0, 1.0 / 6.0), (0.5, 1.0 / 3.0), (0.5, 1.0 / 3.0), (1.0, 1.0 / 6.0)]
            }
        }
    }
}

/// The likelihood of an image.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Likelihood {
    /// Bits per dimension: the negative logarithm of the density per value, for intervals of width 2/255 around the
    /// 256 pixel values. With uniform dequantisation, its mean is an upper bound on the bits of the image itself.
    pub bits: f64,
    /// The natural logarithm of the density of the image, dequantised if the evaluation dequantises, in units of
    /// [-1, 1].
    pub log_density: f64,
}

impl ProbabilityFlow {
    /// Creates the evaluation with this number of steps of the integrator. `seed` determines the random numbers.
    ///
    /// # Errors
    /// Returns an error if `steps` is 0, if the schedule has one timestep or ends without signal, where the log-SNR is
    /// infinite, and the errors of [`Diffusion::validate`].
    pub fn new(diffusion: &Diffusion, steps: usize, seed: u64) -> Result<Self> {
        diffusion.validate()?;
        let schedule = diffusion.schedule();
        if steps == 0 {
            return Err(Error::config("integration steps", steps, "at least 1"));
        }
        if schedule.steps() < 2 {
            return Err(Error::config("schedule steps", schedule.steps(), "at least 2 for an ODE"));
        }
        if schedule.terminal_snr() == 0.0 {
            return Err(Error::config("terminal SNR", 0, "above 0, so that the log-SNR is finite"));
        }
        Ok(Self {
            diffusion: diffusion.clone(),
            steps,
            integrator: Integrator::default(),
            trace: Trace::Rademacher(1),
            dequantised: true,
            seed,
        })
    }

    /// Sets the solver of the ODE. The default is [`Integrator::RungeKutta`].
    #[must_use]
    pub fn integrator(self, integrator: Integrator) -> Self {
        Self { integrator, ..self }
    }

    /// Sets the computation of the divergence. The default is one vector of random signs.
    ///
    /// # Errors
    /// Returns an error for a mean over no vectors.
    pub fn trace(self, trace: Trace) -> Result<Self> {
        Ok(Self { trace: trace.check()?, ..self })
    }

    /// Sets whether each value receives a uniform random number from -1/255 to 1/255, so that images of 256 pixel values
    /// become continuous. The default is `true`. Without it, the density of an image is unbounded: a model can
    /// concentrate it at the pixel values.
    #[must_use]
    pub fn dequantised(self, dequantised: bool) -> Self {
        Self { dequantised, ..self }
    }

    /// The number of evaluations of the network for a batch.
    pub fn evaluations(&self) -> usize {
        self.steps * self.integrator.stages().len()
    }

    /// Computes the likelihood of each image of a batch (batch, ...) of values in [-1, 1], and calls `seen` after each
    /// step. Returns `None` if `seen` returns `Break`.
    ///
    /// Steps are computed in the dtype of the images, and the logarithm of the density in f64. The random numbers of an
    /// image depend on the seed and on its position, which begins at [`Batch::first`]. With the U-Net on the CPU the
    /// bits of a result do not depend on the batch. The network receives the classes of the images, if it has
    /// [classes](Denoiser::classes).
    ///
    /// # Errors
    /// Returns an error if the images are not a batch of floating-point numbers, if the output of the network does not
    /// have their shape, or if candle cannot differentiate it with respect to its input. Returns an error if a result is
    /// not finite, and the errors of the network and of `seen`.
    pub fn evaluate(
        &self,
        denoiser: &(impl Denoiser + ?Sized),
        batch: impl Into<Batch>,
        mut seen: impl FnMut(Evaluated) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Vec<Likelihood>>> {
        let request = Request::new(denoiser, batch.into(), self.seed)?;
        let schedule = self.diffusion.schedule();
        let (first, last) =
            (schedule.log_snr(0.0)?, schedule.log_snr((schedule.steps() - 1) as f64)?);
        let step = (last - first) / self.steps as f64;
        let mut x = self.start(&request)?;
        let mut integrals = vec![0.0; request.count];
        for done in 0..self.steps {
            let (start, mut next, mut slope) = (x.clone(), x.clone(), None);
            for &(share, weight) in self.integrator.stages() {
                let at = match &slope {
                    Some(slope) => backend::of(&start).combine(&start, 1.0, slope, share * step)?,
                    None => start.clone(),
                };
                let log_snr = first + (done as f64 + share) * step;
                let (found, divergences) = self.slope(denoiser, &request, &at, log_snr)?;
                next = backend::of(&next).combine(&next, 1.0, &found, weight * step)?;
                for (integral, divergence) in integrals.iter_mut().zip(divergences) {
                    *integral += weight * step * divergence;
                }
                slope = Some(found);
            }
            x = next;
            if !report(&mut seen, done + 1, self.steps)? {
                return Ok(None);
            }
        }
        let prior = |z: &f64| -0.5 * (z * z + libm::log(std::f64::consts::TAU));
        let ends = host(&x)?;
        let images = ends.chunks(request.values).zip(integrals).map(|(end, integral)| {
            let log_density = end.iter().map(prior).sum::<f64>() + integral;
            if !log_density.is_finite() {
                let t = (schedule.steps() - 1) as f64;
                return Err(Error::NonFiniteSample { what: "the log-density", t });
            }
            let nats = -log_density / request.values as f64 - libm::log(2.0 * HALF_BIN);
            Ok(Likelihood { bits: nats / std::f64::consts::LN_2, log_density })
        });
        images.collect::<Result<_>>().map(Some)
    }

    /// The images at which the ODE begins.
    fn start(&self, request: &Request) -> Result<Tensor> {
        if !self.dequantised {
            return Ok(request.images.clone());
        }
        let noise = request.filled(|k, noise| {
            let mut stream = request.stream(Use::Dequantisation, 0, k);
            noise.iter_mut().for_each(|value| *value = (2.0 * stream.uniform() - 1.0) as f32);
        })?;
        backend::of(&noise).combine(&request.images, 1.0, &noise, HALF_BIN)
    }

    /// Computes the right-hand side of the ODE, and its divergence for each image.
    fn slope(
        &self,
        denoiser: &(impl Denoiser + ?Sized),
        request: &Request,
        x: &Tensor,
        log_snr: f64,
    ) -> Result<(Tensor, Vec<f64>)> {
        let schedule = self.diffusion.schedule();
        let [low, high] = [schedule.steps() - 1, 0].map(|t| schedule.log_snr(t as f64));
        // The time that the network receives.
        let t = f64::from(schedule.time_of(log_snr.clamp(low?, high?))? as f32);
        let bar = schedule.alpha_bar_at(t)?;
        let x = Var::from_tensor(x)?;
        let t = timesteps_of(&x, t)?;
        let output = denoiser.denoise(&x, &t, &request.condition)?.prediction;
        let output = request.checked(&output)?;
        let traces = self.trace.of(&output, &x, request)?;
        // The right-hand side with x_0 = p x + q output.
        let [p, q] = self.diffusion.x_0_factors(bar);
        let signal = bar.sqrt();
        let (of_x, of_output) = (0.5 * signal * (p - signal), 0.5 * signal * q);
        let (x, output) = (x.as_detached_tensor(), output.detach());
        let slope = backend::of(&x).combine(&x, of_x, &output, of_output)?;
        let divergence = |trace| of_x * request.values as f64 + of_output * trace;
        Ok((slope, traces.into_iter().map(divergence).collect()))
    }
}
