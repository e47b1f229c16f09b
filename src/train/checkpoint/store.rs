//! Writes checkpoints, so that at any moment a complete one can be opened: see [`save`].

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{Tensor, Var};

use super::files::{sync_dir, write_synced, write_tensors};
use super::lock::Lock;
use super::state::{FORMAT, Files, NetworkState, STATE, State, read_state, to_value};
use super::{Checkpoint, EMA, MODEL, OPTIMIZER};
use crate::train::{AdamW, Ema, GradScaler, TrainConfig};
use crate::{Diffusion, Error, Network, Result, SamplerConfig};

/// Suffixes of the names beside a checkpoint: of the checkpoint being written, of those being removed, and of the
/// lock file.
const SAVING: &str = ".saving";
const REMOVING: &str = ".removing";
const LOCK: &str = ".lock";

/// The exclusive right to save at a directory, held until this value is dropped.
#[derive(Debug)]
pub(in crate::train) struct Claim {
    /// Absolute.
    dir: PathBuf,
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

    /// Returns whether this is the right to save at `dir`, even if another path leads there.
    pub fn is_for(&self, dir: &Path) -> bool {
        let real = |dir: &Path| {
            let dir = absolute(dir).ok()?;
            Some(parent(&dir).canonicalize().ok()?.join(dir.file_name()?))
        };
        absolute(dir).is_ok_and(|dir| dir == self.dir)
            || real(&self.dir).is_some_and(|ours| real(dir) == Some(ours))
    }

