//! Evaluation: many images from a sampler, features of images, metrics that compare sets of images by their features,
//! and the bits per dimension of images.
//!
//! An [`Extractor`] computes [`Features`], which all metrics share: [`Inception`] those of published figures. The
//! chapter on [evaluation](crate::docs::evaluation) has the source of each metric, and the number of images that it
//! needs.
//!
//! | metric | item |
//! | --- | --- |
//! | Fréchet distance (FID) | [`Statistics`], [`Gaussian`] |
//! | kernel distance (KID) | [`KernelDistance`] |
//! | sliced Wasserstein distance (MIND) | [`SlicedDistance`] |
//! | Inception Score | [`inception_score`] |
//! | precision, recall, density, coverage | [`Prdc`] |
//! | nearest training images, memorisation | [`Nearest`] |
//! | balance of classes | [`Balance`] |
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

mod balance;
mod cifar;
mod digits;
mod distances;
mod efficientnet;
mod estimate;
mod extractor;
mod factor;
mod features;
mod frechet;
mod generator;
mod groups;
mod inception;
mod inception_score;
mod kernel;
mod likelihood;
mod manifold;
mod memorisation;
mod npz;
mod product;
mod singular;
mod sliced;
mod statistics;
mod statistics_file;
mod weights;

pub use balance::Balance;
pub use cifar::{CifarClassifier, CifarNetwork};
pub use digits::DigitClassifier;
pub use efficientnet::EfficientNet;
pub use estimate::Estimate;
pub use extractor::{Extractor, ExtractorIdentity, extract};
pub use features::{Classes, Features};
pub use frechet::Gaussian;
pub use generator::{Drawn, Generator, bytes};
pub use inception::{Inception, Resizing};
pub use inception_score::inception_score;
pub use kernel::{KernelDistance, kernel_mmd2};
pub use likelihood::{
    Bound, Evaluated, Integrator, Likelihood, ProbabilityFlow, Term, Trace, VariationalBound,
};
pub use manifold::Prdc;
pub use memorisation::Nearest;
pub use sliced::SlicedDistance;
pub use statistics::Statistics;
