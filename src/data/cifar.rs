use std::io::{BufReader, Read};
use std::path::Path;
use std::slice;

use super::file::{DataFile, buffer};
use super::images::Images;
use super::split::Split;
use crate::error::{Error, Result};

const SHAPE: (usize, usize, usize) = (3, 32, 32);
const PIXELS: u64 = 3 * 32 * 32;
/// A label, and an image channel by channel.
const RECORD: u64 = 1 + PIXELS;
const MAX_LABEL: u8 = 9;

/// Ten times the size of a published batch. A limit is needed because a small gzipped file may decompress to any
/// number.
const MAX_RECORDS: u64 = 100_000;

/// Reads the binary version of CIFAR-10, with its labels (0 to 9).
///
/// `dir`, or `cifar-10-batches-bin` in it, holds `data_batch_1.bin` to `data_batch_5.bin`, or `test_batch.bin` for
/// [`Split::Test`]. A batch may have up to 100,000 images.
///
/// # Errors
///
/// Returns [`Error::Io`] if the directory or a file does not exist or cannot be read. Returns [`Error::Data`] if a file
/// is empty, does not consist of whole records of 3,073 bytes, has too many of them, or has a label above 9.
pub fn cifar10(dir: impl AsRef<Path>, split: Split) -> Result<Images> {
    let dir = dir.as_ref();
    dir.metadata().map_err(Error::io(dir))?;
    let nested = dir.join("cifar-10-batches-bin");
    let dir = if nested.is_dir() { &nested } else { dir };
    let names: &[&str] = match split {
        Split::Train => &[
            "data_batch_1.bin",
            "data_batch_2.bin",
            "data_batch_3.bin",
            "data_batch_4.bin",
            "data_batch_5.bin",
        ],
        Split::Test => &["test_batch.bin"],
    };
    let batches = names
        .iter()
        .map(|name| {
            let file = DataFile::open(&dir.join(name))?;
            let bytes = file.content_len(MAX_RECORDS * RECORD)?;
            if bytes > MAX_RECORDS * RECORD {
                return Err(file.data(format!(
                    "more than {} bytes; a CIFAR-10 batch has at most {MAX_RECORDS} records of \
                     {RECORD} bytes",
                    MAX_RECORDS * RECORD
                )));
            }
            if bytes == 0 || bytes % RECORD != 0 {
                return Err(file.data(format!(
                    "{bytes} bytes; a CIFAR-10 batch is one or more records of {RECORD} bytes"
                )));
            }
            Ok((file, bytes / RECORD))
        })
        .collect::<Result<Vec<_>>>()?;

    let records = batches.iter().map(|(_, records)| records).sum::<u64>();
    let mut pixels = buffer(dir, records.saturating_mul(PIXELS))?;
    let mut labels = buffer(dir, records)?;
    let mut places = pixels.chunks_exact_mut(PIXELS as usize).zip(&mut labels);
    for (file, records) in &batches {
        let mut content = BufReader::with_capacity(64 << 10, file.content()?);
        for (record, (image, label)) in (0..*records).zip(places.by_ref()) {
            content
                .read_exact(slice::from_mut(label))
                .and_then(|()| content.read_exact(image))
                .map_err(|e| file.failed(e))?;
            if *label > MAX_LABEL {
                return Err(file.data(format!(
                    "record {record} has label {label}; CIFAR-10's are 0 to {MAX_LABEL}"
                )));
            }
        }
    }
    Ok(Images::new(pixels, SHAPE)?.with_labels(labels)?.with_classes(usize::from(MAX_LABEL) + 1))
}
