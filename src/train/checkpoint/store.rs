//! Writes checkpoints so that a complete one can be opened at any moment: see [`save`].

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::claim::Claim;
use super::files::{sync_dir, write_synced, write_tensors};
use super::format::{Files, Identity, STATE, State, read_state, state_to_write};
use super::found::{Found, archived};
use super::paths::{
    REMOVING, SAVING, archive_names, aside, check_place, entries, foreign, parent, sibling,
};
use super::weights;
use crate::backend::Counters;
use crate::error::{Error, Result};
use crate::files::existing;
use crate::sample::SamplerConfig;
use crate::train::stateful::{Fields, Stateful};

/// The result of a successful [`Trainer::save`](crate::Trainer::save).
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Saved {
    /// Problems that did not prevent saving: [`Error::NotRemoved`] for each old checkpoint that could not be
    /// removed, and [`Error::Vanished`] if the parent directory was removed during the run.
    pub warnings: Vec<Error>,
}

/// The values from which a checkpoint is written.
pub(in crate::train) struct Snapshot<'a> {
    pub identity: Identity<'a>,
    pub step: u64,
    /// The sampler settings of the run, if they were set.
    pub sampling: Option<&'a SamplerConfig>,
    pub parts: Vec<&'a dyn Stateful>,
    /// The exact counts of the updates.
    pub counters: Counters,
}

impl Snapshot<'_> {
    /// # Errors
    /// Returns an error if the checkpoint belongs to another run.
    fn must_match(&self, state: &State) -> Result<()> {
        state.must_match(&self.identity, "save another run elsewhere")
    }
}

/// Writes a checkpoint so that a complete one can be opened at any moment.
///
/// 1. Write all files into a directory beside it, and flush them to disk.
/// 2. Move the current checkpoint aside, to a name with its step.
/// 3. Move the new directory to its place. Between 2 and 3, `open` finds it where it was written.
/// 4. Remove the oldest checkpoints. The new one is saved by now, even if a removal fails.
///
/// # Errors
/// Returns an error if `dir` holds anything other than a checkpoint of this run, or a checkpoint of a later
/// step, or a damaged one. Nothing is written in these cases.
pub(in crate::train) fn save(claim: &Claim, keep: usize, snapshot: &Snapshot<'_>) -> Result<Saved> {
    let dir = &claim.dir;
    let vanished = claim.hold()?;
    make_way(dir, snapshot)?;
    let new = sibling(dir, SAVING);
    fs::create_dir(&new).map_err(Error::io(&new))?;
    // Removing the incomplete files frees space on a full disk. The first error is the one to report.
    if let Err(error) = write_files(&new, snapshot) {
        let _ = clear(&new);
        return Err(error);
    }
    if let Err(error) = replace(dir, &new, snapshot) {
        // If nothing is at `dir`, the new checkpoint is the one that `open` finds.
        if read_state(dir).is_ok() {
            let _ = clear(&new);
        }
        return Err(error);
    }
    let mut warnings: Vec<Error> = vanished.into_iter().collect();
    // The checkpoint can be opened, although a power failure could still undo the rename.
    warnings.extend(sync_dir(parent(dir)).err());
    warnings.extend(sweep(dir));
    warnings.extend(prune(dir, keep, snapshot));
    Ok(Saved { warnings })
}

/// Performs all steps of [`save`] except for writing files. Problems are thus found before any training result
/// could be lost.
///
/// # Errors
/// Returns the errors of [`save`].
pub(in crate::train) fn rehearse(claim: &Claim, snapshot: &Snapshot<'_>) -> Result<()> {
    let dir = &claim.dir;
    claim.hold()?;
    make_way(dir, snapshot)?;
    for (step, path) in archive_names(dir)? {
        if (snapshot.step..=snapshot.identity.train.steps).contains(&step) {
            check_aside(&path, snapshot)?;
        }
    }

    let busy = |error: io::Error| match error.kind() {
        ErrorKind::ResourceBusy | ErrorKind::CrossesDevices => Error::Occupied {
            path: dir.clone(),
            found: "it cannot be renamed, like a mount point; use a directory within it".into(),
        },
        _ => Error::io(dir)(error),
    };
    let new = sibling(dir, SAVING);
    if read_state(dir).is_ok() {
        // Between the two renames, `open` finds the checkpoint at the path of a new one.
        fs::rename(dir, &new).map_err(busy)?;
        return fs::rename(&new, dir).map_err(busy);
    }
    remove_empty(dir).map_err(busy)?;
    fs::create_dir(&new).map_err(Error::io(&new))?;
    fs::rename(&new, dir).map_err(busy)?;
    fs::remove_dir(dir).map_err(busy)
}

