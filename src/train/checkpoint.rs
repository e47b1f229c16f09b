use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::scaler::ScalerState;
use super::{AdamConfig, AdamW, Ema, EmaConfig, GradScaler, GradScalerConfig, TrainConfig};
use crate::error::in_short;
use crate::network::read_tensors;
use crate::{Diffusion, Error, Network, Parameters, Result};

const MODEL: &str = "model.safetensors";
const EMA: &str = "ema.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "checkpoint.json";

/// What the names beside a checkpoint's end in: of the one being written, and of one being removed.
const SAVING: &str = ".saving";
const REMOVING: &str = ".removing";

/// The newest format that this version writes and reads.
const FORMAT: u32 = 1;

/// The largest `checkpoint.json` that is read; a custom schedule of a million steps fits.
const MAX_STATE_BYTES: u64 = 64 << 20;

/// `checkpoint.json`: everything but the tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    format_version: u32,
    step: u64,
    images_seen: u64,
    /// Images in the source, once one was used.
    dataset_len: Option<u64>,
    ema_updates: u64,
    /// With [`Precision::F16`](crate::Precision::F16).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    grad_scaler: Option<ScalerState>,
    network: NetworkState,
    diffusion: Diffusion,
    train: TrainConfig,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkState {
    kind: String,
    config: Value,
}

/// A training run on disk: a directory of safetensors and JSON, enough to sample or to resume.
///
/// [`Trainer::save`](crate::Trainer::save) writes it; all tensors are f32, by the weights' names.
///
/// | file | content |
/// | --- | --- |
/// | `checkpoint.json` | format version, step, configuration of network, process and training |
/// | `model.safetensors` | the weights |
/// | `ema.safetensors` | their averages, where there are any |
/// | `optimizer.safetensors` | the optimiser's state |
pub struct Checkpoint {
    dir: PathBuf,
    state: State,
}

