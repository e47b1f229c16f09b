#![deny(missing_docs)]
//! Denoising diffusion models.

pub mod data;
mod error;

pub use data::{ImageSource, Images};
pub use error::{Error, Result};
