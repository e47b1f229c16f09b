use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::Tensor;
use rayon::prelude::*;

use super::request::{Evaluated, Request, Use, host, report};
use crate::data::Batch;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::Diffusion;
use crate::process::bound::{decoder, divergence};
use crate::process::learned::LogVariances;
use crate::sample::Variance;

/// Computes the variational bound of images in bits per dimension: an upper bound on the bits per value of a lossless
/// code whose model is the network. Ho et al. 2020, equation 5.
///
/// The bound is the sum of these terms, each computed in f64:
///
/// - the prior term: the divergence of `q(x_T | x_0)` from standard normals,
/// - for each timestep `t` from 1: the divergence of `p(x_{t-1} | x_t)`, the network's step, from the posterior
///   `q(x_{t-1} | x_t, x_0)`, at one random `x_t`,
/// - the decoder term at timestep 0: the negative logarithm of the probability of each pixel's byte. A byte is an
///   interval of width 2/255 around its value in [-1, 1]. The first and the last interval are infinite (equation 13).
///
/// At timestep 0, `Variance::Beta` and `Variance::Posterior` have the posterior variance of timestep 1, as in the code
/// of Nichol and Dhariwal 2021. The variance of the posterior itself is 0 there.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use ddpm::Diffusion;
/// use ddpm::data::{Batch, Images};
/// use ddpm::eval::{Bound, VariationalBound};
/// use ddpm::nn::from_fn;
/// use ddpm::sample::Variance;
/// # use candle_core::{Device, Tensor};
///
/// # let unet = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
/// # let images = Images::new(vec![128; 5 * 16], (1, 4, 4))?;
/// let seed = 0;
/// let evaluator = VariationalBound::new(&Diffusion::ddpm(), Variance::Posterior, seed)?.sampled(8)?;
/// let mut bounds = Vec::new();
/// for first in [0, 3] {
///     let batch = Batch::read(&images, first..5.min(first + 3), &Device::Cpu)?;
///     let bits = evaluator.evaluate(&unet, batch, |_| Ok(ControlFlow::Continue(())))?;
///     bounds.extend(bits.expect("not stopped"));
/// }
/// println!("{} bits per dimension", Bound::mean(&bounds)?.total);
/// # assert_eq!(bounds.len(), 5);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct VariationalBound {
    diffusion: Diffusion,
    variance: Variance,
    /// The timesteps of the reverse process, and the `alpha_bar` of each.
    timesteps: Vec<usize>,
    bars: Vec<f64>,
    sampled: Option<usize>,
    clip: bool,
    seed: u64,
}

/// The variational bound of an image, or the mean of several.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Bound {
    /// The bound in bits per dimension. It is the sum of the prior term and all other terms, or, with
    /// [`VariationalBound::sampled`], an estimate without bias.
    pub total: f64,
    /// The prior term in bits per dimension. No weight of the network changes it.
    pub prior: f64,
    /// The terms in increasing order of their timesteps. The first is the decoder term.
    pub terms: Vec<Term>,
}

/// A term of the variational bound.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Term {
    /// The timestep at which the network was evaluated.
    pub t: usize,
    /// The term in bits per dimension.
    pub bits: f64,
    /// The mean squared error of the predicted `x_0`, clipped if the evaluation clips.
    pub x_0_mse: f64,
    /// The mean squared error of the noise that follows from the predicted `x_0`. It is the SNR times `x_0_mse`.
    pub noise_mse: f64,
}

impl Bound {
    /// The decoder term in bits per dimension.
    pub fn decoder(&self) -> f64 {
        self.terms.first().map_or(0.0, |term| term.bits)
    }

    /// Computes the mean over images. A term is the mean over those images that have a term of its timestep.
    ///
    /// # Errors
    /// Returns an error if there are no images.
    pub fn mean(images: &[Self]) -> Result<Self> {
        if images.is_empty() {
            return Err(Error::config("number of images", 0, "at least 1"));
        }
        let mean = |of: fn(&Self) -> f64| images.iter().map(of).sum::<f64>() / images.len() as f64;
        let mut by_timestep: BTreeMap<usize, Vec<Term>> = BTreeMap::new();
        for term in images.iter().flat_map(|image| &image.terms) {
            by_timestep.entry(term.t).or_default().push(*term);
        }
        let terms = by_timestep.into_iter().map(|(t, terms)| {
            let mean =
                |of: fn(&Term) -> f64| terms.iter().map(of).sum::<f64>() / terms.len() as f64;
            let (x_0_mse, noise_mse) = (mean(|term| term.x_0_mse), mean(|term| term.noise_mse));
            Term { t, bits: mean(|term| term.bits), x_0_mse, noise_mse }
        });
        Ok(Self {
            total: mean(|image| image.total),
            prior: mean(|image| image.prior),
            terms: terms.collect(),
        })
    }
}

