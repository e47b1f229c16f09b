//! Interpolation of the random numbers of two images.

use candle_core::{DType, Device, Shape, Tensor};

use super::noise::{draw_planned, draw_prior};
use super::plan::PlannedStep;
use crate::error::{Error, Result};

/// The two ends of an [interpolation](super::Sampler::interpolate).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Ends {
    /// The first image of each of two seeds. Their `x_T`, and the noise of every step, are interpolated. With every
    /// solver, the ends are thus the images of these seeds.
    Seeds([u64; 2]),
    /// Two `x_T`, of shape (2, ...), such as the noise of two pictures by [`Sampler::invert`](super::Sampler::invert).
    /// The two `x_T` are interpolated. With a [deterministic](super::Sampler::is_deterministic) solver, the ends are
    /// the images that it samples from these `x_T`.
    Noise(Tensor),
}

/// An interpolation: an image per weight.
#[derive(Debug, Clone)]
pub(super) struct Interpolation {
    ends: Ends,
    weights: Vec<f64>,
}

impl Interpolation {
    /// # Errors
    /// Returns an error if a weight is not in [0, 1], or if the noise is not that of two images.
    pub fn new(ends: Ends, weights: &[f64]) -> Result<Self> {
        if let Some(weight) = weights.iter().find(|weight| !(0.0..=1.0).contains(*weight)) {
            return Err(Error::config("weight", weight, "from 0 to 1"));
        }
        match &ends {
            Ends::Noise(noise) if noise.dims().first() != Some(&2) => {
                Err(Error::shape("the noise of the ends", noise.dims(), "(2, ...)"))
            }
            _ => Ok(Self { ends, weights: weights.to_vec() }),
        }
    }

    /// Returns the interpolation of some of the images.
    pub fn narrow(&self, first: usize, len: usize) -> Result<Self> {
        let weights = first.checked_add(len).and_then(|end| self.weights.get(first..end));
        let Some(weights) = weights else {
            let expected = format!("at most {}, one for each weight", self.weights.len());
            return Err(Error::config("images of an interpolation", len, expected));
        };
        Ok(Self { ends: self.ends.clone(), weights: weights.to_vec() })
    }

    /// Returns the `x_T` of the images.
    pub fn start(&self, shape: &Shape, device: &Device) -> Result<Tensor> {
        let prior = |seed, one: &Shape| draw_prior(0, one, seed, &Device::Cpu);
        match &self.ends {
            Ends::Seeds(seeds) => self.of(seeds, shape, device, prior),
            Ends::Noise(noise) => {
                let ends = [noise.narrow(0, 0, 1)?, noise.narrow(0, 1, 1)?];
                self.between(ends, shape, device)
            }
        }
    }

    /// Returns the noise of the images in a step, if it is interpolated.
    pub fn noise(
        &self,
        step: &PlannedStep,
        shape: &Shape,
        device: &Device,
    ) -> Option<Result<Tensor>> {
        let Ends::Seeds(seeds) = &self.ends else { return None };
        let noise = |seed, one: &Shape| draw_planned(step, 0, one, seed, &Device::Cpu);
        Some(self.of(seeds, shape, device, noise))
    }

    /// Interpolates what `draw` returns for one image of each seed.
    fn of(
        &self,
        &[a, b]: &[u64; 2],
        shape: &Shape,
        device: &Device,
        draw: impl Fn(u64, &Shape) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let image = shape.dims().get(1..).unwrap_or_default();
        let one = Shape::from([&[1], image].concat());
        self.between([draw(a, &one)?, draw(b, &one)?], shape, device)
    }

    /// # Errors
    /// Returns an error if `shape` is not that of the images.
    fn between(&self, ends: [Tensor; 2], shape: &Shape, device: &Device) -> Result<Tensor> {
        let image = ends[0].dims().get(1..).unwrap_or_default();
        let expected = [&[self.weights.len()], image].concat();
        if shape.dims() != expected {
            let expected =
                format!("{expected:?}: one image for each weight, of the shape of the ends");
            return Err(Error::shape("sample", shape.dims(), expected));
        }
        let [a, b] = ends.map(|end| end.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>());
        let values = spherical(&a?, &b?, &self.weights)?;
        Ok(Tensor::from_vec(values, shape, device)?)
    }
}

/// Spherical interpolation: for each weight `w`, with the angle `c` between `a` and `b`,
///
/// ```text
/// (sin((1 - w) c) a + sin(w c) b) / sin(c)
/// ```
///
/// Shoemake 1985; Song et al. 2021 (DDIM), appendix D.5. Unlike linear interpolation, spherical interpolation keeps the
/// length, and thus the standard deviation of the noise.
///
/// # Errors
/// Returns an error if an end is zero or not finite, or if the ends are opposite.
fn spherical(a: &[f64], b: &[f64], weights: &[f64]) -> Result<Vec<f32>> {
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (norm_a, norm_b) = (norm(a), norm(b));
    if let Some(norm) = [norm_a, norm_b].into_iter().find(|n| !(n.is_finite() && *n > 0.0)) {
        return Err(Error::config("length of the noise of an end", norm, "positive and finite"));
    }
    // Exact for small angles as well, unlike the inverse cosine. Kahan 2006.
    let combined = |sign: f64| -> f64 {
        let values = a.iter().zip(b).map(|(a, b)| a / norm_a + sign * b / norm_b);
        values.map(|x| x * x).sum::<f64>().sqrt()
    };
    let angle = 2.0 * libm::atan2(combined(-1.0), combined(1.0));
    let sine = libm::sin(angle);
    if angle > 1.0 && sine < 1e-6 {
        let expected = "less than pi: opposite ends have no shortest path between them";
        return Err(Error::config("angle of the noise of the ends", angle, expected));
    }
    let factors = |weight: f64| match sine < 1e-6 {
        // The limit, which differs by less than the square of the angle.
        true => [1.0 - weight, weight],
        false => [1.0 - weight, weight].map(|weight| libm::sin(weight * angle) / sine),
    };
    let mut values = Vec::with_capacity(weights.len() * a.len());
    for [of_a, of_b] in weights.iter().map(|&weight| factors(weight)) {
        values.extend(a.iter().zip(b).map(|(a, b)| (of_a * a + of_b * b) as f32));
    }
    Ok(values)
}
