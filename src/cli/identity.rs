use std::fmt;
use std::fs::{self, File};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::datasets::{DataSet, crc32};
use super::result::Result;
use crate::data::Dataset;
use crate::data::folder::FolderConfig;
use crate::error::Error;
use crate::files;
use crate::train::Change;

/// The images on which a run is trained: the content of the file `data.json` beside its checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// The name of the data set.
    pub name: String,
    images: usize,
    /// The CRC-32 of all pixels, or the SHA-256 fingerprint of a folder.
    #[serde(rename = "crc32")]
    checksum: String,
    /// The number of held-out images.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) held_out: usize,
    /// The instruction to select the set.
    options: String,
    /// The settings of a folder of pictures. Files of earlier versions lack them, and the names of the classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pictures: Option<FolderConfig>,
    /// The names of the classes of a folder of pictures.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    class_names: Vec<String>,
}

impl Identity {
    /// The field of a run's history that records other images.
    pub(super) const FIELD: &str = "images";

    /// The identity of a data set.
    pub fn of(set: &DataSet<impl Dataset>) -> Self {
        Self {
            name: set.name.clone(),
            images: set.images.len(),
            checksum: set.checksum.clone(),
            held_out: 0,
            options: set.options.clone(),
            pictures: set.pictures.clone(),
            class_names: set.class_names.clone(),
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

    /// Returns whether the file is of an earlier version, which lacks the settings of these pictures.
    pub(super) fn completes(&self, path: &Path) -> Result<bool> {
        let lacks = |run: Self| run.pictures.is_none() && self.pictures.is_some();
        Ok(Self::read(path)?.is_some_and(lacks))
    }

    /// Returns whether these are the images of `run`, with the same number held out.
    pub(super) fn has_images_of(&self, run: &Self) -> bool {
        self.is_of_set(run) && self.held_out == run.held_out
    }

    fn is_of_set(&self, run: &Self) -> bool {
        (run.images, &run.checksum) == (self.images, &self.checksum)
    }

    /// Checks that the classes of these images are those of `run`, whose file is `path`. Class `k` of the network is the
    /// `k`-th folder.
    ///
    /// # Errors
    /// Returns an error that names the first class with another folder.
    pub(super) fn check_classes(&self, run: &Self, path: &Path) -> Result<()> {
        let (before, now) = (&run.class_names, &self.class_names);
        let differs = |&k: &usize| before.get(k) != now.get(k);
        // The names of the classes of an earlier version's run are unknown.
        let differing = (0..before.len().max(now.len())).find(differs);
        let Some(k) = differing.filter(|_| !before.is_empty()) else { return Ok(()) };
        let [before, now] = [before, now].map(|names| names.get(k).map_or("none", String::as_str));
        let (path, name) = (path.display(), &self.name);
        let wrong =
            format!("{path}: the folder of class {k} is {before} in the run, and {now} in {name}");
        let remedy = "let the folders be those of the run, or begin a new run with another --out";
        Err(format!("{wrong}; {remedy}").into())
    }

    /// Formats the error that these images are not those of the run with this file.
    pub(super) fn mismatch(&self, run: &Self, path: &Path) -> String {
        let (path, options) = (path.display(), &run.options);
        if self.is_of_set(run) {
            let (run, found) = (run.held_out, self.held_out);
            let wrong = format!("{path}: the run holds out {run} images, not {found}");
            return format!("{wrong}; to continue it, omit --held-out, or add --change");
        }
        if run.pictures.is_some() && self.pictures.is_some() && run.name == self.name {
            let (name, before, now) = (&self.name, run.content(), self.content());
            let wrong = format!("{path}: {name} have changed since: from {before}, to {now}");
            let remedy =
                "restore their files to continue the run, or add --change to train on these images";
            return format!("{wrong}; {remedy}");
        }
        let wrong = format!("{path}: the run is of {run}, not of {self}");
        format!("{wrong}; to continue it, {options}, or add --change to train on these images")
    }

    /// Formats the number of images and the beginning of their checksum.
    fn content(&self) -> String {
        let Self { images, checksum, .. } = self;
        match checksum.len() {
            ..=8 => format!("{images} images, crc32 {checksum}"),
            _ => format!("{images} images, sha256 {checksum:.16}..."),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.name, self.content())?;
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
