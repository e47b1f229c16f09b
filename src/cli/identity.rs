use std::fmt;
use std::fs::{self, File};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::datasets::{DataSet, crc32};
use super::result::Result;
use crate::data::Dataset;
use crate::error::Error;
use crate::files;
use crate::train::Change;

/// The images on which a run is trained: the content of the file `data.json` beside its checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The name of the data set.
    pub name: String,
    images: usize,
    /// The CRC-32 of all pixels, or the fingerprint of a folder.
    crc32: String,
    /// The number of held-out images.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) held_out: usize,
    /// The instruction to select the set.
    options: String,
}

impl Identity {
    /// The field of a run's history that records other images.
    pub(super) const FIELD: &str = "images";

    /// The identity of a data set.
    pub fn of(set: &DataSet<impl Dataset>) -> Self {
        Self {
            name: set.name.clone(),
            images: set.images.len(),
            crc32: set.crc32.clone(),
            held_out: 0,
            options: set.options.clone(),
        }
    }

    /// Sets the number of held-out images.
    pub(super) fn holding_out(self, held_out: usize) -> Self {
        Self { held_out, ..self }
    }

    /// The CRC-32 of bytes, as gzip computes it, in hexadecimal.
    pub fn crc32(bytes: &[u8]) -> String {
        crc32(bytes)
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        Ok(files::write(path, format!("{}\n", serde_json::to_string(self)?).as_bytes())?)
    }

    /// Reads the file of a run. Returns `None` if it does not exist.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if its content is something else.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let read = files::existing(fs::read(path)).map_err(Error::io(path))?;
        let Some(text) = read else { return Ok(None) };
        let run = serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Some(run))
    }

    /// Reads the identity of the images of a run: that of the last change in its history, otherwise that of its file. A
    /// checkpoint that records a change is written before the file.
    pub(super) fn of_run(path: &Path, history: &[Change]) -> Result<Option<Self>> {
        let in_file = Self::read(path)?;
        match history.iter().rfind(|change| change.field == Self::FIELD) {
            Some(change) => Ok(Some(serde_json::from_value(change.to.clone())?)),
            None => Ok(in_file),
        }
    }

    /// Returns whether these are the images that the file names.
    pub(super) fn is_in(&self, path: &Path) -> Result<bool> {
        Ok(Self::read(path)?.is_some_and(|run| self.has_images_of(&run)))
    }

    /// Returns whether these are the images of `run`, with the same number held out.
    pub(super) fn has_images_of(&self, run: &Self) -> bool {
        self.is_of_set(run) && self.held_out == run.held_out
    }

    fn is_of_set(&self, run: &Self) -> bool {
        (run.images, &run.crc32) == (self.images, &self.crc32)
    }

    /// Formats the error that these images are not those of the run with this file.
    pub(super) fn mismatch(&self, run: &Self, path: &Path) -> String {
        let (path, options) = (path.display(), &run.options);
        if self.is_of_set(run) {
            let (run, found) = (run.held_out, self.held_out);
            let wrong = format!("{path}: the run holds out {run} images, not {found}");
            return format!("{wrong}; to continue it, omit --held-out, or add --change");
        }
        let wrong = format!("{path}: the run is of {run}, not of {self}");
        format!("{wrong}; to continue it, {options}, or add --change to train on these images")
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} images, crc32 {}", self.name, self.images, self.crc32)?;
        match self.held_out {
            0 => write!(f, ")"),
            held_out => write!(f, ", {held_out} held out)"),
        }
    }
}

/// Computes the SHA-256 of a file, in hexadecimal.
pub(super) fn sha256(path: &Path) -> Result<String> {
    let hash = File::open(path).and_then(files::sha256);
    Ok(hash.map_err(Error::io(path))?)
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}
