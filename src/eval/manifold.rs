use std::sync::atomic::{AtomicBool, Ordering};

use super::distances::{map, radii};
use super::features::Features;
use crate::error::{Error, Result};

/// Precision, recall, density and coverage of generated images.
///
/// Each set of images stands for the union of balls around its images. The radius of a ball is the distance of its
/// centre from the `k`-th nearest other image of the set.
///
/// Precision and recall are those of Kynkäänniemi et al. 2019, who use `k = 3`, 50,000 images and the features of
/// VGG-16. Density and coverage are those of Naeem et al. 2020, who use `k = 5` and 10,000 images. All four depend on
/// `k`, on both numbers of images, and on the features; compare only with the same. Outliers among real images raise
/// precision, but hardly density.
///
/// Balls are closed, as in Kynkäänniemi's equation 1. `prdc` has open balls, which differ for equal distances only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prdc {
    /// The share of generated images within a ball of a real image.
    pub precision: f64,
    /// The share of real images within a ball of a generated image.
    pub recall: f64,
    /// The mean number of balls of real images around a generated image, divided by `k`. It can exceed 1.
    pub density: f64,
    /// The share of real images whose ball has a generated image.
    pub coverage: f64,
}

impl Prdc {
    /// Computes the four figures for balls of the `k`-th nearest image.
    ///
    /// The time is that of three products of all images with all images. The memory is 90 MB for 2,048 features,
    /// and a few numbers per image, beside the features.
    ///
    /// # Errors
    /// Returns an error if the numbers of features differ, if `k` is 0, or if a set has at most `k` images.
    pub fn measure(real: &Features, generated: &Features, k: usize) -> Result<Self> {
        real.check_size(generated)?;
        if k == 0 {
            return Err(Error::config("k", k, "at least 1"));
        }
        for features in [real, generated] {
            features.check_count(k.saturating_add(1))?;
        }
        let (real_radii, generated_radii) = (radii(real, k)?, radii(generated, k)?);
        let mut precise = Vec::new();
        precise.resize_with(generated.count(), AtomicBool::default);
        let seen = map(real, generated, |i, distances| {
            let mut within = 0_u64;
            for (j, precise) in precise.iter().enumerate() {
                if distances.within(j, real_radii[i]) {
                    within += 1;
                    precise.store(true, Ordering::Relaxed);
                }
            }
            (within, (0..generated.count()).any(|j| distances.within(j, generated_radii[j])))
        })?;
        let share = |count: usize, of: usize| count as f64 / of as f64;
        let precise = precise.into_iter().map(AtomicBool::into_inner);
        let balls: u64 = seen.iter().map(|(within, _)| within).sum();
        Ok(Self {
            precision: share(precise.filter(|&precise| precise).count(), generated.count()),
            recall: share(seen.iter().filter(|(_, recalled)| *recalled).count(), real.count()),
            density: balls as f64 / k as f64 / generated.count() as f64,
            coverage: share(seen.iter().filter(|(within, _)| *within > 0).count(), real.count()),
        })
    }
}
