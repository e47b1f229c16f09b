//! Evaluation: many images from a sampler, and the Fréchet distance between the features of two sets of images.
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

mod frechet;
mod generator;
mod statistics;
mod symmetric;

pub use frechet::Gaussian;
pub use generator::{Drawn, Generator, bytes};
pub use statistics::Statistics;
