use std::iter;
use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};

use crate::data::Images;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::sample::{Sampler, Step};

/// The number of images that share a seed.
const SEEDED: usize = 100;

/// Draws many images as bytes, with the memory of a few at a time.
///
/// An image depends only on the seed and its position, not on the number of images. The first hundred images are those
/// that the sampler draws from `seed`. Each further hundred has its own seed, which is derived from `seed`.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use candle_core::{Device, Tensor};
/// use ddpm::eval::Generator;
/// use ddpm::data::Dataset;
/// use ddpm::nn::from_fn;
/// use ddpm::{Diffusion, Sampler, Solver};
///
/// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
/// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 5)?;
/// let generator = Generator::new(&sampler, (1, 8, 8), 0, &Device::Cpu);
/// let steps = generator.steps(150);
/// let images = generator.draw(&denoiser, 150, |drawn| {
///     println!("step {} of {steps}", drawn.done);
///     Ok(ControlFlow::Continue(()))
/// })?;
/// assert_eq!(images.map(|images| images.len()), Some(150));
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Generator {
    sampler: Sampler,
    image_shape: (usize, usize, usize),
    seed: u64,
    first: usize,
    device: Device,
}

/// A sampling step of one part of the images.
#[derive(Debug, Clone, Copy)]
pub struct Drawn<'a> {
    /// The position of the first image of the part.
    pub first: usize,
    /// The index of the sampling step within its part, from 0.
    pub index: usize,
    /// Whether this is the last step of its part, after which the samples are images.
    pub is_last: bool,
    /// The samples of the part after the step: (count, channels, height, width).
    pub x: &'a Tensor,
    /// The number of sampling steps so far, of [`Generator::steps`] in total.
    pub done: usize,
}

impl Generator {
    /// Creates a generator of images of `image_shape` (channels, height, width).
    pub fn new(
        sampler: &Sampler,
        image_shape: (usize, usize, usize),
        seed: u64,
        device: &Device,
    ) -> Self {
        Self { sampler: sampler.clone(), image_shape, seed, first: 0, device: device.clone() }
    }

    /// Sets the position of the first image to draw, so that any images of a seed can be drawn alone. The default is 0.
    /// The sampler's condition is that of the images to draw.
    #[must_use]
    pub fn first_image(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// The number of images that are drawn at a time, a divisor of [`SEEDED`]. A GPU needs many to be fully used.
    fn part(&self) -> usize {
        if self.device.is_cpu() { 20 } else { SEEDED }
    }

    /// The number of sampling steps in which `count` images are drawn.
    pub fn steps(&self, count: usize) -> usize {
        self.parts(count).count() * self.sampler.timesteps().len()
    }

    /// The first image and the number of images of each part. The images of a part share a seed.
    fn parts(&self, count: usize) -> impl Iterator<Item = (usize, usize)> {
        let (part, mut next, end) = (self.part(), self.first, self.first.saturating_add(count));
        iter::from_fn(move || {
            let len = (part - next % part).min(end - next);
            let first = next;
            next += len;
            (len > 0).then_some((first, len))
        })
    }

    /// Draws images, and calls `seen` after each sampling step. Returns `None` if `seen` returns `Break`.
    ///
    /// # Errors
    /// Returns an error if there is not enough memory, and the errors of the sampler and of `seen`.
    pub fn draw(
        &self,
        denoiser: &(impl Denoiser + ?Sized),
        count: usize,
        mut seen: impl FnMut(Drawn<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Images>> {
        let (channels, height, width) = self.image_shape;
        let Some(mut pixels) = reserved(&[channels, count, height, width]) else {
            let expected = "small enough for the pixels of all images to be in memory";
            return Err(Error::config("count", count, expected));
        };
        let flow = self.visit(denoiser, count, |drawn| {
            let flow = seen(drawn)?;
            if drawn.is_last && flow.is_continue() {
                pixels.extend(bytes(drawn.x)?);
            }
            Ok(flow)
        })?;
        match flow {
            ControlFlow::Continue(()) => Images::new(pixels, self.image_shape).map(Some),
            ControlFlow::Break(()) => Ok(None),
        }
    }

    /// Draws images without keeping them: `seen` is called after each sampling step, and receives the images of a part
    /// with its [last](Drawn::is_last) step. Any number of images has the memory of one part. Returns `Break` if `seen`
    /// does.
    ///
    /// # Errors
    /// Returns the errors of the sampler and of `seen`.
    pub fn visit(
        &self,
        denoiser: &(impl Denoiser + ?Sized),
        count: usize,
        mut seen: impl FnMut(Drawn<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<ControlFlow<()>> {
        let (channels, height, width) = self.image_shape;
        let mut done = 0;
        for (first, len) in self.parts(count) {
            let shape = (len, channels, height, width);
            let seed = match first / SEEDED {
                0 => self.seed,
                hundred => SplitMix64(self.seed).nth(hundred as u64 - 1),
            };
            let sampler = self.sampler.part(first - self.first, len)?;
            let sampler = sampler.first_image((first % SEEDED) as u32);
            let steps = sampler.timesteps().len();
            for step in sampler.steps(denoiser, shape, seed, &self.device)? {
                let Step { index, x, .. } = &step?;
                done += 1;
                let drawn = Drawn { first, index: *index, is_last: index + 1 == steps, x, done };
                if seen(drawn)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Converts the values of samples to bytes: -1 becomes 0, and 1 becomes 255. Values outside [-1, 1], which samples
/// have during sampling, are clamped.
///
/// # Errors
/// Returns an error if a value is not finite.
pub fn bytes(samples: &Tensor) -> Result<Vec<u8>> {
    let values: Vec<f32> = samples.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let byte = |value: f32| match value.is_finite() {
        // `as` saturates.
        true => Ok(((value + 1.0) * 127.5).round() as u8),
        false => Err(Error::config("samples", value, "finite to be drawn")),
    };
    values.into_iter().map(byte).collect()
}

/// The generator of the seeds. Steele et al. 2014.
struct SplitMix64(u64);

impl SplitMix64 {
    /// The number after `n` others.
    fn nth(self, n: u64) -> u64 {
        let state = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(n.wrapping_add(1)));
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
