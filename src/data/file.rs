//! Data files whose content is not trusted: no memory is allocated on the word of a header.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use crate::error::{Error, Result};
use crate::memory::filled;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// An open data file, which may be gzipped.
pub(super) struct DataFile {
    path: PathBuf,
    file: File,
    /// Number of bytes on disk.
    len: u64,
    gzipped: bool,
}

impl DataFile {
    pub fn open(path: &Path) -> Result<Self> {
        // Checked before opening, because opening a pipe would wait for its writer.
        if !path.metadata().map_err(Error::io(path))?.is_file() {
            return Err(Error::data(path, "not a regular file"));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        let mut start = Vec::new();
        (&file).take(2).read_to_end(&mut start).map_err(Error::io(path))?;
        Ok(Self { path: path.to_owned(), file, len, gzipped: start == GZIP_MAGIC })
    }

    /// Returns the content from its start, decompressed.
    pub fn content(&self) -> Result<Box<dyn Read + '_>> {
        let mut file = &self.file;
        file.rewind().map_err(|e| self.failed(e))?;
        Ok(if self.gzipped { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) })
    }

    /// Returns the length of the content. Returns `enough + 1` if it is more than `enough`.
    ///
    /// Gzipped content is decompressed for this and discarded. This takes as long as a second
    /// decompression, but memory is then only allocated for content that exists.
    pub fn content_len(&self, enough: u64) -> Result<u64> {
        if !self.gzipped {
            return Ok(self.len.min(enough.saturating_add(1)));
        }
        let mut content = self.content()?.take(enough.saturating_add(1));
        io::copy(&mut content, &mut io::sink()).map_err(|e| self.failed(e))
    }

    pub fn data(&self, reason: impl Into<String>) -> Error {
        Error::data(&self.path, reason)
    }

    /// The error for a failed read of the content.
    pub fn failed(&self, error: io::Error) -> Error {
        match error.kind() {
            ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof
                if self.gzipped =>
            {
                self.data(format!("damaged gzip data: {error}"))
            }
            _ => Error::io(&self.path)(error),
        }
    }
}

/// Allocates a zeroed buffer of `len` bytes. The caller has checked that the file holds as many.
pub(super) fn buffer(path: &Path, len: u64) -> Result<Vec<u8>> {
    let buffer = usize::try_from(len).ok().and_then(|len| filled(&[len], 0));
    buffer.ok_or_else(|| Error::data(path, format!("no memory for its {len} bytes")))
}