impl Checkpoint {
    /// Opens the checkpoint at `dir`; where saving was cut off at the one moment when there is none,
    /// the new one beside it, or else the one before.
    ///
    /// Only `checkpoint.json` is read until weights are asked for.
    ///
    /// # Errors
    /// If there is no complete checkpoint, it is damaged, or of a newer format.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let missing = match Self::newest(dir) {
            Err(error @ Error::NoCheckpoint { .. }) => error,
            found => return found,
        };
        archived(dir).ok().and_then(|mut older| older.pop()).ok_or(missing)
    }

    /// The checkpoint at `dir`, or the new one that `save` was about to move there.
    fn newest(dir: &Path) -> Result<Self> {
        let missing = match read_state(dir) {
            Ok(state) => return Ok(Self { dir: dir.to_owned(), state }),
            Err(error @ Error::NoCheckpoint { .. }) => error,
            Err(error) => return Err(error),
        };
        let Ok(new) = absolute(dir).map(|dir| sibling(&dir, SAVING)) else { return Err(missing) };
        match read_state(&new) {
            // The state is written last: where it reads, all the rest is there.
            Ok(state) => Ok(Self { dir: new, state }),
            Err(Error::NoCheckpoint { .. } | Error::Damaged { .. }) => Err(missing),
            Err(error) => Err(error),
        }
    }

    /// The directory: the one asked for, or where it was missing, the one found beside it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Updates of the weights so far.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// The process that the network learned to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        &self.state.diffusion
    }

    /// How the network was trained.
    pub fn train_config(&self) -> &TrainConfig {
        &self.state.train
    }

    /// The network's configuration.
    ///
    /// # Errors
    /// If the checkpoint holds another kind of network, or a configuration that `N` does not
    /// accept.
    pub fn network<N: Network>(&self) -> Result<N> {
        let NetworkState { kind, config } = &self.state.network;
        if kind != N::KIND {
            return Err(mismatch("network.kind", kind, N::KIND));
        }
        serde_json::from_value(config.clone()).map_err(|e| self.damaged_config(e))
    }

    fn damaged_config(&self, error: impl std::fmt::Display) -> Error {
        Error::damaged(self.dir.join(STATE), format!("network.config: {error}"))
    }

    /// The network with its weights; it takes no gradients.
    ///
    /// # Errors
    /// If the file is damaged, or does not hold just the weights of the network.
    pub fn model<N: Network>(&self, device: &Device) -> Result<N::Model> {
        self.frozen::<N>(MODEL, device)
    }

    /// The network with its averaged weights, which give the better samples; where none were
    /// averaged, as [`model`](Self::model).
    ///
    /// # Errors
    /// If the file is damaged, or does not hold just the weights of the network.
    pub fn ema<N: Network>(&self, device: &Device) -> Result<N::Model> {
        let file = if self.state.train.ema.is_some() { EMA } else { MODEL };
        self.frozen::<N>(file, device)
    }

    fn frozen<N: Network>(&self, file: &str, device: &Device) -> Result<N::Model> {
        let parameters = Parameters::load(self.dir.join(file), DType::F32, device)?;
        parameters.build(&self.network::<N>()?).map_err(|error| match error {
            Error::Config { .. } => self.damaged_config(error),
            error => error,
        })
    }

    pub(super) fn images_seen(&self) -> u64 {
        self.state.images_seen
    }

    pub(super) fn dataset_len(&self) -> Option<u64> {
        self.state.dataset_len
    }

    pub(super) fn parameters(&self, device: &Device) -> Result<Parameters> {
        let path = self.dir.join(MODEL);
        let tensors = read_tensors(&path, device)?;
        Ok(Parameters::trainable(&path, tensors, DType::F32, device))
    }

    pub(super) fn optimizer(
        &self,
        config: AdamConfig,
        vars: &BTreeMap<String, Var>,
        device: &Device,
    ) -> Result<AdamW> {
        let path = self.dir.join(OPTIMIZER);
        let state = read_tensors(&path, device)?;
        let mut optimizer = AdamW::new(config, vars)?;
        check_tensors(&path, &state, &optimizer.shared_state())?;
        // No update of a run was one of the optimiser's but for those that were skipped.
        let skipped = self.state.grad_scaler.map_or(0, |scaler| scaler.skipped);
        optimizer.restore(self.state.step - skipped, &state)?;
        Ok(optimizer)
    }

    /// The scaler of a run that has one.
    pub(super) fn grad_scaler(&self, config: GradScalerConfig) -> Result<GradScaler> {
        match self.state.grad_scaler {
            Some(state) => GradScaler::restore(config, state),
            None => Err(Error::damaged(self.dir.join(STATE), "grad_scaler is missing")),
        }
    }

    pub(super) fn average(
        &self,
        config: EmaConfig,
        vars: &BTreeMap<String, Var>,
        device: &Device,
    ) -> Result<Ema> {
        let path = self.dir.join(EMA);
        let mut averages = read_tensors(&path, device)?;
        let ema = Ema::new(config, vars)?;
        check_tensors(&path, &averages, ema.averages())?;
        for (name, average) in &mut averages {
            if let Some(var) = vars.get(name) {
                *average = average.to_dtype(var.dtype())?.to_device(var.device())?;
            }
        }
        Ok(Ema::restore(config, self.state.ema_updates, averages))
    }

    /// # Errors
    /// Unless a run of these configurations is the one that was saved.
    pub(super) fn must_match<N: Network>(
        &self,
        network: &N,
        train: &TrainConfig,
        diffusion: &Diffusion,
    ) -> Result<()> {
        if self.state.network.kind != N::KIND {
            return Err(mismatch("network.kind", &self.state.network.kind, N::KIND));
        }
        compare("network", &self.state.network.config, &to_value(network)?)?;
        compare("diffusion", &to_value(&self.state.diffusion)?, &to_value(diffusion)?)?;
        // These change how long a run goes on and what is told of it, not what it computes.
        let TrainConfig { steps, log_every, keep_checkpoints, .. } = *train;
        let saved = TrainConfig { steps, log_every, keep_checkpoints, ..self.state.train.clone() };
        compare("train", &to_value(&saved)?, &to_value(train)?)
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("dir", &self.dir)
            .field("step", &self.state.step)
            .finish_non_exhaustive()
    }
}

