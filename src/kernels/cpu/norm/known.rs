use std::ops::Range;

use rayon::prelude::*;

use super::passes::{Affine, SPAN, Stats, normalize};
use crate::kernels::cpu::isa::Isa;

/// A normalisation whose statistics are known, so that each pixel can be normalised by itself.
#[derive(Debug)]
pub(crate) struct Known {
    isa: Isa,
    /// True if SiLU follows the normalisation.
    silu: bool,
    channels: usize,
    /// For each image, the means of the channels, then their factors, then their biases.
    values: Vec<f32>,
}

impl Known {
    /// Creates the normalisation of no images.
    pub(super) fn new(isa: Isa, silu: bool, channels: usize) -> Self {
        Self { isa, silu, channels, values: Vec::new() }
    }

    /// Adds an image with these statistics, weights and biases.
    pub(super) fn push(&mut self, stats: &Stats, weight: &[f32], bias: &[f32]) {
        self.values.extend_from_slice(&stats.mean);
        self.values.extend(stats.scale(weight));
        self.values.extend_from_slice(bias);
    }

    /// Writes some channels of some normalised pixels of an image. `x` has all channels of these pixels.
    pub(crate) fn write_pixels(
        &self,
        image: usize,
        x: &[f32],
        channels: Range<usize>,
        y: &mut [f32],
    ) {
        let all = self.channels;
        let of_image = &self.values[image * 3 * all..][..3 * all];
        let values = |i: usize| &of_image[i * all..][..all][channels.clone()];
        let affine = Affine::new(values(0), values(1), values(2));
        let x = x.get(channels.start..).unwrap_or_default();
        normalize(self.isa, y, x, all, &affine, self.silu);
    }

    /// Writes all images of `x` to `y`.
    pub(crate) fn write(&self, x: &[f32], y: &mut [f32]) {
        let image = x.len() / (self.values.len() / (3 * self.channels));
        let span = SPAN * self.channels;
        y.par_chunks_mut(image).zip(x.par_chunks(image)).enumerate().for_each(|(k, (y, x))| {
            let spans = y.par_chunks_mut(span).zip(x.par_chunks(span));
            spans.for_each(|(y, x)| self.write_pixels(k, x, 0..self.channels, y));
        });
    }
}
