use candle_core::Tensor;

use crate::error::Result;
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, GroupNorm, Linear, Sinusoids};
use crate::random::Dropout;

/// The operations of networks on the maps of a device, forward and backward, for a [tape](crate::engine::tape).
///
/// Maps are channels-last, of dimensions (batch, height, width, channels). Weights, and their
/// gradients, are candle's tensors of f32.
pub(crate) trait Maps {
    /// The values of a map, on loan from a pool. They go back to it when this is dropped.
    type Buffer;

    /// What a normalisation's way back needs besides its input.
    type Statistics;

    /// A map of images (batch, channels, height, width) of f32.
    fn images(&self, x: &Tensor) -> Result<Self::Buffer>;

    /// The images of a map, in f32.
    fn to_images(&self, dims: [usize; 4], map: &Self::Buffer) -> Result<Tensor>;

    /// The sinusoids of timesteps (batch): vectors.
    fn sinusoids(&self, sinusoids: &Sinusoids, t: &Tensor) -> Result<Self::Buffer>;

    /// Memory for a map of `len` values, its content whatever was there before.
    fn take(&self, len: usize) -> Result<Self::Buffer>;

    /// Adds `more` to `sum`, maps of `len` values.
    fn add(&self, sum: &mut Self::Buffer, more: &Self::Buffer, len: usize) -> Result<()>;

    /// The convolution of a map `x` of these dimensions, and what is added to it: its dimensions and
    /// values.
    fn convolve(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Self::Buffer,
        add: Add<'_, Self::Buffer>,
    ) -> Result<([usize; 4], Self::Buffer)>;

    /// From the gradient `dy` of a convolution's output to those of its weight and bias, and, where it
    /// is wanted, of what was added to each image.
    fn convolve_weight_gradients(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        x: &Self::Buffer,
        dy: &Self::Buffer,
        per_image: bool,
    ) -> Result<([Tensor; 2], Option<Self::Buffer>)>;

    /// From the gradient `dy` of a convolution's output to that of its input, of these dimensions;
    /// which is added to what is in `dx`, or takes its place.
    fn convolve_input_gradient(
        &self,
        conv: &Conv2d,
        dims: [usize; 4],
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
        accumulate: bool,
    ) -> Result<()>;

    /// The normalised map, activated.
    fn normalize(
        &self,
        norm: &GroupNorm,
        dims: [usize; 4],
        x: &Self::Buffer,
    ) -> Result<(Self::Buffer, Self::Statistics)>;

    /// The same once more.
    fn normalize_again(
        &self,
        norm: &GroupNorm,
        dims: [usize; 4],
        x: &Self::Buffer,
        statistics: &Self::Statistics,
    ) -> Result<Self::Buffer>;

    /// Makes the gradient `d` of a normalisation's output that of its input, and adds `more` to it;
    /// gives the gradients of weight and bias.
    fn normalize_backward(
        &self,
        norm: &GroupNorm,
        dims: [usize; 4],
        x: &Self::Buffer,
        statistics: &Self::Statistics,
        d: &mut Self::Buffer,
        more: Option<&Self::Buffer>,
    ) -> Result<[Tensor; 2]>;

    /// The linear layer of a batch of activated vectors.
    fn linear(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &Self::Buffer,
    ) -> Result<Self::Buffer>;

    /// From the gradient of a linear layer's output to that of its input, and those of weight and bias.
    fn linear_backward(
        &self,
        f: VectorActivation,
        linear: &Linear,
        batch: usize,
        x: &Self::Buffer,
        dy: &Self::Buffer,
    ) -> Result<(Self::Buffer, [Tensor; 2])>;

    /// What the maps (batch, channels) are multiplied by in the network's `layer`-th dropout.
    fn mask(&self, dropout: &Dropout, layer: u16, dims: [usize; 4], p: f64)
    -> Result<Self::Buffer>;

    /// Each channel of each image times its factor in `mask`.
    fn scale_maps(
        &self,
        dims: [usize; 4],
        x: &Self::Buffer,
        mask: &Self::Buffer,
    ) -> Result<Self::Buffer>;

    /// The channels of both, of so many pixels in all, one after the other.
    fn concatenate(
        &self,
        pixels: usize,
        channels: [usize; 2],
        maps: [&Self::Buffer; 2],
    ) -> Result<Self::Buffer>;

    /// The opposite of [`concatenate`](Self::concatenate).
    fn split(
        &self,
        pixels: usize,
        channels: [usize; 2],
        map: &Self::Buffer,
    ) -> Result<[Self::Buffer; 2]>;

    /// Attention of all pixels to all, from their q, k and v, side by side in `qkv`, of these
    /// dimensions.
    fn attention(&self, dims: [usize; 4], qkv: &Self::Buffer) -> Result<Self::Buffer>;

    /// From the gradient of attention's output to that of `qkv`.
    fn attention_backward(
        &self,
        dims: [usize; 4],
        qkv: &Self::Buffer,
        dy: &Self::Buffer,
    ) -> Result<Self::Buffer>;
}
