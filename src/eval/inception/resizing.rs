use rayon::prelude::*;

use super::network::SIZE;
use crate::data::dataset::ImageShape;

/// The method by which [`Inception`](super::Inception) scales images to 299 x 299 pixels, and their bytes to [-1, 1].
///
/// Both methods interpolate between two by two pixels, also if the image is larger, and round nothing to bytes in
/// between. They differ in the position of the pixels, which changes the Fréchet distance. Figures of different methods
/// cannot be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Resizing {
    /// The method of pytorch-fid, with which most figures were computed since 2018. The centres of pixels keep their
    /// place: output pixel i lies at `(i + 0.5) size / 299 - 0.5`, at least 0. Bytes b become `2 b / 255 - 1`.
    #[default]
    PytorchFid,
    /// The method of TensorFlow 1 and the original code of the distance, which torch-fidelity also uses: output pixel
    /// i lies at `i size / 299`. Bytes b become `(b - 128) / 128`.
    TensorFlow1,
}

impl Resizing {
    /// The description in the identity of an extractor.
    pub(super) fn description(self) -> &'static str {
        match self {
            Self::PytorchFid => {
                "bilinear to 299 x 299 with centred pixels, bytes / 127.5 - 1 (pytorch-fid)"
            }
            Self::TensorFlow1 => "bilinear to 299 x 299 as in TensorFlow 1, (bytes - 128) / 128",
        }
    }

    /// The two pixels of a line of `size` between which each output pixel lies, and the share of the second.
    fn positions(self, size: usize) -> Vec<(usize, usize, f32)> {
        // In f32, as both programs compute them.
        let scale = size as f32 / SIZE as f32;
        let position = |i: usize| match self {
            Self::PytorchFid => (scale * (i as f32 + 0.5) - 0.5).max(0.0),
            Self::TensorFlow1 => scale * i as f32,
        };
        (0..SIZE)
            .map(|i| {
                let first = (position(i) as usize).min(size - 1);
                (first, (first + 1).min(size - 1), position(i) - first as f32)
            })
            .collect()
    }

    /// Scales images of bytes, channel by channel, to maps (count, 299, 299, 3). Grey images have three equal channels.
    pub(super) fn resize(self, images: &[u8], shape: ImageShape, maps: &mut [f32]) {
        let ImageShape { channels, height, width } = shape;
        let (rows, columns) = (self.positions(height), self.positions(width));
        let (factor, shift) = match self {
            Self::PytorchFid => (2.0 / 255.0, -1.0),
            Self::TensorFlow1 => (1.0 / 128.0, -1.0),
        };
        let plane = height * width;
        maps.par_chunks_mut(SIZE * 3).enumerate().for_each(|(line, pixels)| {
            let (image, (top, bottom, down)) = (line / SIZE, rows[line % SIZE]);
            for (channel, image) in images[image * channels * plane..][..channels * plane]
                .chunks_exact(plane)
                .enumerate()
            {
                let (top, bottom) =
                    (&image[top * width..][..width], &image[bottom * width..][..width]);
                for (pixel, &(left, right, across)) in pixels.chunks_exact_mut(3).zip(&columns) {
                    let between = |line: &[u8]| {
                        let [left, right] = [left, right].map(|x| f32::from(line[x]));
                        left + (right - left) * across
                    };
                    let (top, bottom) = (between(top), between(bottom));
                    pixel[channel] = (top + (bottom - top) * down) * factor + shift;
                }
            }
            if channels == 1 {
                pixels.as_chunks_mut().0.iter_mut().for_each(|pixel| *pixel = [pixel[0]; 3]);
            }
        });
    }
}
