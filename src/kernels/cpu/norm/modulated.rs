use rayon::prelude::*;

use super::{Known, Normalization, Stats};

/// A normalisation whose weight and bias depend on the image: `weight (1 + scale)` and `bias (1 + scale) + shift`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Modulated<'a> {
    pub norm: Normalization<'a>,
    /// (batch, 2 channels): the scales of an image, then its shifts.
    pub by: &'a [f32],
}

impl Modulated<'_> {
    fn channels(&self) -> usize {
        self.norm.weight.len()
    }

    /// Calls `f` with the normalisation of the image of these scales and shifts.
    fn of_image<R>(&self, by: &[f32], f: impl FnOnce(Normalization<'_>) -> R) -> R {
        let Normalization { isa, config, weight, bias } = self.norm;
        let (scale, shift) = by.split_at(self.channels());
        let scaled =
            |values: &[f32]| values.iter().zip(scale).map(|(x, s)| x * (1.0 + s)).collect();
        let (weight, mut bias): (Vec<f32>, Vec<f32>) = (scaled(weight), scaled(bias));
        bias.iter_mut().zip(shift).for_each(|(bias, shift)| *bias += shift);
        f(Normalization { isa, config, weight: &weight, bias: &bias })
    }

    /// Writes `y` from `x`, and returns the statistics of each image.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32]) -> Vec<Stats> {
        let (of_image, image) = self.lengths(x);
        let images = y.par_chunks_mut(image).zip(x.par_chunks(image));
        let all = images
            .zip(self.by.par_chunks(of_image))
            .map(|((y, x), by)| self.of_image(by, |norm| norm.forward(1, x, y)));
        all.flatten_iter().collect()
    }

    /// Returns the normalisation with the statistics of [`forward`](Self::forward), which are those of the plain
    /// normalisation.
    pub(crate) fn known(&self, stats: &[Stats]) -> Known {
        let mut known = Known::new(self.norm.isa, self.norm.silu(), self.channels());
        for (stats, by) in stats.iter().zip(self.by.chunks(2 * self.channels())) {
            self.of_image(by, |norm| known.push(stats, norm.weight, norm.bias));
        }
        known
    }

    /// Returns the gradients of weight and bias, writes that of `by`, and replaces `dy` by the gradient of `x` plus
    /// `more`.
    pub(crate) fn backward(
        &self,
        x: &[f32],
        stats: &[Stats],
        dy: &mut [f32],
        more: Option<&[f32]>,
        dby: &mut [f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let (of_image, image) = self.lengths(x);
        let c = self.channels();
        let images = dy.par_chunks_mut(image).zip(x.par_chunks(image)).zip(stats.par_chunks(1));
        let vectors = self.by.par_chunks(of_image).zip(dby.par_chunks_mut(of_image));
        let gradients: Vec<_> = images
            .zip(vectors)
            .enumerate()
            .map(|(k, (((dy, x), stats), (by, dby)))| {
                let more = more.map(|more| &more[k * image..][..image]);
                let (weight, bias) = self.of_image(by, |norm| norm.backward(x, stats, dy, more));
                let (scale, shift) = dby.split_at_mut(c);
                for i in 0..c {
                    scale[i] = weight[i] * self.norm.weight[i] + bias[i] * self.norm.bias[i];
                }
                shift.copy_from_slice(&bias);
                (weight, bias)
            })
            .collect();
        let mut sums = vec![[0f64; 2]; c];
        for ((weight, bias), by) in gradients.iter().zip(self.by.chunks(of_image)) {
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = 1.0 + f64::from(by[i]);
                sums[0] += factor * f64::from(weight[i]);
                sums[1] += factor * f64::from(bias[i]);
            }
        }
        sums.into_iter().map(|[weight, bias]| (weight as f32, bias as f32)).unzip()
    }

    /// The length of the scales and shifts of an image, and that of its map.
    fn lengths(&self, x: &[f32]) -> (usize, usize) {
        let of_image = 2 * self.channels();
        (of_image, x.len() / (self.by.len() / of_image))
    }
}
