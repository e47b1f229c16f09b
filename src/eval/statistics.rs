use super::frechet::Gaussian;
use crate::error::{Error, Result};

/// The mean and the covariance of feature vectors, in f64, computed incrementally.
///
/// Statistics of parts, for example from several processes, can be merged. Chan et al. 1979.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    count: u64,
    mean: Vec<f64>,
    /// The sum of the products of deviations from the mean, row by row.
    scatter: Vec<f64>,
}

impl Statistics {
    /// Creates empty statistics of vectors of `size` features each.
    pub fn new(size: usize) -> Self {
        Self { count: 0, mean: vec![0.0; size], scatter: vec![0.0; size * size] }
    }

    /// The number of features of a vector.
    pub fn size(&self) -> usize {
        self.mean.len()
    }

    /// The number of vectors so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Adds vectors. `features` contains them one after the other.
    ///
    /// # Errors
    /// Returns an error if the length of `features` is not a multiple of [`size`](Self::size), or if a feature is not
    /// finite. Nothing is added in these cases.
    pub fn add(&mut self, features: &[f32]) -> Result<()> {
        let size = self.size();
        if size == 0 || !features.len().is_multiple_of(size) {
            let expected = format!("a multiple of {size}, the features of an image");
            return Err(Error::config("features.len()", features.len(), expected));
        }
        if let Some(feature) = features.iter().find(|feature| !feature.is_finite()) {
            return Err(Error::config("a feature", feature, "finite"));
        }
        for vector in features.chunks_exact(size) {
            let vector: Vec<f64> = vector.iter().copied().map(f64::from).collect();
            self.combine(1, &vector, None);
        }
        Ok(())
    }

    /// Adds all vectors of `other`.
    ///
    /// # Errors
    /// Returns an error if the vectors of `other` have a different number of features.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if other.size() != self.size() {
            let expected = format!("{}, as in the statistics that they are added to", self.size());
            return Err(Error::config("features per image", other.size(), expected));
        }
        if other.count > 0 {
            self.combine(other.count, &other.mean, Some(&other.scatter));
        }
        Ok(())
    }

    /// Adds `count` vectors with this mean and scatter. `None` is a scatter of zero.
    fn combine(&mut self, count: u64, mean: &[f64], scatter: Option<&[f64]>) {
        let (before, added) = (self.count as f64, count as f64);
        let total = before + added;
        let apart: Vec<f64> = mean.iter().zip(&self.mean).map(|(new, old)| new - old).collect();
        let weight = before * added / total;
        for (row, a) in self.scatter.chunks_exact_mut(mean.len()).zip(&apart) {
            row.iter_mut().zip(&apart).for_each(|(sum, b)| *sum += a * b * weight);
        }
        for (sum, other) in self.scatter.iter_mut().zip(scatter.unwrap_or_default()) {
            *sum += other;
        }
        self.mean.iter_mut().zip(&apart).for_each(|(mean, apart)| *mean += apart * added / total);
        self.count += count;
    }

    /// Returns the normal distribution with the mean and the unbiased covariance of the vectors.
    ///
    /// # Errors
    /// Returns an error if there are fewer than 2 vectors.
    pub fn gaussian(&self) -> Result<Gaussian> {
        if self.count < 2 {
            return Err(Error::config("number of images", self.count, "at least 2"));
        }
        let covariance = self.scatter.iter().map(|sum| sum / (self.count - 1) as f64).collect();
        Gaussian::new(self.mean.clone(), covariance)
    }

    /// Computes the [Fréchet distance](Gaussian::frechet_distance) of the two normal distributions.
    ///
    /// # Errors
    /// Returns an error if either has fewer than 2 vectors, or if their numbers of features differ.
    pub fn frechet_distance(&self, other: &Self) -> Result<f64> {
        self.gaussian()?.frechet_distance(&other.gaussian()?)
    }
}
