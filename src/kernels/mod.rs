//! The heavy operations, behind one seam: networks call these functions and know nothing of how
//! they are computed.
//!
//! Feature maps are channels-last in here, contiguous (batch, height, width, channels): a
//! convolution is then a matrix product over pixels, and a normalisation reads memory in order.
//! Weights keep PyTorch's layouts, which are those of the files.
//!
//! Each operation has a reference composition of plain candle operations, which runs wherever
//! there is no kernel for it and is the oracle for the kernels' values and gradients.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor};

pub use cpu::Activation;
pub(crate) use cpu::*;

/// (batch, channels, height, width) to (batch, height, width, channels).
pub(crate) fn to_channels_last(images: &Tensor) -> Result<Tensor> {
    images.permute((0, 2, 3, 1))?.contiguous()
}

/// (batch, height, width, channels) to (batch, channels, height, width).
pub(crate) fn to_channels_first(maps: &Tensor) -> Result<Tensor> {
    maps.permute((0, 3, 1, 2))?.contiguous()
}
