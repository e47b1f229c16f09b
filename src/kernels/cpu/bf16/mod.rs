//! Products of bf16 operands, summed in f32.

#[cfg(target_arch = "x86_64")]
mod amx;
mod emulated;
pub(crate) mod operands;
#[cfg(target_arch = "x86_64")]
mod pairs;
pub(crate) mod unit;
