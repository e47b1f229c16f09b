use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::lock::Lock;
use super::paths::{LOCK, absolute, check_place, dangling, parent, sibling};
use crate::error::{Error, Result};

/// The exclusive right to save at a directory, held until this value is dropped.
#[derive(Debug)]
pub(in crate::train) struct Claim {
    /// The absolute path of the directory.
    pub(super) dir: PathBuf,
    /// `None` only within [`hold`](Self::hold).
    lock: Mutex<Option<Lock>>,
}

impl Claim {
    /// Takes the right to save at `dir`.
    ///
    /// # Errors
    /// Returns an error if another trainer holds it, or if the parent directory cannot be created.
    pub fn take(dir: &Path) -> Result<Self> {
        let dir = absolute(dir)?;
        check_place(&dir)?;
        let lock = Self::lock(&dir)?;
        Ok(Self { dir, lock: Mutex::new(Some(lock)) })
    }

    fn lock(dir: &Path) -> Result<Lock> {
        let parent = parent(dir);
        fs::create_dir_all(parent).map_err(|error| match dangling(parent) {
            Some(error) => error,
            None => Error::io(parent)(error),
        })?;
        Lock::take(sibling(dir, LOCK), dir)
    }

    /// Returns whether this is the right to save at `dir`. Different paths to one directory are recognised.
    pub fn is_for(&self, dir: &Path) -> bool {
        let real = |dir: &Path| {
            let dir = absolute(dir).ok()?;
            Some(parent(&dir).canonicalize().ok()?.join(dir.file_name()?))
        };
        absolute(dir).is_ok_and(|dir| dir == self.dir)
            || real(&self.dir).is_some_and(|ours| real(dir) == Some(ours))
    }

    /// Checks that the lock is still held, and takes it again if its file was removed. Returns a warning if
    /// the parent directory was removed in the meantime.
    ///
    /// # Errors
    /// Returns an error if another trainer took the lock after its file was removed.
    pub(super) fn hold(&self) -> Result<Option<Error>> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.as_ref().is_some_and(|lock| !lock.is_lost()) {
            return Ok(None);
        }
        let parent = parent(&self.dir);
        let vanished = (!parent.exists()).then(|| Error::Vanished { path: parent.to_owned() });
        *lock = None;
        *lock = Some(Self::lock(&self.dir)?);
        Ok(vanished)
    }
}
