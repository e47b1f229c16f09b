use candle_core::{DType, Device, Tensor, WithDType};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Dynamic thresholding of the predicted image. Saharia et al. 2022, [Imagen](https://arxiv.org/abs/2205.11487),
/// section 2.3.
///
/// For each image, `s` is the quantile `ratio` of the absolute values of all its pixels, but at least 1 and at most
/// `max`. The image is clipped to [-s, s] and divided by `s`. Clipping alone would saturate many pixels of an image
/// that strong guidance made too bright.
///
/// `max` is not in the paper, but in diffusers. With `max` 1, thresholding is clipping to [-1, 1].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DynamicThreshold {
    /// Above 0, up to 1, for example 0.995. A quantile between two pixels is interpolated linearly.
    pub ratio: f64,
    /// Finite and at least 1. `f64::MAX` is no limit.
    pub max: f64,
}

impl DynamicThreshold {
    /// # Errors
    /// Returns an error if a setting is not in its range.
    pub(super) fn check(self) -> Result<Self> {
        if !(self.ratio > 0.0 && self.ratio <= 1.0) {
            return Err(Error::config("ratio of the threshold", self.ratio, "above 0, up to 1"));
        }
        if !(1.0..f64::INFINITY).contains(&self.max) {
            let expected = "finite and at least 1";
            return Err(Error::config("max of the threshold", self.max, expected));
        }
        Ok(self)
    }

    /// Computes the thresholded images (batch, ...), which take no gradient. An image does not depend on the others.
    ///
    /// The pixels are computed on the CPU, because candle sorts only short rows on a GPU.
    pub(super) fn apply(self, x_0: &Tensor) -> Result<Tensor> {
        match x_0.dtype() {
            DType::F64 => self.apply_as::<f64>(x_0),
            DType::F32 => self.apply_as::<f32>(x_0),
            half => Ok(self.apply_as::<f32>(&x_0.to_dtype(DType::F32)?)?.to_dtype(half)?),
        }
    }

    fn apply_as<T: WithDType>(self, x_0: &Tensor) -> Result<Tensor> {
        let mut pixels = x_0.detach().flatten_all()?.to_device(&Device::Cpu)?.to_vec1::<T>()?;
        let size = pixels.len() / x_0.dim(0)?.max(1);
        for image in pixels.chunks_mut(size.max(1)) {
            let mut sizes: Vec<f64> = image.iter().map(|x| x.to_f64().abs()).collect();
            let s = quantile(&mut sizes, self.ratio).clamp(1.0, self.max);
            for x in image {
                *x = T::from_f64((x.to_f64() / s).clamp(-1.0, 1.0));
            }
        }
        let images = Tensor::from_vec(pixels, x_0.shape(), &Device::Cpu)?;
        Ok(images.to_device(x_0.device())?)
    }
}

/// The quantile of one or more values, of which none is NaN, interpolated linearly between its two neighbours.
fn quantile(values: &mut [f64], ratio: f64) -> f64 {
    let position = ratio * (values.len() - 1) as f64;
    let (_, &mut low, above) = values.select_nth_unstable_by(position as usize, f64::total_cmp);
    let high = above.iter().copied().min_by(f64::total_cmp).unwrap_or(low);
    low + position.fract() * (high - low)
}
