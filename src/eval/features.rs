use std::fmt;

use crate::error::{Error, Result};

/// The features of images, in f32, and perhaps their scores for classes. All metrics of sets of images compute from
/// them, so a network sees each image once.
///
/// ```
/// use ddpm::eval::{Classes, Features};
///
/// // Two features and three logits per image.
/// let mut features = Features::with_classes(2, Classes::Logits(3));
/// features.add_scored(&[0.5, 1.0], &[2.0, 0.0, -1.0])?;
/// features.add_scored(&[0.1, 0.2, 0.3, 0.4], &[0.0, 1.0, 0.0, 0.0, 0.0, 1.0])?;
/// assert_eq!((features.count(), features.get(2)), (3, Some(&[0.3, 0.4][..])));
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Clone, PartialEq)]
pub struct Features {
    size: usize,
    values: Vec<f32>,
    classes: Option<Classes>,
    scores: Vec<f32>,
}

/// The meaning and the number of an image's scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Classes {
    /// Any finite numbers, whose softmax is the probabilities.
    Logits(usize),
    /// Probabilities of at least 0, whose sum is 1 up to 0.001.
    Probabilities(usize),
}

impl Classes {
    /// The number of classes.
    pub fn count(self) -> usize {
        match self {
            Self::Logits(count) | Self::Probabilities(count) => count,
        }
    }
}

impl Features {
    /// Creates an empty set of images with `size` features each, without scores.
    pub fn new(size: usize) -> Self {
        Self { size, values: vec![], classes: None, scores: vec![] }
    }

    /// Creates an empty set of images with `size` features each, and these scores.
    pub fn with_classes(size: usize, classes: Classes) -> Self {
        Self { classes: Some(classes), ..Self::new(size) }
    }

    /// The number of features per image.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The number of images.
    pub fn count(&self) -> usize {
        self.values.len().checked_div(self.size).unwrap_or_default()
    }

    /// The meaning of the scores, if there are scores.
    pub fn classes(&self) -> Option<Classes> {
        self.classes
    }

    /// The features of all images, one image after the other.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The scores of all images, one image after the other.
    pub fn scores(&self) -> &[f32] {
        &self.scores
    }

    /// Returns the features of image `index`, or `None` past the last image.
    pub fn get(&self, index: usize) -> Option<&[f32]> {
        (index < self.count()).then(|| self.image(index))
    }

    /// The features of image `index`, which exists.
    pub(super) fn image(&self, index: usize) -> &[f32] {
        &self.values[index * self.size..][..self.size]
    }

    /// Adds the features of images, one image after the other.
    ///
    /// # Errors
    /// Returns an error if the length is not a multiple of [`size`](Self::size), if a feature is not finite, if images
    /// have scores, or if there is not enough memory. Nothing is added in these cases.
    pub fn add(&mut self, features: &[f32]) -> Result<()> {
        self.add_scored(features, &[])
    }

    /// Adds the features and the scores of images.
    ///
    /// # Errors
    /// Returns the errors of [`add`](Self::add), and an error if there is not one score per image and class, or if the
    /// scores of an image do not have their [meaning](Classes). Nothing is added in these cases.
    pub fn add_scored(&mut self, features: &[f32], scores: &[f32]) -> Result<()> {
        check_vectors(features, self.size)?;
        let classes = self.classes.map_or(0, Classes::count);
        let count = features.len() / self.size;
        if count.checked_mul(classes) != Some(scores.len()) {
            let expected = format!("{classes} for each of {count} images");
            return Err(Error::config("scores.len()", scores.len(), expected));
        }
        if let Some(score) = scores.iter().find(|score| !score.is_finite()) {
            return Err(Error::config("a score", score, "finite"));
        }
        if let Some(Classes::Probabilities(classes)) = self.classes {
            scores.chunks(classes.max(1)).try_for_each(check_probabilities)?;
        }
        let room = self.values.try_reserve(features.len());
        if room.and_then(|()| self.scores.try_reserve(scores.len())).is_err() {
            let expected = "small enough for the features of all images to be in memory";
            return Err(Error::config("number of images", self.count() + count, expected));
        }
        self.values.extend(features);
        self.scores.extend(scores);
        Ok(())
    }

