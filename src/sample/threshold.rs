use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::backend;
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

    /// Computes the thresholded images (batch, ...). An image does not depend on the others.
    ///
    /// The pixels are read from the device, because candle sorts only short rows on a GPU.
    pub(super) fn apply(self, x_0: &Tensor) -> Result<Tensor> {
        let backend = backend::of(x_0);
        let scaled = |image: usize| {
            let x_0 = x_0.narrow(0, image, 1)?;
            let mut sizes = x_0.detach().flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            sizes.iter_mut().for_each(|x| *x = x.abs());
            let s = quantile(&mut sizes, self.ratio).clamp(1.0, self.max);
            backend.combine(&x_0, 1.0 / s, &x_0, 0.0)
        };
        let images = (0..x_0.dim(0)?).map(scaled).collect::<Result<Vec<_>>>()?;
        backend.clamp(&Tensor::cat(&images, 0)?, -1.0, 1.0)
    }
}

/// The quantile of values, of which none is NaN, interpolated linearly between the two neighbours. That of no values
/// is 0.
fn quantile(values: &mut [f64], ratio: f64) -> f64 {
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let position = ratio * last as f64;
    let (_, &mut low, above) = values.select_nth_unstable_by(position as usize, f64::total_cmp);
    let high = above.iter().copied().min_by(f64::total_cmp).unwrap_or(low);
    low + position.fract() * (high - low)
}