/// All that a checkpoint is written from.
pub(super) struct Snapshot<'a, N> {
    pub network: &'a N,
    pub train: &'a TrainConfig,
    pub diffusion: &'a Diffusion,
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
    /// Unless the checkpoint is one of the same run.
    fn must_match(&self, checkpoint: &Checkpoint) -> Result<()> {
        checkpoint.must_match(self.network, self.train, self.diffusion)
    }
}

/// Writes a checkpoint so that at any moment a complete one can be opened at `dir`.
///
/// 1. Write all files into a directory beside `dir`, and flush them to disk.
/// 2. Move the present checkpoint aside, under a name with its step.
/// 3. Move the new directory to `dir`. Between 2 and 3, `open` finds it where it was written.
/// 4. Remove the oldest ones.
///
/// # Errors
/// If the present checkpoint is another run's, of a later step, or damaged: then nothing is written.
pub(super) fn save<N: Network>(dir: &Path, keep: usize, snapshot: &Snapshot<N>) -> Result<()> {
    let dir = absolute(dir)?;
    let parent = dir.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(Error::io(parent))?;

    let new = sibling(&dir, SAVING);
    match Checkpoint::newest(&dir) {
        Ok(present) => {
            snapshot.must_match(&present)?;
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
                replace(&dir, &new, snapshot)?;
                sync_dir(parent)?;
            }
        }
        Err(Error::NoCheckpoint { .. }) => {}
        Err(error) => return Err(error),
    }
    // Whatever a save that was cut off left behind.
    remove(&dir, &new)?;
    fs::create_dir(&new).map_err(Error::io(&new))?;
    let written = write_files(&new, snapshot).and_then(|()| replace(&dir, &new, snapshot));
    if written.is_err() {
        // A full disk should have the room back; the error that matters is the one above.
        let _ = remove(&dir, &new);
    }
    written?;
    sync_dir(parent)?;
    prune(&dir, keep, snapshot)
}

fn write_files<N: Network>(dir: &Path, snapshot: &Snapshot<N>) -> Result<()> {
    let weights: BTreeMap<String, Tensor> =
        snapshot.vars.iter().map(|(k, v)| (k.clone(), v.as_detached_tensor())).collect();
    write_tensors(&dir.join(MODEL), &weights)?;
    write_tensors(&dir.join(OPTIMIZER), &snapshot.optimizer.shared_state())?;
    if let Some(ema) = snapshot.ema {
        write_tensors(&dir.join(EMA), ema.averages())?;
    }
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
            match read_state(&aside) {
                // The same step saved again: the newer one counts.
                Ok(state) => {
                    snapshot.must_match(&Checkpoint { dir: aside.clone(), state })?;
                    remove(dir, &aside)?;
                }
                // Not a checkpoint, so not ours to remove.
                Err(_) if aside.exists() => {
                    return Err(Error::io(&aside)(ErrorKind::AlreadyExists.into()));
                }
                Err(_) => {}
            }
            fs::rename(dir, &aside).map_err(Error::io(dir))?;
        }
        // Nothing here, or an empty directory that someone made in advance.
        Err(Error::NoCheckpoint { .. }) => match fs::remove_dir(dir) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io(dir)(e)),
            _ => {}
        },
        Err(error) => return Err(error),
    }
    fs::rename(new, dir).map_err(Error::io(dir))
}

