//! GroupNorm, with the activation that follows it.

mod parts;

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, argument, holds, kernel};
use super::launch::{THREADS, blocks_of, each, each_of};
use super::maps::{Added, ImageSums};
use super::memory::Memory;
use crate::kernels::op::activation::Activation;
use crate::kernels::op::norm::NormConfig;

const MODULE: &Module = &Module {
    name: "norm",
    source: concat!(
        include_str!("../common.cuh"),
        include_str!("../activation.cuh"),
        include_str!("norm.cu"),
        include_str!("backward.cu"),
    ),
};

kernel! { MODULE, "normalize", Normalize {
    x: Pointer, sum: Pointer, y: Pointer, added: Pointer, vectors: Pointer, residual: Pointer,
    mask: Pointer, weight: Pointer, bias: Pointer, statistics: Pointer, s: Sizes,
} }
kernel! { MODULE, "normalize_again", NormalizeAgain {
    x: Pointer, y: Pointer, weight: Pointer, bias: Pointer, statistics: Pointer, s: Sizes,
} }
kernel! { MODULE, "normalize_backward", NormalizeBackward {
    x: Pointer, d: Pointer, more: Pointer, weight: Pointer, bias: Pointer, statistics: Pointer,
    for_weight: Pointer, for_bias: Pointer, sums: Pointer, also: Pointer, s: Sizes,
} }

kernel! { MODULE, "modulate", Modulate {
    weight: Pointer, bias: Pointer, by: Pointer, weights: Pointer, biases: Pointer, channels: u32,
    count: u32,
} }
kernel! { MODULE, "modulate_backward", ModulateBackward {
    weight: Pointer, bias: Pointer, by: Pointer, for_weight: Pointer, for_bias: Pointer,
    d_by: Pointer, channels: u32, count: u32,
} }

argument! { MODULE, struct Sizes {
    f: i32, channels: u32, pixels: u32, groups: u32, width: u32, count: u32, eps: f32,
    per_image: u32, line: u32, part: u32,
} }

/// The bytes that a block reads at once of each pixel, if groups have fewer.
const LINE: usize = 128;

/// The mean and the reciprocal standard deviation of each group.
pub(crate) struct NormStatistics(Memory);

/// A normalisation of maps (batch, height, width, channels).
pub(crate) struct Norm<'a> {
    pub element: Element,
    pub dims: [usize; 4],
    pub config: NormConfig,
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    /// Scales and shifts (batch, 2 channels).
    pub by: Option<&'a Memory>,
}

/// The results of the backward pass of a normalisation, except the gradient of its input.
pub(crate) struct NormGradients {
    /// The contributions of the images to the gradients of weight and bias: each (batch, channels) in f32.
    pub of_vectors: [Memory; 2],
    /// The gradient of scales and shifts, if there are any.
    pub by: Option<Memory>,
    /// The sums of the input's gradient over the pixels.
    pub sums: ImageSums,
}

/// Returns the number of groups, each of `group` channels, that a block handles: as many as fill a line, if the kernel
/// can divide its threads among them. `width` values of `bytes` each are one pack.
fn groups_of_line(group: u32, groups: u32, (bytes, width): (usize, u32)) -> u32 {
    let fits = |line: &u32| {
        let packs = line * group / width;
        let even = packs.is_power_of_two() && (group / width).is_power_of_two() && packs <= 32;
        even && (line * group) as usize * bytes <= LINE && groups.is_multiple_of(*line)
    };
    [32, 16, 8, 4, 2].into_iter().find(fits).unwrap_or(1)
}

/// The operands of a backward pass.
struct Backward {
    x: Pointer,
    d: Pointer,
    more: Pointer,
    weight: Pointer,
    bias: Pointer,
    statistics: Pointer,
    s: Sizes,
}

/// The packs of a line that a block holds in registers.
const HELD: u64 = 16 * 512;

const _: () = assert!(
    holds(MODULE.source, "#define HELD 16\n") && holds(MODULE.source, "#define MOST 512\n")
);

/// Maximum number of pixels of an image that always has one part: one launch takes less time than four.
const PIXELS: u32 = 32 * 32;

/// The packs of a part. Each of a block's threads holds eight of them.
const PART: u32 = 8 * THREADS;

