use std::collections::BTreeMap;

use candle_core::Tensor;

use super::adam::check_floating;
use crate::backend::clip_norm;
use crate::error::{Error, Result};

/// Scales all gradients so that their global L2 norm is at most `max_norm`, and returns the norm before clipping. An
/// infinite `max_norm` does not clip. The method is that of PyTorch's `clip_grad_norm_`. Pascanu et al. 2013.
///
/// The norm stays on the device, and nothing is read back.
///
/// # Errors
/// Returns an error if there are no gradients, if one is not of a floating-point dtype, or if `max_norm` is not
/// positive.
pub fn clip_grad_norm(gradients: &mut BTreeMap<String, Tensor>, max_norm: f64) -> Result<Tensor> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::config("max_norm", max_norm, "positive, or infinite not to clip"));
    }
    gradients.iter().try_for_each(|(name, gradient)| check_floating("gradient", name, gradient))?;
    clip_norm(gradients.values_mut().collect(), max_norm)
}
