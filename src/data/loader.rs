use std::ops::Range;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use rand::RngCore;

use super::dataset::{Dataset, normalized};
use super::parallel;
use crate::backend;
use crate::denoiser::Condition;
use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::random::{Noise, Purpose};

/// Images of one update.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Batch {
    /// The images (batch, channels, height, width), in f32 and in [-1, 1].
    pub images: Tensor,
    /// The class of each image, in u32 (batch), if the images have classes. [`Trainer::next_batch`] returns them on the
    /// CPU. If the classes are on a GPU, an update waits for the device to read them.
    ///
    /// [`Trainer::next_batch`]: crate::Trainer::next_batch
    pub classes: Option<Tensor>,
    /// The position of the first image in the whole batch of the update, from 0. It determines the random numbers of
    /// each image, so that a batch gives the same result if it is divided.
    pub first: u64,
}

impl Batch {
    /// Reads the images with these indices, without random changes, for example to evaluate a network on them. `first`
    /// is the index of the first image, so that random numbers of an image do not depend on the batch.
    ///
    /// # Errors
    /// Returns an error if the range is empty or exceeds the data set, if the data set fails to read, or if a class is
    /// not one of its classes.
    pub fn read(dataset: &dyn Dataset, images: Range<usize>, device: &Device) -> Result<Self> {
        if images.is_empty() || images.end > dataset.len() {
            let expected = format!("a range of at least one of the {} images", dataset.len());
            return Err(Error::config("images", format!("{images:?}"), expected));
        }
        let first = images.start as u64;
        let indices: Vec<usize> = images.collect();
        Ok(Self { first, ..read(dataset, &indices)?.upload(device)? })
    }

    /// # Errors
    /// Returns an error if there is not one class for each image, or if the positions of the images are not less than
    /// 2^32.
    pub(crate) fn check(&self) -> Result<()> {
        let count = self.images.dims().first().copied().unwrap_or(0);
        Condition::from(self.classes.clone()).check(count)?;
        if self.first.checked_add(count as u64).is_none_or(|end| end > 1 << 32) {
            return Err(Error::config("first", self.first, "the batch's positions less than 2^32"));
        }
        Ok(())
    }
}

impl From<Tensor> for Batch {
    /// A whole batch of images without classes.
    fn from(images: Tensor) -> Self {
        Self { images, classes: None, first: 0 }
    }
}

impl From<&Tensor> for Batch {
    fn from(images: &Tensor) -> Self {
        images.clone().into()
    }
}

impl From<&Batch> for Batch {
    fn from(batch: &Batch) -> Self {
        batch.clone()
    }
}

/// The position of an update in a run, which determines its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// Number of updates before this one.
    pub step: u64,
    /// Number of images in these updates.
    pub images_seen: u64,
}

/// A batch in host memory.
#[derive(Debug)]
pub(crate) struct HostBatch {
    pixels: Vec<f32>,
    classes: Option<Vec<u32>>,
    dims: [usize; 4],
    first: u64,
}

impl HostBatch {
    /// Copies the batch to the device without waiting for the device. The copy is queued after the work that this
    /// thread submitted before. On a GPU each thread has its own queue, so the training thread calls this.
    pub fn upload(self, device: &Device) -> Result<Batch> {
        let backend = backend::on(device, DType::F32);
        let classes = |classes: Vec<u32>| Tensor::from_vec(classes, self.dims[0], &Device::Cpu);
        Ok(Batch {
            images: backend.upload(self.pixels, &self.dims, device)?,
            classes: self.classes.map(classes).transpose()?,
            first: self.first,
        })
    }
}

/// Reads the batches of a run: a new order of all images in each epoch, and random flips. A batch is a function of the
/// seed and the [`Position`], so a loader has no state to save.
#[derive(Debug, Clone)]
pub(crate) struct Loader {
    noise: Noise,
    /// Number of images of an update.
    batch: u64,
    /// The part of the batch that this loader reads.
    part: Range<u64>,
    horizontal_flip: bool,
    /// The order of the images in the current epoch: epoch, number of images, order.
    order: Option<(u64, usize, Vec<u32>)>,
}

