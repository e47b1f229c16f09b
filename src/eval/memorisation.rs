use super::distances::map;
use super::features::Features;
use crate::error::{Error, Result};

/// The nearest training images of samples.
///
/// Samples that copy training images score well in every metric that compares two sets. They are found by their nearest
/// training images, in the space of any features; pixels are features, too. Both criteria compare the nearest image
/// with further ones, because distances vary with the place in this space.
///
/// ```
/// use ddpm::eval::{Features, Nearest};
///
/// let mut training = Features::new(1);
/// training.add(&[0.0, 10.0, 20.0])?;
/// let mut samples = Features::new(1);
/// samples.add(&[9.0, 15.5])?;
/// let nearest = Nearest::find(&samples, &training, 2)?;
/// assert_eq!(nearest.of(0).collect::<Vec<_>>(), [(1, 1.0), (0, 9.0)]);
/// assert_eq!(nearest.share_near_second(1.0 / 3.0), 0.5);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Nearest {
    k: usize,
    /// The index and the distance of each of the `k` nearest images of each sample.
    found: Vec<(usize, f64)>,
}

impl Nearest {
    /// Finds the `k` nearest training images of each sample by the Euclidean distance of their features. Of equally
    /// near images the first is found. The memory is 90 MB for 2,048 features, beside the features and the
    /// result, for any number of images.
    ///
    /// # Errors
    /// Returns an error if the numbers of features differ, if `k` is 0, if there are fewer than `k` training images, or
    /// if there are no samples.
    pub fn find(samples: &Features, training: &Features, k: usize) -> Result<Self> {
        if k == 0 {
            return Err(Error::config("k", k, "at least 1"));
        }
        samples.check_count(1)?;
        training.check_count(k)?;
        let found = map(samples, training, |_, distances| distances.nearest(k, None))?;
        let found = found.into_iter().flatten().map(|(square, index)| (index, square.sqrt()));
        Ok(Self { k, found: found.collect() })
    }

    /// The number of samples.
    pub fn count(&self) -> usize {
        self.found.len() / self.k
    }

    /// Returns the index and the distance of the training images nearest to sample `index`, the nearest first. Past the
    /// last sample there are none.
    pub fn of(&self, index: usize) -> impl Iterator<Item = (usize, f64)> {
        self.found.chunks_exact(self.k).nth(index).into_iter().flatten().copied()
    }

    /// The share of samples whose nearest training image is less than `ratio` times as far away as the second nearest.
    /// Yoon et al. 2023 and Gu et al. 2023 use 1/3 and pixels. `NaN` if `k` is 1.
    pub fn share_near_second(&self, ratio: f64) -> f64 {
        self.share(ratio, |nearest| nearest.get(1).map_or(f64::NAN, |(_, distance)| *distance))
    }

    /// The share of samples whose nearest training image is less than `ratio` times as far away as the `k` nearest on
    /// average, the nearest included. Carlini et al. 2023, section 5.1, use the ratio 1/2, `k = 50` and pixels.
    pub fn share_near_mean(&self, ratio: f64) -> f64 {
        let mean = |nearest: &[(usize, f64)]| {
            nearest.iter().map(|(_, distance)| distance).sum::<f64>() / nearest.len() as f64
        };
        self.share(ratio, mean)
    }

    /// The share of samples whose nearest image is nearer than `ratio` times a reference. A copy of an image that
    /// occurs repeatedly is always near.
    fn share(&self, ratio: f64, reference: impl Fn(&[(usize, f64)]) -> f64) -> f64 {
        if self.k == 1 {
            return f64::NAN;
        }
        let samples = self.found.chunks_exact(self.k);
        let near = samples.filter(|nearest| {
            let distance = nearest[0].1;
            distance == 0.0 || distance < ratio * reference(nearest)
        });
        near.count() as f64 / self.count() as f64
    }
}
