//! Sampling: a solver is a plan of stages, and one loop runs every plan.
//!
//! A new solver is one file with its stages, and its variant of `Solver` with a line in `stages`, `NAMES` and
//! `Display`.

mod ancestral;
mod config;
mod ddim;
pub(crate) mod diffusers;
mod dpm_solver;
mod edit;
mod edm;
mod exponential;
mod finite;
mod guidance;
mod heun;
mod inpainting;
mod interpolation;
mod inversion;
mod noise;
pub(crate) mod pipeline;
mod plan;
mod sampler;
mod solver;
mod spacing;
mod start;
mod steps;
#[cfg(test)]
mod tests;
mod threshold;
mod unipc;

pub use ancestral::Variance;
pub use config::SamplerConfig;
pub use edm::Churn;
pub use guidance::{Autoguidance, Guidance};
pub use inpainting::Resampling;
pub use interpolation::Ends;
pub use pipeline::DiffusersFolder;
pub use sampler::Sampler;
pub use solver::Solver;
pub use spacing::Spacing;
pub(crate) use steps::timesteps_of;
pub use steps::{Step, Steps};
pub use threshold::DynamicThreshold;
pub use unipc::BFunction;
