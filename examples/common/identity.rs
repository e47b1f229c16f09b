//! Which images a run is trained on: a small file beside its checkpoint.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use ddpm::ImageSource;
use flate2::Crc;
use serde::{Deserialize, Serialize};

use super::cli::Result;
use super::datasets::DataSet;
use super::files;

#[derive(Serialize, Deserialize)]
pub struct Identity {
    pub name: String,
    images: usize,
    /// Of all pixels.
    crc32: String,
    /// What to do to choose the set.
    options: String,
}

impl Identity {
    pub fn of(set: &DataSet) -> Self {
        Self {
            name: set.kind.name.into(),
            images: set.images.len(),
            crc32: crc32(set.images.pixels()),
            options: set.kind.options.into(),
        }
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        files::write(path, format!("{}\n", serde_json::to_string(self)?).as_bytes())
    }

    /// What the file says, if there is one.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|e| files::at(path, e))?,
        };
        let run = serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Some(run))
    }

    /// Makes sure that the run with this file is trained on the same images; false where there is no
    /// such file to tell.
    pub fn check(&self, path: &Path) -> Result<bool> {
        let Some(run) = Self::read(path)? else { return Ok(false) };
        if (run.images, &run.crc32) != (self.images, &self.crc32) {
            let (path, options) = (path.display(), &run.options);
            let wrong = format!("{path}: the run is of {run}, not of {self}");
            return Err(format!("{wrong}; to go on with it, {options}").into());
        }
        Ok(true)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} images, crc32 {})", self.name, self.images, self.crc32)
    }
}

/// As gzip's.
pub fn crc32(bytes: &[u8]) -> String {
    let mut crc = Crc::new();
    crc.update(bytes);
    format!("{:08x}", crc.sum())
}
