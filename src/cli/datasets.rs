//! The data sets of a program, with instructions to download missing ones.

use std::ffi::OsStr;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use flate2::Crc;

use super::arguments::quoted;
use super::result::Result;
use crate::data::folder::{Folder, FolderConfig};
use crate::data::{self, Dataset, Images, Split};

/// The value of `--data` that requests a download instead of a directory.
const HUB: &str = "hub";

/// A data set, and the texts about it for the user.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DataSet<D = Images> {
    /// The name of the set.
    pub name: String,
    /// The images.
    pub images: D,
    /// A description: the name and the source.
    pub about: String,
    /// The instruction to select the set, for a user who selected another one.
    pub options: String,
    /// The checksum that identifies the images: the CRC-32 of their pixels, or the SHA-256 fingerprint of a folder.
    pub(super) checksum: String,
    /// The settings of a folder of pictures.
    pub(super) pictures: Option<FolderConfig>,
    /// The names of the classes of a folder of pictures.
    pub(super) class_names: Vec<String>,
}

impl DataSet {
    /// Creates a set whose description is its name.
    pub fn new(name: &str, images: Images) -> Self {
        Self {
            name: name.into(),
            about: name.into(),
            options: "choose its images".into(),
            checksum: crc32(images.pixels()),
            pictures: None,
            class_names: Vec::new(),
            images,
        }
    }

    fn of(kind: &Kind, source: &str, images: Images) -> Self {
        let about = format!("{} {source}", kind.name);
        Self { about, options: kind.options.into(), ..Self::new(kind.name, images) }
    }
}

impl DataSet<Folder> {
    /// Creates the set of the pictures of a folder.
    pub fn folder(folder: Folder) -> Self {
        let name = format!("the pictures of {}", folder.root().display());
        Self {
            about: name.clone(),
            name,
            options: "pass --data with their folder".into(),
            checksum: folder.fingerprint(),
            pictures: Some(folder.config().clone()),
            class_names: folder.class_names().to_vec(),
            images: folder,
        }
    }
}

impl<D: Dataset> DataSet<D> {
    /// Checks that the images have the shape (channels, height, width) that the network expects.
    ///
    /// # Errors
    /// Returns an error that states both shapes if they differ. For pictures, it names the options that give them the
    /// expected shape.
    pub fn check_shape(&self, expected: (usize, usize, usize)) -> Result<()> {
        let (about, found): (_, (usize, usize, usize)) = (&self.about, self.images.shape().into());
        if found != expected {
            let shapes = format!("have shape {found:?}; the network's have {expected:?}");
            let (channels, height, width) = expected;
            let channels = match (&self.pictures, channels) {
                (Some(_), 1) => "grey",
                (Some(_), 3) => "rgb",
                (Some(_), 4) => "rgba",
                _ => return Err(format!("the images of {about} {shapes}").into()),
            };
            let options = format!("--height {height} --width {width} --channels {channels}");
            return Err(format!("the images of {about} {shapes}; pass {options}").into());
        }
        Ok(())
    }
}

/// Computes the CRC-32 of bytes, as gzip does, in hexadecimal.
pub(super) fn crc32(bytes: &[u8]) -> String {
    let mut crc = Crc::new();
    crc.update(bytes);
    format!("{:08x}", crc.sum())
}

/// A published set.
struct Kind {
    name: &'static str,
    /// Its directory, which is also its name in fetch-data.
    folder: &'static str,
    /// The options that select it.
    options: &'static str,
}

