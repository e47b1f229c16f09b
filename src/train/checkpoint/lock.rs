use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Number of attempts if the lock file disappears while it is being locked.
const ATTEMPTS: usize = 16;

/// An advisory lock on saving at one place: a lock on a file that holds the process id. The system releases the
/// lock when the process ends, for any reason. The file may remain.
///
/// On a file system without locks, saving works without a lock.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// Locks the file `path`, for saving at `dir`.
    ///
    /// # Errors
    /// Returns [`Error::Locked`] if the lock is held already, or an error if the file cannot be created.
    pub fn take(path: PathBuf, dir: &Path) -> Result<Self> {
        for _ in 1..ATTEMPTS {
            let lock = Self::try_take(path.clone(), dir)?;
            // The previous holder may have removed the file after it was opened here and before it was locked.
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
            // The file belongs to another user, whose process was killed. Opening it to read is enough to lock it.
            Err(denied) if denied.kind() == ErrorKind::PermissionDenied => {
                open(false).map_err(|_| denied)
            }
            opened => opened,
        }
        .map_err(Error::io(&path))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            let mut text = String::new();
            // On systems where locked files cannot be read, the process id stays unknown.
            let _ = (&mut file).take(20).read_to_string(&mut text);
            let holder = match text.trim().parse::<u32>() {
                Ok(id) if id == std::process::id() => "this process".into(),
                Ok(id) => format!("process {id}"),
                Err(_) => "another process".into(),
            };
            return Err(Error::Locked { path: dir.into(), holder });
        }
        // The id is only for the message above. The lock is valid without it.
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        Ok(Self { path, file })
    }

    /// Returns whether the path no longer leads to the locked file. Another process could then take the lock.
    #[cfg(unix)]
    pub fn is_lost(&self) -> bool {
        use std::os::unix::fs::MetadataExt;

        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let ours = self.file.metadata().map(id);
        !matches!((ours, fs::metadata(&self.path).map(id)), (Ok(a), Ok(b)) if a == b)
    }

    /// Returns whether the path no longer exists. Other cases are detected only on Unix.
    #[cfg(not(unix))]
    pub fn is_lost(&self) -> bool {
        !self.path.exists()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // On other systems an open file cannot be removed, or the file could be that of another process.
        if cfg!(unix) && !self.is_lost() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
