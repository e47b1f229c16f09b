//! Elementwise operations on feature maps: conversion to and from images, sums, concatenation, dropout, scaling by two.

mod source;
mod sums;

use candle_core::{Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Launch, kernel};
use super::launch::{each, each_of};
use super::memory::Memory;
use source::MODULE;
pub(crate) use sums::{ColumnSums, ImageSums};

kernel! { MODULE, "images_to_map", ImagesToMap {
    x: Pointer, y: Pointer, channels: u32, pixels: u32, count: u32,
} }
kernel! { MODULE, "map_to_images", MapToImages {
    x: Pointer, y: Pointer, channels: u32, pixels: u32, count: u32,
} }
kernel! { MODULE, "add", Add { sum: Pointer, more: Pointer, width: u32, count: u32 } }
kernel! { MODULE, "add_to_map", AddToMap {
    x: Pointer, y: Pointer, bias: Pointer, per_image: Pointer, residual: Pointer, mask: Pointer,
    channels: u32, pixels: u32, width: u32, count: u32,
} }
kernel! { MODULE, "concatenate", Concatenate {
    a: Pointer, b: Pointer, y: Pointer, first: u32, second: u32, width: u32, count: u32,
} }
kernel! { MODULE, "split", Split {
    y: Pointer, a: Pointer, b: Pointer, first: u32, second: u32, width: u32, count: u32,
} }
kernel! { MODULE, "repeat_pixels", RepeatPixels {
    x: Pointer, y: Pointer, w: u32, channels: u32, factor: f32, width: u32, count: u32,
} }
kernel! { MODULE, "sum_pixels", SumPixels {
    x: Pointer, y: Pointer, w: u32, channels: u32, factor: f32, accumulate: i32, width: u32, count: u32,
} }
/// A move of the channels of images or weights: `count / (channels pixels)` items, from (channels, pixels) in
/// f32 to (pixels, channels) of a map, or back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Channels {
    pub channels: usize,
    pub pixels: usize,
    pub count: usize,
}

impl Channels {
    pub fn last(self, gpu: &Gpu, x: Pointer, y: Pointer, element: Element) -> Result<()> {
        let (channels, pixels, count) = self.sizes();
        gpu.launch(element, each(self.count)?, ImagesToMap { x, y, channels, pixels, count })
    }

    pub fn first(self, gpu: &Gpu, x: Pointer, y: Pointer, element: Element) -> Result<()> {
        let (channels, pixels, count) = self.sizes();
        gpu.launch(element, each(self.count)?, MapToImages { x, y, channels, pixels, count })
    }

    fn sizes(self) -> (u32, u32, u32) {
        (self.channels as u32, self.pixels as u32, self.count as u32)
    }
}

/// Converts images (batch, channels, height, width) in f32 to a map.
pub(crate) fn images_to_map(gpu: &Gpu, x: &Tensor, element: Element) -> Result<Memory> {
    let (x, (_, channels, h, w)) = (x.contiguous()?, x.dims4()?);
    let count = x.elem_count();
    let y = gpu.take_for(count, element)?;
    let own = Channels { channels, pixels: h * w, count };
    own.last(gpu, gpu.pointer(&x)?, y.pointer, element)?;
    Ok(y)
}

/// Converts a map to images (batch, channels, height, width) in f32.
pub(crate) fn map_to_images(
    gpu: &Gpu,
    x: &Memory,
    [batch, h, w, channels]: [usize; 4],
    element: Element,
) -> Result<Tensor> {
    let (images, pointer) = gpu.tensor(&[batch, channels, h, w])?;
    let own = Channels { channels, pixels: h * w, count: images.elem_count() };
    own.first(gpu, x.pointer, pointer, element)?;
    Ok(images)
}

/// Adds `more` to `sum`, both maps of `count` values.
pub(crate) fn add(
    gpu: &Gpu,
    sum: &Memory,
    more: &Memory,
    count: usize,
    element: Element,
) -> Result<()> {
    add_at(gpu, sum.pointer, more.pointer, count, element)
}

/// Adds the values at `more` to those at `sum`.
pub(super) fn add_at(
    gpu: &Gpu,
    sum: Pointer,
    more: Pointer,
    count: usize,
    element: Element,
) -> Result<()> {
    let width = element.width(&[count], &[sum, more]);
    let add = Add { sum, more, width, count: count as u32 };
    gpu.launch(element, each_of(count, width)?, add)
}

/// Computes a new map of `count` values by a kernel that reads `inputs`. All of them have multiples of `channels`
/// values. `kernel` receives the address of the map, and the number of values that a thread may handle at a time.
fn new_map<K: Launch>(
    gpu: &Gpu,
    count: usize,
    (channels, inputs): (&[usize], &[Pointer]),
    element: Element,
    kernel: impl FnOnce(Pointer, u32) -> K,
) -> Result<Memory> {
    let y = gpu.take_for(count, element)?;
    let width = element.width(channels, &[inputs, &[y.pointer]].concat());
    gpu.launch(element, each_of(count, width)?, kernel(y.pointer, width))?;
    Ok(y)
}

