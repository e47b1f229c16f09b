//! GroupNorm: each group of channels of each image is normalised to mean 0 and variance 1, then each
//! channel is scaled and shifted. Wu and He 2018.
//!
//! A modulated normalisation replaces weight and bias by `weight (1 + scale)` and `bias (1 + scale) + shift`, with a
//! scale and a shift per image and channel: `GroupNorm(x) (1 + scale) + shift`. Dhariwal and Nichol 2021, section 3.1.

use super::activation::Activation;

/// The number of groups of every normalisation of the crate's networks.
pub(crate) const GROUPS: usize = 8;

/// The default of [`NormConfig::eps`], as in PyTorch.
pub(crate) const EPS: f64 = 1e-5;

/// The settings of a normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NormConfig {
    /// Number of groups. It divides the number of channels.
    pub groups: usize,
    /// Number added to the variance.
    pub eps: f64,
    /// Activation applied to the normalised value.
    pub activation: Activation,
}

impl NormConfig {
    /// A normalisation in [`GROUPS`] groups.
    pub(crate) fn new(activation: Activation) -> Self {
        Self { groups: GROUPS, eps: EPS, activation }
    }
}
