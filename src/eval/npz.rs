//! Archives of NumPy (`.npz`): arrays of floating-point numbers by name. An archive is a ZIP file whose entries are
//! `.npy` files.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use flate2::read::DeflateDecoder;
use flate2::{Crc, CrcReader};

use crate::error::{Error, Result};
use crate::files;

/// The greatest ratio of the sizes before and after compression that deflate reaches.
const DEFLATE_LIMIT: u64 = 1032;
/// The magic bytes and the lengths of the three ZIP records.
const LOCAL: (&[u8], usize) = (b"PK\x03\x04", 30);
const CENTRAL: (&[u8], usize) = (b"PK\x01\x02", 46);
const END: (&[u8], usize) = (b"PK\x05\x06", 22);

/// An array in C order.
pub(super) struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
    /// Whether the file has fewer bits than f64.
    pub is_f32: bool,
}

/// An open archive. Only its directory is in memory.
pub(super) struct Archive {
    path: PathBuf,
    file: File,
    len: u64,
    entries: Vec<Entry>,
}

struct Entry {
    name: Vec<u8>,
    deflated: bool,
    crc: u32,
    compressed: u64,
    size: u64,
    offset: u64,
}

impl Archive {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        let mut archive = Self { path: path.to_owned(), file, len, entries: vec![] };
        archive.entries = archive.directory()?;
        Ok(archive)
    }

    /// Reads the array `name`, if there is one.
    pub fn array(&mut self, name: &str) -> Result<Option<Array>> {
        let wanted = format!("{name}.npy").into_bytes();
        let Some(at) = self.entries.iter().position(|entry| entry.name == wanted) else {
            return Ok(None);
        };
        let &Entry { deflated, crc, compressed, size, offset, .. } = &self.entries[at];
        let local = self.bytes(offset, LOCAL.1 as u64)?;
        if !local.starts_with(LOCAL.0) {
            return Err(self.damaged(format!("there is no entry {name} at byte {offset}")));
        }
        let start =
            offset + LOCAL.1 as u64 + u64::from(u16_at(&local, 26)) + u64::from(u16_at(&local, 28));
        let fits = start.checked_add(compressed).is_some_and(|end| end <= self.len);
        let limit = if deflated { compressed.saturating_mul(DEFLATE_LIMIT) } else { compressed };
        if !fits || size > limit || !deflated && size != compressed {
            return Err(self.damaged(format!("entry {name} has more bytes than the file")));
        }
        self.file.seek(SeekFrom::Start(start)).map_err(Error::io(&self.path))?;
        let stored = (&self.file).take(compressed);
        let content: Box<dyn Read + '_> =
            if deflated { Box::new(DeflateDecoder::new(stored)) } else { Box::new(stored) };
        let mut content = CrcReader::new(content.take(size));
        let array =
            npy(&mut content, size).map_err(|reason| self.damaged(format!("{name}: {reason}")))?;
        if content.crc().sum() != crc {
            return Err(self.damaged(format!("{name}: the checksum of the content is wrong")));
        }
        Ok(Some(array))
    }

    /// Reads the directory at the end of the file.
    fn directory(&mut self) -> Result<Vec<Entry>> {
        // A comment of up to 65,535 bytes may follow.
        let tail = self.len.min(END.1 as u64 + 65_535);
        let bytes = self.bytes(self.len - tail, tail)?;
        let end = (0..(bytes.len() + 1).saturating_sub(END.1)).rev().find(|&i| {
            bytes[i..].starts_with(END.0)
                && i + END.1 + usize::from(u16_at(&bytes, i + 20)) == bytes.len()
        });
        let Some(end) = end else {
            return Err(self.damaged("not a complete .npz file: it has no ZIP directory".into()));
        };
        let (count, size, offset) =
            (u16_at(&bytes, end + 10), u32_at(&bytes, end + 12), u32_at(&bytes, end + 16));
        if count == u16::MAX || size == u32::MAX || offset == u32::MAX {
            return Err(
                self.damaged("a ZIP64 directory; at most 65,534 entries in 4 GB are read".into())
            );
        }
        let directory = self.bytes(offset.into(), size.into())?;
        let (mut entries, mut rest) = (vec![], &directory[..]);
        for _ in 0..count {
            if rest.len() < CENTRAL.1 || !rest.starts_with(CENTRAL.0) {
                return Err(self.damaged("the ZIP directory is incomplete".into()));
            }
            let (header, after) = rest.split_at(CENTRAL.1);
            let length = |at| usize::from(u16_at(header, at));
            let (name, others) = (length(28), length(30) + length(32));
            let (flags, method) = (u16_at(header, 8), u16_at(header, 10));
            if after.len() < name + others || flags & 1 != 0 || !matches!(method, 0 | 8) {
                return Err(self.damaged(
                    "an entry is incomplete, encrypted, or neither stored nor deflated".into(),
                ));
            }
            entries.push(Entry {
                name: after[..name].to_vec(),
                deflated: method == 8,
                crc: u32_at(header, 16),
                compressed: u32_at(header, 20).into(),
                size: u32_at(header, 24).into(),
                offset: u32_at(header, 42).into(),
            });
            rest = &after[name + others..];
        }
        Ok(entries)
    }

    /// Reads bytes, of which no more than the file has are allocated.
    fn bytes(&mut self, offset: u64, len: u64) -> Result<Vec<u8>> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(self.damaged(format!("the file ends before byte {len} after {offset}")));
        }
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(offset)).map_err(Error::io(&self.path))?;
        (&self.file).take(len).read_to_end(&mut bytes).map_err(Error::io(&self.path))?;
        if bytes.len() as u64 != len {
            return Err(self.damaged("the file became shorter while it was read".into()));
        }
        Ok(bytes)
    }

    pub fn damaged(&self, reason: String) -> Error {
        Error::damaged(&self.path, reason)
    }
}

