//! The network of the Python package denoising-diffusion-pytorch, and its files.
//!
//! It is computed on candle tensors, and convolutions and linear layers by the crate's kernels.

mod blocks;
mod config;
mod file;
mod unet;

pub use config::LucidrainsConfig;
pub use file::LucidrainsFile;
pub use unet::LucidrainsUNet;
