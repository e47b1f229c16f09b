use candle_nn::VarBuilder;
use serde::{Serialize, de::DeserializeOwned};

use crate::denoiser::Trainable;
use crate::error::Result;

/// The configuration of a network. A checkpoint stores it, and builds the network from it.
///
/// [`UNetConfig`](crate::UNetConfig) implements this trait, and so does the configuration of your own network:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Conv2d, Conv2dConfig, Linear, Module, VarBuilder, conv2d, linear};
/// use ddpm::nn::{Condition, Output, Trainable};
/// use ddpm::nn::{Architecture, Parameters};
/// use ddpm::{Denoiser, Result, TimeEmbedding};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct SmallConfig {
///     channels: usize,
/// }
///
/// struct Small {
///     embedding: TimeEmbedding,
///     time: Linear,
///     convolution: Conv2d,
/// }
///
/// impl Architecture for SmallConfig {
///     const KIND: &'static str = "small";
///     type Model = Small;
///
///     fn build(&self, vb: VarBuilder) -> Result<Small> {
///         let channels = self.channels;
///         let same_size = Conv2dConfig { padding: 1, ..Default::default() };
///         Ok(Small {
///             embedding: TimeEmbedding::new(16, vb.pp("embedding"))?,
///             time: linear(16, channels, vb.pp("time"))?,
///             convolution: conv2d(channels, channels, 3, same_size, vb.pp("convolution"))?,
///         })
///     }
/// }
///
/// impl Denoiser for Small {
///     fn denoise(&self, x_t: &Tensor, t: &Tensor, _: &Condition) -> Result<Output> {
///         let time = self.time.forward(&self.embedding.forward(t)?)?; // (batch, channels)
///         let x_t = x_t.broadcast_add(&time.unsqueeze(2)?.unsqueeze(3)?)?;
///         Ok(Output::new(self.convolution.forward(&x_t)?))
///     }
/// }
///
/// impl Trainable for Small {}
///
/// # fn main() -> Result<()> {
/// let weights = Parameters::new(0, DType::F32, &Device::Cpu);
/// let small = weights.build(&SmallConfig { channels: 3 })?;
/// let x_t = Tensor::zeros((2, 3, 8, 8), DType::F32, &Device::Cpu)?;
/// let output = small.forward(&x_t, &Tensor::new(&[0u32, 999], &Device::Cpu)?)?;
/// assert_eq!(output.dims(), x_t.dims());
/// assert!(weights.vars().contains_key("convolution.weight"));
/// # Ok(())
/// # }
/// ```
pub trait Architecture: Serialize + DeserializeOwned {
    /// The name of this kind of network in a checkpoint. Reading a checkpoint with another name is an error.
    const KIND: &'static str;

    /// The beginnings of the names of the first and the last layer, and of embeddings. In a new run, Adam updates their
    /// matrices if [Muon](crate::train::MuonConfig::adam) updates the others. The default are the names of
    /// [`UNet`](crate::UNet).
    const OUTER_LAYERS: &'static [&'static str] = &["init_conv.", "out_conv.", "class_embedding."];

    /// The type of the network.
    type Model: Trainable;

    /// Builds the network. Each weight is requested from `vb` under its own name.
    ///
    /// This is called once for training, and again for other weights in the same network, such as the averaged
    /// weights. The same configuration must therefore always request the same names and shapes.
    ///
    /// # Errors
    /// Returns an error if the configuration is not valid, or if `vb` cannot supply a weight.
    fn build(&self, vb: VarBuilder) -> Result<Self::Model>;
}
