//! The operations of networks, of the optimiser and of the process. Networks call them independently of how
//! they are computed.
//!
//! - [`op`] defines each operation for every device: its sizes, its settings, and what is added to its output.
//! - [`mod@reference`] composes each operation of candle operations. It is the oracle of the kernels' tests,
//!   and the fallback if there is no kernel.
//! - [`cpu`] and `cuda` contain the kernels.
//! - [`autograd`] applies the operations to candle tensors, differentiable by candle.
//! - `suite` tests every implementation of every operation against [`mod@reference`].
//!
//! Feature maps are channels-last, contiguous (batch, height, width, channels): a convolution is then a matrix
//! product over pixels, and a normalisation reads memory in order. Weights have PyTorch's layouts, in memory
//! as in files.

mod autograd;
pub(crate) mod cpu;
pub(crate) mod cuda;
// Only the kernels for CUDA devices are compiled at run time.
#[allow(dead_code)]
mod disk_cache;
pub(crate) mod op;
mod reference;
mod slices;
#[cfg(test)]
mod suite;
#[cfg(test)]
pub(crate) mod tests;

pub(crate) use autograd::{attention, conv2d, group_norm, linear, modulated_group_norm};
pub(crate) use cpu::adam::{AdamStep, follow, sum_of_squares};
pub(crate) use cpu::isa::{Isa, check_limit};
pub(crate) use cpu::muon::MuonStep;
pub(crate) use cpu::pixels::{
    add_values, all_finite, clamp_values, losses, squared_errors, weighted_sum,
};
pub(crate) use reference::layout::{to_channels_first, to_channels_last};
pub(crate) use reference::linear::activated;
pub(crate) use reference::pixels::{average_pixels, upsample_nearest_2x};
pub(crate) use slices::{on_cpu_in_f32, same_storage, with_values, with_values_mut};
