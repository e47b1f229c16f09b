//! Evaluation: many images from a sampler, the Fréchet distance between the features of two sets of images, and the bits
//! per dimension of images.
//!
//! The distance compares sets of images by the [`Statistics`] of their features. The caller supplies the features:
//! numbers per image that a classifier or another network computes. With the features of Inception, the distance is the
//! FID (Heusel et al. 2017).
//!
//! ```
//! use ddpm::eval::Statistics;
//!
//! // Two features per image. Statistics need not see all images at once.
//! let mut real = Statistics::new(2);
//! real.add(&[0.0, 0.0, 2.0, 0.0, 0.0, 2.0, 2.0, 2.0])?;
//! let mut generated = Statistics::new(2);
//! generated.add(&[1.0, 0.0, 3.0, 0.0])?;
//! generated.add(&[1.0, 2.0, 3.0, 2.0])?;
//! // The spread is the same, and the means are 1 apart.
//! assert!((real.frechet_distance(&generated)? - 1.0).abs() < 1e-9);
//! # Ok::<(), ddpm::Error>(())
//! ```
//!
//! [`VariationalBound`] and [`ProbabilityFlow`] compute the number of bits per value that images need with a network as
//! their model: as an upper bound, and by the density of the probability-flow ODE.

mod frechet;
mod generator;
mod likelihood;
mod statistics;
mod symmetric;

pub use frechet::Gaussian;
pub use generator::{Drawn, Generator, bytes};
pub use likelihood::{
    Bound, Evaluated, Integrator, Likelihood, ProbabilityFlow, Term, Trace, VariationalBound,
};
pub use statistics::Statistics;
