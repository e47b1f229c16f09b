use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::backend;
use crate::denoiser::{Condition, Denoiser, Output};
use crate::error::{Error, Result};

/// Guidance: predictions that are further away from a baseline than those of the network. Ho and Salimans 2022.
///
/// In classifier-free guidance, the baseline is the prediction of the same network without a class.
/// [`Autoguidance`] has another baseline. For a prediction `e` and its baseline `b`, the sampler uses
///
/// ```text
/// b + scale (e - b)
/// ```
///
/// A `scale` of 2 here is a `w` of 1 in the paper, whose equation 6 adds `w (e - b)` to `e`. Guidance evaluates the
/// network for twice as many images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Guidance {
    /// The factor of the difference; at least 0. With 1 the prediction is that of the network.
    pub scale: f64,
    /// From 0 to 1: the weight of the guided prediction, rescaled to the standard deviation of `e` in each image, in
    /// the result. It prevents images with too much contrast at a large `scale`. Lin et al. 2024, equations 15 and 16.
    #[serde(default)]
    pub rescale: f64,
    /// The first and the last timestep with guidance. `None` guides at every timestep. Guidance at high noise reduces
    /// variety, and at low noise it has little effect. Kynkäänniemi et al. 2024.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<(usize, usize)>,
}

impl Guidance {
    /// Creates guidance of this scale at every timestep, without rescaling.
    pub const fn new(scale: f64) -> Self {
        Self { scale, rescale: 0.0, interval: None }
    }

    /// Sets the weight of the rescaled prediction.
    #[must_use]
    pub const fn rescale(self, rescale: f64) -> Self {
        Self { rescale, ..self }
    }

    /// Sets the first and the last timestep with guidance.
    #[must_use]
    pub const fn interval(self, first: usize, last: usize) -> Self {
        Self { interval: Some((first, last)), ..self }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// Returns an error that names the first invalid field, its value and the allowed values.
    pub fn validate(&self) -> Result<()> {
        if !(self.scale >= 0.0 && self.scale.is_finite()) {
            return Err(Error::config("guidance.scale", self.scale, "finite, at least 0"));
        }
        if !(0.0..=1.0).contains(&self.rescale) {
            return Err(Error::config("guidance.rescale", self.rescale, "from 0 to 1"));
        }
        match self.interval {
            Some((first, last)) if first > last => {
                let expected = format!("at most the last timestep, which is {last}");
                Err(Error::config("guidance.interval", first, expected))
            }
            _ => Ok(()),
        }
    }

    /// Returns whether the network is guided at this time.
    pub(super) fn applies(&self, t: f64) -> bool {
        self.scale != 1.0
            && self.interval.is_none_or(|(first, last)| (first as f64..=last as f64).contains(&t))
    }

    /// Computes the guided prediction from a prediction and its baseline.
    pub(super) fn combine(&self, prediction: &Tensor, baseline: &Tensor) -> Result<Tensor> {
        let backend = backend::of(prediction);
        let guided = backend.combine(prediction, self.scale, baseline, 1.0 - self.scale)?;
        if self.rescale == 0.0 {
            return Ok(guided);
        }
        let (wanted, found) = (deviations(prediction)?, deviations(&guided)?);
        // An image without contrast cannot be rescaled. It stays as it is.
        let flat = found.eq(0f64)?.to_dtype(found.dtype())?;
        let ratio = ((wanted * (1.0 - &flat)?)? + &flat)?.div(&(&found + &flat)?)?;
        let factor = ((ratio * self.rescale)? + (1.0 - self.rescale))?;
        Ok(guided.broadcast_mul(&factor)?)
    }
}

/// Computes the standard deviation of each image: (batch, 1, ...).
fn deviations(x: &Tensor) -> Result<Tensor> {
    let flat = x.flatten_from(1)?;
    let deviations = flat.broadcast_sub(&flat.mean_keepdim(1)?)?.sqr()?.mean(1)?.sqrt()?;
    let dims: Vec<usize> =
        x.dims().iter().enumerate().map(|(i, &n)| if i == 0 { n } else { 1 }).collect();
    Ok(deviations.reshape(dims)?)
}

/// A network with another one, such as a smaller or less trained one, as the baseline of its [`Guidance`]. Karras et
/// al. 2024, "Guiding a diffusion model with a bad version of itself".
///
/// It needs no classes. If there are some, both networks see them.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ddpm::nn::from_fn;
/// use ddpm::sample::{Autoguidance, Guidance};
/// use ddpm::{Diffusion, Sampler, Solver};
///
/// let strong = from_fn(|x_t: &Tensor, _t: &Tensor| Ok((x_t * 0.9)?));
/// let weak = from_fn(|x_t: &Tensor, _t: &Tensor| Ok((x_t * 0.8)?));
/// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 10)?.guidance(Guidance::new(1.5))?;
/// let guided = Autoguidance::new(strong, weak);
/// let images = sampler.sample(&guided, (2, 1, 8, 8), 0, &Device::Cpu)?;
/// assert_eq!(images.dims(), [2, 1, 8, 8]);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Autoguidance<S, W> {
    strong: S,
    weak: W,
}

impl<S: Denoiser, W: Denoiser> Autoguidance<S, W> {
    /// Creates the denoiser `strong` with the baseline `weak`. Both predict the same quantity of the same process.
    pub fn new(strong: S, weak: W) -> Self {
        Self { strong, weak }
    }
}

impl<S: Denoiser, W: Denoiser> Denoiser for Autoguidance<S, W> {
    fn denoise(&self, x_t: &Tensor, t: &Tensor, condition: &Condition) -> Result<Output> {
        self.strong.denoise(x_t, t, condition)
    }

    fn classes(&self) -> Option<u32> {
        self.strong.classes()
    }

    fn no_class(&self) -> Option<u32> {
        self.strong.no_class()
    }

    fn denoise_with_baseline(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
    ) -> Result<[Output; 2]> {
        let output = self.strong.denoise(x_t, t, condition)?;
        let condition = if self.weak.classes().is_some() { condition } else { &Condition::None };
        Ok([output, self.weak.denoise(x_t, t, condition)?])
    }
}
