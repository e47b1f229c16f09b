use std::fs;
use std::path::{Path, PathBuf};

use super::format::{STATE, State, read_state};
use super::paths::{absolute, archive_names, new_beside};
use crate::error::{Error, Result};

/// A checkpoint on disk of which only `checkpoint.json` has been read.
pub(super) struct Found {
    pub dir: PathBuf,
    pub state: State,
}

impl Found {
    /// Opens the checkpoint at `dir`. If there is none, opens the new one that an interrupted `save` did not
    /// move there.
    pub fn newest(dir: &Path) -> Result<Self> {
        let missing = match read_state(dir) {
            Ok(state) => return Ok(Self { dir: dir.to_owned(), state }),
            Err(error @ Error::NoCheckpoint { .. }) => error,
            Err(error) => return Err(error),
        };
        let Ok(new) = new_beside(dir) else { return Err(missing) };
        match read_state(&new) {
            // The state is written last: if it can be read, the other files are complete.
            Ok(state) => Ok(Self { dir: new, state }),
            Err(Error::NoCheckpoint { .. } | Error::Damaged { .. }) => Err(missing),
            Err(error) => Err(error),
        }
    }
}

/// Returns the checkpoints that were moved aside from `dir`, oldest first. Within a run they are ordered by
/// step, because copying a file changes its time. Runs are ordered by the time of their newest checkpoint.
pub(super) fn archived(dir: &Path) -> Result<Vec<Found>> {
    let mut runs: Vec<Vec<Found>> = Vec::new();
    for (step, path) in archive_names(&absolute(dir)?)? {
        let Ok(state) = read_state(&path) else { continue };
        if state.progress.step != step {
            continue;
        }
        let run = runs.iter_mut().find(|run| state.is_of_the_run_of(&run[0].state));
        let found = Found { dir: path, state };
        match run {
            Some(run) => run.push(found),
            None => runs.push(vec![found]),
        }
    }
    let written =
        |found: &Found| fs::metadata(found.dir.join(STATE)).and_then(|m| m.modified()).ok();
    runs.sort_by_cached_key(|run| run.iter().map(written).max());
    Ok(runs.into_iter().flatten().collect())
}
