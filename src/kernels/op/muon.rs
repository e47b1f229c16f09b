//! Muon's orthogonalisation of a matrix. Jordan et al. 2024.
//!
//! Let `X` be the matrix divided by its Frobenius norm. Each iteration replaces `X` by `a X + (b A + c A²) X`, where
//! `A = X Xᵀ`. It maps each singular value `σ` to `a σ + b σ³ + c σ⁵`, which drives values from 0 to 1 towards the
//! range from 0.7 to 1.2.

/// The coefficients `a`, `b` and `c`.
pub(crate) const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];

/// Number of iterations.
pub(crate) const ITERATIONS: usize = 5;

/// The smallest norm by which a matrix is divided.
pub(crate) const LEAST_NORM: f64 = 1e-7;

/// The factor of the orthogonalised matrix, which gives its elements about the root mean square of an update of Adam:
/// `0.2 √max(rows, columns)`. Liu et al. 2025, equation 4.
pub(crate) fn scale((rows, cols): (usize, usize)) -> f64 {
    0.2 * (rows.max(cols) as f64).sqrt()
}
