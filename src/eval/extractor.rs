use std::fmt;
use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

use super::features::Features;
use super::statistics::Statistics;
use crate::data::dataset::Dataset;
use crate::data::images::Images;
use crate::data::parallel;
use crate::error::{Error, Result};
use crate::memory::filled;

/// A network, or another function, that computes features of images.
///
/// ```
/// use ddpm::Result;
/// use ddpm::data::{Dataset, Images};
/// use ddpm::eval::{Extractor, ExtractorIdentity, Features};
///
/// /// The mean of all bytes of an image.
/// struct Brightness;
///
/// impl Extractor for Brightness {
///     fn size(&self) -> usize {
///         1
///     }
///
///     fn identity(&self) -> ExtractorIdentity {
///         ExtractorIdentity::new("brightness")
///     }
///
///     fn extract(&self, images: &Images) -> Result<Features> {
///         let mut features = Features::new(1);
///         for index in 0..images.len() {
///             let pixels = images.get(index).unwrap_or_default();
///             let sum: f32 = pixels.iter().map(|&p| f32::from(p)).sum();
///             features.add(&[sum / pixels.len() as f32])?;
///         }
///         Ok(features)
///     }
/// }
///
/// let images = Images::new(vec![0, 2, 4, 4], (1, 1, 2))?;
/// assert_eq!(Features::extracted(&Brightness, &images, 100)?.values(), [1.0, 4.0]);
/// # Ok::<(), ddpm::Error>(())
/// ```
pub trait Extractor {
    /// The number of features per image.
    fn size(&self) -> usize;

    /// The identity, which belongs to every result: figures of different extractors cannot be compared.
    fn identity(&self) -> ExtractorIdentity;

    /// Computes the features of images, in their order, and the scores for classes, if there are any. All calls return
    /// the same [`classes`](Features::classes).
    ///
    /// # Errors
    /// Returns an error if the images cannot be processed, for example because of their shape.
    fn extract(&self, images: &Images) -> Result<Features>;
}

/// The identity of an extractor. `Display` prints it in one line for a report.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExtractorIdentity {
    /// The name of the network and of the layer.
    pub name: String,
    /// The SHA-256 of the file of the weights, in hexadecimal digits, if there is such a file.
    pub weights_sha256: Option<String>,
    /// The method by which images are scaled to the input of the network, if they are. Libraries differ in it, which
    /// changes figures (Parmar et al. 2022).
    pub resizing: Option<String>,
}

impl ExtractorIdentity {
    /// Creates the identity of an extractor without a file of weights, and without scaling.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), weights_sha256: None, resizing: None }
    }
}

impl fmt::Display for ExtractorIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(sha256) = &self.weights_sha256 {
            write!(f, ", weights {sha256}")?;
        }
        self.resizing.iter().try_for_each(|resizing| write!(f, ", resizing {resizing}"))
    }
}

/// Computes the features of all images of a data set, `batch` at a time, and passes each batch to `seen`, in order.
/// Returns `Break` if `seen` does. The images are read on the threads of the data set.
///
/// # Errors
/// Returns an error if `batch` is 0, if there is not enough memory for the images of a batch, if the extractor does not
/// return [`size`](Extractor::size) features for each image, and the errors of the data set, the extractor and `seen`.
pub fn extract(
    extractor: &(impl Extractor + ?Sized),
    images: &(impl Dataset + ?Sized),
    batch: usize,
    mut seen: impl FnMut(&Features) -> Result<ControlFlow<()>>,
) -> Result<ControlFlow<()>> {
    if batch == 0 {
        return Err(Error::config("batch", batch, "at least 1"));
    }
    for start in (0..images.len()).step_by(batch) {
        let count = batch.min(images.len() - start);
        let features = extractor.extract(&read(images, start, count)?)?;
        if (features.count(), features.size()) != (count, extractor.size()) {
            let expected = format!("[{count}, {}], by the extractor's size", extractor.size());
            return Err(Error::shape("features", [features.count(), features.size()], expected));
        }
        if seen(&features)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Reads `count` images from `start`.
fn read(images: &(impl Dataset + ?Sized), start: usize, count: usize) -> Result<Images> {
    let shape = images.shape();
    let size = shape.values().unwrap_or(usize::MAX);
    let Some(mut pixels) = filled(&[count, size], 0) else {
        return Err(Error::config("batch", count, "small enough for its images to be in memory"));
    };
    let items = (start..start + count).zip(pixels.chunks_mut(size.max(1)));
    let items = items.collect::<Vec<_>>().into_iter();
    let stop = AtomicBool::new(false);
    parallel::map(images.threads(), items, &stop, |(index, pixels)| images.read(index, pixels))?;
    Images::new(pixels, shape)
}

impl Features {
    /// Computes the features of all images of a data set, as [`extract`] does.
    ///
    /// # Errors
    /// Returns the errors of [`extract`], and an error if there is not enough memory for the features, or if batches
    /// differ in their classes.
    pub fn extracted(
        extractor: &(impl Extractor + ?Sized),
        images: &(impl Dataset + ?Sized),
        batch: usize,
    ) -> Result<Self> {
        let mut all: Option<Self> = None;
        let flow = extract(extractor, images, batch, |features| {
            match &mut all {
                Some(all) => all.append(features)?,
                None => all = Some(features.clone()),
            }
            Ok(ControlFlow::Continue(()))
        });
        flow.map(|_| all.unwrap_or_else(|| Self::new(extractor.size())))
    }
}

impl Statistics {
    /// Computes the statistics of all images of a data set, as [`extract`] does, without keeping features.
    ///
    /// # Errors
    /// Returns the errors of [`extract`].
    pub fn extracted(
        extractor: &(impl Extractor + ?Sized),
        images: &(impl Dataset + ?Sized),
        batch: usize,
    ) -> Result<Self> {
        let mut statistics = Self::new(extractor.size());
        let flow = extract(extractor, images, batch, |features| {
            statistics.add(features.values())?;
            Ok(ControlFlow::Continue(()))
        });
        flow.map(|_| statistics)
    }
}