/// Repeats each pixel in both directions, times `factor`. `dims` are those of `x`.
pub(crate) fn repeat_pixels(
    gpu: &Gpu,
    x: &Memory,
    dims: [usize; 4],
    factor: f32,
    element: Element,
) -> Result<Memory> {
    let [batch, h, w, channels] = dims;
    let (x, count) = (x.pointer, 4 * batch * h * w * channels);
    new_map(gpu, count, (&[channels], &[x]), element, |y, width| {
        let (w, channels, count) = (w as u32, channels as u32, count as u32);
        RepeatPixels { x, y, w, channels, factor, width, count }
    })
}

/// Sums two by two pixels, times `factor`. `dims` are those of `x`, with even height and width.
pub(crate) fn sum_pixels(
    gpu: &Gpu,
    x: &Memory,
    dims: [usize; 4],
    factor: f32,
    element: Element,
) -> Result<Memory> {
    let [batch, h, w, channels] = dims;
    let (x, sums) = (x.pointer, [batch, h / 2, w / 2, channels]);
    new_map(gpu, sums.iter().product(), (&[channels], &[x]), element, |y, width| {
        SumPixels::of([x, y], sums, (factor, false), width)
    })
}

/// Writes the sums of two by two pixels, times `factor`, or adds them to the values there. `sums` are the dimensions of
/// the result. Only convolutions by cuDNN need it.
#[cfg(feature = "cudnn")]
pub(super) fn sum_pixels_to(
    gpu: &Gpu,
    [x, y]: [Pointer; 2],
    sums: [usize; 4],
    (factor, accumulate): (f32, bool),
    element: Element,
) -> Result<()> {
    let width = element.width(&sums[3..], &[x, y]);
    let sum = SumPixels::of([x, y], sums, (factor, accumulate), width);
    gpu.launch(element, each_of(sums.iter().product(), width)?, sum)
}

impl SumPixels {
    fn of(
        [x, y]: [Pointer; 2],
        sums: [usize; 4],
        (factor, accumulate): (f32, bool),
        width: u32,
    ) -> Self {
        let [_, _, w, channels] = sums.map(|size| size as u32);
        let (accumulate, count) = (i32::from(accumulate), sums.iter().product::<usize>() as u32);
        Self { x, y, w, channels, factor, accumulate, width, count }
    }
}

/// Concatenates the channels of two maps. `pixels` is the number of pixels in the batch.
pub(crate) fn concatenate(
    gpu: &Gpu,
    [a, b]: [&Memory; 2],
    channels: [usize; 2],
    pixels: usize,
    element: Element,
) -> Result<Memory> {
    let [first, second] = channels.map(|channels| channels as u32);
    let (a, b, count) = (a.pointer, b.pointer, pixels * (channels[0] + channels[1]));
    new_map(gpu, count, (&channels, &[a, b]), element, |y, width| Concatenate {
        a,
        b,
        y,
        first,
        second,
        width,
        count: count as u32,
    })
}

/// The inverse of [`concatenate`].
pub(crate) fn split(
    gpu: &Gpu,
    y: &Memory,
    channels: [usize; 2],
    pixels: usize,
    element: Element,
) -> Result<[Memory; 2]> {
    let [first, second] = channels.map(|channels| channels as u32);
    let parts = [
        gpu.take_for(pixels * channels[0], element)?,
        gpu.take_for(pixels * channels[1], element)?,
    ];
    let count = pixels * (channels[0] + channels[1]);
    let ([a, b], y) = (parts.each_ref().map(|part| part.pointer), y.pointer);
    let width = element.width(&channels, &[y, a, b]);
    let split = Split { y, a, b, first, second, width, count: count as u32 };
    gpu.launch(element, each_of(count, width)?, split)?;
    Ok(parts)
}

/// Values that are added to a map (batch, pixels, channels), and factors by which the sum is multiplied.
#[derive(Default)]
pub(crate) struct Added<'a> {
    pub bias: Option<&'a Tensor>,
    /// Vectors (batch, channels).
    pub per_image: Option<&'a Memory>,
    pub residual: Option<&'a Memory>,
    /// Factors (batch, channels).
    pub mask: Option<&'a Memory>,
}

impl Added<'_> {
    /// The addresses of bias, vectors, residual and mask, or null.
    pub(super) fn pointers(&self, gpu: &Gpu) -> Result<[Pointer; 4]> {
        let bias = self.bias.map_or(Ok(Pointer::NONE), |bias| gpu.pointer(bias))?;
        let [vectors, residual, mask] =
            [self.per_image, self.residual, self.mask].map(Memory::pointer_or_none);
        Ok([bias, vectors, residual, mask])
    }

    /// Writes the sum to `y`, which may be `x`.
    pub fn add_to(
        &self,
        gpu: &Gpu,
        [x, y]: [&Memory; 2],
        [batch, pixels, channels]: [usize; 3],
        element: Element,
    ) -> Result<()> {
        let [bias, per_image, residual, mask] = self.pointers(gpu)?;
        let (x, y, count) = (x.pointer, y.pointer, batch * pixels * channels);
        let width = element.width(&[channels], &[x, y, bias, per_image, residual, mask]);
        let add = AddToMap {
            x,
            y,
            bias,
            per_image,
            residual,
            mask,
            channels: channels as u32,
            pixels: pixels as u32,
            width,
            count: count as u32,
        };
        gpu.launch(element, each_of(count, width)?, add)
    }
}
