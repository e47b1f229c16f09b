use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::random::Dropout;

/// The inputs of a pass through a network, other than its images.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pass<'a> {
    /// The timesteps (batch). `None` if the network does not need them.
    pub t: Option<&'a Tensor>,
    /// The classes (batch), u32. `None` if the network has no classes.
    pub classes: Option<&'a Tensor>,
    /// The dropout masks of a training pass.
    pub dropout: Option<&'a Dropout>,
}

impl<'a> Pass<'a> {
    /// The timesteps.
    ///
    /// # Errors
    /// Returns an error if the pass has none.
    pub fn timesteps(&self) -> Result<&'a Tensor> {
        self.t.ok_or_else(|| Error::config("timesteps", "none", "given to a time embedding"))
    }

    /// The classes.
    ///
    /// # Errors
    /// Returns an error if the pass has none.
    pub fn classes(&self) -> Result<&'a Tensor> {
        self.classes.ok_or_else(|| Error::config("classes", "none", "given to an embedding"))
    }
}
