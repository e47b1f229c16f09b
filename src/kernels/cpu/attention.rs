//! Attention, one image and head at a time, so that the scores stay in the cache. The backward pass recomputes
//! them.

use std::cell::RefCell;

use rayon::prelude::*;

use super::gemm::gemm;
use super::gemm::pack::Mat;
use super::isa::Isa;
use super::math::{dot, exp};
use super::memory::sized;
use super::simd::{Simd, lanes, simd_fn};
use crate::kernels::op::attention::AttentionShape;

thread_local! {
    /// The scores of a head and their gradients, reused from call to call. Nothing may wait for other
    /// threads while they are borrowed: this thread could be given work that borrows them again.
    static SCORES: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Attention of these sizes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention {
    pub isa: Isa,
    pub shape: AttentionShape,
}

impl Attention {
    /// Writes `y` (batch, positions, channels) from `qkv` (batch, positions, 3 channels).
    pub(crate) fn forward(&self, qkv: &[f32], y: &mut [f32]) {
        let AttentionShape { positions, channels, .. } = self.shape;
        let image = positions * channels;
        qkv.par_chunks(3 * image).zip(y.par_chunks_mut(image)).for_each(|(qkv, y)| {
            for first in self.heads() {
                let [q, k, v] = self.split(qkv, first);
                SCORES.with_borrow_mut(|(shares, _)| {
                    let shares = self.shares(q, k, shares);
                    gemm(self.isa, (&mut y[first..], channels), self.square(shares), v, false);
                });
            }
        });
    }

    /// Writes the gradient of `qkv` from that of `y`.
    pub(crate) fn backward(&self, qkv: &[f32], dy: &[f32], dqkv: &mut [f32]) {
        let (n, c, isa) = (self.shape.positions, self.shape.channels, self.isa);
        let images = qkv.par_chunks(3 * n * c).zip(dy.par_chunks(n * c));
        images.zip(dqkv.par_chunks_mut(3 * n * c)).for_each(|((qkv, dy), dqkv)| {
            for first in self.heads() {
                let [q, k, v] = self.split(qkv, first);
                let dy = Mat::with_stride(&dy[first..], n, self.shape.head(), c);
                let dqkv = &mut dqkv[first..];
                SCORES.with_borrow_mut(|(shares, dscores)| {
                    let shares = self.shares(q, k, shares);
                    let dscores = sized(dscores, n * n);
                    gemm(isa, (&mut *dscores, n), dy, v.transposed(), false);
                    softmax_backward(isa, dscores, shares, n, self.shape.scale());
                    let (shares, dscores) = (self.square(shares), self.square(dscores));
                    gemm(isa, (&mut *dqkv, 3 * c), dscores, k, false);
                    gemm(isa, (&mut dqkv[c..], 3 * c), dscores.transposed(), q, false);
                    gemm(isa, (&mut dqkv[2 * c..], 3 * c), shares.transposed(), dy, false);
                });
            }
        });
    }

    /// The first channel of each head.
    fn heads(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.shape.channels).step_by(self.shape.head())
    }

    /// A matrix of scores.
    fn square<'a>(&self, values: &'a [f32]) -> Mat<'a> {
        Mat::new(values, self.shape.positions, self.shape.positions)
    }

    /// q, k and v of the head of an image whose first channel is `first`, each (positions, head).
    fn split<'a>(&self, qkv: &'a [f32], first: usize) -> [Mat<'a>; 3] {
        let AttentionShape { positions, channels: c, .. } = self.shape;
        [0, 1, 2]
            .map(|i| Mat::with_stride(&qkv[i * c + first..], positions, self.shape.head(), 3 * c))
    }

    /// Writes the softmax of the scores to `memory`: the weight of each position in the output of each.
    /// Rows sum to 1.
    fn shares<'a>(&self, q: Mat, k: Mat, memory: &'a mut Vec<f32>) -> &'a [f32] {
        let n = self.shape.positions;
        let scores = sized(memory, n * n);
        gemm(self.isa, (&mut *scores, n), q, k.transposed(), false);
        softmax(self.isa, scores, n, self.shape.scale());
        scores
    }
}

simd_fn! {
    /// Replaces each row by the softmax of the row times `scale`, which is positive.
    fn softmax<S>(rows: &mut [f32], length: usize, scale: f32) {
        for row in rows.chunks_exact_mut(length) {
            // Without subtracting the maximum, a large score would overflow.
            let maximum = maximum::<S>(row);
            let total = exponentials::<S>(row, maximum, scale);
            row.iter_mut().for_each(|x| *x /= total);
        }
    }
}

simd_fn! {
    /// The backward pass of the softmax, in place: the gradient of a row minus its mean weighted by the
    /// shares, times the shares and `scale`.
    fn softmax_backward<S>(gradients: &mut [f32], shares: &[f32], length: usize, scale: f32) {
        let rows = gradients.chunks_exact_mut(length).zip(shares.chunks_exact(length));
        for (d, p) in rows {
            let mean = dot::<S>(d, p);
            d.iter_mut().zip(p).for_each(|(d, p)| *d = scale * p * (*d - mean));
        }
    }
}

/// The largest value of a row.
#[inline(always)]
fn maximum<S: Simd>(row: &[f32]) -> f32 {
    let (vectors, rest) = row.split_at(row.len() / S::WIDTH * S::WIDTH);
    let mut most = S::splat(f32::NEG_INFINITY);
    for x in vectors.chunks_exact(S::WIDTH) {
        // SAFETY: the chunk has the values of a vector.
        most = unsafe { S::load(x.as_ptr()) }.at_least(most);
    }
    let lanes = lanes(most);
    rest.iter().chain(&lanes[..S::WIDTH]).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Replaces each value by the exponential of its distance from `maximum` times `scale`. Returns their sum.
#[inline(always)]
fn exponentials<S: Simd>(row: &mut [f32], maximum: f32, scale: f32) -> f32 {
    let (vectors, rest) = row.split_at_mut(row.len() / S::WIDTH * S::WIDTH);
    let mut total = S::splat(0.0);
    for x in vectors.chunks_exact_mut(S::WIDTH) {
        // SAFETY: the chunk has the values of a vector.
        unsafe {
            let value = exp(S::load(x.as_ptr()).sub(S::splat(maximum)).mul(S::splat(scale)));
            value.store(x.as_mut_ptr());
            total = total.add(value);
        }
    }
    let mut sum: f32 = lanes(total)[..S::WIDTH].iter().sum();
    for x in rest {
        *x = exp((*x - maximum) * scale);
        sum += *x;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scores would overflow if the maximum were not subtracted. The weight of the maximum is then 1.
    #[test]
    fn large_scores_leave_one_share() {
        for isa in Isa::available() {
            let mut rows = [1e4, -1e4, 9.9e3, 3e38, -3e38, 0.0];
            softmax(isa, &mut rows, 3, 1.0);
            assert!((rows[0] - 1.0).abs() < 1e-6 && (rows[3] - 1.0).abs() < 1e-6, "{isa:?}");
            assert!([1, 2, 4, 5].iter().all(|&i| (0.0..1e-30).contains(&rows[i])), "{rows:?}");
        }
    }
}
