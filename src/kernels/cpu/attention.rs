use std::cell::RefCell;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::elementwise::{dot, exp};
use super::gemm::{Mat, gemm};
use super::simd::{Isa, Simd, lanes, simd_fn};
use super::values::sized;

thread_local! {
    /// An image's scores and their gradients, reused from call to call. Nothing may wait for other
    /// threads while they are borrowed: this one could be given work that borrows them again.
    static SCORES: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// `softmax(q k^T / sqrt(channels)) v` over all positions; each (batch, positions, channels).
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    // The scores grow with the number of channels: scaling q first keeps them small.
    let scores = (q * scale)?.matmul(&k.transpose(1, 2)?.contiguous()?)?;
    // Not `softmax_last_dim`, which has no gradient.
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
}

/// Attention on the CPU, an image at a time, whose scores stay in the cache; they are computed
/// again for the backward pass, not kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionSizes {
    pub isa: Isa,
    pub positions: usize,
    pub channels: usize,
}

impl AttentionSizes {
    /// `y` (batch, positions, channels) from `qkv` (batch, positions, 3 channels): q, k and v of a
    /// position side by side.
    pub fn forward(&self, qkv: &[f32], y: &mut [f32]) {
        let image = self.positions * self.channels;
        qkv.par_chunks(3 * image).zip(y.par_chunks_mut(image)).for_each(|(qkv, y)| {
            let [q, k, v] = self.split(qkv);
            SCORES.with_borrow_mut(|(shares, _)| {
                let shares = self.shares(q, k, shares);
                gemm(self.isa, (y, self.channels), self.square(shares), v, false);
            });
        });
    }

    /// The gradient of `qkv` from that of `y`.
    pub fn backward(&self, qkv: &[f32], dy: &[f32], dqkv: &mut [f32]) {
        let (n, c, isa) = (self.positions, self.channels, self.isa);
        let images = qkv.par_chunks(3 * n * c).zip(dy.par_chunks(n * c));
        images.zip(dqkv.par_chunks_mut(3 * n * c)).for_each(|((qkv, dy), dqkv)| {
            let [q, k, v] = self.split(qkv);
            let dy = Mat::new(dy, n, c);
            SCORES.with_borrow_mut(|(shares, dscores)| {
                let shares = self.shares(q, k, shares);
                let dscores = sized(dscores, n * n);
                gemm(isa, (&mut *dscores, n), dy, v.transposed(), false);
                softmax_backward(isa, dscores, shares, n, self.scale());
                let (shares, dscores) = (self.square(shares), self.square(dscores));
                gemm(isa, (&mut *dqkv, 3 * c), dscores, k, false);
                gemm(isa, (&mut dqkv[c..], 3 * c), dscores.transposed(), q, false);
                gemm(isa, (&mut dqkv[2 * c..], 3 * c), shares.transposed(), dy, false);
            });
        });
    }

    /// What scores are multiplied with.
    fn scale(&self) -> f32 {
        1.0 / (self.channels as f32).sqrt()
    }

    fn square<'a>(&self, values: &'a [f32]) -> Mat<'a> {
        Mat::new(values, self.positions, self.positions)
    }

    /// q, k and v of an image, each (positions, channels).
    fn split<'a>(&self, qkv: &'a [f32]) -> [Mat<'a>; 3] {
        let (n, c) = (self.positions, self.channels);
        [0, 1, 2].map(|i| Mat::with_stride(&qkv[i * c..], n, c, 3 * c))
    }

    /// What share of each position's attention goes to each, rows of sum 1, in `memory`.
    fn shares<'a>(&self, q: Mat, k: Mat, memory: &'a mut Vec<f32>) -> &'a [f32] {
        let scores = sized(memory, self.positions * self.positions);
        gemm(self.isa, (&mut *scores, self.positions), q, k.transposed(), false);
        softmax(self.isa, scores, self.positions, self.scale());
        scores
    }
}

simd_fn! {
    /// The softmax of each row times `scale`, which is positive.
    fn softmax<S>(rows: &mut [f32], length: usize, scale: f32) {
        for row in rows.chunks_exact_mut(length) {
            // Without the maximum a large score would overflow.
            let maximum = maximum::<S>(row);
            let total = exponentials::<S>(row, maximum, scale);
            row.iter_mut().for_each(|x| *x /= total);
        }
    }
}

