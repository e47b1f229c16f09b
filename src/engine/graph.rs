use crate::error::Result;
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear, Sinusoids};

/// A network, written once for every [`Engine`].
///
/// A graph is composed of the layers and blocks of [`nn`](crate::nn). [`Model`](crate::nn::Model) turns it into a
/// [`Denoiser`](crate::Denoiser) with inference, training by the crate's kernels, every
/// [`Precision`](crate::Precision), CUDA graphs and checkpoints. The graph itself needs no code for these:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use ddpm::nn::{Activation, Conv2d, Engine, Graph, GroupNorm, Model, Architecture, ResBlock, TimeEmbedding};
/// use ddpm::nn::Parameters;
/// use ddpm::{Denoiser, Precision, Result};
/// use serde::{Deserialize, Serialize};
///
/// struct Small {
///     time: TimeEmbedding,
///     input: Conv2d,
///     block: ResBlock,
///     norm: GroupNorm,
///     output: Conv2d,
/// }
///
/// impl Graph for Small {
///     fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x_t: &E::Map) -> Result<E::Map> {
///         let time = self.time.run(engine)?;
///         let x = engine.conv(&self.input, x_t)?;
///         let x = self.block.run(engine, &x, &time)?;
///         engine.norm_conv(&self.norm, &self.output, &x)
///     }
/// }
///
/// #[derive(Serialize, Deserialize)]
/// struct SmallConfig {
///     width: usize,
/// }
///
/// impl Architecture for SmallConfig {
///     const KIND: &'static str = "small";
///     type Model = Model<Small>;
///
///     fn build(&self, vb: VarBuilder) -> Result<Model<Small>> {
///         Model::new(Small {
///             time: TimeEmbedding::new(16, vb.pp("time"))?,
///             input: Conv2d::new(3, self.width, 3, vb.pp("input"))?,
///             block: ResBlock::new(self.width, self.width, 16, vb.pp("block"))?,
///             norm: GroupNorm::new(self.width, Activation::Silu, vb.pp("norm"))?,
///             output: Conv2d::new(self.width, 3, 3, vb.pp("output"))?,
///         })
///     }
/// }
///
/// let small = Parameters::new(0, DType::F32, &Device::Cpu).build(&SmallConfig { width: 16 })?;
/// let x_t = Tensor::zeros((2, 3, 8, 8), DType::F32, &Device::Cpu)?;
/// let output = small.forward(&x_t, &Tensor::new(&[0u32, 999], &Device::Cpu)?)?;
/// assert_eq!(output.dims(), x_t.dims());
/// # Ok::<(), ddpm::Error>(())
/// ```
pub trait Graph: Send + Sync {
    /// Computes the output from a feature map of the images `x_t`.
    ///
    /// The engine holds the timesteps and dropout masks of the pass. The same layers must run in every pass: the choice
    /// must not depend on the values of maps or on the batch.
    ///
    /// # Errors
    /// Returns the errors of the engine.
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x_t: &E::Map) -> Result<E::Map>;

    /// Returns whether the output has twice as many channels as the images: first those of the prediction, then those
    /// of the [variance](crate::nn::Output::variance). The default is `false`.
    fn learns_variance(&self) -> bool {
        false
    }

    /// Checks whether the network accepts images with this number of channels, height and width.
    ///
    /// # Errors
    /// Returns an error that states the allowed shape. The default accepts every shape; convolutions return an error if
    /// the channels do not fit.
    fn check_images(&self, channels: usize, height: usize, width: usize) -> Result<()> {
        let _ = (channels, height, width);
        Ok(())
    }
}

