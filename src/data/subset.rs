use std::fmt;

use super::dataset::{Dataset, ImageShape};
use crate::error::{Error, Result};
use crate::random::{Noise, Purpose};

/// Some images of a data set.
#[derive(Clone)]
pub struct Subset<'a> {
    whole: &'a dyn Dataset,
    indices: Vec<u32>,
}

/// Divides a data set at random into training images and `count` held-out images. Both parts keep the order of the data
/// set.
///
/// The division depends only on `count` and the number of images. A resumed run therefore has the same division, and
/// runs with different seeds can be compared. The division is random because the images of a class are often
/// consecutive.
///
/// # Errors
/// Returns an error if one of the two parts would be empty, or if there is not enough memory.
///
/// ```
/// use ddpm::data::{Dataset, Images, hold_out};
///
/// let images = Images::new(vec![0; 10 * 4], (1, 2, 2))?;
/// let (train, held_out) = hold_out(&images, 3)?;
/// assert_eq!((train.len(), held_out.len()), (7, 3));
/// # Ok::<(), ddpm::Error>(())
/// ```
pub fn hold_out(dataset: &dyn Dataset, count: usize) -> Result<(Subset<'_>, Subset<'_>)> {
    let all = dataset.len();
    if count == 0 || count >= all {
        let expected = format!("at least 1, and less than {all}, the number of images");
        return Err(Error::config("held-out images", count, expected));
    }
    let mut train = Noise::new(0).stream(Purpose::Split, 0, 0).permutation(all)?;
    let mut held_out = train.split_off(all - count);
    train.sort_unstable();
    held_out.sort_unstable();
    let part = |indices| Subset { whole: dataset, indices };
    Ok((part(train), part(held_out)))
}

impl<'a> Subset<'a> {
    /// Chooses `count` images of a data set at random, in the order of the data set. The choice depends only on the
    /// seed, on `count` and on the number of images.
    ///
    /// # Errors
    /// Returns an error if `count` is 0 or exceeds the number of images, or if there is not enough memory.
    ///
    /// ```
    /// use ddpm::data::{Dataset, Images, Subset};
    ///
    /// let images = Images::new(vec![0; 10 * 4], (1, 2, 2))?;
    /// assert_eq!(Subset::random(&images, 3, 0)?.len(), 3);
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    pub fn random(dataset: &'a dyn Dataset, count: usize, seed: u64) -> Result<Self> {
        let all = dataset.len();
        if !(1..=all).contains(&count) {
            let expected = format!("from 1 to {all}, the number of images");
            return Err(Error::config("images to choose", count, expected));
        }
        let mut indices = Noise::new(seed).stream(Purpose::Choice, 0, 0).permutation(all)?;
        indices.truncate(count);
        indices.sort_unstable();
        Ok(Self { whole: dataset, indices })
    }
}

impl Subset<'_> {
    /// The indices of the images in the whole data set.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    fn index(&self, index: usize) -> Result<usize> {
        let found = self.indices.get(index).map(|&index| index as usize);
        found.ok_or_else(|| {
            let expected = format!("less than {}, the number of images", self.len());
            Error::config("index", index, expected)
        })
    }
}

impl Dataset for Subset<'_> {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn shape(&self) -> ImageShape {
        self.whole.shape()
    }

    /// The number of classes of the whole data set.
    fn classes(&self) -> usize {
        self.whole.classes()
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        self.whole.read(self.index(index)?, pixels)
    }

    fn read_augmented(&self, index: usize, random: u64, pixels: &mut [u8]) -> Result<Option<u32>> {
        self.whole.read_augmented(self.index(index)?, random, pixels)
    }

    fn threads(&self) -> usize {
        self.whole.threads()
    }
}

// A data set has no `Debug`.
impl fmt::Debug for Subset<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subset")
            .field("len", &self.len())
            .field("of", &self.whole.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Images;

    #[test]
    fn every_image_is_in_one_part_with_its_class() -> Result<()> {
        let images = Images::new((0..40).collect(), (1, 1, 2))?.with_labels((0..20).collect())?;
        let (train, held_out) = hold_out(&images, 6)?;
        let mut seen = Vec::new();
        for part in [&train, &held_out] {
            for index in 0..part.len() {
                let mut pixels = [0; 2];
                let class = part.read(index, &mut pixels)?;
                assert_eq!(class, Some(u32::from(pixels[0] / 2)));
                assert_eq!(part.read_augmented(index, 7, &mut pixels)?, class);
                seen.extend(class);
            }
            assert!(part.indices().is_sorted() && part.read(part.len(), &mut [0; 2]).is_err());
            assert_eq!((part.classes(), part.shape()), (20, images.shape()));
        }
        assert_eq!((train.len(), held_out.len()), (14, 6));
        // The last images alone could be those of one class.
        assert!(held_out.indices()[0] < 10, "{held_out:?}");
        seen.sort_unstable();
        assert_eq!(seen, Vec::from_iter(0..20));
        Ok(())
    }

    #[test]
    fn images_are_chosen_by_a_seed_and_keep_their_order() -> Result<()> {
        let images = Images::new((0..100).collect(), (1, 1, 1))?;
        let chosen = |count, seed| Ok::<_, Error>(Subset::random(&images, count, seed)?.indices);
        let ten = chosen(10, 0)?;
        assert!(ten.len() == 10 && ten.is_sorted_by(|a, b| a < b), "{ten:?}");
        assert_eq!(ten, chosen(10, 0)?);
        assert_ne!(ten, chosen(10, 1)?);
        // The first images alone could be those of one class.
        assert!(ten[9] > 50, "{ten:?}");
        assert_eq!(chosen(100, 5)?, Vec::from_iter(0..100));
        for count in [0, 101] {
            let message = chosen(count, 0).unwrap_err().to_string();
            let expected = format!("images to choose is {count}; it must be from 1 to 100");
            assert!(message.starts_with(&expected), "{message}");
        }
        Ok(())
    }

    #[test]
    fn both_parts_must_have_images() {
        let images = Images::new(vec![0; 4], (1, 1, 2)).unwrap();
        for count in [0, 2, 3] {
            let message = hold_out(&images, count).unwrap_err().to_string();
            let expected = format!("held-out images is {count}; it must be at least 1, and less");
            assert!(message.starts_with(&expected), "{message}");
        }
    }
}
