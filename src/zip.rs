//! ZIP archives: entries by name, stored or deflated. NumPy (`.npz`) and PyTorch write such archives.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use flate2::Crc;
use flate2::read::DeflateDecoder;

use crate::error::{Error, Result};

/// The greatest ratio of the sizes before and after compression that deflate reaches.
const DEFLATE_LIMIT: u64 = 1032;
/// The magic bytes and the lengths of the ZIP records. In a large archive, a ZIP64 record follows the directory, and
/// a locator follows that record.
const LOCAL: (&[u8], usize) = (b"PK\x03\x04", 30);
const CENTRAL: (&[u8], usize) = (b"PK\x01\x02", 46);
const END: (&[u8], usize) = (b"PK\x05\x06", 22);
const END_64: (&[u8], usize) = (b"PK\x06\x06", 56);
const LOCATOR_64: (&[u8], usize) = (b"PK\x06\x07", 20);
/// The identifier of the extra field with the numbers that do not fit 32 bits.
const EXTRA_64: u16 = 1;

/// An open archive. Only its directory is in memory.
pub(crate) struct Archive {
    path: PathBuf,
    file: File,
    len: u64,
    /// The entries by their names.
    entries: BTreeMap<Vec<u8>, Entry>,
}

struct Entry {
    deflated: bool,
    crc: u32,
    compressed: u64,
    size: u64,
    offset: u64,
}

impl Archive {
    /// Reads the directory of the archive in a file, which was opened at `path`.
    ///
    /// # Errors
    /// Returns an error if there is no complete directory, or if an entry is encrypted or compressed by another method
    /// than deflate.
    pub fn new(path: &Path, file: File) -> Result<Self> {
        let len = file.metadata().map_err(Error::io(path))?.len();
        let mut archive = Self { path: path.to_owned(), file, len, entries: BTreeMap::new() };
        archive.entries = archive.directory()?;
        Ok(archive)
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The names of the entries, in their order.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.keys().map(|name| &**name)
    }

    /// The size of the content of the entry `name`, as the directory states it, if there is such an entry.
    pub fn size(&self, name: &str) -> Option<u64> {
        self.entries.get(name.as_bytes()).map(|entry| entry.size)
    }

    /// Reads the entry `name`, if there is one.
    ///
    /// # Errors
    /// Returns an error if the entry is incomplete, or if its checksum is wrong.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(entry) = self.entries.get(name.as_bytes()) else { return Ok(None) };
        let &Entry { deflated, crc: expected, compressed, size, offset } = entry;
        let local = self.bytes(offset, LOCAL.1 as u64)?;
        if !local.starts_with(LOCAL.0) {
            return Err(self.damaged(format!("there is no entry {name} at byte {offset}")));
        }
        let names = u64::from(u16_at(&local, 26)) + u64::from(u16_at(&local, 28));
        let start = offset + LOCAL.1 as u64 + names;
        let fits = start.checked_add(compressed).is_some_and(|end| end <= self.len);
        let limit = if deflated { compressed.saturating_mul(DEFLATE_LIMIT) } else { compressed };
        if !fits || size > limit {
            return Err(self.damaged(format!("entry {name} has more bytes than the file")));
        }
        let content = match deflated {
            false => self.bytes(start, compressed)?,
            true => {
                // The vector grows with the bytes that the file really has.
                let mut content = Vec::new();
                let stored = self.from(start)?.take(compressed);
                let read = DeflateDecoder::new(stored).take(size).read_to_end(&mut content);
                read.map_err(|error| self.damaged(format!("{name}: {error}")))?;
                content
            }
        };
        if content.len() as u64 != size {
            return Err(self.damaged(format!("{name}: the content is incomplete")));
        }
        if crc(&content) != expected {
            return Err(self.damaged(format!("{name}: the checksum of the content is wrong")));
        }
        Ok(Some(content))
    }

    /// Reads the directory at the end of the file.
    fn directory(&self) -> Result<BTreeMap<Vec<u8>, Entry>> {
        // A comment of up to 65,535 bytes may follow, and a locator may precede.
        let tail = self.len.min((LOCATOR_64.1 + END.1) as u64 + 65_535);
        let bytes = self.bytes(self.len - tail, tail)?;
        let end = (0..(bytes.len() + 1).saturating_sub(END.1)).rev().find(|&i| {
            bytes[i..].starts_with(END.0)
                && i + END.1 + usize::from(u16_at(&bytes, i + 20)) == bytes.len()
        });
        let Some(end) = end else {
            return Err(self.damaged("not a complete archive: it has no ZIP directory".into()));
        };
        let mut count = u64::from(u16_at(&bytes, end + 10));
        let mut size = u64::from(u32_at(&bytes, end + 12));
        let mut offset = u64::from(u32_at(&bytes, end + 16));
        if let Some(locator) = end.checked_sub(LOCATOR_64.1).map(|at| &bytes[at..end])
            && locator.starts_with(LOCATOR_64.0)
        {
            let record = self.bytes(u64_at(locator, 8), END_64.1 as u64)?;
            if !record.starts_with(END_64.0) {
                return Err(self.damaged("there is no ZIP64 directory where it should be".into()));
            }
            [count, size, offset] = [32, 40, 48].map(|at| u64_at(&record, at));
        }
        let directory = self.bytes(offset, size)?;
        let (mut entries, mut rest) = (BTreeMap::new(), &directory[..]);
        for _ in 0..count {
            let (name, entry, after) =
                Entry::parse(rest).map_err(|reason| self.damaged(reason.into()))?;
            entries.entry(name).or_insert(entry);
            rest = after;
        }
        Ok(entries)
    }

    fn from(&self, offset: u64) -> Result<&File> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).map_err(Error::io(&self.path))?;
        Ok(file)
    }

    /// Reads bytes. Allocates no more memory than the file has bytes.
    fn bytes(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(self.damaged(format!("the file ends before byte {len} after {offset}")));
        }
        let mut bytes = Vec::new();
        self.from(offset)?.take(len).read_to_end(&mut bytes).map_err(Error::io(&self.path))?;
        if bytes.len() as u64 != len {
            return Err(self.damaged("the file became shorter while it was read".into()));
        }
        Ok(bytes)
    }

    /// The error for a file whose content is not as expected.
    pub fn damaged(&self, reason: String) -> Error {
        Error::damaged(&self.path, reason)
    }
}