impl VariationalBound {
    /// Creates the evaluation of all timesteps of a process, with this variance of the reverse process. `seed`
    /// determines the random numbers.
    ///
    /// # Errors
    /// Returns the errors of [`Diffusion::validate`].
    pub fn new(diffusion: &Diffusion, variance: Variance, seed: u64) -> Result<Self> {
        diffusion.validate()?;
        let (timesteps, bars) =
            (0..diffusion.schedule().steps(), diffusion.schedule().alpha_bars());
        Ok(Self {
            diffusion: diffusion.clone(),
            variance,
            timesteps: timesteps.collect(),
            bars: bars.to_vec(),
            sampled: None,
            clip: false,
            seed,
        })
    }

    /// Sets the timesteps of the reverse process, in increasing order. It is the process from which
    /// [`Sampler::with_timesteps`](crate::Sampler::with_timesteps) samples: its betas are those of Nichol and Dhariwal
    /// 2021, equation 19. Its bound is complete, with fewer terms, and usually larger than that of all timesteps.
    ///
    /// # Errors
    /// Returns an error if the list is empty, not strictly increasing, or contains a timestep that the schedule does
    /// not have.
    pub fn timesteps(self, timesteps: &[usize]) -> Result<Self> {
        let bars = timesteps.iter().map(|&t| self.diffusion.schedule().alpha_bar(t));
        let bars: Vec<f64> = bars.collect::<Result<_>>()?;
        if timesteps.is_empty() || !timesteps.is_sorted_by(|a, b| a < b) {
            let expected = "one or more, strictly increasing";
            return Err(Error::config("timesteps", format!("{timesteps:?}"), expected));
        }
        let evaluation = Self { timesteps: timesteps.to_vec(), bars, ..self };
        match evaluation.sampled {
            Some(count) => evaluation.sampled(count),
            None => Ok(evaluation),
        }
    }

    /// Sets the number of terms that are evaluated per image besides the decoder term. Without it, all are. The total
    /// is then an estimate without bias: timesteps are uniform within equal parts of the process, so that each term
    /// has the same probability. Every image has its own timesteps.
    ///
    /// # Errors
    /// Returns an error if `count` is not from 1 to the number of terms.
    pub fn sampled(self, count: usize) -> Result<Self> {
        let all = self.timesteps.len() - 1;
        if !(1..=all).contains(&count) {
            let expected = format!("from 1 to {all}, the number of terms besides the decoder term");
            return Err(Error::config("sampled terms", count, expected));
        }
        Ok(Self { sampled: Some(count), ..self })
    }

    /// Sets whether the predicted `x_0` is clipped to [-1, 1] before it is used. The default is off. Nichol and
    /// Dhariwal's code clips, which usually makes the bound smaller.
    #[must_use]
    pub fn clip_denoised(self, clip: bool) -> Self {
        Self { clip, ..self }
    }

    /// The number of evaluations of the network for a batch.
    pub fn evaluations(&self) -> usize {
        self.sampled.map_or(self.timesteps.len(), |count| count + 1)
    }

