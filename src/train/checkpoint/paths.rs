//! The paths beside a checkpoint: `checkpoint.saving`, `checkpoint.removing`, `checkpoint.lock`, `checkpoint-<step>`.

use std::fs;
use std::path::{Path, PathBuf};

use super::format::STATE;
use crate::error::{Error, Result};
use crate::train::state::KINDS;

/// Suffixes of the names beside a checkpoint: of the checkpoint being written, of those being removed, and of the
/// lock file.
pub(super) const SAVING: &str = ".saving";
pub(super) const REMOVING: &str = ".removing";
pub(super) const LOCK: &str = ".lock";

/// # Errors
/// Returns an error if a checkpoint cannot replace what is at `dir`.
pub(super) fn check_place(dir: &Path) -> Result<()> {
    let occupied = |found| Err(Error::Occupied { path: dir.to_owned(), found });
    // If this fails, the first use of the directory returns the error.
    let Ok(metadata) = dir.symlink_metadata() else { return Ok(()) };
    if let Some(error) = dangling(dir) {
        return Err(error);
    }
    let has_state = dir.join(STATE).exists();
    if metadata.is_symlink() {
        return match has_state {
            true => Ok(()),
            false => occupied(format!(
                "it is a link to {}, which holds no checkpoint; link the directory around it instead",
                target(dir)
            )),
        };
    }
    if !metadata.is_dir() {
        return occupied("it is a file".into());
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;

        if parent(dir).metadata().is_ok_and(|parent| parent.dev() != metadata.dev()) {
            let found = "it is a mount point, which cannot be renamed; use a directory within it";
            return occupied(found.into());
        }
    }
    match entries(dir).as_slice() {
        [] => Ok(()),
        _ if has_state => Ok(()),
        [name] => occupied(format!("it holds {name}, and no {STATE}")),
        [name, others @ ..] => {
            occupied(format!("it holds {name} and {} more, and no {STATE}", others.len()))
        }
    }
}

/// The error for the deepest link in `path` whose target does not exist, if there is one.
pub(super) fn dangling(path: &Path) -> Option<Error> {
    let link = path.ancestors().find(|path| path.is_symlink() && !path.exists())?;
    let found = format!("it is a link to {}, which does not exist", target(link));
    Some(Error::Occupied { path: link.to_owned(), found })
}

fn target(link: &Path) -> String {
    link.read_link().map_or_else(|_| "somewhere".into(), |target| target.display().to_string())
}

/// Describes the first thing at `new` that a save would not have written. Hidden files, which systems add to
/// directories, do not count.
pub(super) fn foreign(new: &Path) -> Option<String> {
    let metadata = new.symlink_metadata().ok()?;
    if !metadata.is_dir() {
        return Some("it is in the way of the files of a new checkpoint".into());
    }
    let ours = |name: &str| name == STATE || KINDS.iter().any(|kind| kind.owns(name));
    let others = |name: &String| !name.starts_with('.') && !ours(name);
    let name = entries(new).into_iter().find(others)?;
    Some(format!("it holds {name}, which is not a file of a checkpoint"))
}

/// The names in a directory, in order.
pub(super) fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Returns the paths that are named like checkpoints moved aside from `dir`, and their steps: `checkpoint-000000100`
/// beside `checkpoint`. Ignores other paths, such as a copy whose name contains a date.
pub(super) fn archive_names(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let parent = parent(dir);
    let prefix = format!("{}-", dir.file_name().unwrap_or_default().to_string_lossy());
    let mut found = Vec::new();
    for entry in fs::read_dir(parent).map_err(Error::io(parent))? {
        let path = entry.map_err(Error::io(parent))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(step) = name.strip_prefix(&prefix).and_then(|step| step.parse::<u64>().ok())
            && path == aside(dir, step)
        {
            found.push((step, path));
        }
    }
    found.sort(); // by step
    Ok(found)
}

/// The path to which the checkpoint of this step is moved when a newer one replaces it.
pub(super) fn aside(dir: &Path, step: u64) -> PathBuf {
    sibling(dir, &format!("-{step:09}"))
}

/// The path at which a new checkpoint is written before it replaces the one at `dir`.
pub(super) fn new_beside(dir: &Path) -> Result<PathBuf> {
    Ok(sibling(&absolute(dir)?, SAVING))
}

pub(super) fn absolute(dir: &Path) -> Result<PathBuf> {
    let given = dir;
    match std::path::absolute(dir) {
        Ok(dir) if dir.file_name().is_some() => Ok(dir),
        Err(e) if !given.as_os_str().is_empty() => Err(Error::io(given)(e)),
        _ => {
            let value = format!("{:?}", given.display().to_string());
            Err(Error::config("checkpoint directory", value, "a path that ends in a name"))
        }
    }
}

/// The parent of a checkpoint's directory, whose path must be absolute.
pub(super) fn parent(dir: &Path) -> &Path {
    dir.parent().unwrap_or(Path::new("/"))
}

pub(super) fn sibling(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    dir.with_file_name(name)
}
