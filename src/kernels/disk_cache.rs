//! A cache of compiled kernels on disk, in a directory of the user. Only the first program that uses a
//! kernel waits for its compilation.
//!
//! The name of a file is a hash of its key, which is the compiler's input. The file also contains the key,
//! so that another key with the same hash is not mistaken for it. A checksum detects damage. Files are
//! written under another name and then renamed, so that a reader sees a complete file or none. Because the
//! content runs on the device, Unix systems check ownership: the directory and the files must belong to the
//! user of the process, and nobody else may write to them. No failure here is an error: the caller compiles
//! instead.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use flate2::Crc;

use crate::random::fnv1a;

/// Maximum total size of all files in bytes: about twenty times the size for one device and precision.
pub(crate) const LIMIT: u64 = 64 << 20;

/// The first bytes of a file. They change with the format.
const MAGIC: &[u8; 8] = b"ddpm-cu1";

/// Magic number, CRC-32 of the remaining bytes, and the lengths of key and image. Key and image follow.
const HEADER: usize = 8 + 4 + 8 + 8;

const EXTENSION: &str = "kernels";
const UNFINISHED: &str = "unfinished";

/// Age after which an unrenamed file is assumed to belong to a killed process.
const ABANDONED: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
    owner: Owner,
    limit: u64,
}

impl Cache {
    /// Opens the cache in this directory, and creates the directory if necessary. Returns `None` if others
    /// may write there.
    pub fn open(directory: PathBuf, limit: u64) -> Option<Self> {
        let owner = Owner::of_directory(&directory).ok()??;
        Some(Self { directory, owner, limit })
    }

    /// Returns the image that was stored under this key.
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        let path = self.path(key);
        let there = fs::symlink_metadata(&path).ok()?;
        if !there.is_file() || !self.owner.alone_may_write(&there) || there.len() > self.limit {
            return None;
        }
        let file = File::open(&path).ok()?;
        // Detects a link that replaced the file between the two calls.
        if !is_the_same(&there, &file.metadata().ok()?) {
            return None;
        }
        let mut bytes = Vec::with_capacity(there.len() as usize);
        (&file).take(self.limit + 1).read_to_end(&mut bytes).ok()?;
        let image = decoded(&bytes, key)?.to_vec();
        // Files are removed in the order of these times. If setting one fails, the time of writing counts.
        let _ = file.set_modified(SystemTime::now());
        Some(image)
    }

    /// Stores `image` under this key, if possible.
    pub fn put(&self, key: &str, image: &[u8]) {
        let bytes = encoded(key, image);
        if bytes.len() as u64 > self.limit {
            return;
        }
        let path = self.path(key);
        let unfinished = unfinished(&self.directory);
        if let Ok(mut file) = create(&unfinished) {
            let written = file.write_all(&bytes).and_then(|()| fs::rename(&unfinished, &path));
            if written.is_err() {
                let _ = fs::remove_file(&unfinished);
            }
        }
        self.prune();
    }

    fn path(&self, key: &str) -> PathBuf {
        self.directory.join(format!("{:016x}.{EXTENSION}", fnv1a(key.as_bytes())))
    }

    /// Removes the least recently used files until the rest is within the limit.
    fn prune(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        let mut files = Vec::new();
        for entry in entries.flatten() {
            let (path, Ok(metadata)) = (entry.path(), entry.metadata()) else { continue };
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            match path.extension().and_then(OsStr::to_str) {
                Some(EXTENSION) if metadata.is_file() => files.push((used, metadata.len(), path)),
                Some(UNFINISHED) if used.elapsed().is_ok_and(|age| age > ABANDONED) => {
                    let _ = fs::remove_file(path);
                }
                _ => {}
            }
        }
        files.sort();
        let mut sum: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if sum <= self.limit {
                break;
            }
            if fs::remove_file(path).is_ok() {
                sum -= len;
            }
        }
    }
}

/// Returns the directory for compiled kernels that the environment variables select.
pub(crate) fn directory(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(directory) = variable("DDPM_CUDA_CACHE") {
        let off = directory.is_empty() || directory == "0";
        return (!off).then(|| directory.into());
    }
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = if cfg!(windows) {
        absolute("LOCALAPPDATA")
    } else {
        absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))
    };
    Some(caches?.join("ddpm").join("cuda"))
}

