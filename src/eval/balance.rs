use super::features::Features;
use crate::error::{Error, Result};

/// The classes that a classifier predicts for images, compared with an expected distribution.
///
/// ```
/// use ddpm::eval::{Balance, Classes, Features};
///
/// let mut features = Features::with_classes(1, Classes::Logits(2));
/// features.add_scored(&[0.0; 4], &[1.0, 0.0, 2.0, 1.0, 0.0, 3.0, 5.0, 0.0])?;
/// let balance = Balance::measure(&features, None)?;
/// assert_eq!(balance.counts(), [3, 1]);
/// assert_eq!((balance.rarest(), balance.commonest()), ((1, 0.25), (0, 0.75)));
/// assert_eq!(balance.total_variation(), 0.25);
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Balance {
    counts: Vec<u64>,
    expected: Vec<f64>,
}

impl Balance {
    /// Counts the images by their class of the highest score, the first one if there are several. `expected` is the
    /// share of each class, by default the same for all.
    ///
    /// # Errors
    /// Returns an error if the images have no scores, if there are no images, or if `expected` is not a share of at
    /// least 0 per class, with a sum of 1 up to 1e-6.
    pub fn measure(features: &Features, expected: Option<&[f64]>) -> Result<Self> {
        let (classes, scores) = features.scored()?;
        let classes = classes.count();
        let expected = match expected {
            Some(expected) => expected.to_vec(),
            None => vec![1.0 / classes as f64; classes],
        };
        let sum: f64 = expected.iter().sum();
        let shares = expected.iter().all(|share| *share >= 0.0) && (sum - 1.0).abs() <= 1e-6;
        if expected.len() != classes || !shares {
            let found = format!("of {} shares with the sum {sum}", expected.len());
            let allowed = format!("{classes} shares of at least 0 with the sum 1");
            return Err(Error::config("expected distribution", found, allowed));
        }
        let mut counts = vec![0; classes];
        for scores in scores {
            let best =
                (1..classes).fold(0, |best, i| if scores[i] > scores[best] { i } else { best });
            counts[best] += 1;
        }
        Ok(Self { counts, expected })
    }

    /// The number of images of each class.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// The share of the images of each class.
    pub fn shares(&self) -> impl DoubleEndedIterator<Item = f64> + ExactSizeIterator {
        let total: u64 = self.counts.iter().sum();
        self.counts.iter().map(move |&count| count as f64 / total as f64)
    }

    /// The first of the rarest classes, and its share.
    pub fn rarest(&self) -> (usize, f64) {
        let ranked = self.shares().enumerate();
        ranked.min_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap_or_default()
    }

    /// The first of the commonest classes, and its share.
    pub fn commonest(&self) -> (usize, f64) {
        let ranked = self.shares().enumerate().rev();
        ranked.max_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap_or_default()
    }

    /// The total variation from the expected distribution: half of the sum of the differences, from 0 to 1.
    pub fn total_variation(&self) -> f64 {
        self.shares().zip(&self.expected).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0
    }

    /// The Kullback-Leibler divergence of the images' distribution from the expected one, in nats. It is infinite if
    /// there is an image of a class that is not expected.
    pub fn divergence(&self) -> f64 {
        let terms = self.shares().zip(&self.expected).filter(|(p, _)| *p > 0.0);
        terms.map(|(p, q)| p * (p / q).ln()).sum()
    }
}
