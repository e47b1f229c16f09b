//! What a classifier says of a set of images.

use ddpm::{ImageSource, Images};
use serde::Serialize;

use super::classifier::{CLASSES, Classifier, FEATURES, labels};
use super::common::cli::Result;
use super::frechet::Gaussian;

/// From this probability of a class on, an image is clearly of it.
pub const CONFIDENT: f32 = 0.9;

#[derive(Serialize)]
pub struct Figures {
    pub images: usize,
    /// From the reference.
    pub mnist_fd: f64,
    /// The share of images that are clearly of a class.
    pub confident: f64,
    /// How many images are most like each digit.
    pub classes: [usize; CLASSES],
}

/// Images that others are compared with.
pub struct Reference {
    gaussian: Gaussian,
    /// The share of them that the classifier tells right.
    pub accuracy: f64,
}

impl Reference {
    pub fn new(classifier: &Classifier, images: &Images) -> Result<Self> {
        let labels = labels(images)?;
        let (features, probabilities) = classifier.look(images)?;
        let right = probabilities.iter().zip(labels).filter(|(p, l)| best(p) == usize::from(**l));
        let accuracy = right.count() as f64 / images.len() as f64;
        Ok(Self { gaussian: Gaussian::fit(&features, FEATURES), accuracy })
    }

    pub fn compare(&self, classifier: &Classifier, images: &Images) -> Result<Figures> {
        let (features, probabilities) = classifier.look(images)?;
        let mnist_fd = self.gaussian.distance(&Gaussian::fit(&features, FEATURES));
        let (confident, classes) = tally(&probabilities);
        Ok(Figures { images: images.len(), mnist_fd, confident, classes })
    }
}

/// The share of images that are clearly of a class, and how many are most like each.
pub fn tally(probabilities: &[Vec<f32>]) -> (f64, [usize; CLASSES]) {
    let mut classes = [0; CLASSES];
    probabilities.iter().for_each(|p| classes[best(p)] += 1);
    let clear = probabilities.iter().filter(|p| p[best(p)] > CONFIDENT).count();
    (clear as f64 / probabilities.len() as f64, classes)
}

fn best(probabilities: &[f32]) -> usize {
    (0..probabilities.len())
        .max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]))
        .unwrap_or_default()
}
