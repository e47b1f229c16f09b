use candle_core::{DType, Tensor};

use crate::backend;
use crate::error::{Error, Result};

/// Detects values that are not finite. On the CPU they are detected immediately. On other devices the results of
/// the checks stay on the device, and are read once.
#[derive(Default)]
pub(super) struct FiniteCheck {
    /// The name of the tensor, its timestep, and the result of the check.
    unread: Vec<(&'static str, f64, Tensor)>,
}

impl FiniteCheck {
    /// Checks a tensor, named `what`, of the timestep `t`.
    ///
    /// # Errors
    /// On the CPU, returns an error if a value is not finite.
    pub fn add(&mut self, what: &'static str, t: f64, x: &Tensor) -> Result<()> {
        let found = backend::of(x).finiteness(&x.detach())?;
        self.unread.push((what, t, found));
        if backend::reading_waits(x.device()) { Ok(()) } else { self.read() }
    }

    /// # Errors
    /// Returns an error that names the first tensor that is not finite.
    pub fn read(&mut self) -> Result<()> {
        for (what, t, found) in self.unread.drain(..) {
            if !found.to_dtype(DType::F32)?.to_scalar::<f32>()?.is_finite() {
                return Err(Error::NonFiniteSample { what, t });
            }
        }
        Ok(())
    }
}