    /// Computes the bound of each image of a batch (batch, ...) of values in [-1, 1], and calls `seen` after each
    /// evaluation of the network. Returns `None` if `seen` returns `Break`.
    ///
    /// `x_t` is computed in the dtype of the images. The random numbers of an image depend on the seed and on its
    /// position, which begins at [`Batch::first`]. With the U-Net on the CPU the bits of a result do not depend on the
    /// batch. The network receives the classes of the images, if it has [classes](Denoiser::classes).
    ///
    /// # Errors
    /// Returns an error if the images are not a batch of floating-point numbers, if they are not finite, if the network
    /// does not learn the variance, but `Variance::Learned` is set, or if an output of the network does not have the
    /// shape of the images or is not finite. Returns the errors of the network and of `seen`.
    pub fn evaluate(
        &self,
        denoiser: &(impl Denoiser + ?Sized),
        batch: impl Into<Batch>,
        mut seen: impl FnMut(Evaluated) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Vec<Bound>>> {
        let request = Request::new(denoiser, batch.into(), self.seed)?;
        let x_0 = host(&request.images)?;
        if !x_0.iter().all(|x| x.is_finite()) {
            return Err(Error::NonFiniteSample { what: "an image", t: 0.0 });
        }
        let steps: Vec<Vec<usize>> = (0..request.count).map(|k| self.steps(&request, k)).collect();
        let mut terms = vec![Vec::new(); request.count];
        let total = self.evaluations();
        for done in 0..total {
            let at: Vec<usize> = steps.iter().map(|steps| steps[done]).collect();
            for (terms, term) in terms.iter_mut().zip(self.terms(denoiser, &request, &x_0, &at)?) {
                terms.push(term);
            }
            if !report(&mut seen, done + 1, total)? {
                return Ok(None);
            }
        }
        let images = terms.into_iter().zip(x_0.chunks(request.values));
        Ok(Some(images.map(|(terms, x_0)| self.bound(terms, x_0)).collect()))
    }

    /// The bound of an image with these terms.
    fn bound(&self, terms: Vec<Term>, x_0: &[f64]) -> Bound {
        let bar = self.bars[self.bars.len() - 1];
        let log_variance = libm::log1p(-bar);
        let term = |x: &f64| divergence(bar.sqrt() * x, log_variance, 0.0).0;
        let prior = bits(x_0.iter().map(term).sum(), x_0.len());
        let sum: f64 = terms.iter().skip(1).map(|term| term.bits).sum();
        // Without sampling, the share is exactly 1.
        let share = (self.bars.len() - 1) as f64 / (terms.len() - 1).max(1) as f64;
        let decoder = terms.first().map_or(0.0, |term| term.bits);
        Bound { total: prior + decoder + share * sum, prior, terms }
    }

    /// The steps of the reverse process that are evaluated for image `k`, in increasing order.
    fn steps(&self, request: &Request, k: usize) -> Vec<usize> {
        let all = self.timesteps.len() - 1;
        let Some(count) = self.sampled else { return (0..=all).collect() };
        let mut stream = request.stream(Use::Terms, 0, k);
        let part = all as f64 / count as f64;
        let steps =
            (0..count).map(|i| 1 + (((i as f64 + stream.uniform()) * part) as usize).min(all - 1));
        [0].into_iter().chain(steps).collect()
    }

    /// Computes a term of each image, at its step `at` of the reverse process.
    fn terms(
        &self,
        denoiser: &(impl Denoiser + ?Sized),
        request: &Request,
        x_0: &[f64],
        at: &[usize],
    ) -> Result<Vec<Term>> {
        let timesteps: Vec<u32> = at.iter().map(|&i| self.timesteps[i] as u32).collect();
        let eps = request.filled(|k, eps| {
            request.stream(Use::Noise, timesteps[k].into(), k).fill_normal(eps);
        })?;
        let t = Tensor::from_vec(timesteps, request.count, request.images.device())?;
        let x_t = self.diffusion.q_sample(&request.images, &t, &eps)?;
        let output = denoiser.denoise(&x_t, &t, &request.condition)?;
        let prediction = host(&request.checked(&output.prediction)?)?;
        let v = match (self.variance, &output.variance) {
            (Variance::Learned, Some(variance)) => Some(host(&request.checked(variance)?)?),
            (Variance::Learned, None) => {
                let expected = "beta or posterior, because the network does not learn the variance";
                return Err(Error::config("variance", "learned", expected));
            }
            _ => None,
        };
        let x_t = host(&x_t)?;
        let image = |(k, &i): (usize, &usize)| {
            let values = k * request.values..(k + 1) * request.values;
            let v = v.as_ref().map(|v| &v[values.clone()]);
            self.term(i, [&x_0[values.clone()], &x_t[values.clone()], &prediction[values]], v)
        };
        at.par_iter().enumerate().map(image).collect()
    }

    /// Computes the term of an image at step `i` from `x_0`, `x_t` and the prediction of the network.
    fn term(&self, i: usize, images: [&[f64]; 3], v: Option<&[f64]>) -> Result<Term> {
        let [x_0, x_t, prediction] = images;
        let bar = self.bars[i];
        let before = i.checked_sub(1).map_or(1.0, |before| self.bars[before]);
        let [p, q] = self.diffusion.x_0_factors(bar);
        let variances = LogVariances::of_chain(&self.bars, i);
        // The mean of q(x_{t-1} | x_t, x_0) depends on x_0 by this factor. Both means have the same x_t.
        let gain = before.sqrt() * (1.0 - bar / before) / (1.0 - bar);
        let (mut sum, mut squares) = (0.0, 0.0);
        for (j, &x) in x_0.iter().enumerate() {
            let predicted = p * x_t[j] + q * prediction[j];
            let error = x - if self.clip { predicted.clamp(-1.0, 1.0) } else { predicted };
            let log_variance = match (v, self.variance) {
                (Some(v), _) => variances.at(v[j]),
                (None, Variance::Beta) if i > 0 => variances.most,
                (None, _) => variances.least,
            };
            sum += match i {
                0 => decoder(x, error, log_variance).0,
                _ => divergence(gain * error, variances.least, log_variance).0,
            };
            squares += error * error;
        }
        let (t, bits) = (self.timesteps[i], bits(sum, x_0.len()));
        if !bits.is_finite() || !squares.is_finite() {
            return Err(Error::NonFiniteSample { what: "the denoiser's output", t: t as f64 });
        }
        let x_0_mse = squares / x_0.len() as f64;
        Ok(Term { t, bits, x_0_mse, noise_mse: bar / (1.0 - bar) * x_0_mse })
    }
}

/// Converts nats of an image to bits per value.
fn bits(nats: f64, values: usize) -> f64 {
    nats / (std::f64::consts::LN_2 * values as f64)
}
