//! How a checkpoint is written, so that at any moment a complete one can be opened: see [`save`].

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

/// What the names beside a checkpoint's end in: of the one being written, of those being removed, and of
/// the file that is locked.
const SAVING: &str = ".saving";
const REMOVING: &str = ".removing";
const LOCK: &str = ".lock";

/// The right to save at a directory, which nobody else has while this lives.
#[derive(Debug)]
pub(in crate::train) struct Claim {
    /// Absolute.
    dir: PathBuf,
    /// None only within [`hold`](Self::hold).
    lock: Mutex<Option<Lock>>,
}

impl Claim {
    /// # Errors
    /// Returns an error if somebody else holds it, or if the directory around it cannot be made.
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

    /// Whether this is for saving at `dir`, by whatever path.
    pub fn is_for(&self, dir: &Path) -> bool {
        let real = |dir: &Path| {
            let dir = absolute(dir).ok()?;
            Some(parent(&dir).canonicalize().ok()?.join(dir.file_name()?))
        };
        absolute(dir).is_ok_and(|dir| dir == self.dir)
            || real(&self.dir).is_some_and(|ours| real(dir) == Some(ours))
    }

    /// Makes sure that the lock is still ours; tells of the directory if it was removed meanwhile.
    ///
    /// # Errors
    /// Returns an error if somebody else took the lock after its file was removed.
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

    /// Does what [`save`] does except for writing files, so that whatever is in its way is found before
    /// there is something to lose.
    ///
    /// # Errors
    /// Those of [`save`].
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
                found: "it cannot be renamed, as a mount point cannot; name a directory within it"
                    .into(),
            },
            _ => Error::io(dir)(error),
        };
        let new = sibling(dir, SAVING);
        if read_state(dir).is_ok() {
            // Between the two, `open` finds the checkpoint where a new one would be.
            fs::rename(dir, &new).map_err(busy)?;
            return fs::rename(&new, dir).map_err(busy);
        }
        remove_empty(dir).map_err(busy)?;
        fs::create_dir(&new).map_err(Error::io(&new))?;
        fs::rename(&new, dir).map_err(busy)?;
        fs::remove_dir(dir).map_err(busy)
    }
}

/// What [`Trainer::save`](crate::Trainer::save) has to tell after it succeeded.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Saved {
    /// What went wrong beside the saving: [`Error::NotRemoved`] for each old checkpoint that could not be
    /// removed, [`Error::Vanished`] if the directory was removed while the run went on.
    pub warnings: Vec<Error>,
}

/// All that a checkpoint is written from.
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
    /// Returns an error if the checkpoint is one of another run.
    fn must_match(&self, state: &State) -> Result<()> {
        let remedy = "save another run elsewhere";
        state.must_match(self.network, self.train, self.diffusion, remedy)
    }
}

/// Writes a checkpoint so that at any moment a complete one can be opened.
///
/// 1. Write all files into a directory beside it, and flush them to disk.
/// 2. Move the present checkpoint aside, under a name with its step.
/// 3. Move the new directory to its place. Between 2 and 3, `open` finds it where it was written.
/// 4. Remove the oldest ones. The checkpoint is saved by now, whatever becomes of these.
///
/// # Errors
/// Returns an error if something other than the run's own checkpoint is there, or one of a later step, or
/// a damaged one; then nothing is written.
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
    let written = write_files(&new, snapshot).and_then(|()| replace(dir, &new, snapshot));
    if written.is_err() {
        // A full disk should have the room back; the error that matters is the one above.
        let _ = clear(&new);
    }
    written?;
    sync_dir(parent(dir))?;
    let mut warnings: Vec<Error> = vanished.into_iter().collect();
    warnings.extend(sweep(dir));
    warnings.extend(prune(dir, keep, snapshot));
    Ok(Saved { warnings })
}

