use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// How often a lock file that vanished while it was being locked is tried again.
const ATTEMPTS: usize = 16;

/// An advisory lock for those who save at one place: a lock on a file that holds the number of the
/// process. The system releases it when the process ends, however it ends; the file may stay then.
///
/// A file system without locks gives none: saving goes on without one there.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// Takes the lock by the file `path`, for those who save at `dir`.
    ///
    /// # Errors
    /// Returns [`Error::Locked`] if somebody has it, or an error if the file cannot be made.
    pub fn take(path: PathBuf, dir: &Path) -> Result<Self> {
        for _ in 1..ATTEMPTS {
            let lock = Self::try_take(path.clone(), dir)?;
            // Whoever had it may have removed the file between our opening and our locking it.
            if !lock.is_lost() {
                return Ok(lock);
            }
        }
        Self::try_take(path, dir)
    }

    fn try_take(path: PathBuf, dir: &Path) -> Result<Self> {
        let open = |write| {
            OpenOptions::new().read(true).write(write).create(write).truncate(false).open(&path)
        };
        let mut file = match open(true) {
            // Another owner's, left by a process that was killed: to lock it, reading is enough.
            Err(e) if e.kind() == ErrorKind::PermissionDenied => open(false),
            opened => opened,
        }
        .map_err(Error::io(&path))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            let mut text = String::new();
            // Where locked files cannot be read, the number stays unknown.
            let _ = (&mut file).take(20).read_to_string(&mut text);
            let holder = match text.trim().parse::<u32>() {
                Ok(id) if id == std::process::id() => "this process".into(),
                Ok(id) => format!("process {id}"),
                Err(_) => "another process".into(),
            };
            return Err(Error::Locked { path: dir.into(), holder });
        }
        // Only for the message above: without it the lock is as good.
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        Ok(Self { path, file })
    }

    /// Whether the path no longer leads to the locked file, so that others can take the lock.
    #[cfg(unix)]
    pub fn is_lost(&self) -> bool {
        use std::os::unix::fs::MetadataExt;

        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let ours = self.file.metadata().map(id);
        !matches!((ours, fs::metadata(&self.path).map(id)), (Ok(a), Ok(b)) if a == b)
    }

    /// As on Unix, as far as the path alone tells.
    #[cfg(not(unix))]
    pub fn is_lost(&self) -> bool {
        !self.path.exists()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Elsewhere an open file cannot be removed, or another's could be.
        if cfg!(unix) && !self.is_lost() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
