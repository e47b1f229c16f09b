//! Sampling: a solver is a plan of stages, and one loop runs every plan.
//!
//! A new solver is one file with its stages, and its variant of `Solver` with a line in `stages` and in `Display`.

mod ancestral;
mod config;
mod ddim;
mod finite;
mod guidance;
mod heun;
mod noise;
mod plan;
mod sampler;
mod solver;
mod spacing;
#[cfg(test)]
mod tests;

pub use ancestral::Variance;
pub use config::SamplerConfig;
pub use guidance::{Autoguidance, Guidance};
pub use sampler::{Sampler, Step, Steps};
pub use solver::Solver;
