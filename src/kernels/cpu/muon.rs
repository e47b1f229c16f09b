//! Muon: the momentum, the orthogonalisation and the step of matrices.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};

use rayon::prelude::*;

use super::adam::sum_of_squares;
use super::gemm::gemm_packed;
use super::gemm::pack::Mat;
use super::isa::Isa;
use super::memory::{before_line, first_line};
use super::simd::simd_fn;
use crate::kernels::op::muon::{COEFFICIENTS, ITERATIONS, LEAST_NORM, scale};

/// The factors of one update of Muon. `backend/reference.rs` specifies the update as a composition.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MuonStep {
    /// Factors of the momentum, and of the gradient in it.
    pub momentum: [f32; 2],
    pub nesterov: bool,
    /// Factor of the gradient: clipping.
    pub gradient_scale: f32,
    /// Factor of the weight before it is updated: decoupled decay.
    pub keep: f32,
    pub learning_rate: f64,
}

/// Values that one thread updates at a time.
const CHUNK: usize = 1 << 14;

impl MuonStep {
    /// Updates a matrix (rows, columns) and its momentum.
    pub fn update(
        &self,
        isa: Isa,
        size: (usize, usize),
        gradient: &[f32],
        momentum: &mut [f32],
        weight: &mut [f32],
    ) {
        let mut update = Spare::new(gradient.len());
        let chunks = gradient.par_chunks(CHUNK).zip(momentum.par_chunks_mut(CHUNK));
        chunks.zip(update.par_chunks_mut(CHUNK)).for_each(|((gradient, momentum), update)| {
            accumulate(isa, self, gradient, momentum, update);
        });
        let update = orthogonalized(isa, &update, size);
        let factors = [self.keep, (self.learning_rate * scale(size)) as f32];
        let chunks = weight.par_chunks_mut(CHUNK).zip(update.par_chunks(CHUNK));
        chunks.for_each(|(weight, update)| subtract(isa, factors, weight, update));
    }
}

thread_local! {
    /// Memory of earlier updates. New memory would cost a page fault per 4 KiB.
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Values with arbitrary content, which begin at a cache line. Their memory is used again.
struct Spare {
    values: Vec<f32>,
    span: Range<usize>,
}

impl Spare {
    fn new(len: usize) -> Self {
        let least = len + before_line::<f32>();
        let found = SPARE.with_borrow_mut(|spare| {
            let fits = spare.iter().enumerate().filter(|(_, values)| values.len() >= least);
            let smallest = fits.min_by_key(|(_, values)| values.len()).map(|(i, _)| i);
            smallest.map(|i| spare.swap_remove(i))
        });
        let values = found.unwrap_or_else(|| vec![0.0; least]);
        let first = first_line(&values);
        Self { values, span: first..first + len }
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        // A thread that ends needs no memory.
        let _ = SPARE.try_with(|spare| spare.borrow_mut().push(values));
    }
}

impl Deref for Spare {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[self.span.clone()]
    }
}

impl DerefMut for Spare {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[self.span.clone()]
    }
}

simd_fn! {
    fn accumulate<S>(step: &MuonStep, gradient: &[f32], momentum: &mut [f32], update: &mut [f32]) {
        let [decay, gain] = step.momentum;
        for ((gradient, momentum), update) in gradient.iter().zip(momentum).zip(update) {
            let gradient = gradient * step.gradient_scale;
            *momentum = *momentum * decay + gradient * gain;
            *update = if step.nesterov { *momentum * decay + gradient * gain } else { *momentum };
        }
    }
}

simd_fn! {
    fn subtract<S>(factors: [f32; 2], weight: &mut [f32], update: &[f32]) {
        let [keep, size] = factors;
        for (weight, update) in weight.iter_mut().zip(update) {
            *weight = *weight * keep - update * size;
        }
    }
}

