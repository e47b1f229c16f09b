use candle_core::Device;

use crate::precision::Precision;

/// The device, the size and the kind of a pass.
pub(crate) struct Place<'a> {
    pub device: &'a Device,
    pub precision: Precision,
    /// The number of images.
    pub batch: usize,
    /// True if a backward pass follows.
    pub recording: bool,
    /// True if the weights never change.
    pub fixed: bool,
    /// True if packed weights are not kept for the next pass.
    pub repack: bool,
}
