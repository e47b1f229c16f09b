//! The kernels for CUDA devices. They are compiled when the program first uses them, from the sources beside
//! these files, and cached on disk. Matrix products use cuBLASLt, except in linear layers, in attention in bf16 and f16,
//! and in gradients of convolutions with few channels. With the feature `cudnn`, convolutions use cuDNN.
//!
//! The values of maps are f32, bf16 or f16 ([`Element`]). The kernels compute in f32 or f64, and each sum has
//! a fixed order. Everything is launched on candle's stream. Only functions that read from the device wait for
//! it.
//!
//! Each directory holds one operation: its `.cu` source, and the functions that launch its kernels. The files
//! in this directory are shared by the operations.

#![cfg(feature = "cuda")]

mod adam;
mod attention;
mod blas;
mod capture;
mod compiler;
mod conv;
mod device;
#[cfg(feature = "cudnn")]
mod dnn;
mod element;
mod kernel;
mod launch;
mod linear;
mod maps;
mod memory;
mod modules;
mod muon;
mod norm;
mod owned;
mod pass_graph;
mod pixels;
mod random;
mod replay;
mod staging;
mod step_graph;
#[cfg(test)]
mod tests;
mod weights;

pub(crate) use adam::{UpdateSettings, Updater, WeightUpdate};
pub(crate) use attention::{Attention, AttentionResults};
pub(crate) use conv::Convolution;
pub(crate) use device::{Gpu, upload};
pub(crate) use element::Element;
pub(crate) use linear::{
    InputGradient, LinearLayer, WeightGradient, add_class, sinusoids, sums_by_class,
    weight_gradients,
};
pub(crate) use maps::{
    Added, ColumnSums, ImageSums, add, concatenate, images_to_map, map_to_images, repeat_pixels,
    split, sum_pixels,
};
pub(crate) use memory::Memory;
pub(crate) use norm::{Norm, NormGradients, NormStatistics};
#[cfg(test)]
pub(crate) use pass_graph::is_captured;
pub(crate) use pass_graph::repeated;
pub(crate) use pixels::{add_to, are_plain, clamp, combine, mix, squared_error};
pub(crate) use random::{dropout_mask, normals};
pub(crate) use step_graph::StepGraph;
pub(crate) use weights::{Network, PassWeights};