/// Checks `dir` and the paths beside it, completes an interrupted save, and removes its leftovers.
///
/// # Errors
/// Returns the errors of [`save`].
fn make_way(dir: &Path, snapshot: &Snapshot<'_>) -> Result<()> {
    check_place(dir)?;
    let new = sibling(dir, SAVING);
    match Found::newest(dir) {
        Ok(present) => {
            snapshot.must_match(&present.state)?;
            if snapshot.step < present.state.progress.step {
                let expected = format!(
                    "at least {}, that of the checkpoint in {}, which would be lost; continue that run with \
                     Trainer::resume, or save elsewhere",
                    present.state.progress.step,
                    dir.display()
                );
                return Err(Error::config("step", snapshot.step, expected));
            }
            if present.dir == new {
                // The last save was interrupted between its steps 2 and 3. This is its step 3.
                replace(dir, &new, snapshot)?;
                sync_dir(parent(dir))?;
            }
        }
        Err(Error::NoCheckpoint { .. }) => {}
        Err(error) => return Err(error),
    }
    if let Some(foreign) = foreign(&new) {
        return Err(Error::Occupied { path: new, found: foreign });
    }
    if new.symlink_metadata().is_ok() {
        discard(dir, &new).map_err(Error::io(&new))?;
    }
    // The next save warns of anything that cannot be removed now.
    sweep(dir);
    Ok(())
}

fn write_files(dir: &Path, snapshot: &Snapshot<'_>) -> Result<()> {
    let mut files = Files::default();
    let network = (snapshot.identity.kind, &snapshot.identity.network);
    let (diffusion, step) = (snapshot.identity.diffusion, snapshot.step);
    let description = weights::describe(network, diffusion, step, snapshot.sampling)?;
    for part in &snapshot.parts {
        if let Some(tensors) = part.tensors() {
            let file = part.kind().file(part.index());
            let metadata = part.kind().weights.then_some((weights::KEY, &*description));
            let checksum = write_tensors(&dir.join(&file), &tensors, metadata, snapshot.step)?;
            files.insert(file, checksum);
        }
    }
    let fields = |fields: &mut Fields| {
        snapshot.parts.iter().try_for_each(|part| part.save(fields, &snapshot.counters))
    };
    let json = state_to_write(&snapshot.identity, fields, &files)?;
    write_synced(&dir.join(STATE), &json)?;
    sync_dir(dir)
}

/// Moves the checkpoint at `dir` aside, and `new` to its place.
fn replace(dir: &Path, new: &Path, snapshot: &Snapshot<'_>) -> Result<()> {
    match read_state(dir) {
        Ok(state) => {
            let aside = aside(dir, state.progress.step);
            // If the same step is saved again, the newer checkpoint replaces the older.
            let again = check_aside(&aside, snapshot)?;
            if !again || discard(dir, &aside).is_ok() {
                fs::rename(dir, &aside).map_err(Error::io(dir))?;
            } else {
                // The older one cannot even be renamed, so it stays.
                discard(dir, dir).map_err(Error::io(dir))?;
            }
        }
        // There is nothing here, or an empty directory that was created in advance.
        Err(Error::NoCheckpoint { .. }) => remove_empty(dir).map_err(Error::io(dir))?,
        Err(error) => return Err(error),
    }
    fs::rename(new, dir).map_err(Error::io(dir))
}

