#![deny(missing_docs)]
//! Denoising diffusion models.

mod data;
mod error;

pub use data::ImageSource;
pub use error::{Error, Result};
