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

    /// Writes some normalised pixels of an image.
    pub(crate) fn write_pixels(&self, image: usize, x: &[f32], y: &mut [f32]) {
        let c = self.channels;
        let values = &self.values[image * 3 * c..][..3 * c];
        let affine = Affine::new(&values[..c], &values[c..2 * c], &values[2 * c..]);
        normalize(self.isa, y, x, &affine, self.silu);
    }

    /// Writes all images of `x` to `y`.
    pub(crate) fn write(&self, x: &[f32], y: &mut [f32]) {
        let image = x.len() / (self.values.len() / (3 * self.channels));
        let span = SPAN * self.channels;
        y.par_chunks_mut(image).zip(x.par_chunks(image)).enumerate().for_each(|(k, (y, x))| {
            let spans = y.par_chunks_mut(span).zip(x.par_chunks(span));
            spans.for_each(|(y, x)| self.write_pixels(k, x, y));
        });
    }
}
