//! Convolutions: the algorithms, and the plan that selects one.

pub(crate) mod algorithm;
mod bf16;
pub(crate) mod epilogue;
mod im2col;
mod parts;
pub(crate) mod plan;
#[cfg(test)]
mod tests;
mod winograd;