/// Reads a `.npy` file of `size` bytes.
fn npy(content: &mut impl Read, size: u64) -> std::result::Result<Array, String> {
    let mut start = [0; 8];
    let mut exactly = |bytes: &mut [u8]| content.read_exact(bytes).map_err(|e| e.to_string());
    exactly(&mut start)?;
    if !start.starts_with(b"\x93NUMPY") {
        return Err("not a .npy file".into());
    }
    // Version 1 has a length of 2 bytes, later ones of 4.
    let mut length = [0; 4];
    let digits = if start[6] == 1 { 2 } else { 4 };
    exactly(&mut length[..digits])?;
    let length = u32::from_le_bytes(length);
    // Also the header of an array of many dimensions is short.
    if length > 4096 {
        return Err(format!("a header of {length} bytes; at most 4,096 are read"));
    }
    let mut header = vec![0; length as usize];
    exactly(&mut header)?;
    let header = String::from_utf8_lossy(&header);
    let field = |name: &str| {
        let at = header.find(&format!("'{name}':"))?;
        Some(header[at + name.len() + 3..].trim_start())
    };
    let width = match field("descr").unwrap_or_default() {
        descr if descr.starts_with("'<f8'") => 8,
        descr if descr.starts_with("'<f4'") => 4,
        _ => return Err("the numbers are not little-endian float64 or float32".into()),
    };
    let shape = field("shape").and_then(|shape| shape.strip_prefix('(')?.split_once(')'));
    let shape = shape.map(|(shape, _)| shape.split(',').map(str::trim).filter(|n| !n.is_empty()));
    let shape =
        shape.and_then(|shape| shape.map(|n| n.parse().ok()).collect::<Option<Vec<usize>>>());
    let Some(shape) = shape else { return Err("the header has no shape".into()) };
    if shape.len() > 1 && !field("fortran_order").is_some_and(|order| order.starts_with("False")) {
        return Err("the array is not in C order".into());
    }
    let count = shape.iter().try_fold(1u64, |count, &n| count.checked_mul(n as u64));
    let expected = count.and_then(|count| count.checked_mul(width));
    if expected != Some(size.saturating_sub(8 + digits as u64 + u64::from(length))) {
        return Err(format!("shape {shape:?} does not fit the size of the entry"));
    }
    // The vector grows with the bytes that the file really has.
    let mut bytes = Vec::new();
    content.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if Some(bytes.len() as u64) != expected {
        return Err("the content is incomplete".into());
    }
    let values = if width == 8 {
        bytes.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect()
    } else {
        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes).into()).collect()
    };
    Ok(Array { shape, values, is_f32: width == 4 })
}

/// Writes an archive of arrays, stored without compression.
pub(super) fn write(path: &Path, arrays: &[(&str, &[usize], &[f64])]) -> Result<()> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, shape, values) in arrays {
        // As NumPy writes it: `(3,)` and `(3, 3)`.
        let comma = if shape.len() == 1 { "," } else { "" };
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ") + comma;
        let header = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': ({shape}), }}");
        // With the 10 bytes before it, the header ends at a multiple of 64 bytes.
        let length = (header.len() + 11).next_multiple_of(64) - 10;
        let mut content = b"\x93NUMPY\x01\x00".to_vec();
        content.extend((length as u16).to_le_bytes());
        content.extend(format!("{header:<0$}\n", length - 1).into_bytes());
        content.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let name = format!("{name}.npy");
        let (size, offset) = (short(content.len())?, short(file.len())?);
        let mut crc = Crc::new();
        crc.update(&content);
        // Version 2.0, no flags, stored, 1980-01-01, the checksum, both sizes, and the lengths of the names.
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 33, 0];
        for number in [crc.sum(), size, size, name.len() as u32] {
            common.extend(number.to_le_bytes());
        }
        directory.extend([CENTRAL.0, &[20, 0], &common, &[0; 10]].concat());
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
        file.extend([LOCAL.0, &common, name.as_bytes(), &content].concat());
    }
    let count = arrays.len() as u16;
    let (start, size) = (short(file.len())?, short(directory.len())?);
    file.extend(directory);
    file.extend([END.0, &[0; 4], &count.to_le_bytes(), &count.to_le_bytes()].concat());
    file.extend([&size.to_le_bytes()[..], &start.to_le_bytes(), &[0; 2]].concat());
    files::write(path, &file)
}

/// Returns a size or a position in an archive, which must not reach the mark of ZIP64.
fn short(bytes: usize) -> Result<u32> {
    let number = u32::try_from(bytes).ok().filter(|number| *number < u32::MAX);
    number.ok_or_else(|| {
        Error::config("statistics", format!("of {bytes} bytes"), "less than 4 GB in a file")
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_stay_below_the_mark_of_large_archives() {
        let mark = u32::MAX as usize;
        assert_eq!(short(mark - 1).unwrap(), u32::MAX - 1);
        for bytes in [mark, mark + 1, usize::MAX] {
            let message = short(bytes).unwrap_err().to_string();
            assert!(message.contains("it must be less than 4 GB in a file"), "{message}");
        }
    }
}
