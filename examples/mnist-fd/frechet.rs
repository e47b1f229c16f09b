//! The Fréchet distance of two normal distributions (Dowson and Landau 1982), in f64.

/// A normal distribution, as far as samples tell.
pub struct Gaussian {
    pub mean: Vec<f64>,
    /// Symmetric, row by row.
    pub covariance: Vec<f64>,
}

impl Gaussian {
    /// Mean and unbiased covariance of points of `size` numbers each, of which there are at least 2.
    pub fn fit(points: &[f32], size: usize) -> Self {
        let count = (points.len() / size) as f64;
        let mut mean = vec![0.0; size];
        for point in points.chunks_exact(size) {
            mean.iter_mut().zip(point).for_each(|(m, &x)| *m += f64::from(x) / count);
        }
        let mut covariance = vec![0.0; size * size];
        for point in points.chunks_exact(size) {
            let away: Vec<f64> = point.iter().zip(&mean).map(|(&x, m)| f64::from(x) - m).collect();
            for (row, a) in covariance.chunks_exact_mut(size).zip(&away) {
                row.iter_mut().zip(&away).for_each(|(c, b)| *c += a * b / (count - 1.0));
            }
        }
        Self { mean, covariance }
    }

    /// `|m - m'|^2 + Tr(C + C' - 2 (C C')^1/2)`, the square of a metric, as is usual.
    pub fn distance(&self, other: &Self) -> f64 {
        let n = self.mean.len();
        let apart: f64 = self.mean.iter().zip(&other.mean).map(|(a, b)| (a - b).powi(2)).sum();
        // C C' is not symmetric, but has the eigenvalues of C^1/2 C' C^1/2, which is.
        let root = square_root(&self.covariance, n);
        let product = multiply(&multiply(&root, &other.covariance, n), &root, n);
        let (values, _) = eigen(product, n);
        let shared: f64 = values.iter().map(|v| v.max(0.0).sqrt()).sum();
        let sum = trace(&self.covariance, n) + trace(&other.covariance, n);
        let distance = apart + sum - 2.0 * shared;
        // Rounding must not make it negative; what is more than that must be seen.
        if distance.abs() <= 1e-6 * sum { distance.max(0.0) } else { distance }
    }
}

fn trace(a: &[f64], n: usize) -> f64 {
    a.iter().step_by(n + 1).sum()
}

fn multiply(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let mut product = vec![0.0; n * n];
    for (row, a) in product.chunks_exact_mut(n).zip(a.chunks_exact(n)) {
        for (a, b) in a.iter().zip(b.chunks_exact(n)) {
            row.iter_mut().zip(b).for_each(|(p, b)| *p += a * b);
        }
    }
    product
}

/// Of a symmetric matrix without negative eigenvalues, but for rounding.
fn square_root(a: &[f64], n: usize) -> Vec<f64> {
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

/// Eigenvalues and eigenvectors, the latter row by row, of a symmetric matrix: Jacobi's method,
/// which turns each pair of axes in which the matrix is not diagonal, until none is left.
pub fn eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; n * n];
    vectors.iter_mut().step_by(n + 1).for_each(|v| *v = 1.0);
    let squares: f64 = a.iter().map(|x| x * x).sum();
    // It converges quadratically: ten sweeps are usual.
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
                // The smaller of the two angles that make it 0; Golub and Van Loan, section 8.5.
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