/// Returns the path of a temporary file that only this process writes. The number of a process is not enough:
/// containers that share a directory have the same ones.
fn unfinished(directory: &Path) -> PathBuf {
    let random = RandomState::new().build_hasher().finish();
    directory.join(format!("{}-{random:016x}.{UNFINISHED}", std::process::id()))
}

/// Creates a file that must not exist yet.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// The user to whom files must belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg(unix)]
struct Owner(u32);

#[cfg(unix)]
impl Owner {
    /// Returns the user of the process, if the directory belongs to this user and nobody else may write
    /// there.
    fn of_directory(directory: &Path) -> io::Result<Option<Self>> {
        use std::os::unix::fs::{DirBuilderExt, MetadataExt};

        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let there = fs::symlink_metadata(directory)?;
        if !there.is_dir() || !Self(there.uid()).alone_may_write(&there) {
            return Ok(None);
        }
        // New files belong to the effective user, whose id std does not offer otherwise.
        let probe = unfinished(directory);
        let made = create(&probe)?.metadata();
        fs::remove_file(&probe)?;
        let own = Self(made?.uid());
        Ok((own == Self(there.uid())).then_some(own))
    }

    fn alone_may_write(self, there: &Metadata) -> bool {
        use std::os::unix::fs::MetadataExt;

        there.uid() == self.0 && there.mode() & 0o022 == 0
    }
}

#[cfg(unix)]
fn is_the_same(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;

    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// On other systems, directories of users are not writable by others.
#[derive(Debug, Clone, Copy)]
#[cfg(not(unix))]
struct Owner;

#[cfg(not(unix))]
impl Owner {
    fn of_directory(directory: &Path) -> io::Result<Option<Self>> {
        DirBuilder::new().recursive(true).create(directory)?;
        Ok(fs::symlink_metadata(directory)?.is_dir().then_some(Self))
    }

    fn alone_may_write(self, _: &Metadata) -> bool {
        true
    }
}

#[cfg(not(unix))]
fn is_the_same(a: &Metadata, b: &Metadata) -> bool {
    a.len() == b.len()
}

fn encoded(key: &str, image: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + key.len() + image.len());
    bytes.extend(MAGIC);
    bytes.extend([0; 4]);
    for part in [key.as_bytes(), image] {
        bytes.extend((part.len() as u64).to_le_bytes());
    }
    bytes.extend(key.as_bytes());
    bytes.extend(image);
    let sum = checksum(&bytes[12..]);
    bytes[8..12].copy_from_slice(&sum);
    bytes
}

