use super::symmetric::{eigen, multiply, square_root, trace};
use crate::error::{Error, Result};

/// A normal distribution of feature vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Gaussian {
    mean: Vec<f64>,
    covariance: Vec<f64>,
}

impl Gaussian {
    /// Creates the distribution with this mean and covariance. The covariance is a symmetric matrix, row by row.
    ///
    /// # Errors
    /// Returns an error if the covariance is not a symmetric matrix of the size of the mean.
    pub fn new(mean: Vec<f64>, covariance: Vec<f64>) -> Result<Self> {
        let n = mean.len();
        let symmetric =
            || (0..n).all(|i| (0..i).all(|j| covariance[i * n + j] == covariance[j * n + i]));
        if covariance.len() != n * n || !symmetric() {
            let found = format!("of {} values", covariance.len());
            return Err(Error::config("covariance", found, format!("symmetric, {n} x {n}")));
        }
        Ok(Self { mean, covariance })
    }

    /// The mean of each feature.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The covariance, row by row.
    pub fn covariance(&self) -> &[f64] {
        &self.covariance
    }

    /// Computes the squared Fréchet distance `|m - m'|^2 + Tr(C + C' - 2 (C C')^1/2)`. Dowson and Landau 1982.
    ///
    /// # Errors
    /// Returns an error if the numbers of features differ.
    pub fn frechet_distance(&self, other: &Self) -> Result<f64> {
        let n = self.mean.len();
        if other.mean.len() != n {
            let expected = format!("{n}, as in the other distribution");
            return Err(Error::config("features per image", other.mean.len(), expected));
        }
        let apart: f64 = self.mean.iter().zip(&other.mean).map(|(a, b)| (a - b).powi(2)).sum();
        // C C' is not symmetric, but has the same eigenvalues as the symmetric matrix C^1/2 C' C^1/2.
        let root = square_root(&self.covariance, n);
        let product = multiply(&multiply(&root, &other.covariance, n), &root, n);
        let (values, _) = eigen(product, n);
        let shared: f64 = values.iter().map(|v| v.max(0.0).sqrt()).sum();
        let sum = trace(&self.covariance, n) + trace(&other.covariance, n);
        let distance = apart + sum - 2.0 * shared;
        // Rounding must not make the distance negative. A larger negative value would be an error, and remains
        // visible.
        Ok(if distance.abs() <= 1e-6 * sum { distance.max(0.0) } else { distance })
    }
}