impl Loader {
    /// Creates a loader of whole batches.
    pub fn new(seed: u64, batch: usize, horizontal_flip: bool) -> Self {
        let batch = batch as u64;
        Self { noise: Noise::new(seed), batch, part: 0..batch, horizontal_flip, order: None }
    }

    /// Returns the position after another update with a whole batch.
    pub fn after(&self, at: Position) -> Position {
        Position { step: at.step + 1, images_seen: at.images_seen.wrapping_add(self.batch) }
    }

    /// Reads and flips the images of an update. Returns `None` if `stop` is set in the meantime.
    ///
    /// # Errors
    /// Returns an error if the data set cannot be trained on, or fails to read, or if a class is not one of its
    /// classes.
    pub fn read(
        &mut self,
        dataset: &dyn Dataset,
        at: Position,
        stop: &AtomicBool,
    ) -> Result<Option<HostBatch>> {
        let size = check(dataset)?;
        let (shape, classes) = (dataset.shape(), dataset.classes());
        let batch = (self.part.end - self.part.start) as usize;
        let Some(mut pixels) = reserved(&[batch, size]) else {
            let expected = format!("small enough for a batch of images of {size} values in memory");
            return Err(Error::config("batch_size", batch, expected));
        };
        pixels.resize(batch * size, 0.0);
        let images = self
            .part
            .clone()
            .map(|k| Ok((k, self.shuffled(at.images_seen.wrapping_add(k), dataset.len())?)));
        let images = images.collect::<Result<Vec<_>>>()?.into_iter();
        let (noise, flips) = (self.noise, self.horizontal_flip);
        let places = images.zip(pixels.chunks_exact_mut(size));
        let found = parallel::map(dataset.threads(), places, stop, |((k, index), place)| {
            let stream = |purpose| noise.stream(purpose, at.step, k as u32);
            let mut bytes = vec![0; size];
            let random = stream(Purpose::Augment).next_u64();
            let class = dataset.read_augmented(index, random, &mut bytes)?;
            let class = check_class(index, class, classes)?;
            if flips && stream(Purpose::Flip).below(2) == 1 {
                bytes.chunks_mut(shape.width).for_each(<[u8]>::reverse);
            }
            place.iter_mut().zip(bytes).for_each(|(value, byte)| *value = normalized(byte));
            Ok(class)
        })?;
        let Some(found) = found else { return Ok(None) };
        Ok(Some(HostBatch {
            pixels,
            classes: (classes > 0).then(|| found.into_iter().flatten().collect()),
            dims: [batch, shape.channels, shape.height, shape.width],
            first: self.part.start,
        }))
    }

    /// Returns the index of the `position`-th image of the run.
    fn shuffled(&mut self, position: u64, len: usize) -> Result<usize> {
        let (epoch, place) = (position / len as u64, (position % len as u64) as usize);
        match &self.order {
            Some((e, n, order)) if (*e, *n) == (epoch, len) => Ok(order[place] as usize),
            _ => {
                let order = self.noise.stream(Purpose::Shuffle, epoch, 0).permutation(len)?;
                let index = order[place] as usize;
                self.order = Some((epoch, len, order));
                Ok(index)
            }
        }
    }
}

/// Reads images of a data set, without random changes.
///
/// # Errors
/// Returns an error if the data set fails to read, or if a class is not one of its classes.
pub(crate) fn read(dataset: &dyn Dataset, indices: &[usize]) -> Result<HostBatch> {
    let (size, shape, classes) = (check(dataset)?, dataset.shape(), dataset.classes());
    let read = |&index: &usize| {
        let mut bytes = vec![0; size];
        let class = dataset.read(index, &mut bytes)?;
        Ok((bytes, check_class(index, class, classes)?))
    };
    let never = AtomicBool::new(false);
    let images = parallel::map(dataset.threads(), indices.iter(), &never, read)?;
    let (bytes, found): (Vec<_>, Vec<_>) = images.into_iter().flatten().unzip();
    Ok(HostBatch {
        pixels: bytes.into_iter().flatten().map(normalized).collect(),
        classes: (classes > 0).then(|| found.into_iter().flatten().collect()),
        dims: [indices.len(), shape.channels, shape.height, shape.width],
        first: 0,
    })
}