    /// Makes sure that this still holds the lock. Returns a warning if the parent directory was removed in the
    /// meantime.
    ///
    /// # Errors
    /// Returns an error if another trainer took the lock after its file was removed.
    fn hold(&self) -> Result<Option<Error>> {
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

    /// Does everything that [`save`] does, except for writing files, so that obstacles are found before there is
    /// anything to lose.
    ///
    /// # Errors
    /// Returns the errors of [`save`].
    pub fn rehearse<N: Network>(&self, snapshot: &Snapshot<N>) -> Result<()> {
        let dir = &self.dir;
        self.hold()?;
        make_way(dir, snapshot)?;
        for (step, path) in archive_names(dir)? {
            if (snapshot.step..=snapshot.train.steps).contains(&step) {
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
}

/// The result of a successful [`Trainer::save`](crate::Trainer::save).
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Saved {
    /// Problems that did not prevent saving: [`Error::NotRemoved`] for each old checkpoint that could not be
    /// removed, and [`Error::Vanished`] if the parent directory was removed during the run.
    pub warnings: Vec<Error>,
}

/// The values from which a checkpoint is written.
pub(in crate::train) struct Snapshot<'a, N> {
    pub network: &'a N,
    pub train: &'a TrainConfig,
    pub diffusion: &'a Diffusion,
    pub sampling: Option<SamplerConfig>,
    pub step: u64,
    pub images_seen: u64,
    pub dataset_len: Option<u64>,
    pub vars: &'a BTreeMap<String, Var>,
    pub optimizer: &'a AdamW,
    pub ema: Option<&'a Ema>,
    pub ema_updates: u64,
    pub scaler: Option<&'a GradScaler>,
}

impl<N: Network> Snapshot<'_, N> {
    /// # Errors
    /// Returns an error if the checkpoint belongs to another run.
    fn must_match(&self, state: &State) -> Result<()> {
        let remedy = "save another run elsewhere";
        state.must_match(self.network, self.train, self.diffusion, remedy)
    }
}

/// Writes a checkpoint so that at any moment a complete one can be opened.
///
/// 1. Write all files into a directory beside it, and flush them to disk.
/// 2. Move the current checkpoint aside, to a name with its step.
/// 3. Move the new directory to its place. Between 2 and 3, `open` finds it where it was written.
/// 4. Remove the oldest checkpoints. The new one is saved by now, even if a removal fails.
///
/// # Errors
/// Returns an error if `dir` holds anything other than a checkpoint of this run, or a checkpoint of a later
/// step, or a damaged one. Nothing is written in these cases.
pub(in crate::train) fn save<N: Network>(
    claim: &Claim,
    keep: usize,
    snapshot: &Snapshot<N>,
) -> Result<Saved> {
    let dir = &claim.dir;
    let vanished = claim.hold()?;
    make_way(dir, snapshot)?;
    let new = sibling(dir, SAVING);
    fs::create_dir(&new).map_err(Error::io(&new))?;
    // Clearing frees the space on a full disk. The error to report is the first one.
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
    // The checkpoint can be opened, even if a power cut could still take it back.
    warnings.extend(sync_dir(parent(dir)).err());
    warnings.extend(sweep(dir));
    warnings.extend(prune(dir, keep, snapshot));
    Ok(Saved { warnings })
}

/// Checks `dir` and the paths beside it, finishes an interrupted save, and removes what it left.
///
/// # Errors
/// Returns the errors of [`save`].
fn make_way<N: Network>(dir: &Path, snapshot: &Snapshot<N>) -> Result<()> {
    check_place(dir)?;
    let new = sibling(dir, SAVING);
    match Checkpoint::newest(dir) {
        Ok(present) => {
            snapshot.must_match(&present.state)?;
            if snapshot.step < present.step() {
                let expected = format!(
                    "at least {}, that of the checkpoint in {}, which would be lost; continue that run with \
                     Trainer::resume, or save elsewhere",
                    present.step(),
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

/// # Errors
/// Returns an error if a checkpoint cannot replace what is at `dir`.
fn check_place(dir: &Path) -> Result<()> {
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
fn dangling(path: &Path) -> Option<Error> {
    let link = path.ancestors().find(|path| path.is_symlink() && !path.exists())?;
    let found = format!("it is a link to {}, which does not exist", target(link));
    Some(Error::Occupied { path: link.to_owned(), found })
}

fn target(link: &Path) -> String {
    link.read_link().map_or_else(|_| "somewhere".into(), |target| target.display().to_string())
}

/// Describes anything at `new` that no save writes there. Hidden files, which systems add to directories, do not count.
fn foreign(new: &Path) -> Option<String> {
    let metadata = new.symlink_metadata().ok()?;
    if !metadata.is_dir() {
        return Some("it is in the way of the files of a new checkpoint".into());
    }
    let ours = [MODEL, EMA, OPTIMIZER, STATE];
    let others = |name: &String| !name.starts_with('.') && !ours.contains(&name.as_str());
    let name = entries(new).into_iter().find(others)?;
    Some(format!("it holds {name}, which is not a file of a checkpoint"))
}

/// The names in a directory, in order.
fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn write_files<N: Network>(dir: &Path, snapshot: &Snapshot<N>) -> Result<()> {
    let weights: BTreeMap<String, Tensor> =
        snapshot.vars.iter().map(|(k, v)| (k.clone(), v.as_detached_tensor())).collect();
    let write = |file, tensors| write_tensors(&dir.join(file), tensors, snapshot.step);
    let files = Files {
        model: write(MODEL, &weights)?,
        optimizer: write(OPTIMIZER, &snapshot.optimizer.shared_state())?,
        ema: snapshot.ema.map(|ema| write(EMA, ema.averages())).transpose()?,
    };
    let state = State {
        format_version: FORMAT,
        step: snapshot.step,
        images_seen: snapshot.images_seen,
        dataset_len: snapshot.dataset_len,
        ema_updates: snapshot.ema_updates,
        grad_scaler: snapshot.scaler.map(GradScaler::state),
        network: NetworkState { kind: N::KIND.into(), config: to_value(snapshot.network)? },
        diffusion: snapshot.diffusion.clone(),
        train: snapshot.train.clone(),
        sampling: snapshot.sampling,
        files: Some(files),
    };
    let json = serde_json::to_vec_pretty(&state).map_err(Error::external)?;
    write_synced(&dir.join(STATE), &json)?;
    sync_dir(dir)
}

/// Moves the checkpoint at `dir` aside, and `new` to its place.
fn replace<N: Network>(dir: &Path, new: &Path, snapshot: &Snapshot<N>) -> Result<()> {
    match read_state(dir) {
        Ok(state) => {
            let aside = aside(dir, state.step);
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
fn check_aside<N: Network>(aside: &Path, snapshot: &Snapshot<N>) -> Result<bool> {
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
fn prune<N: Network>(dir: &Path, keep: usize, snapshot: &Snapshot<N>) -> Vec<Error> {
    let mut older = archived(dir).unwrap_or_default();
    older.retain(|checkpoint| snapshot.must_match(&checkpoint.state).is_ok());
    let surplus = older.len().saturating_sub(keep.saturating_sub(1));
    older.truncate(surplus);
    older.into_iter().filter_map(|old| remove(dir, old.dir).err()).collect()
}

/// Removes the checkpoint `old`, which was moved aside from `dir`.
///
/// # Errors
/// Returns an error if it cannot be removed, or if it holds a file that no save wrote. If nothing of it is lost,
/// it keeps its name.
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

/// Renames `old`, one of the directories of the checkpoint `dir`, so that it is not found as a checkpoint even
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
        // A link was a checkpoint's. Anything else that no save wrote belongs to the user.
        .filter(|path| path.is_symlink() || foreign(path).is_none())
        .filter_map(|path| clear(&path).err().map(|source| Error::NotRemoved { path, source }))
        .collect()
}

/// Removes a link, or a directory. Of a directory, `checkpoint.json` is removed first: without it the rest is not
/// a checkpoint.
fn clear(path: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => {
            gone(fs::remove_file(path.join(STATE)))?;
            gone(fs::remove_dir_all(path))
        }
        _ => gone(fs::remove_file(path)),
    }
}

/// Removes `dir` if it is an empty directory.
fn remove_empty(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The checkpoints moved aside from `dir`, oldest first. Within a run they are ordered by step, because a copied
/// file has another time. Runs are ordered by the time of their newest checkpoint.
pub(super) fn archived(dir: &Path) -> Result<Vec<Checkpoint>> {
    let mut runs: Vec<Vec<Checkpoint>> = Vec::new();
    for (step, path) in archive_names(&absolute(dir)?)? {
        let Ok(state) = read_state(&path) else { continue };
        if state.step != step {
            continue;
        }
        let run = runs.iter_mut().find(|run| state.is_of_the_run_of(&run[0].state));
        let checkpoint = Checkpoint { dir: path, state };
        match run {
            Some(run) => run.push(checkpoint),
            None => runs.push(vec![checkpoint]),
        }
    }
    let written = |checkpoint: &Checkpoint| {
        fs::metadata(checkpoint.dir.join(STATE)).and_then(|m| m.modified()).ok()
    };
    runs.sort_by_cached_key(|run| run.iter().map(written).max());
    Ok(runs.into_iter().flatten().collect())
}

/// The paths with the name of a checkpoint moved aside from `dir`, and their steps: `checkpoint-000000100` beside
/// `checkpoint`. Other paths are ignored, such as a copy whose name has a date.
fn archive_names(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
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
fn aside(dir: &Path, step: u64) -> PathBuf {
    sibling(dir, &format!("-{step:09}"))
}

/// The path at which a new checkpoint is written before it replaces the one at `dir`.
pub(super) fn new_beside(dir: &Path) -> Result<PathBuf> {
    Ok(sibling(&absolute(dir)?, SAVING))
}

fn absolute(dir: &Path) -> Result<PathBuf> {
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
fn parent(dir: &Path) -> &Path {
    dir.parent().unwrap_or(Path::new("/"))
}

fn sibling(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    dir.with_file_name(name)
}