    /// Adds all images of `other`.
    ///
    /// # Errors
    /// Returns an error if the sizes or the classes differ, or if there is not enough memory.
    pub fn append(&mut self, other: &Self) -> Result<()> {
        self.check_size(other)?;
        if other.classes != self.classes {
            let expected = format!("{:?}, as before", self.classes);
            return Err(Error::config("classes", format!("{:?}", other.classes), expected));
        }
        self.add_scored(&other.values, &other.scores)
    }

    /// Returns the images with these indices, in this order. An index may occur several times.
    ///
    /// # Errors
    /// Returns an error if there is no image with an index, or if there is not enough memory.
    pub fn select(&self, indices: &[usize]) -> Result<Self> {
        let mut selected = Self { values: vec![], scores: vec![], ..*self };
        let classes = self.classes.map_or(0, Classes::count);
        for &index in indices {
            if index >= self.count() {
                let expected = format!("less than {}, the number of images", self.count());
                return Err(Error::config("index", index, expected));
            }
            selected.add_scored(self.image(index), &self.scores[index * classes..][..classes])?;
        }
        Ok(selected)
    }

    /// # Errors
    /// Returns an error if the numbers of features per image differ.
    pub(super) fn check_size(&self, other: &Self) -> Result<()> {
        if other.size == self.size {
            return Ok(());
        }
        let expected = format!("{}, as in the other set of images", self.size);
        Err(Error::config("features per image", other.size, expected))
    }

    /// # Errors
    /// Returns an error if there are fewer than `least` images.
    pub(super) fn check_count(&self, least: usize) -> Result<()> {
        if self.count() >= least {
            return Ok(());
        }
        Err(Error::config("number of images", self.count(), format!("at least {least}")))
    }

    /// Returns the scores of each image, and their meaning.
    ///
    /// # Errors
    /// Returns an error if there are no scores or no images.
    pub(super) fn scored(&self) -> Result<(Classes, std::slice::ChunksExact<'_, f32>)> {
        self.check_count(1)?;
        match self.classes {
            Some(classes) if classes.count() > 0 => {
                Ok((classes, self.scores.chunks_exact(classes.count())))
            }
            _ => Err(Error::config("classes", "None", "present: the metric needs scores")),
        }
    }
}

/// # Errors
/// Returns an error if these are not finite features of `size` per image.
pub(super) fn check_vectors(features: &[f32], size: usize) -> Result<()> {
    if size == 0 || !features.len().is_multiple_of(size) {
        let expected = format!("a multiple of {size}, the features of an image");
        return Err(Error::config("features.len()", features.len(), expected));
    }
    match features.iter().find(|feature| !feature.is_finite()) {
        Some(feature) => Err(Error::config("a feature", feature, "finite")),
        None => Ok(()),
    }
}

/// # Errors
/// Returns an error if these are not the probabilities of an image.
fn check_probabilities(probabilities: &[f32]) -> Result<()> {
    if let Some(negative) = probabilities.iter().find(|&&p| p < 0.0) {
        return Err(Error::config("a probability", negative, "at least 0"));
    }
    let sum: f64 = probabilities.iter().copied().map(f64::from).sum();
    if (sum - 1.0).abs() > 1e-3 {
        return Err(Error::config("sum of an image's probabilities", sum, "1, up to 0.001"));
    }
    Ok(())
}

// A derived `Debug` would print every feature.
impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Features")
            .field("count", &self.count())
            .field("size", &self.size)
            .field("classes", &self.classes)
            .finish_non_exhaustive()
    }
}