/// Returns the number of values of an image.
///
/// # Errors
/// Returns an error if there are no images, too many images, or images without values.
pub(crate) fn check(dataset: &dyn Dataset) -> Result<usize> {
    let size = dataset.shape().values().unwrap_or(0);
    if dataset.is_empty() || size == 0 || dataset.len() > u32::MAX as usize {
        let value = format!("{} images of {size} values", dataset.len());
        let expected = "1 to 2^32 - 1 images of at least one value each";
        return Err(Error::config("data set", value, expected));
    }
    Ok(size)
}

/// # Errors
/// Returns an error if the class of an image is not one of the data set's.
fn check_class(index: usize, class: Option<u32>, classes: usize) -> Result<Option<u32>> {
    match class {
        Some(found) if (found as usize) < classes => Ok(class),
        None if classes == 0 => Ok(None),
        _ => {
            let found = class.map_or("none".into(), |class| class.to_string());
            let expected = match classes {
                0 => "none, because Dataset::classes is 0".to_string(),
                _ => format!("less than {classes}, the value of Dataset::classes"),
            };
            Err(Error::config("class", format!("{found} in image {index}"), expected))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Images;

    /// A part of a batch has the images and flips of its position in the whole batch.
    #[test]
    fn parts_of_a_batch_are_parts_of_the_whole() -> Result<()> {
        let images = Images::new((0..=251).collect(), (1, 3, 4))?.with_labels((0..21).collect())?;
        let mut whole = Loader::new(5, 8, true);
        let parts = [0..3, 3..8].map(|part| Loader { part, ..whole.clone() });
        let stop = AtomicBool::new(false);
        for at in [(0, 0), (1, 8), (2, 16), (7, 56)] {
            let at = Position { step: at.0, images_seen: at.1 };
            let read = |loader: &mut Loader| -> Result<Batch> {
                loader.read(&images, at, &stop)?.expect("not stopped").upload(&Device::Cpu)
            };
            let expected = read(&mut whole)?;
            let [a, b] = parts.clone().map(|mut part| read(&mut part));
            let (a, b) = (a?, b?);
            assert_eq!((expected.first, a.first, b.first), (0, 0, 3));
            let joined = Tensor::cat(&[&a.images, &b.images], 0)?.flatten_all()?;
            assert_eq!(joined.to_vec1::<f32>()?, expected.images.flatten_all()?.to_vec1::<f32>()?);
            let classes = |batch: &Batch| batch.classes.as_ref().unwrap().to_vec1::<u32>();
            assert_eq!([classes(&a)?, classes(&b)?].concat(), classes(&expected)?);
            // Each image keeps its class: its smallest value is 12 times the class, flipped or not.
            for (k, class) in classes(&expected)?.into_iter().enumerate() {
                let row = expected.images.get(k)?.flatten_all()?.to_vec1::<f32>()?;
                let first = row.into_iter().fold(f32::INFINITY, f32::min);
                assert_eq!(first, normalized(class as u8 * 12));
            }
        }
        Ok(())
    }

    struct Classes(Option<u32>, usize);

    impl Dataset for Classes {
        fn len(&self) -> usize {
            1
        }

        fn shape(&self) -> crate::data::ImageShape {
            (1, 1, 1).into()
        }

        fn classes(&self) -> usize {
            self.1
        }

        fn read(&self, _: usize, _: &mut [u8]) -> Result<Option<u32>> {
            Ok(self.0)
        }
    }

    #[test]
    fn classes_that_do_not_exist_are_refused_with_the_image() {
        let at = Position { step: 0, images_seen: 0 };
        let read = |class, classes| {
            Loader::new(0, 1, false).read(&Classes(class, classes), at, &AtomicBool::new(false))
        };
        for (class, classes, expected) in [
            (Some(3), 3, "class is 3 in image 0; it must be less than 3"),
            (None, 3, "class is none in image 0; it must be less than 3"),
            (Some(0), 0, "class is 0 in image 0; it must be none, because Dataset::classes is 0"),
        ] {
            let message = read(class, classes).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
        read(Some(2), 3).unwrap();
        read(None, 0).unwrap();
    }
}
