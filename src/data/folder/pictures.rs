use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::cache::{self, Cache, Key};
use super::config::FolderConfig;
use super::decode;
use super::recipe::{Recipe, Scaled};
use crate::data::dataset::{Dataset, ImageShape};
use crate::error::{Error, Result};

/// The pictures of a folder as a data set.
///
/// The page of the [module](super) describes which files are pictures, and how pixels are computed. With
/// [`Crop::Random`](super::Crop::Random), the crops of a training run are determined by its seed, the update and the
/// position of the image in its batch.
pub struct Folder {
    pub(super) root: PathBuf,
    pub(super) recipe: Recipe,
    pub(super) pictures: Vec<Picture>,
    pub(super) class_names: Vec<String>,
    pub(super) unreadable: Vec<UnreadableFile>,
    pub(super) ignored: usize,
    pub(super) cache: Option<Cache>,
    /// Number of threads that decode.
    pub(super) threads: usize,
}

/// A picture of a folder.
#[derive(Debug)]
pub(super) struct Picture {
    /// The path relative to the folder.
    pub path: PathBuf,
    pub class: Option<u32>,
    /// The hash of its content.
    pub key: Key,
    /// The scaled picture, if it is kept in memory.
    pub scaled: Option<Scaled>,
}

/// A picture, link or folder that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnreadableFile {
    /// The path relative to the folder.
    pub path: PathBuf,
    /// The reason, in one line.
    pub reason: String,
}

impl Folder {
    /// The configuration.
    pub fn config(&self) -> &FolderConfig {
        &self.recipe.config
    }

    /// The path of the folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The SHA-256 hash of the names, the contents and the settings of all pictures, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for Picture { path, key, .. } in &self.pictures {
            hash.update(path.as_os_str().as_encoded_bytes());
            hash.update([0]);
            hash.update(key);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The path of picture `index`, relative to the folder. Returns `None` past the last picture.
    pub fn path(&self, index: usize) -> Option<&Path> {
        self.pictures.get(index).map(|picture| &*picture.path)
    }

    /// The names of the classes, in the order of their numbers: the sub-folders with at least one picture, readable or
    /// not. Empty if [`FolderConfig::classes`] is not set.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// The pictures, links and folders that cannot be read, in the order of their paths.
    pub fn unreadable(&self) -> &[UnreadableFile] {
        &self.unreadable
    }

    /// The number of files that are not pictures. Files whose names begin with a dot are not counted.
    pub fn ignored(&self) -> usize {
        self.ignored
    }

    /// The number of pictures that are kept in memory.
    pub fn in_memory(&self) -> usize {
        self.pictures.iter().filter(|picture| picture.scaled.is_some()).count()
    }

    /// Returns a scaled picture from memory, from the cache, or from its file.
    fn scaled<'a>(&self, picture: &'a Picture) -> Result<Cow<'a, Scaled>> {
        if let Some(scaled) = &picture.scaled {
            return Ok(Cow::Borrowed(scaled));
        }
        if let Some(scaled) = self.cache.as_ref().and_then(|c| c.get(&picture.key, &self.recipe)) {
            return Ok(Cow::Owned(scaled));
        }
        let path = self.root.join(&picture.path);
        let data = |reason| Error::data(&path, reason);
        let content = decode::content(&path, self.recipe.config.max_pixels).map_err(data)?;
        if cache::key(&self.recipe, &content) != picture.key {
            return Err(cache::changed(path));
        }
        let scaled = self.recipe.scaled(&content).map_err(data)?;
        if let Some(cache) = &self.cache {
            // Without this file the picture is decoded again. This is no reason to end a run.
            let _ = cache.put(&picture.key, &self.recipe, &scaled);
        }
        Ok(Cow::Owned(scaled))
    }

    fn write(&self, index: usize, random: Option<u64>, pixels: &mut [u8]) -> Result<Option<u32>> {
        let picture = self.pictures.get(index).ok_or_else(|| {
            let expected = format!("less than {}, the number of pictures", self.pictures.len());
            Error::config("index", index, expected)
        })?;
        let expected = self.shape().values().unwrap_or(usize::MAX);
        if pixels.len() != expected {
            let expected = format!("{expected}, the values of an image");
            return Err(Error::config("pixels.len()", pixels.len(), expected));
        }
        let scaled = self.scaled(picture)?;
        let written = self.recipe.write(&scaled, random, pixels);
        written.map_err(|reason| Error::data(self.root.join(&picture.path), reason))?;
        Ok(picture.class)
    }
}

impl Dataset for Folder {
    fn len(&self) -> usize {
        self.pictures.len()
    }

    fn shape(&self) -> ImageShape {
        let FolderConfig { height, width, .. } = self.recipe.config;
        let channels = self.recipe.channels.into();
        ImageShape { channels, height: height as usize, width: width as usize }
    }

    fn classes(&self) -> usize {
        self.class_names.len()
    }

    /// Reads the part around the centre, also with [`Crop::Random`](super::Crop::Random).
    ///
    /// # Errors
    /// Returns an error if there is no image `index`, or if `pixels` does not have the length of an image. Also returns
    /// an error if a picture that is not in memory cannot be read or was changed since the folder was opened.
    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        self.write(index, None, pixels)
    }

    fn read_augmented(&self, index: usize, random: u64, pixels: &mut [u8]) -> Result<Option<u32>> {
        self.write(index, Some(random), pixels)
    }

    /// The threads of rayon's pool when the folder was opened, or 1 if all pictures are in memory.
    fn threads(&self) -> usize {
        self.threads
    }
}

// A derived `Debug` would print every pixel.
impl fmt::Debug for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Folder")
            .field("root", &self.root)
            .field("config", &self.recipe.config)
            .field("len", &self.pictures.len())
            .field("in_memory", &self.in_memory())
            .field("classes", &self.class_names)
            .field("unreadable", &self.unreadable)
            .finish_non_exhaustive()
    }
}