/// Removes the run's oldest checkpoints moved aside from `dir`, until with `dir` itself `keep` are
/// left.
fn prune<N: Network>(dir: &Path, keep: usize, snapshot: &Snapshot<N>) -> Result<()> {
    let mut older = archived(dir)?;
    older.retain(|checkpoint| snapshot.must_match(checkpoint).is_ok());
    let surplus = older.len().saturating_sub(keep.saturating_sub(1));
    for old in &older[..surplus] {
        remove(dir, &old.dir)?;
    }
    Ok(())
}

/// The checkpoints moved aside from `dir`, oldest first: `checkpoint-000000100` beside
/// `checkpoint`, if that is its step. Whatever else lies there, such as a copy that bears a date, is
/// none of ours.
fn archived(dir: &Path) -> Result<Vec<Checkpoint>> {
    let dir = absolute(dir)?;
    let parent = dir.parent().unwrap_or(Path::new("/"));
    let prefix = format!("{}-", dir.file_name().unwrap_or_default().to_string_lossy());
    let mut found = Vec::new();
    for entry in fs::read_dir(parent).map_err(Error::io(parent))? {
        let path = entry.map_err(Error::io(parent))?.path();
        if !path.file_name().unwrap_or_default().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        if let Ok(state) = read_state(&path)
            && path == aside(&dir, state.step)
        {
            let written = fs::metadata(path.join(STATE)).and_then(|m| m.modified());
            let written = written.map_err(Error::io(&path))?;
            found.push((written, state.step, Checkpoint { dir: path, state }));
        }
    }
    // By time, not by step: they may be of several runs.
    found.sort_by_key(|(written, step, _)| (*written, *step));
    Ok(found.into_iter().map(|(.., checkpoint)| checkpoint).collect())
}

/// Where the checkpoint of this step is moved to when a newer one takes its place.
fn aside(dir: &Path, step: u64) -> PathBuf {
    sibling(dir, &format!("-{step:09}"))
}

fn absolute(dir: &Path) -> Result<PathBuf> {
    let dir = std::path::absolute(dir).map_err(Error::io(dir))?;
    if dir.file_name().is_none() {
        return Err(Error::config(
            "checkpoint directory",
            dir.display(),
            "a path that ends in a name",
        ));
    }
    Ok(dir)
}

fn sibling(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    dir.with_file_name(name)
}

/// Removes `old`, one of the directories of the checkpoint `dir`, and what is in it. It first loses
/// its name, so that a half-removed one is never taken for a checkpoint; the new name is always the
/// same, so that the next removal finishes one that was cut off.
fn remove(dir: &Path, old: &Path) -> Result<()> {
    let doomed = sibling(dir, REMOVING);
    for result in
        [fs::remove_dir_all(&doomed), fs::rename(old, &doomed), fs::remove_dir_all(&doomed)]
    {
        match result {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io(&doomed)(e)),
            _ => {}
        }
    }
    Ok(())
}

fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let bytes = safetensors::serialize(tensors, None).map_err(Error::external)?;
    write_synced(path, &bytes)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io(path))
}

/// Makes renames within `dir` last through a power cut. Only Unix can, and needs to.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))?;
    }
    Ok(())
}