/// Orthogonalises a matrix (rows, columns).
///
/// The iterations run on the smaller of the two products of the matrix with itself. With `Q = a I + b A + c A²`, an
/// iteration replaces `X` by `Q X`, and thus `A` by `Q A Q`. The result is the product of all `Q` with the first `X`.
/// It equals that of the definition up to rounding, and most matrices need less than half of the multiplications.
fn orthogonalized(isa: Isa, matrix: &[f32], (rows, cols): (usize, usize)) -> Spare {
    let norm = sum_of_squares(isa, matrix).sqrt();
    let inverse = 1.0 / norm.max(LEAST_NORM);
    let x = Mat::new(matrix, rows, cols);
    let size = rows.min(cols);
    let mut a = if rows <= cols {
        symmetric_product(isa, x, x.transposed())
    } else {
        symmetric_product(isa, x.transposed(), x)
    };
    a.iter_mut().for_each(|value| *value = (f64::from(*value) * inverse * inverse) as f32);
    let square = |left: &[f32], right: &[f32]| {
        symmetric_product(isa, Mat::new(left, size, size), Mat::new(right, size, size))
    };
    let [first, second, third] = COEFFICIENTS.map(|coefficient| coefficient as f32);
    let mut factor: Option<Spare> = None;
    for iteration in 1..=ITERATIONS {
        let mut q = square(&a, &a);
        combine(isa, [second, third], &a, &mut q);
        q.iter_mut().step_by(size + 1).for_each(|diagonal| *diagonal += first);
        if iteration < ITERATIONS {
            a = square(&square(&q, &a), &q);
        }
        factor = Some(match factor {
            Some(factor) => square(&q, &factor),
            None => q,
        });
    }
    let mut factor = factor.unwrap_or_else(|| Spare::new(0));
    factor.iter_mut().for_each(|value| *value = (f64::from(*value) * inverse) as f32);
    let factor = Mat::new(&factor, size, size);
    if rows <= cols { product(isa, factor, x) } else { product(isa, x, factor) }
}

/// Number of rows that one thread computes at a time, whole panels of the right-hand side.
const ROWS: usize = 64;

/// Computes `a b`. The result does not depend on the number of threads.
fn product(isa: Isa, a: Mat<'_>, b: Mat<'_>) -> Spare {
    let (rows, cols) = (a.rows(), b.cols());
    let (mut packed, mut c) = (Spare::new(b.packed_len()), Spare::new(rows * cols));
    let b = b.packed(&mut packed.values);
    c.par_chunks_mut((ROWS * cols).max(1)).enumerate().for_each(|(i, c)| {
        let rows = c.len() / cols;
        gemm_packed(isa, (c, cols), a.rows_from(i * ROWS, rows), b, false);
    });
    c
}

/// Computes `a b`, which is symmetric: little more than half of it is computed, and the rest copied.
fn symmetric_product(isa: Isa, a: Mat<'_>, b: Mat<'_>) -> Spare {
    let size = a.rows();
    let (mut packed, mut c) = (Spare::new(b.packed_len()), Spare::new(size * size));
    let b = b.packed(&mut packed.values);
    c.par_chunks_mut((ROWS * size).max(1)).enumerate().for_each(|(i, c)| {
        let (first, rows) = (i * ROWS, c.len() / size);
        gemm_packed(
            isa,
            (&mut c[first..], size),
            a.rows_from(first, rows),
            b.columns_from(first),
            false,
        );
    });
    // Few rows at a time: their cache lines are used again for the next columns.
    for first in (ROWS..size).step_by(ROWS) {
        let (above, below) = c.split_at_mut(first * size);
        for (i, above) in above.chunks_exact(FEW * size).enumerate() {
            for (row, below) in (first..).zip(below.chunks_exact_mut(size).take(ROWS)) {
                let values = above[row..].iter().step_by(size);
                below[i * FEW..][..FEW].iter_mut().zip(values).for_each(|(to, from)| *to = *from);
            }
        }
    }
    c
}