static MNIST: Kind = Kind {
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

/// Reads the training images of MNIST or Fashion-MNIST from `data`: a directory, or `hub`. Without `data`, reads the
/// digits in the file `embedded`, relative to the working directory or to the `repository`.
///
/// # Errors
/// Returns an error if the files are missing or malformed, with the command that downloads them.
pub fn mnist(
    data: Option<&Path>,
    fashion: bool,
    repository: &str,
    embedded: &str,
) -> Result<DataSet> {
    let kind = if fashion { &FASHION_MNIST } else { &MNIST };
    let Some(dir) = data else {
        return match fashion {
            true => Err("--fashion needs --data DIR; `scripts/fetch-data fashion-mnist data` \
                         fetches it, then pass --data data"
                .into()),
            false => digits(repository, embedded),
        };
    };
    if dir.as_os_str() == HUB {
        return Ok(DataSet::of(kind, "from the Hugging Face hub", hub::mnist(fashion)?));
    }
    let or = if fashion { ", or omit --fashion" } else { ", or pass --fashion" };
    read_mnist(kind, dir, Split::Train, or)
}

/// Reads MNIST with its labels: the training set and the test set.
///
/// # Errors
/// Returns an error if the files are missing or malformed, with the command that downloads them.
pub fn mnist_with_labels(dir: &Path) -> Result<(DataSet, DataSet)> {
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

/// Reads the training images of CIFAR-10 from a directory, or from the `hub`.
///
/// # Errors
/// Returns an error if the files are missing or malformed, with the command that downloads them.
pub fn cifar10(dir: &Path) -> Result<DataSet> {
    if dir.as_os_str() == HUB {
        return Ok(DataSet::of(&CIFAR_10, "from the Hugging Face hub", hub::cifar10()?));
    }
    cifar10_part(dir, Split::Train)
}

/// Reads the training images and the test images of CIFAR-10, with their classes, from a directory.
///
/// # Errors
/// Returns an error if the files are missing or malformed, with the command that downloads them.
pub fn cifar10_with_labels(dir: &Path) -> Result<(DataSet, DataSet)> {
    Ok((cifar10_part(dir, Split::Train)?, cifar10_part(dir, Split::Test)?))
}

/// Reads the training images or the test images of CIFAR-10 from a directory.
pub(super) fn cifar10_part(dir: &Path, split: Split) -> Result<DataSet> {
    let images = data::cifar10(dir, split).map_err(|e| fetch(e, &CIFAR_10, dir))?;
    Ok(DataSet::of(&CIFAR_10, &format!("from {}", dir.display()), images))
}

/// Reads the training images or the test images of MNIST or Fashion-MNIST from a directory.
pub(super) fn mnist_part(dir: &Path, fashion: bool, split: Split) -> Result<DataSet> {
    read_mnist(if fashion { &FASHION_MNIST } else { &MNIST }, dir, split, "")
}

/// Reads the digits of the repository. They are not in the published package.
fn digits(repository: &str, embedded: &str) -> Result<DataSet> {
    let places = [Path::new(repository).join(embedded), PathBuf::from(embedded)];
    let Some(path) = places.iter().find(|path| path.is_file()) else {
        let expected = "run in the root of the repository, or pass --data DIR";
        return Err(format!("{embedded}, the embedded digits, does not exist: {expected}").into());
    };
    let source = "digits embedded in the repository (--data DIR for the full set)";
    let images = data::read_idx_images(path)?;
    // The labels are beside them, in a file of the same name, except for the word and the number of dimensions.
    let labels = PathBuf::from(path.to_string_lossy().replace("images-idx3", "labels-idx1"));
    let labelled = &labels != path && labels.is_file();
    let images =
        if labelled { images.with_labels(data::read_idx_labels(labels)?)? } else { images };
    Ok(DataSet::of(&DIGITS, source, images))
}

/// Returns the directory of a set's files: `dir` itself, or the one that fetch-data created in it.
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
    Ok(DataSet::of(kind, &format!("from {}", place.display()), images))
}

/// The set to which this folder belongs, if it is another one. The files of both have the same names, so only the name
/// of the folder distinguishes them.
fn of_another(kind: &Kind, place: &Path) -> Option<&'static Kind> {
    // `.` has a name, too.
    let whole = place.canonicalize().unwrap_or_default();
    let name = place.file_name().or(whole.file_name())?;
    let is_named = |other: &&Kind| other.name != kind.name && name == OsStr::new(other.folder);
    [&MNIST, &FASHION_MNIST].into_iter().find(is_named)
}

/// Adds to an error the command that downloads the set. Only an empty directory is suggested as the target, because
/// fetch-data replaces files with the names of the set, which may belong to the user.
fn fetch(error: impl Display, kind: &Kind, dir: &Path) -> String {
    let Kind { name, folder, .. } = kind;
    let is_empty = || fs::read_dir(dir).is_ok_and(|mut content| content.next().is_none());
    if !dir.exists() || is_empty() {
        let dir = quoted(&dir.to_string_lossy());
        return format!("{error}; `scripts/fetch-data {folder} {dir}` fetches {name}");
    }
    format!("{error}; `scripts/fetch-data {folder} data` fetches {name}, then pass --data data")
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
        // The loader exchanges rows and columns: (count, channels, width, height).
        images(&vision::cifar::load()?.train_images.transpose(2, 3)?, (3, 32, 32))
    }

    /// Images of bytes from those in [0, 1].
    fn images(images: &Tensor, shape: (usize, usize, usize)) -> Result<Images> {
        let pixels = (images.flatten_all()? * 255.0)?.to_vec1::<f32>()?;
        Ok(Images::new(pixels.into_iter().map(|p| p.round() as u8).collect(), shape)?)
    }
}
