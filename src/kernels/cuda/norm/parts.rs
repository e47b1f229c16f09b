//! Images whose pixels several blocks share, because one block cannot hold its line of the pixels in registers.

use candle_core::Result;

use super::super::device::Gpu;
use super::super::element::{Element, Pointer};
use super::super::kernel::kernel;
use super::super::launch::{THREADS, blocks_of};
use super::super::maps::ImageSums;
use super::super::memory::Memory;
use super::{Backward, MODULE, Norm, Sizes};

kernel! { MODULE, "statistics_of_parts", StatisticsOfParts {
    of_parts: Pointer, statistics: Pointer, s: Sizes,
} }
kernel! { MODULE, "sum_gradients_of_parts", SumGradients {
    x: Pointer, d: Pointer, weight: Pointer, bias: Pointer, statistics: Pointer, of_parts: Pointer,
    s: Sizes,
} }
kernel! { MODULE, "replace_gradient_of_parts", ReplaceGradient {
    x: Pointer, d: Pointer, more: Pointer, weight: Pointer, bias: Pointer, statistics: Pointer,
    for_weight: Pointer, for_bias: Pointer, of_parts: Pointer, s: Sizes,
} }
kernel! { MODULE, "sum_of_parts", SumOfParts {
    of_parts: Pointer, sums: Pointer, more: Pointer, also: Pointer, parts: u32, channels: u32,
    columns: u32,
} }

impl Sizes {
    pub(super) fn has_parts(&self) -> bool {
        self.part < self.pixels
    }

    /// The number of parts of each image.
    pub(super) fn parts(&self) -> u32 {
        self.pixels.div_ceil(self.part.max(1))
    }
}

impl Norm<'_> {
    /// Takes memory for `count` values in f32 of each part, if images have parts.
    pub(super) fn take_for_parts(
        &self,
        gpu: &Gpu,
        s: &Sizes,
        count: usize,
    ) -> Result<Option<Memory>> {
        let parts = self.dims[0] * s.parts() as usize;
        s.has_parts().then(|| gpu.take_for(parts * count, Element::F32)).transpose()
    }

    /// Computes the statistics of images from those of their parts.
    pub(super) fn combine_statistics(
        &self,
        gpu: &Gpu,
        of_parts: Pointer,
        statistics: Pointer,
        s: Sizes,
    ) -> Result<()> {
        let blocks = blocks_of((self.dims[0] as u32, s.groups), (THREADS, 1));
        gpu.launch(self.element, blocks, StatisticsOfParts { of_parts, statistics, s })
    }

    /// Computes the gradients of weight and bias of each image, replaces the gradient of the output, and computes the
    /// sums of the new gradient.
    pub(super) fn backward_of_parts(
        &self,
        gpu: &Gpu,
        &Backward { x, d, more, weight, bias, statistics, s }: &Backward,
        [for_weight, for_bias]: [Pointer; 2],
        sums: &ImageSums,
    ) -> Result<()> {
        let Some(memory) = self.take_for_parts(gpu, &s, 2 * self.dims[3])? else { return Ok(()) };
        let of_parts = memory.pointer;
        let sum = SumGradients { x, d, weight, bias, statistics, of_parts, s };
        gpu.launch(self.element, self.blocks(&s), sum)?;
        self.sum_of_parts(gpu, &s, of_parts, [for_weight, for_bias, Pointer::NONE])?;
        let replace = ReplaceGradient {
            x,
            d,
            more,
            weight,
            bias,
            statistics,
            for_weight,
            for_bias,
            of_parts,
            s,
        };
        gpu.launch(self.element, self.blocks(&s), replace)?;
        let to = [sums.pointer(), Pointer::NONE, sums.also_pointer()];
        self.sum_of_parts(gpu, &s, of_parts, to)
    }

    /// Sums vectors over the parts of each image: to `sums` and to `also` in the type of maps, and those of twice as
    /// many channels to `sums` and `more`.
    fn sum_of_parts(
        &self,
        gpu: &Gpu,
        s: &Sizes,
        of_parts: Pointer,
        [sums, more, also]: [Pointer; 3],
    ) -> Result<()> {
        let (parts, channels) = (s.parts(), s.channels);
        let columns = if more == Pointer::NONE { channels } else { 2 * channels };
        let blocks = blocks_of((self.dims[0] as u32, columns.div_ceil(32)), (32, 8));
        let sum = SumOfParts { of_parts, sums, more, also, parts, channels, columns };
        gpu.launch(self.element, blocks, sum)
    }
}
