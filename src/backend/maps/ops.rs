use candle_core::Tensor;

use crate::error::Result;
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::attention::AttentionShape;
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear, Sinusoids};
use crate::random::Dropout;

/// A normalisation layer, and the scales and shifts (batch, 2 channels) that modulate it, if there are any.
pub(crate) struct Norm<'a, B> {
    pub layer: &'a GroupNorm,
    pub by: Option<&'a B>,
}

/// The gradients of a convolution's weight and bias, and of the values that were added to each image.
pub(crate) type ConvGradients<B> = ([Tensor; 2], Option<B>);

/// The dimensions and the values of a convolution's output, and the statistics of the normalisation before it.
pub(crate) type NormedConvolution<B, S> = ([usize; 4], B, S);

/// The operations of networks on the feature maps of a device, forward and backward, for a
/// [tape](crate::engine::tape).
///
/// Maps are channels-last: (batch, height, width, channels). Weights and their gradients are candle tensors in
/// f32.
pub(crate) trait Maps {
    /// The values of a map, borrowed from a pool. Dropping the buffer returns its memory to the pool.
    type Buffer;

    /// The statistics of a normalisation, which its backward pass reads in addition to the input.
    type Statistics;

    /// Results of the forward pass of an attention, which its backward pass reads in addition to the input.
    type AttentionResults;

    /// Copies images (batch, channels, height, width) in f32 to a map.
    fn images(&self, x: &Tensor) -> Result<Self::Buffer>;

    /// Copies a map to images in f32.
    fn to_images(&self, dims: [usize; 4], map: &Self::Buffer) -> Result<Tensor>;

    /// Computes the sinusoids of the timesteps `t` (batch), a batch of vectors.
    fn sinusoids(&self, sinusoids: &Sinusoids, t: &Tensor) -> Result<Self::Buffer>;

    /// Completes the gradients of weights, after the last operation of a backward pass. These gradients are undefined
    /// before this call.
    fn finish(&self) -> Result<()> {
        Ok(())
    }

    /// Takes memory for a map of `len` values, with arbitrary content.
    fn take(&self, len: usize) -> Result<Self::Buffer>;

    /// Adds `more` to `sum`, both maps of `len` values.
    fn add(&self, sum: &mut Self::Buffer, more: &Self::Buffer, len: usize) -> Result<()>;

    /// Computes the convolution of a map `x` of dimensions `dims`, and adds `add` to it. Returns the dimensions
    /// and the values of the output.
    fn convolve(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Self::Buffer,
        add: Add<'_, Self::Buffer>,
    ) -> Result<([usize; 4], Self::Buffer)>;

    /// Computes the convolution of a map `x` of dimensions `dims` that is [normalised](Self::normalize) first, and adds
    /// `add` to it, if one kernel does both. Otherwise returns `None`.
    fn convolve_normed(
        &self,
        norm: Norm<'_, Self::Buffer>,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Self::Buffer,
        add: Add<'_, Self::Buffer>,
    ) -> Result<Option<NormedConvolution<Self::Buffer, Self::Statistics>>> {
        let _ = (norm, conv, dims, x, add);
        Ok(None)
    }

    /// Computes the gradients of a convolution's weight and bias from the gradient `dy` of its output. With
    /// `per_image`, also returns the gradient of the values that were added to each image.
    fn convolve_weight_gradients(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Self::Buffer,
        dy: &Self::Buffer,
        per_image: bool,
    ) -> Result<ConvGradients<Self::Buffer>>;

