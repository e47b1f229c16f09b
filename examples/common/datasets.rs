//! The data sets, and how to get those that are not there.

use std::ffi::OsStr;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use ddpm::data::{self, Split};
use ddpm::{ImageSource, Images};

use super::cli::{Result, quoted};

/// What `--data` says to download instead of naming a directory.
const HUB: &str = "hub";

const EMBEDDED: &str = "examples/data/mnist-train-10k-images-idx3-ubyte.gz";

/// A set that the examples can read.
pub struct Kind {
    pub name: &'static str,
    /// Its directory, and what fetch-data calls it.
    folder: &'static str,
    /// What to do to choose it.
    pub options: &'static str,
}

pub static MNIST: Kind = Kind {
    name: "MNIST",
    folder: "mnist",
    options: "pass --data with their directory, and no --fashion",
};
static DIGITS: Kind = Kind { options: "pass neither --data nor --fashion", ..MNIST };
static FASHION_MNIST: Kind = Kind {
    name: "Fashion-MNIST",
    folder: "fashion-mnist",
    options: "pass --fashion, and --data with their directory",
};
static CIFAR_10: Kind =
    Kind { name: "CIFAR-10", folder: "cifar10", options: "pass --data with their directory" };

pub struct DataSet {
    pub kind: &'static Kind,
    pub images: Images,
    /// For the user: which images, and from where.
    pub about: String,
}

impl DataSet {
    fn new(kind: &'static Kind, source: &str, images: Images) -> Self {
        Self { kind, images, about: format!("{} {source}", kind.name) }
    }
}

/// MNIST or Fashion-MNIST from `data`, or the digits that come with the repository.
pub fn mnist(data: Option<&Path>, fashion: bool) -> Result<DataSet> {
    let kind = if fashion { &FASHION_MNIST } else { &MNIST };
    let Some(dir) = data else {
        return match fashion {
            true => Err("--fashion needs --data DIR; `scripts/fetch-data fashion-mnist data` \
                         fetches it, then pass --data data"
                .into()),
            false => embedded(),
        };
    };
    if dir.as_os_str() == HUB {
        return Ok(DataSet::new(kind, "from the Hugging Face hub", hub::mnist(fashion)?));
    }
    let or = if fashion { ", or leave --fashion out" } else { ", or pass --fashion" };
    read_mnist(kind, dir, Split::Train, or)
}

/// The digits of a full set with their labels, those to train on and those to test with.
pub fn mnist_digits(dir: &Path) -> Result<(DataSet, DataSet)> {
    if dir.as_os_str() == HUB {
        return Err("--data hub is for the examples that train; pass --data DIR, which \
                    `scripts/fetch-data mnist DIR` fills"
            .into());
    }
    let read = |split, labels: &str| -> Result<DataSet> {
        let set = read_mnist(&MNIST, dir, split, "")?;
        if set.images.labels().is_none() {
            let reason = format!("{}: {labels} is not here", place(&MNIST, dir).display());
            return Err(fetch(reason, &MNIST, dir).into());
        }
        Ok(set)
    };
    let train = read(Split::Train, "train-labels-idx1-ubyte")?;
    Ok((train, read(Split::Test, "t10k-labels-idx1-ubyte")?))
}

/// Where the files of a set are: in the directory itself, or in what fetch-data made in it.
fn place(kind: &Kind, dir: &Path) -> PathBuf {
    let nested = dir.join(kind.folder);
    if nested.is_dir() { nested } else { dir.into() }
}

fn read_mnist(kind: &'static Kind, dir: &Path, split: Split, or: &str) -> Result<DataSet> {
    let place = place(kind, dir);
    if let Some(other) = of_another(kind, &place) {
        let (place, other) = (place.display(), other.name);
        let expected = format!("it must be that of {}{or}", kind.name);
        return Err(format!("--data is {place}, the folder of {other}; {expected}").into());
    }
    let images = data::mnist(&place, split).map_err(|e| fetch(e, kind, dir))?;
    Ok(DataSet::new(kind, &format!("from {}", place.display()), images))
}