/// Looks at what is at `dir` and beside it, finishes a save that was cut off, and removes what was left.
///
/// # Errors
/// Those of [`save`].
fn make_way<N: Network>(dir: &Path, snapshot: &Snapshot<N>) -> Result<()> {
    check_place(dir)?;
    let new = sibling(dir, SAVING);
    match Checkpoint::newest(dir) {
        Ok(present) => {
            snapshot.must_match(&present.state)?;
            if snapshot.step < present.step() {
                let expected = format!(
                    "at least {}, that of the checkpoint in {}, which would be lost; save elsewhere",
                    present.step(),
                    dir.display()
                );
                return Err(Error::config("step", snapshot.step, expected));
            }
            if present.dir == new {
                // The last save was cut off between 2 and 3: this is its 3.
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
    // What cannot be removed now is told after the next save.
    sweep(dir);
    Ok(())
}

/// # Errors
/// Returns an error if there is something at `dir` that a checkpoint cannot replace.
fn check_place(dir: &Path) -> Result<()> {
    let occupied = |found| Err(Error::Occupied { path: dir.to_owned(), found });
    // What cannot be looked at is an error where it is used.
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
            let found = "it is a mount point, which cannot be renamed; name a directory within it";
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

/// The first link on the way to `path` whose target is not there.
fn dangling(path: &Path) -> Option<Error> {
    let link = path.ancestors().find(|path| path.is_symlink() && !path.exists())?;
    let found = format!("it is a link to {}, which is not there", target(link));
    Some(Error::Occupied { path: link.to_owned(), found })
}

fn target(link: &Path) -> String {
    link.read_link().map_or_else(|_| "somewhere".into(), |target| target.display().to_string())
}

/// What is at `new` that a save that was cut off did not leave, if there is something.
fn foreign(new: &Path) -> Option<String> {
    let metadata = new.symlink_metadata().ok()?;
    if !metadata.is_dir() {
        return Some("it is in the way of the files of a new checkpoint".into());
    }
    let ours = [MODEL, EMA, OPTIMIZER, STATE];
    let name = entries(new).into_iter().find(|name| !ours.contains(&name.as_str()))?;
    Some(format!("it holds {name}, which is no file of a checkpoint"))
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

/// Moves what is at `dir` aside, and `new` in its place.
fn replace<N: Network>(dir: &Path, new: &Path, snapshot: &Snapshot<N>) -> Result<()> {
    match read_state(dir) {
        Ok(state) => {
            let aside = aside(dir, state.step);
            // The same step saved again: the newer one counts.
            let again = check_aside(&aside, snapshot)?;
            if !again || discard(dir, &aside).is_ok() {
                fs::rename(dir, &aside).map_err(Error::io(dir))?;
            } else {
                // The older one stays, since it cannot even be renamed.
                discard(dir, dir).map_err(Error::io(dir))?;
            }
        }
        // Nothing here, or an empty directory that someone made in advance.
        Err(Error::NoCheckpoint { .. }) => remove_empty(dir).map_err(Error::io(dir))?,
        Err(error) => return Err(error),
    }
    fs::rename(new, dir).map_err(Error::io(dir))
}

/// Whether a checkpoint of this run is at `aside`, where one of its step is to be moved.
///
/// # Errors
/// Returns an error if something else is there, which is not ours to remove.
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

/// Removes the run's oldest checkpoints moved aside from `dir`, until with `dir` itself `keep` are
/// left; gives what went wrong.
fn prune<N: Network>(dir: &Path, keep: usize, snapshot: &Snapshot<N>) -> Vec<Error> {
    let mut older = archived(dir).unwrap_or_default();
    older.retain(|checkpoint| snapshot.must_match(&checkpoint.state).is_ok());
    let surplus = older.len().saturating_sub(keep.saturating_sub(1));
    older.truncate(surplus);
    older.into_iter().filter_map(|old| remove(dir, old.dir).err()).collect()
}

/// # Errors
/// Returns an error if the checkpoint `old`, moved aside from `dir`, cannot be removed. Where nothing of it
/// is lost, it keeps its name.
fn remove(dir: &Path, old: PathBuf) -> Result<()> {
    let doomed = match discard(dir, &old) {
        Ok(doomed) => doomed,
        Err(source) => return Err(Error::NotRemoved { path: old, source }),
    };
    clear(&doomed).map_err(|source| {
        let kept = doomed.join(STATE).exists() && fs::rename(&doomed, &old).is_ok();
        Error::NotRemoved { path: if kept { old } else { doomed }, source }
    })
}

/// Takes from `old`, one of the directories of the checkpoint `dir`, the name by which it is found: so a
/// half-removed one is never taken for a checkpoint.
fn discard(dir: &Path, old: &Path) -> io::Result<PathBuf> {
    let names = (1..).map(|n| if n == 1 { REMOVING.into() } else { format!("{REMOVING}-{n}") });
    let mut free = names.map(|name| sibling(dir, &name)).filter(|p| p.symlink_metadata().is_err());
    let doomed = free.next().ok_or(ErrorKind::AlreadyExists)?;
    fs::rename(old, &doomed)?;
    Ok(doomed)
}

/// Removes whatever was discarded, now or by a save that was cut off; gives what went wrong.
fn sweep(dir: &Path) -> Vec<Error> {
    let prefix = format!("{}{REMOVING}", dir.file_name().unwrap_or_default().to_string_lossy());
    let doomed = entries(parent(dir)).into_iter().filter(|name| {
        name.strip_prefix(&prefix).is_some_and(|rest| {
            rest.is_empty() || rest.strip_prefix('-').is_some_and(|n| n.parse::<u64>().is_ok())
        })
    });
    doomed
        .filter_map(|name| {
            let path = parent(dir).join(name);
            clear(&path).err().map(|source| Error::NotRemoved { path, source })
        })
        .collect()
}

/// Removes a directory, `checkpoint.json` first, without which the rest is no checkpoint; or a link.
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

/// The checkpoints moved aside from `dir`, oldest first: within a run the step tells the age, since a copy
/// has other times; between runs, the time of each one's newest.
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

/// What bears the name of a checkpoint moved aside from `dir`, with its step: `checkpoint-000000100` beside
/// `checkpoint`. Whatever else is there, such as a copy that bears a date, is none of ours.
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

/// Where the checkpoint of this step is moved to when a newer one takes its place.
fn aside(dir: &Path, step: u64) -> PathBuf {
    sibling(dir, &format!("-{step:09}"))
}

/// Where a new checkpoint is written before it takes the place of that at `dir`.
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

/// The directory around a checkpoint's, whose path is absolute.
fn parent(dir: &Path) -> &Path {
    dir.parent().unwrap_or(Path::new("/"))
}

fn sibling(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    dir.with_file_name(name)
}