/// Minimum number of pixels in a part. Its sums take as much memory as four of its pixels, or fewer.
const LEAST: u32 = 16;

/// Returns the number of pixels of the parts of an image whose lines have this number of packs.
fn pixels_of_part(pixels: u32, packs: u32) -> u32 {
    let fits = pixels <= PIXELS || u64::from(pixels) * u64::from(packs) <= HELD;
    if fits { pixels } else { (PART / packs).max(LEAST) }
}

/// The weights and biases of a launch.
struct Vectors {
    weight: Pointer,
    bias: Pointer,
    /// The memory of weights and biases that depend on the image.
    _own: Option<[Memory; 2]>,
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
        let (channels, count, eps) = (channels as u32, self.count() as u32, self.config.eps as f32);
        let per_image = self.by.map_or(0, |_| channels);
        let line = groups_of_line(channels / groups, groups, (self.element.bytes(), width));
        let part = pixels_of_part(pixels, line * (channels / groups) / width);
        Sizes { f, channels, pixels, groups, width, count, eps, per_image, line, part }
    }

    /// Returns weight and bias, computed for each image if there are scales and shifts.
    fn vectors(&self, gpu: &Gpu) -> Result<Vectors> {
        let (weight, bias) = (gpu.pointer(self.weight)?, gpu.pointer(self.bias)?);
        let Some(by) = self.by else { return Ok(Vectors { weight, bias, _own: None }) };
        let (channels, count) = (self.dims[3] as u32, self.dims[0] * self.dims[3]);
        let own = [gpu.take_for(count, Element::F32)?, gpu.take_for(count, Element::F32)?];
        let [weights, biases] = [own[0].pointer, own[1].pointer];
        let (by, count_of) = (by.pointer, count as u32);
        let modulate = Modulate { weight, bias, by, weights, biases, channels, count: count_of };
        gpu.launch(self.element, each(count)?, modulate)?;
        Ok(Vectors { weight: weights, bias: biases, _own: Some(own) })
    }

    /// Returns weight and bias, and the sizes of a launch for these maps and vectors.
    fn layer(&self, gpu: &Gpu, others: &[Pointer]) -> Result<(Vectors, Sizes)> {
        let vectors = self.vectors(gpu)?;
        let group = self.dims[3] / self.config.groups;
        let width =
            self.element.width(&[group], &[&[vectors.weight, vectors.bias][..], others].concat());
        Ok((vectors, self.sizes(width)))
    }

    /// Launches one block for each part of an image and line of groups. Each thread handles two packs or more, if there
    /// are enough.
    fn blocks(&self, s: &Sizes) -> LaunchConfig {
        let images = self.dims[0] as u32;
        if s.has_parts() {
            return blocks_of((images * s.parts(), s.groups / s.line), (THREADS, 1));
        }
        let packs = s.line * (s.channels / s.groups) / s.width;
        let threads = u64::from(packs).max(u64::from(packs) * u64::from(s.pixels) / 2);
        let threads = (threads.min(512) as u32).next_power_of_two().max(32);
        blocks_of((images, s.groups / s.line), (threads, 1))
    }

    /// Computes the normalised and activated map. Adds `added` to `x` first, if it is given with the memory for the
    /// sum, which may be `x`.
    pub fn forward(
        &self,
        gpu: &Gpu,
        x: &Memory,
        added: Option<(&Added<'_>, &Memory)>,
    ) -> Result<(Memory, NormStatistics)> {
        let y = gpu.take_for(self.count(), self.element)?;
        let own = gpu.take_for(self.dims[0] * self.config.groups * 2, Element::F32)?;
        let (x, y_at) = (x.pointer, y.pointer);
        let sum = Memory::pointer_or_none(added.map(|(_, sum)| sum));
        let [to_all, vectors, residual, mask] = match added {
            Some((added, _)) => added.pointers(gpu)?,
            None => [Pointer::NONE; 4],
        };
        let others = [x, y_at, sum, to_all, vectors, residual, mask];
        let (Vectors { weight, bias, _own }, s) = self.layer(gpu, &others)?;
        // For an image in parts, the kernel computes only the sum, and the statistics of the parts.
        let of_parts = self.take_for_parts(gpu, &s, 2 * self.config.groups)?;
        let statistics = of_parts.as_ref().unwrap_or(&own).pointer;
        let normalize = Normalize {
            x,
            sum,
            y: y_at,
            added: to_all,
            vectors,
            residual,
            mask,
            weight,
            bias,
            statistics,
            s,
        };
        gpu.launch(self.element, self.blocks(&s), normalize)?;
        if of_parts.is_some() {
            self.combine_statistics(gpu, statistics, own.pointer, s)?;
            let x = if added.is_some() { sum } else { x };
            let again = NormalizeAgain { x, y: y_at, weight, bias, statistics: own.pointer, s };
            gpu.launch(self.element, each_of(self.count(), s.width)?, again)?;
        }
        Ok((y, NormStatistics(own)))
    }

    /// Computes the same map again from its statistics.
    pub fn again(&self, gpu: &Gpu, x: &Memory, statistics: &NormStatistics) -> Result<Memory> {
        let y = gpu.take_for(self.count(), self.element)?;
        let (x, y_at, statistics) = (x.pointer, y.pointer, statistics.0.pointer);
        let (vectors, s) = self.layer(gpu, &[x, y_at])?;
        let Vectors { weight, bias, .. } = vectors;
        let normalize = NormalizeAgain { x, y: y_at, weight, bias, statistics, s };
        gpu.launch(self.element, each_of(self.count(), s.width)?, normalize)?;
        Ok(y)
    }

    /// Replaces the gradient `d` of the output by that of the input plus `more`.
    pub fn backward(
        &self,
        gpu: &Gpu,
        (x, statistics): (&Memory, &NormStatistics),
        d: &Memory,
        more: Option<&Memory>,
    ) -> Result<NormGradients> {
        let [batch, _, _, channels] = self.dims;
        let take = || gpu.take_for(batch * channels, Element::F32);
        let of_vectors = [take()?, take()?];
        let sums = ImageSums::take(gpu, batch * channels, self.element)?;
        let (x, d, more) = (x.pointer, d.pointer, Memory::pointer_or_none(more));
        let (Vectors { weight, bias, _own }, s) = self.layer(gpu, &[x, d, more])?;
        let statistics = statistics.0.pointer;
        let backward = Backward { x, d, more, weight, bias, statistics, s };
        let [for_weight, for_bias] = of_vectors.each_ref().map(|memory| memory.pointer);
        if s.has_parts() {
            self.backward_of_parts(gpu, &backward, [for_weight, for_bias], &sums)?;
        } else {
            let (sums, also) = (sums.pointer(), sums.also_pointer());
            let normalize = NormalizeBackward {
                x,
                d,
                more,
                weight,
                bias,
                statistics,
                for_weight,
                for_bias,
                sums,
                also,
                s,
            };
            gpu.launch(self.element, self.blocks(&s), normalize)?;
        }
        let by = self.modulate_backward(gpu, of_vectors.each_ref())?;
        Ok(NormGradients { of_vectors, by, sums })
    }

    /// Returns the gradient of scales and shifts, from the gradients of the weights and biases of each image. Replaces
    /// the latter by their contributions to the gradients of weight and bias.
    fn modulate_backward(&self, gpu: &Gpu, sums: [&Memory; 2]) -> Result<Option<Memory>> {
        let Some(by) = self.by else { return Ok(None) };
        let count = self.dims[0] * self.dims[3];
        let d_by = gpu.take_for(2 * count, self.element)?;
        let backward = ModulateBackward {
            weight: gpu.pointer(self.weight)?,
            bias: gpu.pointer(self.bias)?,
            by: by.pointer,
            for_weight: sums[0].pointer,
            for_bias: sums[1].pointer,
            d_by: d_by.pointer,
            channels: self.dims[3] as u32,
            count: count as u32,
        };
        gpu.launch(self.element, each(count)?, backward)?;
        Ok(Some(d_by))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_images_have_parts() {
        // The recipes' largest maps, in f16 and f32, and a map of one group of 512 channels.
        for packs in [8, 16, 64] {
            assert_eq!(pixels_of_part(32 * 32, packs), 32 * 32);
        }
        assert_eq!(pixels_of_part(64 * 64, 2), 64 * 64);
        assert_eq!(pixels_of_part(64 * 64, 8), 256);
        assert_eq!(pixels_of_part(33 * 33, 8), 256);
        assert_eq!(pixels_of_part(33 * 33, 5000), 16);
    }
}