/// The set whose folder this is, if it is another one. The files of both have the same names, so that
/// only the folder's tells them apart.
fn of_another(kind: &Kind, place: &Path) -> Option<&'static Kind> {
    // `.` has a name, too.
    let whole = place.canonicalize().unwrap_or_default();
    let name = place.file_name().or(whole.file_name())?;
    let is_named = |other: &&Kind| other.name != kind.name && name == OsStr::new(other.folder);
    [&MNIST, &FASHION_MNIST].into_iter().find(is_named)
}

pub fn cifar10(dir: &Path) -> Result<DataSet> {
    if dir.as_os_str() == HUB {
        return Ok(DataSet::new(&CIFAR_10, "from the Hugging Face hub", hub::cifar10()?));
    }
    let images = data::cifar10(dir, Split::Train).map_err(|e| fetch(e, &CIFAR_10, dir))?;
    Ok(DataSet::new(&CIFAR_10, &format!("from {}", dir.display()), images))
}

/// The bundled digits are read when the example runs: they are in the repository, but not in the
/// crate's package, where the examples must compile without them.
fn embedded() -> Result<DataSet> {
    let places = [Path::new(env!("CARGO_MANIFEST_DIR")).join(EMBEDDED), PathBuf::from(EMBEDDED)];
    let Some(path) = places.iter().find(|path| path.is_file()) else {
        let expected = "run in the repository's root, or pass --data DIR";
        return Err(format!("{EMBEDDED}, the embedded digits, is not there: {expected}").into());
    };
    let source = "digits embedded in the repository (--data DIR for the full set)";
    Ok(DataSet::new(&DIGITS, source, data::read_idx_images(path)?))
}

/// What is wrong, and how to get the set: into the directory that was named only if nothing is in it.
/// fetch-data replaces files of the set's names, and those may be the user's own.
fn fetch(error: impl Display, kind: &Kind, dir: &Path) -> String {
    let Kind { name, folder, .. } = kind;
    let is_empty = || fs::read_dir(dir).is_ok_and(|mut content| content.next().is_none());
    if !dir.exists() || is_empty() {
        let dir = quoted(&dir.to_string_lossy());
        return format!("{error}; `scripts/fetch-data {folder} {dir}` fetches {name}");
    }
    format!("{error}; `scripts/fetch-data {folder} data` fetches {name}, then pass --data data")
}

/// Whether a network for images of this shape can be trained on the set.
pub fn check_shape(set: &DataSet, channels: usize, size: usize) -> Result<()> {
    let (found, expected) = (set.images.shape(), (channels, size, size));
    if found != expected {
        let about = &set.about;
        return Err(format!(
            "the images of {about} have shape {found:?}; the network's have {expected:?}"
        )
        .into());
    }
    Ok(())
}

#[cfg(not(feature = "hub"))]
mod hub {
    use super::{Images, Result};

    pub fn mnist(_fashion: bool) -> Result<Images> {
        Err("--data hub needs the feature `hub`: add `--features hub` to cargo's options".into())
    }

    pub fn cifar10() -> Result<Images> {
        mnist(false)
    }
}

#[cfg(feature = "hub")]
mod hub {
    use candle_core::Tensor;
    use candle_datasets::vision;

    use super::{Images, Result};

    pub fn mnist(fashion: bool) -> Result<Images> {
        let set = if fashion { vision::fashion_mnist::load() } else { vision::mnist::load() };
        images(&set?.train_images, (1, 28, 28))
    }

    pub fn cifar10() -> Result<Images> {
        // The loader takes the rows for columns: (count, channels, width, height).
        images(&vision::cifar::load()?.train_images.transpose(2, 3)?, (3, 32, 32))
    }

    /// Images of bytes from those in [0, 1].
    fn images(images: &Tensor, shape: (usize, usize, usize)) -> Result<Images> {
        let pixels = (images.flatten_all()? * 255.0)?.to_vec1::<f32>()?;
        Ok(Images::new(pixels.into_iter().map(|p| p.round() as u8).collect(), shape)?)
    }
}
