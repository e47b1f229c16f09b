//! Networks: layers and blocks, the [`Graph`] of a network, and the [`Model`] that runs it.
//!
//! The chapter [the network](crate::docs::network) describes the crate's U-Net and how to write a custom network.

pub use crate::denoiser::{Condition, Denoiser, Output, OutputGradient, Trainable, from_fn};
pub use crate::engine::{Engine, Graph, Model, Normed};
pub use crate::kernels::op::activation::{Activation, VectorActivation};
pub use crate::kernels::op::conv::{Add, Addends};
pub use crate::layers::{Conv2d, Embedding, GroupNorm, Linear};
pub use crate::model::{
    Architecture, Attention, AttentionHeads, DownBlockType, ImageSize, LucidrainsConfig,
    LucidrainsFile, LucidrainsUNet, OpenAi, Parameters, ResBlock, Resampling, TimeConditioning,
    TimeEmbedding, UNet, UNet2D, UNet2DConfig, UNetConfig, UpBlockType,
};
pub use crate::random::Dropout;
