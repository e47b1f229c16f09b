// The first definition of a Markdown link takes effect. These definitions replace the README's links to files by
// links within rustdoc, and its picture by a copy within the page.
#![doc = include_str!("../docs/images/inline.md")]
//! [process]: crate::docs::process
//! [network]: crate::docs::network
//! [training]: crate::docs::training
//! [sampling]: crate::docs::sampling
//! [reproducibility]: crate::docs::reproducibility
//! [architecture]: crate::docs::architecture
//! [benchmarks]: crate::docs::benchmarks
//!
#![doc = include_str!("../README.md")]
#![deny(missing_docs, unsafe_code)]
#![warn(missing_debug_implementations)]

mod backend;
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
mod denoiser;
#[cfg(any(doc, doctest))]
pub mod docs;
mod engine;
mod error;
pub mod eval;
pub mod files;
#[allow(unsafe_code)]
mod kernels;
mod layers;
mod memory;
mod model;
pub mod nn;
pub mod observe;
#[cfg(feature = "image")]
pub mod pictures;
mod precision;
pub mod process;
mod random;
#[cfg(test)]
mod random_inputs;
pub mod sample;
pub mod train;
mod zip;

/// The version of candle whose tensors and devices are part of this crate's signatures.
pub use {candle_core, candle_nn};

/// The version of `image` whose pictures are part of the signatures of [`pictures`].
#[cfg(feature = "image")]
pub use image;

#[doc(inline)]
pub use denoiser::Denoiser;
#[doc(inline)]
pub use error::{Error, Result};
#[doc(inline)]
pub use model::{ResBlock, TimeEmbedding, UNet, UNetConfig};
#[doc(inline)]
pub use precision::Precision;
#[doc(inline)]
pub use process::{Diffusion, NoiseSchedule};
#[doc(inline)]
pub use sample::{Sampler, Solver};
#[doc(inline)]
pub use train::{Checkpoint, TrainConfig, Trainer};
