use super::features::{Classes, Features};
use crate::backend::inference::Map;
use crate::backend::maps::Pool;
use crate::data::dataset::{Dataset, ImageShape};
use crate::data::images::Images;
use crate::error::{Error, Result};

/// Computes the features and the logits of grey or RGB images, up to `group` at a time, so that the memory does not
/// depend on the number of images. `compute` receives the bytes of some images, their shape and their number.
///
/// # Errors
/// Returns an error if images have other channels, and the errors of `compute`.
pub(super) fn features(
    images: &Images,
    group: usize,
    [features, classes]: [usize; 2],
    compute: impl Fn(&[u8], ImageShape, usize) -> Result<[Map; 2]> + Sync,
) -> Result<Features> {
    let mut all = Features::with_classes(features, Classes::Logits(classes));
    let shape = images.shape();
    if ![1, 3].contains(&shape.channels) {
        let expected = "1 (grey) or 3 (RGB)";
        return Err(Error::config("channels of the images", shape.channels, expected));
    }
    let image = images.pixels().len().checked_div(images.len()).unwrap_or_default();
    for first in (0..images.len()).step_by(group) {
        let count = group.min(images.len() - first);
        let pixels = &images.pixels()[first * image..][..count * image];
        let [features, logits] = Pool::among_threads(|| compute(pixels, shape, count))?;
        all.add_scored(&features.values, &logits.values)?;
    }
    Ok(all)
}