/// The operations of networks on feature maps. The crate has two engines. One uses candle tensors: it runs on every
/// device, and candle can differentiate it. The other uses the crate's kernels, with their own backward passes.
///
/// Maps are channels-last, (batch, height, width, channels); a batch of vectors is (batch, 1, 1, length). Every
/// operation returns an error if the shapes of its operands do not fit. `'n` is the lifetime of the network. The trait
/// is sealed: code outside the crate uses engines, but does not implement them.
pub trait Engine<'n>: Sealed {
    /// A feature map.
    type Map: Clone;

    /// Computes a convolution and adds `add` to it.
    ///
    /// # Errors
    /// Returns an error if a shape does not fit.
    fn conv_add(
        &self,
        conv: &'n Conv2d,
        x: &Self::Map,
        add: Add<'_, Self::Map>,
    ) -> Result<Self::Map>;

    /// Computes the convolution of a map that is [normalised](Normed) first, and adds `add`. The normalised map is not
    /// kept for the backward pass.
    ///
    /// # Errors
    /// Returns an error if a shape does not fit, or if the probability of the dropout is not at least 0 and less than
    /// 1.
    fn normed_conv_add(
        &self,
        normed: Normed<'_, 'n, Self::Map>,
        conv: &'n Conv2d,
        x: &Self::Map,
        add: Add<'_, Self::Map>,
    ) -> Result<Self::Map>;

    /// Normalises and activates a map. [`norm_conv_add`](Self::norm_conv_add) takes less memory if one convolution
    /// follows.
    ///
    /// # Errors
    /// Returns an error if a shape does not fit.
    fn norm(&self, norm: &'n GroupNorm, x: &Self::Map) -> Result<Self::Map> {
        self.modulated_norm(norm, x, None)
    }

    /// Normalises a map, multiplies it by `1 + scale` and adds `shift`, then activates it. The vectors `by` hold the
    /// scales of the channels of an image, then their shifts. Dhariwal and Nichol 2021, section 3.1. Without `by`, this
    /// is a [normalisation](Self::norm).
    ///
    /// # Errors
    /// Returns an error if a shape does not fit.
    fn modulated_norm(
        &self,
        norm: &'n GroupNorm,
        x: &Self::Map,
        by: Option<&Self::Map>,
    ) -> Result<Self::Map>;

    /// Applies an activation to a batch of vectors, then a linear layer.
    ///
    /// # Errors
    /// Returns an error if a shape does not fit.
    fn linear(&self, f: VectorActivation, linear: &'n Linear, x: &Self::Map) -> Result<Self::Map>;

    /// Adds to each vector of a batch the vector of its image's class. In passes without a condition, adds the vector
    /// of no class. A network that calls this method has the classes of `embedding`.
    /// # Errors
    /// Returns an error if a shape does not fit. Returns an error in passes without a condition if the embedding has no
    /// vector of no class.
    fn add_class(&self, embedding: &'n Embedding, x: &Self::Map) -> Result<Self::Map>;

    /// Drops whole channels of each image with probability `p` in training passes. In all other passes, returns the map
    /// unchanged. `layer` is the number of this dropout within the network.
    ///
    /// # Errors
    /// Returns an error if `p` is not at least 0 and less than 1.
    fn drop_maps(&self, x: &Self::Map, layer: u16, p: f64) -> Result<Self::Map>;

    /// Drops single values of each image with probability `p` in training passes. In all other passes, returns the map
    /// unchanged. `layer` is the number of this dropout within the network. The mask of an image depends only on the
    /// seed, the step, `layer`, and the position of the image in the batch of the update.
    ///
    /// # Errors
    /// Returns an error if `p` is not at least 0 and less than 1.
    fn drop_values(&self, x: &Self::Map, layer: u16, p: f64) -> Result<Self::Map>;

    /// Halves height and width: each pixel of the output is the mean of two by two pixels.
    ///
    /// # Errors
    /// Returns an error if height or width is odd.
    fn pool(&self, x: &Self::Map) -> Result<Self::Map>;

    /// Doubles height and width: repeats each pixel in both directions.
    ///
    /// # Errors
    /// Returns an error if there is not enough memory.
    fn upsample(&self, x: &Self::Map) -> Result<Self::Map>;

    /// Concatenates the channels of two maps.
    ///
    /// # Errors
    /// Returns an error if batch, height or width differ.
    fn concatenate(&self, a: &Self::Map, b: &Self::Map) -> Result<Self::Map>;

    /// Computes the softmax attention of all pixels to all. The channels of `qkv` hold queries, keys and values side by
    /// side. Each of the three, and the output, is divided into `heads` heads of equal size.
    ///
    /// # Errors
    /// Returns an error if `heads` is 0, or if the number of channels is not a multiple of `3 heads`.
    fn attention(&self, qkv: &Self::Map, heads: usize) -> Result<Self::Map>;

    /// Computes a part of the network: a map from the maps `inputs`, by `part`, which uses no other maps.
    ///
    /// If the model [recomputes](crate::nn::Trainable::set_recompute), the tape of kernels keeps only `inputs` for the
    /// backward pass, which computes the part again. The gradients are the same in each bit. Of nested parts, only the
    /// outermost is computed again. [`ResBlock`](crate::nn::ResBlock) and [`Attention`](crate::nn::Attention) are
    /// parts. Chen et al. 2016.
    ///
    /// # Errors
    /// Returns the errors of `part`.
    fn recomputable<const N: usize>(
        &self,
        inputs: [&Self::Map; N],
        part: impl Fn(&Self, [&Self::Map; N]) -> Result<Self::Map> + 'n,
    ) -> Result<Self::Map> {
        self.recomputed(inputs, part)
    }

    /// Computes a [recomputable](Self::recomputable) part that is always computed again, because it takes little time
    /// and much memory.
    ///
    /// # Errors
    /// Returns the errors of `part`.
    fn recomputed<const N: usize>(
        &self,
        inputs: [&Self::Map; N],
        part: impl Fn(&Self, [&Self::Map; N]) -> Result<Self::Map> + 'n,
    ) -> Result<Self::Map> {
        part(self, inputs)
    }

    /// Computes the sinusoids of the pass's timesteps, a batch of vectors, for [`TimeEmbedding`](crate::TimeEmbedding).
    #[doc(hidden)]
    fn sinusoids(&self, sinusoids: &Sinusoids) -> Result<Self::Map>;

    /// Computes a [convolution](Self::conv_add) without an addend.
    ///
    /// # Errors
    /// Returns an error if a shape does not fit.
    fn conv(&self, conv: &'n Conv2d, x: &Self::Map) -> Result<Self::Map> {
        self.conv_add(conv, x, Add::NOTHING)
    }

    /// Normalises and activates a map, computes its convolution, and adds `add`. The normalised map is not kept for the
    /// backward pass.
    ///
    /// # Errors
    /// Returns an error if a shape does not fit.
    fn norm_conv_add(
        &self,
        norm: &'n GroupNorm,
        conv: &'n Conv2d,
        x: &Self::Map,
        add: Add<'_, Self::Map>,
    ) -> Result<Self::Map> {
        self.normed_conv_add(Normed { norm, by: None, dropout: None }, conv, x, add)
    }

    /// Computes a [convolution of a normalised map](Self::norm_conv_add) without an addend.
    ///
    /// # Errors
    /// Returns an error if a shape does not fit.
    fn norm_conv(&self, norm: &'n GroupNorm, conv: &'n Conv2d, x: &Self::Map) -> Result<Self::Map> {
        self.norm_conv_add(norm, conv, x, Add::NOTHING)
    }
}

/// The layers between a map and a convolution: a normalisation with its activation, and a dropout.
#[derive(Debug)]
pub struct Normed<'a, 'n, M> {
    /// The normalisation.
    pub norm: &'n GroupNorm,
    /// The vectors that [modulate](Engine::modulated_norm) it, if there are any.
    pub by: Option<&'a M>,
    /// The probability with which single values are [dropped](Engine::drop_values) in training passes, and the number
    /// of this dropout within the network; `None` drops nothing.
    pub dropout: Option<(f64, u16)>,
}

/// Seals [`Engine`].
pub trait Sealed {}
