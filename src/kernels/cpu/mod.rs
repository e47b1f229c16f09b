//! The operations on slices in memory, for CPUs.

mod adam;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod bf16;
mod conv;
mod elementwise;
mod gemm;
pub(crate) mod group_norm;
mod half_conv;
mod linear;
mod maps;
mod patches;
mod process;
mod product;
mod simd;
mod strips;
mod values;
mod winograd;

pub(crate) use adam::{AdamStep, sum_of_squares};
pub(crate) use attention::{AttentionSizes, attention};
pub(crate) use bf16::has_bf16_products;
pub(crate) use conv::{Convolution, Weights, Workspace, conv2d, sum_over_batch, sums_by_image};
pub use group_norm::Activation;
pub(crate) use group_norm::{Normalization, Stats, group_norm};
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
