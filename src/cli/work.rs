//! Work that shows its progress, and ends at Ctrl-C.

use std::ops::ControlFlow;

use candle_core::Device;

use super::result::{Interrupted, Result};
use crate::observe::StopOnSignal;

/// Work that shows its progress, and ends at Ctrl-C.
pub(super) struct Work<'a> {
    pub stop: StopOnSignal,
    pub device: &'a Device,
}

impl Work<'_> {
    /// Returns `Continue` until the user stops the program.
    pub fn flow(&self) -> ControlFlow<()> {
        if self.stop.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// # Errors
    /// Returns [`Interrupted`] if the work is to end.
    pub fn check(&self) -> Result<()> {
        if self.stop.is_stopped() { Err(Interrupted.into()) } else { Ok(()) }
    }
}