/// Number of rows that are transposed at a time: a divisor of [`ROWS`].
const FEW: usize = 16;

simd_fn! {
    /// Computes `q = second a + third q`.
    fn combine<S>(factors: [f32; 2], a: &[f32], q: &mut [f32]) {
        let [second, third] = factors;
        q.iter_mut().zip(a).for_each(|(q, a)| *q = third * *q + second * a);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::Normals;

    /// Orthogonalises matrices in parallel.
    fn orthogonalize(isa: Isa, matrices: &mut [(Vec<f32>, (usize, usize))]) {
        matrices.par_iter_mut().with_max_len(1).for_each(|(values, size)| {
            *values = orthogonalized(isa, values, *size).to_vec();
        });
    }

    /// Computes the definition in f64.
    fn definition(matrix: &[f32], (rows, cols): (usize, usize)) -> Vec<f64> {
        let product =
            |a: &dyn Fn(usize, usize) -> f64, b: &dyn Fn(usize, usize) -> f64, (n, k, m)| {
                let mut c = vec![0.0; n * m];
                for i in 0..n {
                    for l in 0..k {
                        for j in 0..m {
                            c[i * m + j] += a(i, l) * b(l, j);
                        }
                    }
                }
                c
            };
        let norm = matrix.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let mut x: Vec<f64> = matrix.iter().map(|&x| f64::from(x) / norm.max(LEAST_NORM)).collect();
        let [a, b, c] = COEFFICIENTS;
        for _ in 0..ITERATIONS {
            let at = |i: usize, j: usize| x[i * cols + j];
            let s = product(&at, &|i, j| at(j, i), (rows, cols, rows));
            let of_s = |i: usize, j: usize| s[i * rows + j];
            let s2 = product(&of_s, &of_s, (rows, rows, rows));
            let q = |i: usize, j: usize| b * s[i * rows + j] + c * s2[i * rows + j];
            let more = product(&q, &at, (rows, rows, cols));
            x = x.iter().zip(more).map(|(x, more)| a * x + more).collect();
        }
        x
    }

    #[test]
    fn orthogonalised_matrices_are_those_of_the_definition() {
        let mut matrices = Vec::new();
        for (k, size) in
            [(1, 1), (1, 40), (40, 1), (16, 16), (33, 70), (70, 33), (24, 216), (130, 200)]
                .into_iter()
                .enumerate()
        {
            matrices.push((Normals(k as u64).values(0, size.0 * size.1), size));
            // Of rank 1, except for small values.
            let far = |x: &f32| 10.0 + 1e-2 * x;
            matrices.push((matrices[2 * k].0.iter().map(far).collect(), size));
        }
        matrices.push((vec![0.0; 12], (3, 4)));
        for isa in Isa::available() {
            let mut found = matrices.clone();
            orthogonalize(isa, &mut found);
            for ((matrix, size), (found, _)) in matrices.iter().zip(&found) {
                let expected = definition(matrix, *size);
                let square: f64 = expected.iter().map(|x| x * x).sum();
                let off: f64 =
                    expected.iter().zip(found).map(|(x, y)| (x - f64::from(*y)).powi(2)).sum();
                // The products of the matrix with itself round its smallest singular values. In f32 the error is up to
                // 2.8e-3 of the result for matrices of nearly rank 1, measured up to 256 x 2304, and 2e-6 for matrices
                // of normal values. In bf16, in which the paper computes, it is 1e-2.
                assert!(
                    off.sqrt() <= 4e-3 * square.sqrt(),
                    "{size:?}, {isa:?}: {off:e} of {square:e}"
                );
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut matrices: Vec<_> = [(130, 300), (300, 130), (64, 64)]
                .into_iter()
                .map(|size: (usize, usize)| (Normals(3).values(0, size.0 * size.1), size))
                .collect();
            pool.install(|| orthogonalize(Isa::detect(), &mut matrices));
            matrices
        };
        let one = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one));
    }
}
