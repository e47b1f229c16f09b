//! The network: `TimeEmbedding`, `ResBlock`, `UNet` and their parts.
//!
//! Public `forward`s take images (batch, channels, height, width); between the parts, feature maps
//! stay channels-last, as [`kernels`](crate::kernels) wants them.

mod attention;
mod denoiser;
mod network;
mod res_block;
mod time_embedding;
mod unet;
mod unet_config;

use candle_core::DType;
use candle_nn::VarBuilder;

use crate::{Error, Result};

pub(crate) use denoiser::backward_by_autograd;
pub use denoiser::{Denoiser, from_fn};
pub use network::{Network, Parameters};
pub(crate) use network::{missing, open_regular, read_regular, tensors_of};
pub use res_block::ResBlock;
pub use time_embedding::TimeEmbedding;
pub use unet::UNet;
pub use unet_config::UNetConfig;

/// The dtype of the weights that come from `vb`.
///
/// # Errors
/// Unless it is f32 or f64: in half precision candle's sums on the CPU stay in half precision, where
/// 300 ones make 256.
fn weights_dtype(vb: &VarBuilder) -> Result<DType> {
    match vb.dtype() {
        dtype @ (DType::F32 | DType::F64) => Ok(dtype),
        dtype => Err(Error::config("dtype", dtype.as_str(), "f32 or f64")),
    }
}
