//! Variations of a picture, interpolation and inpainting, as settings of a sampler.

use candle_core::Tensor;

use super::inpainting::{Known, Resampling};
use super::interpolation::{Ends, Interpolation};
use super::sampler::Sampler;
use super::solver::Solver;
use super::start::Start;
use crate::error::{Error, Result, check_float};

impl Sampler {
    /// Sets a picture whose variations are drawn: SDEdit, Meng et al. 2022, [SDEdit](https://arxiv.org/abs/2108.01073),
    /// section 3.
    ///
    /// Each image starts from the picture, noised to timestep `t = strength T - 1` (rounded) by the forward process
    /// `sqrt(alpha_bar_t) picture + sqrt(1 - alpha_bar_t) eps`. Sampling begins at the largest timestep of this sampler
    /// that is at most `t`, and uses all smaller ones. Image `k` of a seed has the `eps` of its [prior](Self::prior).
    ///
    /// `picture` has the shape of an image, (channels, height, width), and values in [-1, 1]. `strength` is above 0 and
    /// at most 1. With a strength of 1, sampling starts with little of the picture. A strength of 0 would return the
    /// picture.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use ddpm::nn::from_fn;
    /// # use ddpm::{Diffusion, Sampler, Solver};
    /// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
    /// # let picture = Tensor::zeros((1, 8, 8), candle_core::DType::F32, &Device::Cpu)?;
    /// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 50)?.vary(&picture, 0.5)?;
    /// assert_eq!(sampler.timesteps().next(), Some(489.0));
    /// let four = sampler.sample(&denoiser, (4, 1, 8, 8), 0, &Device::Cpu)?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if `strength` is not in its range, and the errors of [`vary_from`](Self::vary_from).
    pub fn vary(self, picture: &Tensor, strength: f64) -> Result<Self> {
        if !(strength > 0.0 && strength <= 1.0) {
            return Err(Error::config("strength", strength, "above 0 and at most 1"));
        }
        let steps = self.settings.diffusion.schedule().steps() as f64;
        let t = (strength * steps).round() - 1.0;
        self.vary_from(picture, t.max(0.0))
    }

    /// Like [`vary`](Self::vary), with a timestep instead of a strength.
    ///
    /// # Errors
    /// Returns an error if `t` is over `T - 1`, if the sampler has no timestep up to `t`, if the picture is not of a
    /// floating-point dtype, or if the sampler already begins at a picture or at an interpolation.
    pub fn vary_from(mut self, picture: &Tensor, t: f64) -> Result<Self> {
        check_float("dtype of the picture", picture.dtype())?;
        let smallest = self.levels.iter().rev().nth(1).map_or(0.0, |level| level.t);
        let largest = (self.settings.diffusion.schedule().steps() - 1) as f64;
        if !(smallest..=largest).contains(&t) {
            let expected = format!(
                "at least {smallest}, the smallest timestep of the sampler, and at most {largest}"
            );
            return Err(Error::config("timestep of the start", t, expected));
        }
        self = self.starting(Start::Picture(picture.clone()))?;
        self.levels.retain(|level| level.t <= t);
        self.planned()
    }

    /// Sets an interpolation between two ends. A batch has one image per weight, from 0 (the first end) to 1 (the
    /// second).
    ///
    /// Noise is interpolated spherically, which keeps its standard deviation (Song et al. 2021, appendix D.5).
    /// [`first_image`](Self::first_image) has no effect. The seed of a batch affects only the noise of the steps with
    /// [`Ends::Noise`].
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use ddpm::nn::from_fn;
    /// # use ddpm::{Diffusion, Sampler, Solver};
    /// use ddpm::sample::Ends;
    /// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
    /// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 5)?;
    /// let path = sampler.clone().interpolate(Ends::Seeds([3, 7]), &[0.0, 0.5, 1.0])?;
    /// let images = path.sample(&denoiser, (3, 1, 8, 8), 0, &Device::Cpu)?;
    /// let second = sampler.sample(&denoiser, (1, 1, 8, 8), 7, &Device::Cpu)?;
    /// let values = |images: Tensor| images.flatten_all()?.to_vec1::<f32>();
    /// assert_eq!(values(images.narrow(0, 2, 1)?)?, values(second)?);
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if a weight is not in [0, 1], if the noise of the ends is not that of two images, or if the
    /// sampler already begins at a picture or at an interpolation. Sampling returns an error if an end is zero or not
    /// finite, or if the ends are opposite.
    pub fn interpolate(self, ends: Ends, weights: &[f64]) -> Result<Self> {
        self.starting(Start::Between(Interpolation::new(ends, weights)?))
    }

    /// Sets the start. A second one is refused: the first may have left out the noisier timesteps that it needs.
    fn starting(mut self, start: Start) -> Result<Self> {
        let set = match self.start {
            Start::Prior => {
                self.start = start;
                return Ok(self);
            }
            Start::Picture(_) => "a picture",
            Start::Between(_) => "an interpolation",
        };
        Err(Error::config("start", set, "noise to set another: a sampler has one start"))
    }

    /// Sets a picture with a known part. Sampling fills the rest: RePaint, Lugmayr et al. 2022,
    /// [RePaint](https://arxiv.org/abs/2201.09865), algorithm 1.
    ///
    /// After each step, the known pixels are replaced by those of the picture, noised to the noise level of the sample:
    ///
    /// ```text
    /// sqrt(alpha_bar) picture + sqrt(1 - alpha_bar) eps
    /// ```
    ///
    /// (equation 8a; line 5 of the algorithm has the variance in place of its root). After the last step, the known
    /// pixels are identical to those of the picture in each bit. `resampling` repeats parts of the steps.
    ///
    /// `picture` has the shape of an image, (channels, height, width), and values in [-1, 1]. `filled` has the same
    /// shape, except for dimensions of 1, such as (1, height, width). Its values are 1 at the pixels to be filled, and
    /// 0 at the known ones.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use ddpm::nn::from_fn;
    /// # use ddpm::{Diffusion, Sampler, Solver};
    /// use ddpm::sample::Resampling;
    /// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
    /// # let picture = Tensor::zeros((1, 2, 2), DType::F32, &Device::Cpu)?;
    /// let filled = Tensor::new(&[[[0u8, 1], [1, 1]]], &Device::Cpu)?;
    /// let resampling = Resampling { jump: 2, count: 3 };
    /// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 5)?;
    /// let sampler = sampler.inpaint(&picture, &filled, resampling)?;
    /// assert_eq!(sampler.evaluations(), 5 + 2 * 2 * 2); // two parts of two steps, twice more
    /// let images = sampler.sample(&denoiser, (4, 1, 2, 2), 0, &Device::Cpu)?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if the solver is neither [`Solver::Ddpm`] nor [`Solver::Ddim`], whose steps need only the
    /// sample. Returns an error if the shapes or dtypes do not fit, if `filled` has other values, or if a setting of
    /// the resampling is not in its range.
    pub fn inpaint(
        mut self,
        picture: &Tensor,
        filled: &Tensor,
        resampling: Resampling,
    ) -> Result<Self> {
        if !matches!(
            self.solver,
            Solver::Ddpm { .. } | Solver::Ddim { .. } | Solver::DdimUnclippedNoise { .. }
        ) {
            let expected = "DDPM or DDIM, whose steps need only the sample, to fill a picture";
            return Err(Error::config("solver", self.solver, expected));
        }
        check_float("dtype of the picture", picture.dtype())?;
        self.settings.known = Some(Known::new(picture, filled)?);
        self.resampling = Some(resampling);
        self.planned()
    }
}
