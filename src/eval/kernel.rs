use super::estimate::Estimate;
use super::features::Features;
use super::product::{doubles, products};
use crate::error::{Error, Result};
use crate::random::{Noise, Purpose};

/// Number of images of each set whose products are in memory at a time.
const TILE: usize = 1024;

/// The kernel distance between two sets of images. With the features of Inception it is the KID (Bińkowski et al.
/// 2018).
///
/// The kernel is `(x . y / d + 1)^3` for `d` features. The distance is the mean of the
/// [unbiased estimates](kernel_mmd2) of the squared maximum mean discrepancy over random subsets, in f64. It does not
/// depend on the number of images except for its variance, and can be slightly negative.
///
/// Subset `s` of the first set has the first [`subset_size`](Self::subset_size) images of a random order of all its
/// images, which depends only on the seed, on `s`, and on the number of images. Subset `s` of the second set has
/// another order. A value is reproduced by the features, the two fields and the seed.
///
/// ```
/// use ddpm::eval::{Features, KernelDistance};
///
/// let mut real = Features::new(1);
/// real.add(&[0.0, 1.0, 2.0, 3.0])?;
/// let mut generated = Features::new(1);
/// generated.add(&[4.0, 5.0, 6.0])?;
/// let mut distance = KernelDistance::default();
/// distance.subset_size = 3;
/// assert!(distance.measure(&real, &generated)?.mean > 0.0);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelDistance {
    /// The number of subsets. The default is 100.
    pub subsets: usize,
    /// The number of images of each set in a subset, at least 2. The default is 1,000.
    pub subset_size: usize,
    /// The seed of the subsets. The default is 0.
    pub seed: u64,
}

impl Default for KernelDistance {
    fn default() -> Self {
        Self { subsets: 100, subset_size: 1000, seed: 0 }
    }
}

impl KernelDistance {
    /// Computes the distance of two sets of images.
    ///
    /// # Errors
    /// Returns an error if the numbers of features differ, if a set has fewer images than a subset, if a subset has
    /// fewer than 2, if there are no subsets, or if the distance exceeds the range of f64.
    pub fn measure(&self, first: &Features, second: &Features) -> Result<Estimate> {
        if self.subsets == 0 {
            return Err(Error::config("subsets", self.subsets, "at least 1"));
        }
        if self.subset_size < 2 {
            return Err(Error::config("subset_size", self.subset_size, "at least 2"));
        }
        let subset = |features: &Features, subset: usize, set: u32| {
            features.check_count(self.subset_size)?;
            let mut stream = Noise::new(self.seed).stream(Purpose::Subset, subset as u64, set);
            let order = stream.permutation(features.count())?;
            let indices: Vec<_> = order[..self.subset_size].iter().map(|&i| i as usize).collect();
            features.select(&indices)
        };
        let estimates =
            (0..self.subsets).map(|s| kernel_mmd2(&subset(first, s, 0)?, &subset(second, s, 1)?));
        Ok(Estimate::of(&estimates.collect::<Result<Vec<_>>>()?))
    }
}

/// Computes the unbiased estimate of the squared maximum mean discrepancy of two sets, with the kernel of
/// [`KernelDistance`]. Gretton et al. 2012, equation 3. The memory is 70 MB for 2,048 features and any number of
/// images.
///
/// # Errors
/// Returns an error if the numbers of features differ, if a set has fewer than 2 images, or if the estimate exceeds the
/// range of f64.
pub fn kernel_mmd2(first: &Features, second: &Features) -> Result<f64> {
    first.check_size(second)?;
    first.check_count(2)?;
    second.check_count(2)?;
    let across = kernels(first, second)? / (first.count() as f64 * second.count() as f64);
    let estimate = within(first)? + within(second)? - 2.0 * across;
    if !estimate.is_finite() {
        return Err(Error::config("kernel distance", estimate, "finite"));
    }
    Ok(estimate)
}

/// The mean of the kernel over the pairs of different images of a set.
fn within(x: &Features) -> Result<f64> {
    let size = x.size();
    let of_itself = |image: &[f32]| kernel(image.iter().map(|&x| f64::from(x).powi(2)).sum(), size);
    let same: f64 = x.values().chunks_exact(size).map(of_itself).sum();
    let count = x.count() as f64;
    Ok((kernels(x, x)? - same) / (count * (count - 1.0)))
}

/// The sum of the kernel over all pairs of an image of `x` and one of `y`.
fn kernels(x: &Features, y: &Features) -> Result<f64> {
    let size = x.size();
    let mut sum = 0.0;
    for x in x.values().chunks(TILE * size).map(doubles) {
        for y in y.values().chunks(TILE * size).map(doubles) {
            let products = products(x.clone(), y, size)?;
            sum += products.into_iter().map(|product| kernel(product, size)).sum::<f64>();
        }
    }
    Ok(sum)
}

/// The kernel of two images from the product of their `size` features.
fn kernel(product: f64, size: usize) -> f64 {
    (product / size as f64 + 1.0).powi(3)
}
