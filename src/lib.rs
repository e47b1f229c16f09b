//! Denoising diffusion models.
#![deny(missing_docs)]

pub mod data;
mod denoiser;
mod diffusion;
mod error;
mod kernels;
mod network;
mod nn;
mod noise;
mod sampler;
mod schedule;
mod train;

pub use data::{ImageSource, Images};
pub use denoiser::{Denoiser, from_fn};
pub use diffusion::{Diffusion, Prediction};
pub use error::{Error, Result};
pub use network::{Network, Parameters};
pub use nn::{ResBlock, TimeEmbedding, UNet, UNetConfig};
pub use noise::Dropout;
pub use sampler::{Sampler, Solver, Step, Steps, Variance};
pub use schedule::NoiseSchedule;
pub use train::{
    AdamConfig, AdamW, Checkpoint, Ema, EmaConfig, Metrics, Observer, TrainConfig, Trainer, Update,
    WeightDecay, clip_grad_norm,
};
