use std::fmt;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::datasets::{DataSet, crc32};
use super::result::Result;
use crate::data::Dataset;
use crate::error::Error;
use crate::files;

/// The images on which a run is trained: the content of the file `data.json` beside its checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The name of the data set.
    pub name: String,
    images: usize,
    /// The CRC-32 of all pixels, or the fingerprint of a folder.
    crc32: String,
    /// The number of images that are not trained on.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) held_out: usize,
    /// The instruction to select the set.
    options: String,
}

impl Identity {
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

    /// Sets the number of images that are not trained on.
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

    /// Returns an error if the run with this file was trained on other images. Returns false if there is no such
    /// file.
    pub(super) fn check(&self, path: &Path) -> Result<bool> {
        let Some(run) = Self::read(path)? else { return Ok(false) };
        if (run.images, &run.crc32) != (self.images, &self.crc32) {
            let (path, options) = (path.display(), &run.options);
            let wrong = format!("{path}: the run is of {run}, not of {self}");
            return Err(format!("{wrong}; to go on with it, {options}").into());
        }
        if run.held_out != self.held_out {
            let (path, run, found) = (path.display(), run.held_out, self.held_out);
            let wrong = format!("{path}: the run holds out {run} images, not {found}");
            return Err(format!("{wrong}; to go on with it, omit --held-out").into());
        }
        Ok(true)
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

fn is_zero(number: &usize) -> bool {
    *number == 0
}
