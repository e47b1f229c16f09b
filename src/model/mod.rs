//! Networks: `TimeEmbedding`, `ResBlock`, `UNet`, `UNet2D`, `LucidrainsUNet` and their parts, and their weights by name.
//!
//! Public `forward`s take images (batch, channels, height, width); between the parts, feature maps stay channels-last.

mod attention;
pub(crate) mod diffusers;
mod image_size;
mod lucidrains;
mod network;
mod openai;
mod parameters;
mod pytorch;
mod res_block;
pub(crate) mod tensor_file;
mod time_embedding;
mod unet;
mod unet2d;
mod unet2d_blocks;
mod unet2d_config;
mod unet_config;

pub use attention::Attention;
pub use image_size::ImageSize;
pub use lucidrains::{LucidrainsConfig, LucidrainsFile, LucidrainsUNet};
pub use network::Architecture;
pub use openai::{AttentionHeads, OpenAi};
pub use parameters::Parameters;
pub use res_block::ResBlock;
pub use time_embedding::TimeEmbedding;
pub use unet::UNet;
pub use unet_config::UNetConfig;
pub use unet2d::UNet2D;
pub use unet2d_config::{DownBlockType, Resampling, TimeConditioning, UNet2DConfig, UpBlockType};
