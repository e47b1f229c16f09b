//! Convolutions: with cuDNN if it has an algorithm, and otherwise as products of patches. Gradients of convolutions
//! with few channels have their own kernels.

#[cfg(feature = "cudnn")]
mod by_dnn;
mod by_patches;
mod few;
mod source;

use candle_core::Result;

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::argument;
use super::maps::Channels;
use super::memory::Memory;
use crate::kernels::op::conv::ConvShape;
use crate::precision::Precision;
use source::MODULE;

argument! { MODULE, struct Sizes {
    h: i32, w: i32, channels: i32, h_out: i32, w_out: i32, kernel: i32, stride: i32, pad: i32,
    upsample: i32,
} }

/// The address to which a result is written, and its memory if it was taken for the result.
type Place = (Pointer, Option<Memory>);

/// A convolution of maps. Its kernel is square.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Convolution {
    precision: Precision,
    element: Element,
    shape: ConvShape,
}

impl Convolution {
    pub fn new(precision: Precision, shape: ConvShape) -> Self {
        Self { precision, element: Element::of(precision), shape }
    }

    /// The dimensions of the output: (batch, height, width, out).
    pub fn output(&self) -> [usize; 4] {
        self.shape.output()
    }

    /// The sizes as kernels read them.
    fn sizes(&self) -> Sizes {
        let ConvShape { h, w, c_in, h_out, w_out, kernel, .. } = self.shape;
        Sizes {
            h: h as i32,
            w: w as i32,
            channels: c_in as i32,
            h_out: h_out as i32,
            w_out: w_out as i32,
            kernel: kernel[0] as i32,
            stride: self.shape.stride() as i32,
            pad: self.shape.padding()[0] as i32,
            upsample: i32::from(self.shape.upsamples()),
        }
    }

    /// The number of output pixels of an image.
    fn pixels(&self) -> usize {
        self.shape.h_out * self.shape.w_out
    }

    /// The reordering of weights from (out, in, k, k) to (out, k, k, in).
    pub(super) fn weights(&self) -> Channels {
        let (channels, pixels) = (self.shape.c_in, self.shape.taps());
        Channels { channels, pixels, count: self.shape.c_out * channels * pixels }
    }

    /// Computes the output without a bias, from `x` and the packed weights.
    pub fn forward(&self, gpu: &Gpu, x: &Memory, packed: Pointer) -> Result<Memory> {
        let y = gpu.take_for(self.output().iter().product(), self.element)?;
        if !self.forward_by_dnn(gpu, x, packed, &y)? {
            self.forward_by_patches(gpu, x, packed, &y)?;
        }
        Ok(y)
    }

    /// Returns whether weights and gradients have the same layout, packed and not packed.
    pub(super) fn is_pointwise(&self) -> bool {
        self.shape.is_pointwise()
    }

    /// Computes the packed gradient of the weights, (out, k, k, in), and returns its type. It is written to `slot` if
    /// there is one of this type, and otherwise to memory that is also returned.
    pub(super) fn weight_gradient(
        &self,
        gpu: &Gpu,
        [x, dy]: [&Memory; 2],
        slot: Option<(Pointer, Element)>,
    ) -> Result<(Element, Option<Memory>)> {
        let place = |element: Element| match slot.filter(|(_, own)| *own == element) {
            Some((slot, _)) => Ok((slot, None)),
            None => {
                let memory = gpu.take_for(self.weights().count, element)?;
                Ok((memory.pointer, Some(memory)))
            }
        };
        if let Some((_, memory)) = self.weight_gradient_by_dnn(gpu, x, dy, place)? {
            return Ok((self.element, memory));
        }
        let (to, memory) = place(Element::F32)?;
        self.weight_gradient_by_patches(gpu, x, dy, to)?;
        Ok((Element::F32, memory))
    }

    /// Writes the gradient of the input to `dx`, or adds it to the values of `dx`.
    pub fn input_gradient(
        &self,
        gpu: &Gpu,
        dy: &Memory,
        packed: Pointer,
        dx: &Memory,
        accumulate: bool,
    ) -> Result<()> {
        if self.input_gradient_of_few(gpu, dy, packed, dx, accumulate)?
            || self.input_gradient_by_dnn(gpu, dy, packed, dx, accumulate)?
        {
            return Ok(());
        }
        self.input_gradient_by_patches(gpu, dy, packed, dx, accumulate)
    }
}

/// Stand-ins for a build without cuDNN.
#[cfg(not(feature = "cudnn"))]
impl Convolution {
    fn forward_by_dnn(&self, _: &Gpu, _: &Memory, _: Pointer, _: &Memory) -> Result<bool> {
        Ok(false)
    }

    fn weight_gradient_by_dnn(
        &self,
        _: &Gpu,
        _: &Memory,
        _: &Memory,
        _: impl FnOnce(Element) -> Result<Place>,
    ) -> Result<Option<Place>> {
        Ok(None)
    }

    fn input_gradient_by_dnn(
        &self,
        _: &Gpu,
        _: &Memory,
        _: Pointer,
        _: &Memory,
        _: bool,
    ) -> Result<bool> {
        Ok(false)
    }
}
