//! Convolutions: with cuDNN if it has an algorithm, and otherwise as products of patches.

#[cfg(feature = "cudnn")]
mod by_dnn;
mod by_patches;

use candle_core::{Result, Tensor};

use super::device::Gpu;
use super::element::Element;
use super::kernel::{Module, argument};
use super::maps::Channels;
use super::memory::Memory;
use crate::kernels::op::conv::ConvShape;
use crate::precision::Precision;

const MODULE: &Module = &Module {
    name: "conv",
    source: concat!(include_str!("../common.cuh"), include_str!("conv.cu")),
};

argument! { MODULE, struct Sizes {
    h: i32, w: i32, channels: i32, h_out: i32, w_out: i32, kernel: i32, stride: i32, pad: i32,
    upsample: i32,
} }

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
    fn weights(&self) -> Channels {
        let (channels, pixels) = (self.shape.c_in, self.shape.taps());
        Channels { channels, pixels, count: self.shape.c_out * channels * pixels }
    }

    /// Packs the weights as (out, k, k, in) in the maps' type.
    pub fn pack(&self, gpu: &Gpu, weight: &Tensor) -> Result<Memory> {
        let own = self.weights();
        let packed = gpu.take_for(own.count, self.element)?;
        own.last(gpu, gpu.pointer(weight)?, packed.pointer, self.element)?;
        Ok(packed)
    }

    /// Computes the output without a bias.
    pub fn forward(&self, gpu: &Gpu, x: &Memory, packed: &Memory) -> Result<Memory> {
        let y = gpu.take_for(self.output().iter().product(), self.element)?;
        if !self.forward_by_dnn(gpu, x, packed, &y)? {
            self.forward_by_patches(gpu, x, packed, &y)?;
        }
        Ok(y)
    }

    /// Writes the gradient of the weights (out, in, k, k).
    pub fn weight_gradient(
        &self,
        gpu: &Gpu,
        x: &Memory,
        dy: &Memory,
        gradient: &Tensor,
    ) -> Result<()> {
        let own = self.weights();
        let (packed, element) = match self.weight_gradient_by_dnn(gpu, x, dy)? {
            Some(packed) => (packed, self.element),
            None => (self.weight_gradient_by_patches(gpu, x, dy)?, Element::F32),
        };
        own.first(gpu, packed.pointer, gpu.pointer(gradient)?, element)
    }

    /// Writes the gradient of the input to `dx`, or adds it to the values of `dx`.
    pub fn input_gradient(
        &self,
        gpu: &Gpu,
        dy: &Memory,
        packed: &Memory,
        dx: &Memory,
        accumulate: bool,
    ) -> Result<()> {
        if self.input_gradient_by_dnn(gpu, dy, packed, dx, accumulate)? {
            return Ok(());
        }
        self.input_gradient_by_patches(gpu, dy, packed, dx, accumulate)
    }
}

/// Stand-ins for a build without cuDNN.
#[cfg(not(feature = "cudnn"))]
impl Convolution {
    fn forward_by_dnn(&self, _: &Gpu, _: &Memory, _: &Memory, _: &Memory) -> Result<bool> {
        Ok(false)
    }

    fn weight_gradient_by_dnn(&self, _: &Gpu, _: &Memory, _: &Memory) -> Result<Option<Memory>> {
        Ok(None)
    }

    fn input_gradient_by_dnn(
        &self,
        _: &Gpu,
        _: &Memory,
        _: &Memory,
        _: &Memory,
        _: bool,
    ) -> Result<bool> {
        Ok(false)
    }
}