impl Entry {
    /// Parses the first entry of a directory. Returns its name, the entry and the rest.
    fn parse(directory: &[u8]) -> std::result::Result<(Vec<u8>, Self, &[u8]), &'static str> {
        let incomplete = "the ZIP directory is incomplete";
        let (header, after) = directory.split_at_checked(CENTRAL.1).ok_or(incomplete)?;
        if !header.starts_with(CENTRAL.0) {
            return Err(incomplete);
        }
        let [name, extra, comment] = [28, 30, 32].map(|at| usize::from(u16_at(header, at)));
        let (name, after) = after.split_at_checked(name).ok_or(incomplete)?;
        let (extra, after) = after.split_at_checked(extra).ok_or(incomplete)?;
        let rest = after.get(comment..).ok_or(incomplete)?;
        let (flags, method) = (u16_at(header, 8), u16_at(header, 10));
        if flags & 1 != 0 || !matches!(method, 0 | 8) {
            return Err("an entry is encrypted, or neither stored nor deflated");
        }
        // The extra field holds those of the numbers that do not fit, in this order.
        let mut large = large_numbers(extra);
        let [size, compressed, offset] = [24, 20, 42].map(|at| match u32_at(header, at) {
            u32::MAX => large.next().unwrap_or(u32::MAX.into()),
            number => number.into(),
        });
        let (deflated, crc) = (method == 8, u32_at(header, 16));
        Ok((name.to_vec(), Self { deflated, crc, compressed, size, offset }, rest))
    }
}

/// Returns the content of an archive of these entries, stored without compression.
///
/// # Errors
/// Returns what is too large for an archive, such as `5000000000 bytes`. An archive has less than 4 GB, at most 65,534
/// entries, and names of at most 65,534 bytes.
pub(crate) fn archive(entries: &[(String, Vec<u8>)]) -> std::result::Result<Vec<u8>, String> {
    let count = below(u16::MAX, entries.len(), "entries")?;
    let short = |bytes| below(u32::MAX, bytes, "bytes");
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in entries {
        let (size, offset) = (short(content.len())?, short(file.len())?);
        let length = below(u16::MAX, name.len(), "bytes of a name")?;
        // Version 2.0, no flags, stored, 1980-01-01, the checksum, both sizes, and the lengths of the name and of the
        // extra fields.
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 33, 0];
        for number in [crc(content), size, size, length.into()] {
            common.extend(number.to_le_bytes());
        }
        directory.extend([CENTRAL.0, &[20, 0], &common, &[0; 10]].concat());
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
        file.extend([LOCAL.0, &common, name.as_bytes(), content].concat());
    }
    let (start, size) = (short(file.len())?, short(directory.len())?);
    file.extend(directory);
    file.extend([END.0, &[0; 4], &count.to_le_bytes(), &count.to_le_bytes()].concat());
    file.extend([&size.to_le_bytes()[..], &start.to_le_bytes(), &[0; 2]].concat());
    Ok(file)
}

/// Returns a number of an archive, which must not reach the mark of ZIP64, the greatest of its type.
fn below<T: TryFrom<usize> + PartialOrd>(
    mark: T,
    number: usize,
    of: &str,
) -> std::result::Result<T, String> {
    let fits = T::try_from(number).ok().filter(|number| *number < mark);
    fits.ok_or_else(|| format!("{number} {of}"))
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// The numbers of 64 bits among the extra fields of an entry.
fn large_numbers(mut fields: &[u8]) -> impl Iterator<Item = u64> {
    let mut found: &[u8] = &[];
    while let Some((header, rest)) = fields.split_at_checked(4)
        && let Some((field, rest)) = rest.split_at_checked(u16_at(header, 2).into())
    {
        if u16_at(header, 0) == EXTRA_64 {
            found = field;
        }
        fields = rest;
    }
    found.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_stay_below_the_mark_of_large_archives() {
        let mark = u32::MAX as usize;
        assert_eq!(below(u32::MAX, mark - 1, "bytes"), Ok(u32::MAX - 1));
        for bytes in [mark, mark + 1, usize::MAX] {
            assert_eq!(below(u32::MAX, bytes, "bytes"), Err(format!("{bytes} bytes")));
        }
    }

    #[test]
    fn archives_of_too_many_entries_or_too_long_names_are_refused() {
        let entries = |count: usize| vec![(String::new(), vec![]); count];
        let named = |length: usize| archive(&[("n".repeat(length), vec![])]);
        assert!(archive(&entries(65_534)).is_ok() && named(65_534).is_ok());
        for count in [65_535, 65_536, 65_537] {
            assert_eq!(archive(&entries(count)), Err(format!("{count} entries")));
            assert_eq!(named(count), Err(format!("{count} bytes of a name")));
        }
    }
}