/// Returns whether `aside`, to which a checkpoint will be moved, holds a checkpoint of this run.
///
/// # Errors
/// Returns an error if it holds anything else, which must not be removed.
fn check_aside(aside: &Path, snapshot: &Snapshot<'_>) -> Result<bool> {
    if aside.symlink_metadata().is_err() {
        return Ok(false);
    }
    let found = match read_state(aside) {
        Ok(state) => match snapshot.must_match(&state) {
            Ok(()) => return Ok(true),
            Err(error) => format!("it holds a checkpoint of another run: {error}"),
        },
        Err(_) => "it holds no checkpoint, and one of that step would be moved there".into(),
    };
    Err(Error::Occupied { path: aside.to_owned(), found })
}

/// Removes the oldest of the run's checkpoints that were moved aside from `dir`, until `keep` are left, including
/// `dir`. Returns the errors.
fn prune(dir: &Path, keep: usize, snapshot: &Snapshot<'_>) -> Vec<Error> {
    let mut older = archived(dir).unwrap_or_default();
    older.retain(|found| snapshot.must_match(&found.state).is_ok());
    let surplus = older.len().saturating_sub(keep.saturating_sub(1));
    older.truncate(surplus);
    older.into_iter().filter_map(|old| remove(dir, old.dir).err()).collect()
}

/// Removes the checkpoint `old`, which was moved aside from `dir`.
///
/// # Errors
/// Returns an error if it cannot be removed, or if it holds a file that no save wrote. It keeps its name if none
/// of its files has been removed.
fn remove(dir: &Path, old: PathBuf) -> Result<()> {
    if !old.is_symlink()
        && let Some(found) = foreign(&old)
    {
        return Err(Error::NotRemoved { path: old, source: io::Error::other(found) });
    }
    let doomed = match discard(dir, &old) {
        Ok(doomed) => doomed,
        Err(source) => return Err(Error::NotRemoved { path: old, source }),
    };
    clear(&doomed).map_err(|source| {
        let kept = doomed.join(STATE).exists() && fs::rename(&doomed, &old).is_ok();
        Error::NotRemoved { path: if kept { old } else { doomed }, source }
    })
}

/// Renames `old`, one of the directories of the checkpoint `dir`, so that it is not taken for a checkpoint even
/// when it is partly removed. Returns the new path.
fn discard(dir: &Path, old: &Path) -> io::Result<PathBuf> {
    let names = (1..).map(|n| if n == 1 { REMOVING.into() } else { format!("{REMOVING}-{n}") });
    let mut free = names.map(|name| sibling(dir, &name)).filter(|p| p.symlink_metadata().is_err());
    let doomed = free.next().ok_or(ErrorKind::AlreadyExists)?;
    fs::rename(old, &doomed)?;
    Ok(doomed)
}

/// Removes everything that was discarded, now or by an interrupted save. Returns the errors.
fn sweep(dir: &Path) -> Vec<Error> {
    let prefix = format!("{}{REMOVING}", dir.file_name().unwrap_or_default().to_string_lossy());
    let doomed = entries(parent(dir)).into_iter().filter(|name| {
        name.strip_prefix(&prefix).is_some_and(|rest| {
            rest.is_empty() || rest.strip_prefix('-').is_some_and(|n| n.parse::<u64>().is_ok())
        })
    });
    doomed
        .map(|name| parent(dir).join(name))
        // Links belong to checkpoints. Anything else that a save would not have written belongs to the user.
        .filter(|path| path.is_symlink() || foreign(path).is_none())
        .filter_map(|path| clear(&path).err().map(|source| Error::NotRemoved { path, source }))
        .collect()
}

/// Removes a link or a directory. In a directory, `checkpoint.json` is removed first: without it, the remaining
/// files are not a checkpoint.
fn clear(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => {
            existing(fs::remove_file(path.join(STATE)))?;
            existing(fs::remove_dir_all(path)).map(drop)
        }
        _ => existing(fs::remove_file(path)).map(drop),
    }
}

/// Removes `dir` if it is an empty directory.
fn remove_empty(dir: &Path) -> io::Result<()> {
    existing(fs::remove_dir(dir)).map(drop)
}
