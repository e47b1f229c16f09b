//! A cache of scaled pictures on disk.
//!
//! The name of a file is the SHA-256 hash of the recipe and of the content of the picture, and the limit of pixels under
//! which it was decoded. A file holds a magic number, the CRC-32 of the remaining bytes, the width, the height, and the
//! pixels. All numbers are little-endian. The checksum detects damage, but no forgery: a program that can write to the
//! directory can change the images.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::SystemTime;

use flate2::Crc;
use sha2::{Digest, Sha256};

use super::recipe::{Recipe, Scaled};
use crate::data::parallel::lock;
use crate::error::{Error, Result};
use crate::files;

/// The first bytes of a file. They change with the format.
const MAGIC: &[u8; 8] = b"ddpm-px1";

/// Magic number, checksum, width and height.
const HEADER: usize = 8 + 4 + 4 + 4;

const EXTENSION: &str = ".pixels";

/// The fraction of the limit down to which files are removed, so that not every new file removes another.
const KEPT: f64 = 0.9;

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
    /// The largest number of bytes of all files.
    limit: u64,
    /// The bytes of all files. Files that other processes write are not included before the next count.
    bytes: Mutex<u64>,
}

impl Cache {
    /// Opens the cache in this directory, and creates the directory if necessary.
    ///
    /// # Errors
    /// Returns an error if no file can be written there.
    pub fn open(directory: PathBuf, limit: u64) -> Result<Self> {
        files::check_writable(directory.join("check"))?;
        files::clear_leftovers(&directory, |name| name.ends_with(EXTENSION));
        let cache = Self { directory, limit, bytes: Mutex::new(0) };
        cache.prune(&mut lock(&cache.bytes));
        Ok(cache)
    }

    /// Returns the scaled picture of this key. Returns `None` if there is none, or if its file is damaged.
    pub fn get(&self, key: &Key, recipe: &Recipe) -> Option<Scaled> {
        let path = self.path(key, recipe);
        let limit = recipe.config.max_pixels * u64::from(recipe.channels) + HEADER as u64;
        let data = fs::metadata(&path).ok().filter(|data| data.is_file() && data.len() <= limit)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(data.len() as usize).ok()?;
        let mut file = File::open(&path).ok()?;
        file.by_ref().take(limit).read_to_end(&mut bytes).ok()?;
        // The time of modification orders files by their last use. If it cannot be set, the file is only removed
        // earlier.
        let _ = file.set_modified(SystemTime::now());
        let scaled = decoded(bytes)?;
        recipe.allows(&scaled).then_some(scaled)
    }

    /// Stores a scaled picture.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written, for example on a full disk.
    pub fn put(&self, key: &Key, recipe: &Recipe, scaled: &Scaled) -> Result<()> {
        let content = encoded(scaled);
        if content.len() as u64 > self.limit {
            return Ok(());
        }
        files::write_unflushed(&self.path(key, recipe), &content)?;
        let mut bytes = lock(&self.bytes);
        *bytes += content.len() as u64;
        if *bytes > self.limit {
            self.prune(&mut bytes);
        }
        Ok(())
    }

    /// Counts the bytes of all files. If they exceed the limit, removes the least recently used files. A file that
    /// cannot be removed, or that another process has removed, is not an error.
    fn prune(&self, bytes: &mut u64) {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let (path, Ok(metadata)) = (entry.path(), entry.metadata()) else { continue };
            let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            if name.ends_with(EXTENSION) && !name.starts_with('.') && metadata.is_file() {
                let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.push((used, metadata.len(), path));
            }
        }
        *bytes = found.iter().map(|(_, len, _)| len).sum();
        if *bytes <= self.limit {
            return;
        }
        found.sort();
        let kept = (self.limit as f64 * KEPT) as u64;
        for (_, len, path) in found {
            if *bytes <= kept {
                break;
            }
            if fs::remove_file(path).is_ok() {
                *bytes -= len;
            }
        }
    }

    /// The file of a scaled picture. Another version of the crate may scale otherwise, and has other files. A key does not
    /// depend on the limit of pixels, but a picture that is readable with one limit may be unreadable with another.
    fn path(&self, key: &Key, recipe: &Recipe) -> PathBuf {
        let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let (limit, version) = (recipe.config.max_pixels, env!("CARGO_PKG_VERSION"));
        self.directory.join(format!("{name}-{limit}-{version}{EXTENSION}"))
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::config::FolderConfig;
    use super::*;

    #[test]
    fn files_that_were_not_used_for_the_longest_time_are_removed_first() -> Result<()> {
        let temporary = tempfile::tempdir().map_err(Error::io("."))?;
        let config = FolderConfig { height: 10, width: 10, ..FolderConfig::default() };
        let recipe = Recipe { config, channels: 1 };
        let scaled = Scaled { width: 10, height: 10, pixels: vec![7; 100] };
        let cache = |limit| Cache::open(temporary.path().into(), limit);
        let keys: Vec<Key> = (0..8).map(|k| [k; 32]).collect();
        let held = |cache: &Cache| -> Vec<u8> {
            keys.iter().filter(|key| cache.path(key, &recipe).exists()).map(|key| key[0]).collect()
        };
        // A file has 120 bytes, so five fit, and four are kept.
        let small = cache(620)?;
        for (key, age) in keys[..5].iter().zip(1..) {
            small.put(key, &recipe, &scaled)?;
            let time = SystemTime::now() - Duration::from_secs(1000 - 100 * age);
            let path = small.path(key, &recipe);
            let file = File::options().write(true).open(path).map_err(Error::io("."))?;
            file.set_modified(time).map_err(Error::io("."))?;
        }
        fs::write(temporary.path().join("notes"), vec![0; 1000]).map_err(Error::io("."))?;
        assert_eq!(held(&small), [0, 1, 2, 3, 4]);
        // The oldest becomes the newest.
        assert_eq!(small.get(&keys[0], &recipe).map(|found| found.pixels), Some(vec![7; 100]));
        small.put(&keys[5], &recipe, &scaled)?;
        assert_eq!(held(&small), [0, 3, 4, 5]);
        small.put(&keys[6], &recipe, &scaled)?;
        assert_eq!(held(&small), [0, 3, 4, 5, 6]);
        // A smaller limit takes effect when the cache is opened. A file over the limit is not kept, and removes no
        // other file.
        let smaller = cache(130)?;
        assert_eq!(held(&smaller).len(), 0);
        smaller.put(&keys[7], &recipe, &scaled)?;
        let large = Scaled { width: 10, height: 20, pixels: vec![7; 200] };
        smaller.put(&keys[6], &recipe, &large)?;
        assert_eq!(held(&smaller), [7]);
        assert!(temporary.path().join("notes").exists());
        Ok(())
    }
}
