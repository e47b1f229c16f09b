//! Sampling: one loop for all solvers.

mod sampler;

pub use sampler::{Sampler, SamplerConfig, Solver, Step, Steps, Variance};