simd_fn! {
    /// Through the softmax, in place: a row's gradient less its mean by the row's shares, times `scale`.
    fn softmax_backward<S>(gradients: &mut [f32], shares: &[f32], length: usize, scale: f32) {
        let rows = gradients.chunks_exact_mut(length).zip(shares.chunks_exact(length));
        for (d, p) in rows {
            let mean = dot::<S>(d, p);
            d.iter_mut().zip(p).for_each(|(d, p)| *d = scale * p * (*d - mean));
        }
    }
}

#[inline(always)]
fn maximum<S: Simd>(row: &[f32]) -> f32 {
    let (vectors, rest) = row.split_at(row.len() / S::WIDTH * S::WIDTH);
    let mut most = S::splat(f32::NEG_INFINITY);
    for x in vectors.chunks_exact(S::WIDTH) {
        // SAFETY: a vector's values.
        most = unsafe { S::load(x.as_ptr()) }.at_least(most);
    }
    let lanes = lanes(most);
    rest.iter().chain(&lanes[..S::WIDTH]).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Replaces each value by its distance from `maximum`, times `scale`, exponentiated; their sum.
#[inline(always)]
fn exponentials<S: Simd>(row: &mut [f32], maximum: f32, scale: f32) -> f32 {
    let (vectors, rest) = row.split_at_mut(row.len() / S::WIDTH * S::WIDTH);
    let mut total = S::splat(0.0);
    for x in vectors.chunks_exact_mut(S::WIDTH) {
        // SAFETY: a vector's values.
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
    use crate::kernels::tests::{Normals, Products, in_each_isa, value_and_gradients};
    use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape};
    use proptest::prelude::*;

    use crate::kernels::with_values;
    use crate::random_inputs::inputs;

    /// For candle, so that both sides go the same way to a gradient.
    struct Attention(Isa);

    impl Attention {
        fn sizes(&self, positions: usize, channels: usize) -> AttentionSizes {
            AttentionSizes { isa: self.0, positions, channels: channels / 3 }
        }
    }

    impl CustomOp1 for Attention {
        fn name(&self) -> &'static str {
            "attention"
        }

        fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            let (batch, n, c) = layout.shape().dims3()?;
            // Not zeros, which a kernel that adds would leave right.
            let mut y = vec![f32::NAN; batch * n * c / 3];
            self.sizes(n, c).forward(qkv.as_slice()?, &mut y);
            Ok((CpuStorage::F32(y), Shape::from((batch, n, c / 3))))
        }

        fn bwd(&self, qkv: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
            let (_, n, c) = qkv.dims3()?;
            let dqkv = with_values([qkv, &dy.contiguous()?], |[qkv, dy]| {
                let mut dqkv = vec![f32::NAN; qkv.len()];
                self.sizes(n, c).backward(qkv, dy, &mut dqkv);
                Ok(dqkv)
            })?;
            Ok(Some(Tensor::from_vec(dqkv, qkv.shape(), qkv.device())?))
        }
    }

    fn composed(qkv: &Tensor) -> Result<Tensor> {
        let c = qkv.dim(2)? / 3;
        let part = |i| qkv.narrow(2, i * c, c)?.contiguous();
        attention(&part(0)?, &part(1)?, &part(2)?)
    }

    proptest! {
        #![proptest_config(inputs(96))]

        #[test]
        fn kernel_agrees_with_its_composition(
            (batch, positions) in (1usize..4, prop_oneof![Just(1usize), 1usize..40]),
            channels in 1usize..70,
            seed: u64,
        ) {
            let normals = Normals(seed);
            let qkv = normals.tensor(0, &[batch, positions, 3 * channels]);
            let dy = normals.gradient(&[batch, positions, channels]);
            let bounds = Products::PLAIN.attention_bounds(&qkv, &dy).unwrap();
            let (inputs, dy) = ([qkv], |_: &[usize]| dy.clone());
            let exact = value_and_gradients(DType::F64, &inputs, dy, |v| composed(&v[0]));
            let kernel = |isa, v: &[Tensor]| v[0].apply_op1(Attention(isa));
            in_each_isa(&inputs, dy, kernel, &exact.unwrap(), &bounds);
        }
    }

    /// Scores that would overflow but for the maximum, which is then all that there is.
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
