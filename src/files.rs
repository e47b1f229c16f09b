//! Atomic writing of files: a file is written beside its final path, flushed to disk and renamed, so it is never
//! incomplete.
//!
//! ```
//! # let temp = tempfile::tempdir().unwrap();
//! # let path = temp.path().join("loss.txt");
//! ddpm::files::write(&path, b"0.0432")?;
//! let aside = ddpm::files::put_aside(&path)?; // loss-old.txt
//! assert!(aside.ends_with("loss-old.txt") && !path.exists());
//! # Ok::<(), ddpm::Error>(())
//! ```

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Writes a file to a temporary path beside `path`, flushes it to disk, and renames it.
///
/// # Errors
/// Returns an error if one of these steps fails, for example on a full disk. An earlier file at `path` is kept then.
pub fn write(path: impl AsRef<Path>, content: &[u8]) -> Result<()> {
    replace(path.as_ref(), content, File::sync_all)
}

/// Writes a file as [`write()`] does, without flushing it to disk: after a power failure the file can be damaged.
///
/// # Errors
/// Returns the errors of [`write()`].
#[cfg(feature = "image")]
pub(crate) fn write_unflushed(path: &Path, content: &[u8]) -> Result<()> {
    replace(path, content, |_| Ok(()))
}

fn replace(path: &Path, content: &[u8], flush: fn(&File) -> io::Result<()>) -> Result<()> {
    let partial = partial(path);
    let written = create(&partial)
        .and_then(|mut file| file.write_all(content).and_then(|()| flush(&file)).map(|()| file))
        .and_then(|_locked| fs::rename(&partial, path));
    written.map_err(|error| {
        // The error to report is the one above.
        let _ = fs::remove_file(&partial);
        Error::io(path)(error)
    })
}

/// Creates a file or directory by `make`, which receives a temporary path beside `path`, and renames it.
///
/// # Errors
/// Returns the errors of `make`, and an error if it cannot be renamed, for example onto a directory that is not empty.
/// Nothing is left at the temporary path then.
pub(crate) fn make(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = partial(path);
    let made = make(&partial).and_then(|()| fs::rename(&partial, path).map_err(Error::io(path)));
    made.inspect_err(|_| {
        // The error to report is the one above.
        let _ = match partial.is_dir() {
            true => fs::remove_dir_all(&partial),
            false => fs::remove_file(&partial),
        };
    })
}

/// Renames a file or directory to a name with `-old`, and with a number if that name is taken. Returns the new path.
///
/// # Errors
/// Returns an error if it cannot be renamed.
pub fn put_aside(path: impl AsRef<Path>) -> Result<PathBuf> {
    let path = path.as_ref();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map(|e| format!(".{}", e.to_string_lossy()));
    let extension = extension.unwrap_or_default();
    let mut aside = path.with_file_name(format!("{stem}-old{extension}"));
    for n in 2.. {
        if !aside.exists() {
            break;
        }
        aside.set_file_name(format!("{stem}-old-{n}{extension}"));
    }
    fs::rename(path, &aside).map_err(Error::io(path))?;
    Ok(aside)
}

/// Removes the temporary files that killed processes left in `dir` when they [wrote](write()) files whose names satisfy
/// `is_target`. Failures are ignored, because these files do no harm.
pub fn clear_leftovers(dir: impl AsRef<Path>, is_target: impl Fn(&str) -> bool) {
    let dir = dir.as_ref();
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_leftover = name.to_str().and_then(target).is_some_and(&is_target);
        if is_leftover && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let path = entry.path();
            // A process that is still writing the file holds its lock.
            if File::open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Tries to create and remove the temporary file with which [`write()`] begins, so that a program can report a path
/// that cannot be written before it works for hours. Creates the directory of `path` if necessary.
///
/// # Errors
/// Returns an error if the temporary file cannot be created.
pub fn check_writable(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    let partial = partial(path);
    create(&partial).and_then(|_| fs::remove_file(&partial)).map_err(Error::io(path))
}

/// Computes the SHA-256 of everything that `content` yields, such as a `File`, in hexadecimal digits.
///
/// # Errors
/// Returns the errors of reading.
pub fn sha256(mut content: impl Read) -> io::Result<String> {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => hash.update(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Returns `None` if a file does not exist.
pub(crate) fn existing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// Creates a file that is locked as long as it is open, if the system supports locks.
fn create(partial: &Path) -> io::Result<File> {
    let file = File::create(partial)?;
    let _ = file.try_lock();
    Ok(file)
}

/// Returns a new temporary path beside `path`: `.NAME.PROCESS-NUMBER`. Two threads that write the same file get
/// different paths.
fn partial(path: &Path) -> PathBuf {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let nth = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}-{nth}", process::id()))
}

/// Returns the name of the file for which a [`partial`] path was created. The number may be missing.
fn target(partial: &str) -> Option<&str> {
    let (target, process) = partial.strip_prefix('.')?.rsplit_once('.')?;
    let numbers = |text: &str| text.parse::<u64>().is_ok();
    process.split('-').all(numbers).then_some(target)
}
