//! The network: `TimeEmbedding`, `ResBlock`, `UNet` and their parts.
//!
//! Public `forward`s take images (batch, channels, height, width); between the parts, feature maps
//! stay channels-last, as [`kernels`](crate::kernels) wants them.

mod attention;
mod layers;
mod res_block;
mod time_embedding;
mod unet;
mod unet_config;

pub use res_block::ResBlock;
pub use time_embedding::TimeEmbedding;
pub use unet::UNet;
pub use unet_config::UNetConfig;
