//! The IDX format of MNIST: a magic number and the size of each dimension, both big-endian, and the bytes.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::dataset::Dataset;
use super::file::{DataFile, buffer};
use super::images::Images;
use super::split::Split;
use crate::error::{Error, Result};

/// Two zero bytes, 8 for unsigned bytes, and the number of dimensions.
const IMAGES: u32 = 0x0803;
const LABELS: u32 = 0x0801;

/// Reads MNIST, or a data set in the same files, such as Fashion-MNIST.
///
/// `dir` holds `train-images-idx3-ubyte`, or `t10k-images-idx3-ubyte` for [`Split::Test`]. The labels are in
/// `train-labels-idx1-ubyte` or `t10k-labels-idx1-ubyte`. Each file may be gzipped, with `.gz` appended to its name.
/// If there is no file of labels, the images have no labels.
///
/// # Errors
///
/// Returns the errors of [`read_idx_images`] and [`read_idx_labels`]. Also returns [`Error::Data`] if the file of
/// images does not exist, or if the numbers of labels and images differ, and [`Error::Io`] if `dir` does not exist.
pub fn mnist(dir: impl AsRef<Path>, split: Split) -> Result<Images> {
    let dir = dir.as_ref();
    dir.metadata().map_err(Error::io(dir))?;
    let part = match split {
        Split::Train => "train",
        Split::Test => "t10k",
    };
    let name = format!("{part}-images-idx3-ubyte");
    let path = find(dir, &name)
        .ok_or_else(|| Error::data(dir, format!("neither {name} nor {name}.gz is here")))?;
    let images = read_idx_images(path)?;
    let Some(path) = find(dir, &format!("{part}-labels-idx1-ubyte")) else {
        return Ok(images);
    };
    let labels = read_idx_labels(&path)?;
    if labels.len() != images.len() {
        let reason = format!("{} labels, for {} images", labels.len(), images.len());
        return Err(Error::data(path, reason));
    }
    images.with_labels(labels)
}

/// The path of the file with this name, or of the gzipped file. A dangling link counts as a file, because it is an
/// error instead of a missing file.
fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    let names = [name, &format!("{name}.gz")];
    names.map(|name| dir.join(name)).into_iter().find(|path| path.symlink_metadata().is_ok())
}

/// Reads an IDX file of grey images of any size, gzipped or not, as images of one channel.
///
/// # Errors
///
/// Returns [`Error::Io`] if the file cannot be read. Returns [`Error::Data`] if it is not an IDX file of images of
/// unsigned bytes, if it holds no image, or if it is shorter or longer than its header says.
pub fn read_idx_images(path: impl AsRef<Path>) -> Result<Images> {
    let ([_, rows, columns], pixels) = read(path.as_ref(), IMAGES)?;
    Images::new(pixels, (1, rows, columns))
}

/// Reads an IDX file of labels, gzipped or not.
///
/// # Errors
///
/// Returns [`Error::Io`] if the file cannot be read. Returns [`Error::Data`] if it is not an IDX file of labels of
/// unsigned bytes, if it holds no label, or if it is shorter or longer than its header says.
pub fn read_idx_labels(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let ([_], labels) = read(path.as_ref(), LABELS)?;
    Ok(labels)
}

fn kind(magic: u32) -> &'static str {
    match magic {
        IMAGES => "IDX images",
        LABELS => "IDX labels",
        _ => "neither IDX images nor IDX labels",
    }
}

/// The sizes of `D` dimensions and the bytes after them.
fn read<const D: usize>(path: &Path, magic: u32) -> Result<([usize; D], Vec<u8>)> {
    let file = DataFile::open(path)?;
    let sizes: [u32; D] = read_header(&file, magic)?;

    let claim = sizes.map(|size| size.to_string()).join(" x ");
    if sizes.contains(&0) {
        return Err(file.data(format!("its header says {claim} bytes; each must be at least 1")));
    }
    let header = header_len(D) as u64;
    // Three 32-bit sizes cannot overflow 128 bits.
    let claimed = sizes.iter().map(|&size| u128::from(size)).product::<u128>();
    let expected = u128::from(header) + claimed;
    let found = file.content_len(u64::try_from(expected).unwrap_or(u64::MAX))?;
    if u128::from(found) != expected {
        let found =
            if u128::from(found) > expected { "more".to_owned() } else { found.to_string() };
        return Err(file.data(format!(
            "{found} bytes; its header says {header} + {claim} = {expected} bytes"
        )));
    }

    let mut bytes = buffer(path, found - header)?;
    let mut content = file.content()?;
    content
        .read_exact(&mut vec![0; header_len(D)])
        .and_then(|()| content.read_exact(&mut bytes))
        .map_err(|e| file.failed(e))?;
    // Lossless: their product is the length of `bytes`.
    Ok((sizes.map(|size| size as usize), bytes))
}

fn header_len(dimensions: usize) -> usize {
    4 * (1 + dimensions)
}

fn read_header<const D: usize>(file: &DataFile, magic: u32) -> Result<[u32; D]> {
    let expected = header_len(D);
    let mut header = Vec::with_capacity(expected);
    file.content()?.take(expected as u64).read_to_end(&mut header).map_err(|e| file.failed(e))?;
    let mut words =
        header.chunks_exact(4).map(|word| word.iter().fold(0, |n, &byte| n << 8 | u32::from(byte)));
    if let Some(found) = words.next().filter(|&found| found != magic) {
        return Err(file.data(format!(
            "starts with {found:#010x} ({}); {} start with {magic:#010x}",
            kind(found),
            kind(magic),
        )));
    }
    if header.len() < expected {
        let found = header.len();
        return Err(
            file.data(format!("{found} bytes; the header of {} has {expected}", kind(magic)))
        );
    }
    let mut sizes = [0; D];
    for (size, word) in sizes.iter_mut().zip(words) {
        *size = word;
    }
    Ok(sizes)
}
