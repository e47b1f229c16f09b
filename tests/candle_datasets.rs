//! The readers of candle-datasets, compared with those of this crate.
//!
//! If `DDPM_DATA` names the directory that `scripts/fetch-data all` filled, the published sets are
//! compared, too.

use std::env;
use std::fs;
use std::path::PathBuf;

use candle_core::{Result, Tensor};
use candle_datasets::vision::{self, Dataset};
use ddpm::data::{Dataset as _, Images};
use ddpm::data::{Split, cifar10, mnist};
use tempfile::TempDir;

fn assert_agree(theirs: Dataset, train: Images, test: Images) -> Result<()> {
    for (images, labels, ours) in [
        (theirs.train_images, theirs.train_labels, train),
        (theirs.test_images, theirs.test_labels, test),
    ] {
        assert_eq!(images.dim(0)?, ours.len());
        assert_eq!(labels.to_vec1::<u8>()?, ours.labels().unwrap());
        let images = images.reshape((ours.len(), ()))?;
        for index in 0..ours.len() {
            assert_eq!(bytes(&images.get(index)?)?, ours.get(index).unwrap(), "image {index}");
        }
    }
    Ok(())
}

/// candle-datasets divides bytes by 255. Rounding recovers them exactly.
fn bytes(image: &Tensor) -> Result<Vec<u8>> {
    Ok(image.to_vec1::<f32>()?.into_iter().map(|x| (x * 255.0).round() as u8).collect())
}

fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn real(set: &str) -> Option<PathBuf> {
    env::var_os("DDPM_DATA").map(|dir| PathBuf::from(dir).join(set))
}

#[test]
fn mnist_agrees() -> Result<()> {
    let dir = TempDir::new()?;
    for (part, count) in [("train", 300u32), ("t10k", 7)] {
        let header = |words: &[u32]| words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<_>>();
        let images = [header(&[0x803, count, 28, 28]), noise(count as usize * 784, count)].concat();
        let labels = [header(&[0x801, count]), noise(count as usize, count)].concat();
        fs::write(dir.path().join(format!("{part}-images-idx3-ubyte")), images)?;
        fs::write(dir.path().join(format!("{part}-labels-idx1-ubyte")), labels)?;
    }
    for dir in [Some(dir.path().to_owned()), real("mnist"), real("fashion-mnist")] {
        let Some(dir) = dir else { continue };
        let ours = |split| mnist(&dir, split).map_err(candle_core::Error::wrap);
        assert_agree(vision::mnist::load_dir(&dir)?, ours(Split::Train)?, ours(Split::Test)?)?;
    }
    Ok(())
}

#[test]
fn cifar10_agrees() -> Result<()> {
    let dir = TempDir::new()?;
    // candle-datasets reads batches of exactly 10,000 images.
    let names = (1..=5).map(|n| format!("data_batch_{n}.bin")).chain(["test_batch.bin".to_owned()]);
    for (seed, name) in names.enumerate() {
        let mut batch = noise(10_000 * 3073, seed as u32);
        batch.iter_mut().step_by(3073).for_each(|label| *label %= 10);
        fs::write(dir.path().join(name), batch)?;
    }
    for dir in [Some(dir.path().to_owned()), real("cifar-10-batches-bin")] {
        let Some(dir) = dir else { continue };
        let ours = |split| cifar10(&dir, split).map_err(candle_core::Error::wrap);
        assert_agree(vision::cifar::load_dir(&dir)?, ours(Split::Train)?, ours(Split::Test)?)?;
    }
    Ok(())
}
