//! The heavy operations, behind one seam: networks call these functions and know nothing of how
//! they are computed.
//!
//! Feature maps are channels-last in here, contiguous (batch, height, width, channels): a
//! convolution is then a matrix product over pixels, and a normalisation reads memory in order.
//! Weights keep PyTorch's layouts, which are those of the files.
//!
//! Each operation has a reference composition of plain candle operations, which runs wherever
//! there is no kernel for it and is the oracle for the kernels' values and gradients.

mod adam;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod bf16;
mod conv;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod elementwise;
mod gemm;
mod group_norm;
mod half_conv;
mod linear;
mod maps;
mod patches;
mod process;
mod product;
mod simd;
mod strips;
#[cfg(test)]
mod tests;
mod values;
mod winograd;

use candle_core::{Result, Tensor};

pub(crate) use adam::{AdamStep, sum_of_squares};
pub(crate) use attention::{AttentionSizes, attention};
pub(crate) use bf16::has_bf16_products;
pub(crate) use conv::{Convolution, Weights, Workspace, conv2d, sum_over_batch, sums_by_image};
pub(crate) use group_norm::{Activation, Normalization, Stats, group_norm};
pub(crate) use linear::{linear, linear_forward, linear_input_gradient, linear_weight_gradient};
pub(crate) use maps::{concatenate, scale_maps, split};
pub(crate) use patches::Scale;
#[cfg(feature = "cuda")]
pub(crate) use process::mix;
pub(crate) use process::{
    add_to, add_values, are_plain, clamp, combine, finiteness, squared_error, weighted_sum,
};
pub(crate) use simd::{Isa, check_limit};
pub(crate) use values::{on_cpu_in_f32, same_storage, try_zeros, with_values, with_values_mut};
pub(crate) use winograd::Epilogue;

/// (batch, channels, height, width) to (batch, height, width, channels).
pub(crate) fn to_channels_last(images: &Tensor) -> Result<Tensor> {
    images.permute((0, 2, 3, 1))?.contiguous()
}

/// (batch, height, width, channels) to (batch, channels, height, width).
pub(crate) fn to_channels_first(maps: &Tensor) -> Result<Tensor> {
    maps.permute((0, 3, 1, 2))?.contiguous()
}
