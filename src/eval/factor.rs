use rayon::prelude::*;

use super::product::{products, transposed};
use crate::error::{Error, Result};

/// Number of rows of the factor between two updates of the remaining matrix.
const PANEL: usize = 64;

/// Factorises a positive semi-definite matrix `C` of size `n`, row by row, as `R^T R`. Returns the rows of `R`, as many
/// as the rank of `C`. Their directions are those of the Cholesky method with the largest pivot first (Higham 2002,
/// section 10.3).
///
/// A remaining variance of at most `rounding` times the largest variance counts as 0. What remains then must be 0 up to
/// a hundred times this limit.
///
/// # Errors
/// Returns an error if the matrix is not positive semi-definite.
pub(super) fn factor(c: &[f64], n: usize, rounding: f64) -> Result<Vec<f64>> {
    let mut rest = c.to_vec();
    let mut variances: Vec<f64> = c.iter().step_by(n + 1).copied().collect();
    let zero = rounding * largest_variance(c, n);
    let (mut rows, mut taken) = (Vec::new(), vec![false; n]);
    loop {
        let first = rows.len();
        while rows.len() < first + PANEL * n {
            // The first of the largest variances, so that the order is always the same.
            let left = (0..n).filter(|&i| !taken[i] && variances[i] > zero);
            let Some(pivot) = left.min_by(|&i, &j| variances[j].total_cmp(&variances[i])) else {
                break;
            };
            let mut row = rest[pivot * n..][..n].to_vec();
            for before in rows[first..].chunks_exact(n) {
                let factor: f64 = before[pivot];
                row.iter_mut().zip(before).for_each(|(value, b)| *value -= factor * b);
            }
            taken[pivot] = true;
            let root = variances[pivot].sqrt();
            for (i, value) in row.iter_mut().enumerate() {
                *value = if taken[i] { 0.0 } else { *value / root };
                variances[i] -= *value * *value;
            }
            row[pivot] = root;
            rows.extend(row);
        }
        let panel = &rows[first..];
        let columns = transposed(panel, n);
        let update = products(columns.clone(), columns, panel.len() / n)?;
        rest.par_iter_mut().zip(update).for_each(|(value, u)| *value -= u);
        if panel.len() < PANEL * n {
            break;
        }
    }
    let largest = rest.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    if largest > 100.0 * zero {
        let scale = largest_variance(c, n);
        let found = format!("indefinite by {:.1e} of its largest variance", largest / scale);
        let expected = "positive semi-definite, except for rounding";
        return Err(Error::config("covariance", found, expected));
    }
    Ok(rows)
}

/// The largest element of the diagonal by magnitude.
fn largest_variance(c: &[f64], n: usize) -> f64 {
    c.iter().step_by(n + 1).fold(0.0, |largest: f64, value| largest.max(value.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `X^T X` of `count` points of `n` values.
    fn scatter(count: usize, n: usize) -> Vec<f64> {
        let point = |i: usize| ((i as f64).sin() * 43_758.5).fract();
        let points: Vec<f64> = (1..=count * n).map(point).collect();
        let columns = transposed(&points, n);
        products(columns.clone(), columns, count).unwrap()
    }

    #[test]
    fn factors_give_the_matrix_back_and_have_its_rank() {
        for (count, n) in [(1, 1), (9, 4), (3, 8), (200, 150), (80, 150)] {
            let c = scatter(count, n);
            let rows = factor(&c, n, n as f64 * f64::EPSILON).unwrap();
            assert_eq!(rows.len() / n, count.min(n), "{count} points of {n} values");
            let columns = transposed(&rows, n);
            let back = products(columns.clone(), columns, rows.len() / n).unwrap();
            let scale = largest_variance(&c, n);
            for (found, expected) in back.iter().zip(&c) {
                assert!((found - expected).abs() <= 1e-12 * scale, "{found}, not {expected}");
            }
        }
    }

    #[test]
    fn an_indefinite_matrix_is_an_error() {
        // The eigenvalues are 1 and -1; 3 and -1; 0 and -1; 1 and -1e-7.
        let small = [1.0, 0.0, 0.0, -1e-7];
        let matrices = [[0.0, 1.0, 1.0, 0.0], [1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, -1.0], small];
        for c in matrices {
            let message = factor(&c, 2, 1e-15).unwrap_err().to_string();
            assert!(message.contains("positive semi-definite"), "{message}");
        }
        // The smallest difference that a covariance in f32 can have.
        assert_eq!(factor(&small, 2, 2.4e-7).unwrap(), [1.0, 0.0]);
        assert!(factor(&[0.0; 4], 2, 1e-15).unwrap().is_empty());
    }
}