/// Returns the image if the bytes are a complete file of this key.
fn decoded<'a>(bytes: &'a [u8], key: &str) -> Option<&'a [u8]> {
    let bytes = bytes.strip_prefix(MAGIC)?;
    let (sum, summed) = bytes.split_at_checked(4)?;
    if sum != checksum(summed) {
        return None;
    }
    let (lengths, parts) = summed.split_at_checked(16)?;
    let image = parts.strip_prefix(key.as_bytes())?;
    let expected = [key.len() as u64, image.len() as u64].map(u64::to_le_bytes);
    (lengths == expected.as_flattened()).then_some(image)
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const KEY: &str = "--gpu-architecture=sm_90\nextern \"C\" __global__ void cast() {}";

    fn image(seed: u8, len: usize) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect()
    }

    fn open(directory: &Path) -> Cache {
        Cache::open(directory.to_owned(), 1 << 20).expect("a cache")
    }

    /// The files of a cache, by name.
    fn files(directory: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    /// Creates a cache with one image, and returns its file.
    fn filled() -> (tempfile::TempDir, Cache, PathBuf) {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("a/b");
        let cache = open(&directory);
        cache.put(KEY, &image(1, 1000));
        let [file] = files(&directory).try_into().expect("one file");
        (temporary, cache, file)
    }

    #[test]
    fn what_was_put_is_found_by_its_key_alone() {
        let (temporary, cache, _) = filled();
        assert_eq!(cache.get(KEY), Some(image(1, 1000)));
        assert_eq!(open(&temporary.path().join("a/b")).get(KEY), Some(image(1, 1000)));
        // A different source, and different options.
        for other in [KEY.replace("cast", "cost"), KEY.replace("90", "80"), String::new()] {
            assert_eq!(cache.get(&other), None);
        }
        cache.put(KEY, &image(2, 10));
        assert_eq!(cache.get(KEY), Some(image(2, 10)));
    }

    #[test]
    fn another_key_of_the_same_hash_is_not_mistaken() {
        let (_temporary, cache, file) = filled();
        fs::copy(file, cache.path("another")).unwrap();
        assert_eq!(cache.get("another"), None);
        // A key with the same beginning.
        let longer = format!("{KEY}\u{1}");
        fs::write(cache.path(&longer), encoded(KEY, b"\x01image")).unwrap();
        assert_eq!(cache.get(&longer), None);
    }

    #[test]
    fn truncated_files_are_noticed() {
        let (_temporary, cache, file) = filled();
        let whole = fs::read(&file).unwrap();
        for len in (0..whole.len()).step_by(7) {
            fs::write(&file, &whole[..len]).unwrap();
            assert_eq!(cache.get(KEY), None, "{len} of {} bytes", whole.len());
        }
        fs::write(&file, [&whole[..], &[0]].concat()).unwrap();
        assert_eq!(cache.get(KEY), None, "one byte more");
        cache.put(KEY, &image(1, 1000));
        assert_eq!(fs::read(&file).unwrap(), whole);
    }

    #[test]
    fn flipped_bits_are_noticed() {
        let (_temporary, cache, file) = filled();
        let whole = fs::read(&file).unwrap();
        for i in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[i] ^= 1 << (i % 8);
            fs::write(&file, flipped).unwrap();
            assert_eq!(cache.get(KEY), None, "byte {i}");
        }
        fs::write(&file, whole).unwrap();
        assert!(cache.get(KEY).is_some());
    }

    #[test]
    fn what_was_not_used_for_the_longest_time_goes_first() {
        let temporary = tempfile::tempdir().unwrap();
        let size = encoded("0", &image(0, 1000)).len() as u64;
        let cache = Cache::open(temporary.path().join("cache"), 3 * size + 5).unwrap();
        let now = SystemTime::now();
        for (age, key) in [(300, "0"), (200, "1"), (100, "2")] {
            cache.put(key, &image(0, 1000));
            let file = OpenOptions::new().write(true).open(cache.path(key)).unwrap();
            file.set_modified(now - Duration::from_secs(age)).unwrap();
        }
        // The oldest becomes the newest.
        assert!(cache.get("0").is_some());
        cache.put("3", &image(0, 1000));
        let found = ["0", "1", "2", "3"].map(|key| cache.get(key).is_some());
        assert_eq!(found, [true, false, true, true]);
        // An image larger than the limit is not stored, and removes nothing.
        cache.put("4", &image(0, 4000));
        assert_eq!(cache.get("4"), None);
        assert_eq!(files(&cache.directory).len(), 3);
    }

    #[test]
    fn what_killed_processes_left_is_removed() {
        let (_temporary, cache, _) = filled();
        let [old, new] = [0, 1].map(|_| unfinished(&cache.directory));
        create(&old).unwrap().set_modified(SystemTime::now() - 2 * ABANDONED).unwrap();
        create(&new).unwrap();
        cache.put(KEY, &image(1, 1000));
        assert!(!old.exists() && new.exists());
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_none() {
        let temporary = tempfile::tempdir().unwrap();
        let file = temporary.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Cache::open(file.join("cache"), LIMIT).is_none());
        assert!(Cache::open(file, LIMIT).is_none());
        // A cache that disappears in the meantime is not an error either.
        let (temporary, cache, _) = filled();
        drop(temporary);
        cache.put(KEY, b"image");
        assert_eq!(cache.get(KEY), None);
    }

    #[cfg(unix)]
    mod unix {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

        use super::*;

        fn set_mode(path: &Path, mode: u32) {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }

        #[test]
        fn files_are_the_owners_alone() {
            let (_temporary, cache, file) = filled();
            assert_eq!(fs::metadata(&cache.directory).unwrap().mode() & 0o777, 0o700);
            assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600);
        }

        #[test]
        fn what_others_can_write_is_not_used() {
            let (_temporary, cache, file) = filled();
            for mode in [0o620, 0o602, 0o666] {
                set_mode(&file, mode);
                assert_eq!(cache.get(KEY), None, "{mode:o}");
            }
            // Files that others can only read are used.
            set_mode(&file, 0o644);
            assert!(cache.get(KEY).is_some());
            for mode in [0o720, 0o702, 0o777, 0o1777] {
                set_mode(&cache.directory, mode);
                assert!(Cache::open(cache.directory.clone(), LIMIT).is_none(), "{mode:o}");
            }
            set_mode(&cache.directory, 0o755);
            assert!(Cache::open(cache.directory.clone(), LIMIT).is_some());
        }

        #[test]
        fn what_belongs_to_others_is_not_used() {
            let (_temporary, cache, file) = filled();
            // Only root can change the owner of a file.
            if chown(&file, Some(12345), None).is_err() {
                return;
            }
            assert_eq!(cache.get(KEY), None);
            // The file is replaced instead of overwritten.
            cache.put(KEY, b"image");
            assert_eq!(cache.get(KEY).as_deref(), Some(&b"image"[..]));
            chown(&cache.directory, Some(12345), None).unwrap();
            assert!(Cache::open(cache.directory.clone(), LIMIT).is_none());
        }

        #[test]
        fn links_are_not_followed() {
            let (temporary, cache, file) = filled();
            let elsewhere = temporary.path().join("elsewhere");
            fs::rename(&file, &elsewhere).unwrap();
            symlink(&elsewhere, &file).unwrap();
            assert_eq!(cache.get(KEY), None);
            let before = fs::read(&elsewhere).unwrap();
            cache.put(KEY, b"image");
            assert_eq!(fs::read(&elsewhere).unwrap(), before);
            assert!(fs::symlink_metadata(&file).unwrap().is_file());
            let link = temporary.path().join("link");
            symlink(&cache.directory, &link).unwrap();
            assert!(Cache::open(link, LIMIT).is_none());
        }
    }

    #[test]
    fn directories_are_the_users() {
        let of = |variables: &[(&str, &str)]| {
            directory(|name| {
                let found = variables.iter().find(|(own, _)| *own == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        let (home, caches) = (("HOME", "/me"), ("XDG_CACHE_HOME", "/caches"));
        let at = |path: &str| Some(PathBuf::from(path));
        if cfg!(unix) {
            assert_eq!(of(&[home]), at("/me/.cache/ddpm/cuda"));
            assert_eq!(of(&[home, caches]), at("/caches/ddpm/cuda"));
            assert_eq!(of(&[home, ("XDG_CACHE_HOME", "")]), at("/me/.cache/ddpm/cuda"));
            assert_eq!(of(&[home, ("XDG_CACHE_HOME", "here")]), at("/me/.cache/ddpm/cuda"));
        }
        assert_eq!(of(&[home, caches, ("DDPM_CUDA_CACHE", "there")]), at("there"));
        for off in ["", "0"] {
            assert_eq!(of(&[home, caches, ("DDPM_CUDA_CACHE", off)]), None);
        }
        assert_eq!(of(&[]), None);
    }

    /// The directory for the child processes of [`two_processes_share_a_cache`].
    const CHILD: &str = "DDPM_TEST_CACHE_CHILD";

    #[test]
    fn two_processes_share_a_cache() {
        let keys = ["first", "second", "third"];
        let expected = |key: &str| image(key.len() as u8, 100_000);
        let use_it = |cache: &Cache| {
            for round in 0..200 {
                let key = keys[round % keys.len()];
                if let Some(found) = cache.get(key) {
                    assert!(found == expected(key), "{key} in round {round}");
                }
                cache.put(key, &expected(key));
            }
        };
        if let Some(directory) = std::env::var_os(CHILD) {
            return use_it(&open(Path::new(&directory)));
        }
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("cache");
        let module = module_path!().split_once("::").expect("a module of a crate").1;
        let name = format!("{module}::two_processes_share_a_cache");
        let mut children: Vec<_> = (0..2)
            .map(|_| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", &name])
                    .env(CHILD, &directory)
                    .spawn()
                    .unwrap()
            })
            .collect();
        let cache = open(&directory);
        use_it(&cache);
        for child in &mut children {
            assert!(child.wait().unwrap().success());
        }
        for key in keys {
            assert!(cache.get(key) == Some(expected(key)), "{key}");
        }
        assert_eq!(files(&directory).len(), keys.len());
    }
}