    /// Computes the gradients of [`convolve_weight_gradients`](Self::convolve_weight_gradients) for a map `x` that is
    /// normalised first, with the statistics of its first normalisation, if one kernel does both. Otherwise returns
    /// `None`.
    fn normed_weight_gradients(
        &self,
        (norm, statistics): (Norm<'_, Self::Buffer>, &Self::Statistics),
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Self::Buffer,
        dy: &Self::Buffer,
        per_image: bool,
    ) -> Result<Option<ConvGradients<Self::Buffer>>> {
        let _ = (norm, statistics, conv, dims, x, dy, per_image);
        Ok(None)
    }

    /// Computes the gradient of a convolution's input, of dimensions `dims`, from the gradient `dy` of its
    /// output. With `accumulate` the result is added to `dx`, otherwise it replaces `dx`.
    fn convolve_input_gradient(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
        accumulate: bool,
    ) -> Result<()>;

    /// Normalises a map and applies the activation.
    fn normalize(
        &self,
        norm: Norm<'_, Self::Buffer>,
        dims: [usize; 4],
        x: &Self::Buffer,
    ) -> Result<(Self::Buffer, Self::Statistics)>;

    /// Repeats [`normalize`](Self::normalize) with the statistics that it returned.
    fn normalize_again(
        &self,
        norm: Norm<'_, Self::Buffer>,
        dims: [usize; 4],
        x: &Self::Buffer,
        statistics: &Self::Statistics,
    ) -> Result<Self::Buffer>;

    /// Replaces the gradient `d` of a normalisation's output by that of its input plus `more`. Returns the
    /// gradients of weight and bias, and of the scales and shifts if there are any.
    fn normalize_backward(
        &self,
        norm: Norm<'_, Self::Buffer>,
        dims: [usize; 4],
        x: &Self::Buffer,
        statistics: &Self::Statistics,
        d: &mut Self::Buffer,
        more: Option<&Self::Buffer>,
    ) -> Result<([Tensor; 2], Option<Self::Buffer>)>;

    /// Applies an activation to a batch of vectors, then a linear layer.
    fn linear(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &Self::Buffer,
    ) -> Result<Self::Buffer>;

    /// Computes the gradients of a linear layer's input, weight and bias from the gradient of its output.
    fn linear_backward(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &Self::Buffer,
        dy: &Self::Buffer,
    ) -> Result<(Self::Buffer, [Tensor; 2])>;

    /// Adds to each vector of a batch `x` the vector of its class. On a CUDA device, a class that the table does not
    /// have gives NaN.
    fn add_class(
        &self,
        embedding: &Embedding,
        classes: &Tensor,
        x: &Self::Buffer,
    ) -> Result<Self::Buffer>;

    /// Computes the gradient of the table of [`add_class`](Self::add_class) from the gradient `dy` of its output.
    fn add_class_backward(
        &self,
        embedding: &Embedding,
        classes: &Tensor,
        dy: &Self::Buffer,
    ) -> Result<Tensor>;

    /// Draws the mask (batch, channels) of the network's dropout number `layer`: the factors of the channels.
    fn mask(&self, dropout: &Dropout, layer: u16, dims: [usize; 4], p: f64)
    -> Result<Self::Buffer>;

    /// Multiplies each channel of each image by its factor in `mask`.
    fn scale_maps(
        &self,
        dims: [usize; 4],
        x: &Self::Buffer,
        mask: &Self::Buffer,
    ) -> Result<Self::Buffer>;

    /// Drops single values of a map in place, by the dropout number `layer` of the network with probability `p`.
    fn drop_values(
        &self,
        dims: [usize; 4],
        x: &mut Self::Buffer,
        dropout: &Dropout,
        layer: u16,
        p: f64,
    ) -> Result<()>;

    /// Repeats each pixel of a map in both directions, times `factor`: from (h, w) to (2 h, 2 w).
    fn repeat_pixels(
        &self,
        dims: [usize; 4],
        x: &Self::Buffer,
        factor: f32,
    ) -> Result<Self::Buffer>;

    /// Sums each two by two pixels of a map of even height and width, times `factor`: from (h, w) to (h / 2, w / 2).
    fn sum_pixels(&self, dims: [usize; 4], x: &Self::Buffer, factor: f32) -> Result<Self::Buffer>;

    /// Concatenates the channels of two maps. `pixels` is the number of pixels in the batch.
    fn concatenate(
        &self,
        pixels: usize,
        channels: [usize; 2],
        maps: [&Self::Buffer; 2],
    ) -> Result<Self::Buffer>;

    /// The inverse of [`concatenate`](Self::concatenate).
    fn split(
        &self,
        pixels: usize,
        channels: [usize; 2],
        map: &Self::Buffer,
    ) -> Result<[Self::Buffer; 2]>;

    /// Computes the attention of all pixels to all. The channels of `qkv` hold q, k and v side by side.
    fn attention(
        &self,
        batch: usize,
        shape: AttentionShape,
        qkv: &Self::Buffer,
    ) -> Result<(Self::Buffer, Self::AttentionResults)>;

    /// Computes the gradient of `qkv` from the gradient `dy` of the attention's output.
    fn attention_backward(
        &self,
        batch: usize,
        shape: AttentionShape,
        qkv: &Self::Buffer,
        results: &Self::AttentionResults,
        dy: &Self::Buffer,
    ) -> Result<Self::Buffer>;
}