fn read_state(dir: &Path) -> Result<State> {
    let path = dir.join(STATE);
    let missing = |reason: String| Error::NoCheckpoint { path: dir.to_owned(), reason };
    let length = match fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() => metadata.len(),
        Ok(_) => return Err(missing(format!("{STATE} is not a file"))),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Err(missing(format!("there is no {STATE}")));
        }
        Err(e) => return Err(Error::io(&path)(e)),
    };
    if length > MAX_STATE_BYTES {
        let reason = format!("{length} bytes long; at most {MAX_STATE_BYTES} are expected");
        return Err(Error::damaged(path, reason));
    }
    let json = fs::read(&path).map_err(Error::io(&path))?;
    let value: Value = serde_json::from_slice(&json)
        .map_err(|e| Error::damaged(&path, in_short(&e.to_string())))?;
    // Before the rest, which a newer version may have changed.
    let Some(version) = value.get("format_version") else {
        return Err(Error::damaged(path, "format_version is missing"));
    };
    match version.as_u64() {
        Some(found) if found == u64::from(FORMAT) => {}
        Some(found) if found > u64::from(FORMAT) => {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            return Err(Error::NewerFormat { path, found, supported: FORMAT });
        }
        _ => {
            let reason = format!("format_version is {}; it must be {FORMAT}", brief(version));
            return Err(Error::damaged(path, reason));
        }
    }
    let state: State = serde_json::from_value(value)
        .map_err(|e| Error::damaged(&path, in_short(&e.to_string())))?;
    check_state(&state).map_err(|e| Error::damaged(&path, e.to_string()))?;
    Ok(state)
}

/// # Errors
/// Names the first number that no run comes to, or that one could not go on from.
fn check_state(state: &State) -> Result<()> {
    let within = |field, value, most| {
        if value > most {
            return Err(Error::config(field, value, format!("at most {most}")));
        }
        Ok(())
    };
    // Random numbers have addresses for so many steps.
    within("step", state.step, (1 << 40) - 1)?;
    // As many again can be added without an overflow.
    within("images_seen", state.images_seen, u64::MAX / 2)?;
    // One an update.
    within("ema_updates", state.ema_updates, state.step)?;
    state.train.validate()?;
    let Some(scaler) = state.grad_scaler else { return Ok(()) };
    within("grad_scaler.skipped", scaler.skipped, state.step)?;
    GradScaler::restore(state.train.grad_scaler, scaler).map(drop)
}

/// # Errors
/// Unless `found` has just the names and shapes of `expected`.
fn check_tensors(
    path: &Path,
    found: &BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let path = path.to_owned();
    for (name, expected) in expected {
        let name = name.clone();
        let Some(found) = found.get(&name) else {
            return Err(Error::MissingWeight { path, name });
        };
        if found.shape() != expected.shape() {
            let (found, expected) = (found.dims().to_vec(), expected.dims().to_vec());
            return Err(Error::WeightShape { path, name, found, expected });
        }
    }
    match found.keys().find(|name| !expected.contains_key(*name)) {
        Some(name) => Err(Error::UnknownWeight { path, name: name.clone() }),
        None => Ok(()),
    }
}

fn mismatch(field: &str, found: &str, expected: &str) -> Error {
    let (found, expected) = (found.into(), expected.into());
    Error::ConfigMismatch { field: field.into(), found, expected }
}

fn to_value(config: &impl Serialize) -> Result<Value> {
    serde_json::to_value(config).map_err(Error::external)
}

/// # Errors
/// Names the first field in which two configurations differ.
fn compare(field: &str, found: &Value, expected: &Value) -> Result<()> {
    if let (Value::Object(found), Value::Object(expected)) = (found, expected)
        && found.keys().eq(expected.keys())
    {
        return found.iter().try_for_each(|(key, value)| {
            compare(&format!("{field}.{key}"), value, &expected[key])
        });
    }
    if found == expected {
        return Ok(());
    }
    if let (Value::Array(found), Value::Array(expected)) = (found, expected)
        && found.len() == expected.len()
        && let Some(i) = (0..found.len()).find(|&i| found[i] != expected[i])
    {
        return compare(&format!("{field}[{i}]"), &found[i], &expected[i]);
    }
    Err(mismatch(field, &brief(found), &brief(expected)))
}

/// A value as JSON; of a long list its length, of other long ones the beginning.
fn brief(value: &Value) -> String {
    const LONG: usize = 80;
    let text = value.to_string();
    match value {
        _ if text.len() <= LONG => text,
        Value::Array(list) => format!("a list of {}", list.len()),
        _ => format!("{}...", &text[..text.floor_char_boundary(LONG)]),
    }
}
