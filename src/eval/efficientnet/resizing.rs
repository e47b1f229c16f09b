//! The scaling of images, bit for bit that of Pillow with `BILINEAR`, and their normalisation.
//!
//! Rows are scaled first. Some versions of Pillow scale the columns of some high images first, which changes bytes by at
//! most 1. For square images all versions scale rows first.

use std::ops::Range;

use rayon::prelude::*;

use super::network::SIZE;
use crate::data::dataset::ImageShape;

/// The description in the identity of an extractor.
pub(super) const DESCRIPTION: &str =
    "bilinear to 224 x 224, antialiased, rounded to bytes (Pillow), (byte - 127) / 128";

/// The byte that the network takes as 0, and the difference of the bytes that it takes as 0 and 1. These are the
/// constants of the published training of EfficientNet-lite.
const STATISTICS: (f32, f32) = (127.0, 128.0);

/// Bits of the weights of pixels after the binary point.
const BITS: u32 = 22;

/// The pixels of a line from which a pixel of a scaled line is computed, and their weights.
struct Taps {
    pixels: Range<usize>,
    weights: Vec<i64>,
}

impl Taps {
    /// The taps of each pixel of a line of `SIZE` pixels that is scaled from one of `size`.
    ///
    /// The weights are a triangle around the position of the pixel. It reaches to the next pixels of the larger line,
    /// so that all pixels of a line that becomes smaller count.
    fn of_line(size: usize) -> Vec<Self> {
        let scale = size as f64 / SIZE as f64;
        let reach = scale.max(1.0);
        let taps = |i: usize| {
            let centre = (i as f64 + 0.5) * scale;
            // The conversion rounds towards zero, and negative numbers to 0.
            let first = (centre - reach + 0.5) as usize;
            let pixels = first..((centre + reach + 0.5) as usize).min(size);
            let height = |x: usize| (1.0 - ((x as f64 - centre + 0.5) / reach).abs()).max(0.0);
            let sum: f64 = pixels.clone().map(height).sum();
            let weight = |x| (height(x) / sum * f64::from(1 << BITS)).round() as i64;
            Self { weights: pixels.clone().map(weight).collect(), pixels }
        };
        (0..SIZE).map(taps).collect()
    }

    /// Computes a pixel from those of its line, rounded to a byte.
    fn apply(&self, line: impl Fn(usize) -> u8) -> u8 {
        let terms = self.pixels.clone().zip(&self.weights);
        let sum: i64 = terms.map(|(x, weight)| i64::from(line(x)) * weight).sum();
        ((sum + (1 << (BITS - 1))) >> BITS).clamp(0, 255) as u8
    }
}

/// Scales images of bytes, first in rows and then in columns, to normalised maps (count, 224, 224, 3). Grey images have
/// three equal channels before they are normalised.
pub(super) fn resize(images: &[u8], shape: ImageShape, maps: &mut [f32]) {
    let ImageShape { channels, height, width } = shape;
    let (rows, columns) = (Taps::of_line(height), Taps::of_line(width));
    let (mean, deviation) = STATISTICS;
    let normalized: [f32; 256] = std::array::from_fn(|byte| (byte as f32 - mean) / deviation);
    let images = images.par_chunks(channels * height * width);
    maps.par_chunks_mut(SIZE * SIZE * 3).zip(images).for_each(|(map, image)| {
        let mut narrow = vec![0; height * SIZE];
        for (channel, plane) in image.chunks(height * width).enumerate() {
            for (line, narrow) in plane.chunks(width).zip(narrow.chunks_mut(SIZE)) {
                for (byte, taps) in narrow.iter_mut().zip(&columns) {
                    *byte = taps.apply(|x| line[x]);
                }
            }
            let to = if channels == 1 { 0..3 } else { channel..channel + 1 };
            for (line, taps) in map.chunks_mut(SIZE * 3).zip(&rows) {
                for (x, pixel) in line.chunks_mut(3).enumerate() {
                    let byte = taps.apply(|y| narrow[y * SIZE + x]);
                    pixel[to.clone()].fill(normalized[usize::from(byte)]);
                }
            }
        }
    });
}
