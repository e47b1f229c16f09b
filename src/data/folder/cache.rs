//! A cache of scaled pictures on disk.
//!
//! The name of a file is the SHA-256 hash of the recipe and of the content of the picture. A file holds a magic number,
//! the CRC-32 of the remaining bytes, the width, the height, and the pixels. All numbers are little-endian. The
//! checksum detects damage, but no forgery: a program that can write to the directory can change the images.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;

use flate2::Crc;
use sha2::{Digest, Sha256};

use super::recipe::{Recipe, Scaled};
use crate::error::{Error, Result};
use crate::files;

/// The first bytes of a file. They change with the format.
const MAGIC: &[u8; 8] = b"ddpm-px1";

/// Magic number, checksum, width and height.
const HEADER: usize = 8 + 4 + 4 + 4;

const EXTENSION: &str = ".pixels";

/// The hash of a recipe and the content of a picture.
pub(super) type Key = [u8; 32];

pub(super) fn key(recipe: &Recipe, content: &[u8]) -> Key {
    let identity = recipe.identity();
    let hash = Sha256::new().chain_update((identity.len() as u64).to_le_bytes());
    hash.chain_update(identity).chain_update(content).finalize().into()
}

#[derive(Debug)]
pub(super) struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// Opens the cache in this directory, and creates the directory if necessary.
    ///
    /// # Errors
    /// Returns an error if no file can be written there.
    pub fn open(directory: PathBuf) -> Result<Self> {
        files::check_writable(directory.join("check"))?;
        files::clear_leftovers(&directory, |name| name.ends_with(EXTENSION));
        Ok(Self { directory })
    }

    /// Returns the scaled picture of this key. Returns `None` if there is none, or if its file is damaged.
    pub fn get(&self, key: &Key, recipe: &Recipe) -> Option<Scaled> {
        let path = self.path(key);
        let limit = recipe.config.max_pixels * u64::from(recipe.channels) + HEADER as u64;
        let data = fs::metadata(&path).ok().filter(|data| data.is_file() && data.len() <= limit)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(data.len() as usize).ok()?;
        File::open(&path).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
        let scaled = decoded(bytes)?;
        recipe.allows(&scaled).then_some(scaled)
    }

    /// Stores a scaled picture.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written, for example on a full disk.
    pub fn put(&self, key: &Key, scaled: &Scaled) -> Result<()> {
        files::write_unflushed(&self.path(key), &encoded(scaled))
    }

    /// Another version of the crate may scale otherwise, and has other files.
    fn path(&self, key: &Key) -> PathBuf {
        let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        self.directory.join(format!("{name}-{}{EXTENSION}", env!("CARGO_PKG_VERSION")))
    }
}

fn encoded(scaled: &Scaled) -> Vec<u8> {
    let sizes = [scaled.width.to_le_bytes(), scaled.height.to_le_bytes()];
    let rest = [sizes.as_flattened(), &scaled.pixels].concat();
    [&MAGIC[..], &checksum(&rest).to_le_bytes(), &rest].concat()
}

fn decoded(mut bytes: Vec<u8>) -> Option<Scaled> {
    let (header, _) = bytes.split_at_checked(HEADER)?;
    let (magic, numbers) = header.split_first_chunk()?;
    let [checked, width, height] = *numbers.as_chunks().0 else { return None };
    if magic != MAGIC || u32::from_le_bytes(checked) != checksum(&bytes[12..]) {
        return None;
    }
    bytes.drain(..HEADER);
    let (width, height) = (u32::from_le_bytes(width), u32::from_le_bytes(height));
    Some(Scaled { width, height, pixels: bytes })
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// The error of a picture whose content is not that of its key.
pub(super) fn changed(path: PathBuf) -> Error {
    Error::data(path, "changed since the folder was opened; open the folder again")
}
