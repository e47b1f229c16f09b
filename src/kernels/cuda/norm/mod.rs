//! GroupNorm, with the activation that follows it.

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, argument, kernel};
use super::launch::{THREADS, blocks_of, each_of};
use super::maps::sum_columns;
use super::memory::Memory;
use crate::kernels::op::activation::Activation;
use crate::kernels::op::norm::NormConfig;

const MODULE: &Module = &Module {
    name: "norm",
    source: concat!(
        include_str!("../common.cuh"),
        include_str!("../activation.cuh"),
        include_str!("norm.cu"),
    ),
};

kernel! { MODULE, "normalize", Normalize {
    x: Pointer, y: Pointer, weight: Pointer, bias: Pointer, statistics: Pointer, s: Sizes,
} }
kernel! { MODULE, "normalize_again", NormalizeAgain {
    x: Pointer, y: Pointer, weight: Pointer, bias: Pointer, statistics: Pointer, s: Sizes,
} }
kernel! { MODULE, "normalize_backward", NormalizeBackward {
    x: Pointer, d: Pointer, more: Pointer, weight: Pointer, bias: Pointer, statistics: Pointer,
    for_weight: Pointer, for_bias: Pointer, s: Sizes,
} }

argument! { MODULE, struct Sizes {
    f: i32, channels: u32, pixels: u32, groups: u32, width: u32, count: u32,
} }

/// The mean and the reciprocal standard deviation of each group.
pub(crate) struct NormStatistics(Memory);

/// A normalisation of maps (batch, height, width, channels).
pub(crate) struct Norm<'a> {
    pub element: Element,
    pub dims: [usize; 4],
    pub config: NormConfig,
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
}

impl Norm<'_> {
    fn count(&self) -> usize {
        self.dims.iter().product()
    }

    fn sizes(&self, width: u32) -> Sizes {
        let [_, h, w, channels] = self.dims;
        let f = match self.config.activation {
            Activation::None => 0,
            Activation::Silu => 1,
        };
        let (pixels, groups) = ((h * w) as u32, self.config.groups as u32);
        Sizes { f, channels: channels as u32, pixels, groups, width, count: self.count() as u32 }
    }

    /// Returns the addresses of weight and bias, and the sizes of a launch for these maps.
    fn layer(&self, gpu: &Gpu, maps: [Pointer; 3]) -> Result<([Pointer; 2], Sizes)> {
        let vectors = [gpu.pointer(self.weight)?, gpu.pointer(self.bias)?];
        let width = self
            .element
            .width(&[self.dims[3] / self.config.groups], &[vectors.as_slice(), &maps].concat());
        Ok((vectors, self.sizes(width)))
    }

    /// Launches one block for each image and group.
    fn blocks(&self) -> LaunchConfig {
        blocks_of((self.dims[0] as u32, self.config.groups as u32), (THREADS, 1))
    }

    /// Computes the normalised and activated map.
    pub fn forward(&self, gpu: &Gpu, x: &Memory) -> Result<(Memory, NormStatistics)> {
        let y = gpu.take_for(self.count(), self.element)?;
        let own = gpu.take_for(self.dims[0] * self.config.groups * 2, Element::F32)?;
        let (x, y_at, statistics) = (x.pointer, y.pointer, own.pointer);
        let ([weight, bias], s) = self.layer(gpu, [x, y_at, Pointer::NONE])?;
        let normalize = Normalize { x, y: y_at, weight, bias, statistics, s };
        gpu.launch(self.element, self.blocks(), normalize)?;
        Ok((y, NormStatistics(own)))
    }

    /// Computes the same map again from its statistics.
    pub fn again(&self, gpu: &Gpu, x: &Memory, statistics: &NormStatistics) -> Result<Memory> {
        let y = gpu.take_for(self.count(), self.element)?;
        let (x, y_at, statistics) = (x.pointer, y.pointer, statistics.0.pointer);
        let ([weight, bias], s) = self.layer(gpu, [x, y_at, Pointer::NONE])?;
        let normalize = NormalizeAgain { x, y: y_at, weight, bias, statistics, s };
        gpu.launch(self.element, each_of(self.count(), s.width)?, normalize)?;
        Ok(y)
    }

    /// Replaces the gradient `d` of the output by that of the input plus `more`. Writes the gradients of
    /// weight and bias.
    pub fn backward(
        &self,
        gpu: &Gpu,
        x: &Memory,
        statistics: &NormStatistics,
        d: &Memory,
        more: Option<&Memory>,
        [d_weight, d_bias]: [&Tensor; 2],
    ) -> Result<()> {
        let [batch, _, _, channels] = self.dims;
        let sums = || gpu.take_for(batch * channels, Element::F32);
        let (for_weight, for_bias) = (sums()?, sums()?);
        let (x, d, more) = (x.pointer, d.pointer, Memory::pointer_or_none(more));
        let ([weight, bias], s) = self.layer(gpu, [x, d, more])?;
        let normalize = NormalizeBackward {
            x,
            d,
            more,
            weight,
            bias,
            statistics: statistics.0.pointer,
            for_weight: for_weight.pointer,
            for_bias: for_bias.pointer,
            s,
        };
        gpu.launch(self.element, self.blocks(), normalize)?;
        sum_columns(gpu, &for_weight, d_weight, batch)?;
        sum_columns(gpu, &for_bias, d_bias, batch)
    }
}
