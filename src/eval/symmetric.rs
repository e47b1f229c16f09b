//! Symmetric matrices of f64, row by row.

/// The sum of the diagonal.
pub(super) fn trace(a: &[f64], n: usize) -> f64 {
    a.iter().step_by(n + 1).sum()
}

/// The matrix product.
pub(super) fn multiply(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let mut product = vec![0.0; n * n];
    for (row, a) in product.chunks_exact_mut(n).zip(a.chunks_exact(n)) {
        for (a, b) in a.iter().zip(b.chunks_exact(n)) {
            row.iter_mut().zip(b).for_each(|(p, b)| *p += a * b);
        }
    }
    product
}

/// The square root of a symmetric matrix without negative eigenvalues, except for rounding.
pub(super) fn square_root(a: &[f64], n: usize) -> Vec<f64> {
    let (values, vectors) = eigen(a.to_vec(), n);
    let mut root = vec![0.0; n * n];
    for (value, vector) in values.iter().zip(vectors.chunks_exact(n)) {
        let scale = value.max(0.0).sqrt();
        for (row, x) in root.chunks_exact_mut(n).zip(vector) {
            row.iter_mut().zip(vector).for_each(|(r, y)| *r += scale * x * y);
        }
    }
    root
}

/// The eigenvalues and, row by row, the eigenvectors of a symmetric matrix. Jacobi's method rotates each pair of axes
/// in which the matrix is not diagonal, until none is left.
pub(super) fn eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; n * n];
    vectors.iter_mut().step_by(n + 1).for_each(|v| *v = 1.0);
    let squares: f64 = a.iter().map(|x| x * x).sum();
    // The method converges quadratically: ten sweeps are usual.
    for _ in 0..50 {
        if off_diagonal(&a, n) <= 1e-30 * squares {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let off = a[p * n + q];
                if off == 0.0 {
                    continue;
                }
                // The smaller of the two angles that make the element 0; Golub and Van Loan, section 8.5.
                let ratio = (a[q * n + q] - a[p * n + p]) / (2.0 * off);
                let tan = 1f64.copysign(ratio) / (ratio.abs() + ratio.hypot(1.0));
                let cos = 1.0 / tan.hypot(1.0);
                let sin = tan * cos;
                let turn = |a: &mut [f64], p: usize, q: usize| {
                    (a[p], a[q]) = (cos * a[p] - sin * a[q], sin * a[p] + cos * a[q]);
                };
                for k in 0..n {
                    turn(&mut a, k * n + p, k * n + q);
                }
                for k in 0..n {
                    turn(&mut a, p * n + k, q * n + k);
                    turn(&mut vectors, p * n + k, q * n + k);
                }
            }
        }
    }
    (a.into_iter().step_by(n + 1).collect(), vectors)
}

fn off_diagonal(a: &[f64], n: usize) -> f64 {
    (0..n * n).filter(|i| i / n != i % n).map(|i| a[i] * a[i]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_near(found: f64, expected: f64) {
        assert!(
            (found - expected).abs() <= 1e-9 * (1.0 + expected.abs()),
            "{found}, not {expected}"
        );
    }

    #[test]
    fn eigenvectors_are_orthonormal_and_give_the_matrix_back() {
        for n in [1, 2, 7, 64] {
            let a: Vec<f64> = (0..n * n)
                .map(|i| ((i / n * (i % n)) as f64 * 0.9).sin() + (i / n + i % n) as f64)
                .collect();
            let (values, vectors) = eigen(a.clone(), n);
            let row = |k: usize| &vectors[k * n..][..n];
            for i in 0..n {
                for j in 0..n {
                    let dot: f64 = row(i).iter().zip(row(j)).map(|(x, y)| x * y).sum();
                    assert_near(dot, f64::from(u8::from(i == j)));
                    let sum = (0..n).map(|k| values[k] * row(k)[i] * row(k)[j]).sum();
                    assert_near(sum, a[i * n + j]);
                }
            }
        }
    }
}
