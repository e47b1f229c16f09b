use super::factor::factor;
use super::product::products;
use super::singular::sum_of_singular_values;
use crate::error::{Error, Result};

/// The rounding of a covariance in f32, relative to its largest element.
pub(super) const F32_ROUNDING: f64 = 2.0 * f32::EPSILON as f64;

/// A normal distribution of feature vectors.
#[derive(Debug, Clone)]
pub struct Gaussian {
    mean: Vec<f64>,
    covariance: Vec<f64>,
    /// The rounding of the covariance, relative to its largest element.
    rounding: f64,
    /// The rounding that is assumed if the covariance is indefinite otherwise.
    larger_rounding: Option<f64>,
}

/// Distributions are equal if their means and covariances are.
impl PartialEq for Gaussian {
    fn eq(&self, other: &Self) -> bool {
        (&self.mean, &self.covariance) == (&other.mean, &other.covariance)
    }
}

impl Gaussian {
    /// Creates the distribution with this mean and covariance. The covariance is a symmetric matrix, row by row.
    ///
    /// # Errors
    /// Returns an error if the covariance is not a symmetric matrix of the size of the mean, or if a value is not
    /// finite.
    pub fn new(mean: Vec<f64>, covariance: Vec<f64>) -> Result<Self> {
        let n = mean.len();
        // The rounding of a sum of `n` products.
        Self::rounded(mean, covariance, n as f64 * f64::EPSILON)
    }

    /// Creates the distribution from a covariance in f32.
    pub(super) fn from_f32(mean: Vec<f64>, covariance: Vec<f64>) -> Result<Self> {
        let n = mean.len() as f64;
        Self::rounded(mean, covariance, F32_ROUNDING.max(2.0 * n * f64::EPSILON))
    }

    /// Creates the distribution from a covariance that may have been computed in f32.
    pub(super) fn from_f64(mean: Vec<f64>, covariance: Vec<f64>) -> Result<Self> {
        Ok(Self { larger_rounding: Some(F32_ROUNDING), ..Self::new(mean, covariance)? })
    }

    fn rounded(mean: Vec<f64>, covariance: Vec<f64>, rounding: f64) -> Result<Self> {
        let n = mean.len();
        let symmetric =
            || (0..n).all(|i| (0..i).all(|j| covariance[i * n + j] == covariance[j * n + i]));
        if let Some(value) = mean.iter().chain(&covariance).find(|value| !value.is_finite()) {
            return Err(Error::config("a mean or covariance", value, "finite"));
        }
        if n.checked_mul(n) != Some(covariance.len()) || !symmetric() {
            let found = format!("of {} values", covariance.len());
            return Err(Error::config("covariance", found, format!("symmetric, {n} x {n}")));
        }
        Ok(Self { mean, covariance, rounding, larger_rounding: None })
    }

    /// The mean of each feature.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The covariance, row by row.
    pub fn covariance(&self) -> &[f64] {
        &self.covariance
    }

    /// Computes the squared Fréchet distance `|m - m'|^2 + Tr(C + C' - 2 (C C')^1/2)`. Dowson and Landau 1982. With the
    /// features of Inception it is the FID (Heusel et al. 2017).
    ///
    /// The trace of the root is the sum of the singular values of `A^T A'` for any factors `C = A A^T` and
    /// `C' = A' A'^T`. All arithmetic is in f64. No matrix is inverted and nothing is added to a diagonal, so the
    /// distance is also exact for singular covariances, such as those of fewer images than features. pytorch-fid adds
    /// 1e-6 to the diagonals in such cases. A variance that remains below the rounding of the covariance (n 2^-52 times
    /// the largest, for n features) counts as 0.
    ///
    /// The time grows with the cube of the number of features. The memory is that of about six matrices.
    ///
    /// # Errors
    /// Returns an error if the numbers of features differ, if a covariance is not positive semi-definite up to its
    /// rounding, or if the distance exceeds the range of f64.
    pub fn frechet_distance(&self, other: &Self) -> Result<f64> {
        let n = self.mean.len();
        if other.mean.len() != n {
            let expected = format!("{n}, as in the other distribution");
            return Err(Error::config("features per image", other.mean.len(), expected));
        }
        let apart: f64 = self.mean.iter().zip(&other.mean).map(|(a, b)| (a - b).powi(2)).sum();
        let sum = self.trace() + other.trace();
        let distance = apart + sum - 2.0 * self.shared(other)?;
        if !distance.is_finite() {
            return Err(Error::config("Fréchet distance", distance, "finite"));
        }
        // Rounding must not make the distance negative. A larger negative value would be an error, and remains
        // visible.
        Ok(if distance.abs() <= 1e-6 * sum { distance.max(0.0) } else { distance })
    }

    /// The sum of the variances.
    fn trace(&self) -> f64 {
        self.covariance.iter().step_by(self.mean.len() + 1).sum()
    }

    /// Computes `Tr (C C')^1/2`, or NaN if values are too large.
    fn shared(&self, other: &Self) -> Result<f64> {
        let n = self.mean.len();
        if n == 0 {
            return Ok(0.0);
        }
        let [a, b] = [self, other].map(|this| {
            let factor = |rounding| factor(&this.covariance, n, rounding);
            match (factor(this.rounding), this.larger_rounding) {
                (Err(_), Some(larger)) => factor(larger),
                (found, _) => found,
            }
        });
        // The transposed matrix has the same singular values.
        let (a, b) = (a?, b?);
        let (long, short) = if a.len() >= b.len() { (a, b) } else { (b, a) };
        let rank = short.len() / n;
        if rank == 0 {
            return Ok(0.0);
        }
        let matrix = products(long, short, n)?;
        Ok(sum_of_singular_values(matrix, rank).unwrap_or(f64::NAN))
    }
}
