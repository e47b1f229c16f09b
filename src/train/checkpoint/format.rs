use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::files::Checksum;
use super::network::NetworkState;
use crate::error::{Error, Result, in_short};
use crate::model::Architecture;
use crate::model::tensor_file::open_regular;
use crate::process::diffusion::Diffusion;
use crate::train::config::TrainConfig;
use crate::train::history::Change;
use crate::train::state::{KINDS, Progress};
use crate::train::stateful::Fields;

/// The name of the file that holds everything except tensors.
pub(super) const STATE: &str = "checkpoint.json";

/// The fields of `checkpoint.json` that belong to no part of a run.
const HEAD: [&str; 5] = ["format_version", "network", "diffusion", "train", "files"];

/// The format that this version writes, and the newest that it reads. Format 1 had no checksums.
pub(super) const FORMAT: u32 = 2;

/// The largest `checkpoint.json` that is read; a custom schedule of a million steps fits.
const MAX_STATE_BYTES: u64 = 64 << 20;

/// The content of `checkpoint.json`: everything except the tensors.
pub(super) struct State {
    pub network: NetworkState<Box<RawValue>>,
    pub diffusion: Diffusion,
    pub train: TrainConfig,
    /// Present since format 2.
    pub files: Option<Files>,
    pub progress: Progress,
    /// The fields of the parts of the run.
    pub fields: Fields,
}

/// Checksums of the files of tensors, by file name, in the order of the parts.
#[derive(Default, PartialEq)]
pub(super) struct Files(Vec<(String, Checksum)>);

impl Files {
    pub fn insert(&mut self, file: String, checksum: Checksum) {
        self.0.push((file, checksum));
    }

    pub fn get(&self, file: &str) -> Option<&Checksum> {
        self.iter().find(|(found, _)| *found == file).map(|(_, checksum)| checksum)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Checksum)> {
        self.0.iter().map(|(file, checksum)| (&**file, checksum))
    }

    /// # Errors
    /// Returns an error if these are not the files of a run with this configuration.
    fn check(&self, train: &TrainConfig) -> Result<()> {
        let mut expected = Vec::new();
        for kind in KINDS {
            expected.extend((0..(kind.files)(train)).map(|index| (kind, kind.file(index))));
        }
        let wrong = |file: &str, found: &str, expected: &str, setting: &str| {
            let reason =
                if setting.is_empty() { String::new() } else { format!(", as {setting} is") };
            let (file, found) = (in_short(file), in_short(found));
            Err(Error::external(format!("files.{file} is {found}; it must be {expected}{reason}")))
        };
        for (file, _) in self.iter() {
            if !expected.iter().any(|(_, expected)| expected == file) {
                let kind = KINDS.iter().find(|kind| kind.owns(file));
                return wrong(file, "present", "absent", kind.map_or("", |kind| kind.setting));
            }
        }
        for (kind, file) in &expected {
            if self.get(file).is_none() {
                return wrong(file, "absent", "present", kind.setting);
            }
        }
        Ok(())
    }
}

impl Serialize for Files {
    fn serialize<S: serde::Serializer>(
        &self,
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

/// Reads a map, in its order, with names that `is_known` accepts.
struct Entries<T>(fn(&str) -> bool, std::marker::PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
    type Value = Vec<(String, T)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let mut entries: Self::Value = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            let wrong = if !(self.0)(&name) {
                "unknown"
            } else if entries.iter().any(|(found, _)| *found == name) {
                "duplicate"
            } else {
                entries.push((name, map.next_value()?));
                continue;
            };
            return Err(A::Error::custom(format_args!("{wrong} field `{}`", in_short(&name))));
        }
        Ok(entries)
    }
}

impl<'de> Deserialize<'de> for Files {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let known = |file: &str| KINDS.iter().any(|kind| kind.owns(file));
        deserializer.deserialize_map(Entries(known, std::marker::PhantomData)).map(Self)
    }
}

/// Reads the fields of an object as text. `known` accepts the names of fields.
///
/// # Errors
/// Returns an error if the text is not an object, or if a field is unknown or occurs twice.
pub(super) fn fields_of(json: &[u8], known: fn(&str) -> bool) -> serde_json::Result<Fields> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let entries: Vec<(String, Box<RawValue>)> =
        deserializer.deserialize_map(Entries(known, std::marker::PhantomData))?;
    deserializer.end()?;
    let mut fields = Fields::default();
    entries.into_iter().for_each(|(name, text)| fields.push(name, text));
    Ok(fields)
}

/// Checks the version before the other fields, because a newer version may have changed them.
///
/// # Errors
/// Returns an error if `format_version` is not from 1 to `newest`.
pub(super) fn check_version(path: &Path, json: &[u8], newest: u32) -> Result<()> {
    #[derive(Deserialize)]
    struct Version {
        format_version: Option<Box<RawValue>>,
    }
    let version: Version = serde_json::from_slice(json).map_err(malformed(path))?;
    let Some(version) = version.format_version else {
        return Err(Error::damaged(path, "format_version is missing"));
    };
    match version.get().parse::<u64>() {
        Ok(found) if found > u64::from(newest) => {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            Err(Error::NewerFormat { path: path.to_owned(), found, supported: newest })
        }
        Ok(1..) => Ok(()),
        _ => {
            let found = in_short(version.get());
            let reason = format!("format_version is {found}; it must be from 1 to {newest}");
            Err(Error::damaged(path, reason))
        }
    }
}

fn malformed(path: &Path) -> impl Fn(serde_json::Error) -> Error {
    move |error| Error::damaged(path, in_short(&error.to_string()))
}

/// Reads `checkpoint.json`, with little more memory than the size of the file.
///
/// # Errors
/// Returns [`Error::NoCheckpoint`] if the file does not exist, or an error if it is damaged or of a newer format.
pub(super) fn read_state(dir: &Path) -> Result<State> {
    let path = dir.join(STATE);
    let missing = |reason: String| Error::NoCheckpoint { path: dir.to_owned(), reason };
    match fs::metadata(&path) {
        Ok(metadata) if !metadata.is_file() => {
            return Err(missing(format!("{STATE} is not a file")));
        }
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Err(missing(format!("there is no {STATE}")));
        }
        _ => {}
    }
    let (file, length) = match open_regular(&path) {
        // A save moved the directory between the two accesses.
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Err(missing(format!("there is no {STATE}")));
        }
        opened => opened?,
    };
    if length > MAX_STATE_BYTES {
        let reason = format!("{length} bytes long; at most {MAX_STATE_BYTES} are expected");
        return Err(Error::damaged(path, reason));
    }
    let mut json = Vec::new();
    file.take(MAX_STATE_BYTES).read_to_end(&mut json).map_err(Error::io(&path))?;
    check_version(&path, &json, FORMAT)?;
    let known =
        |name: &str| HEAD.contains(&name) || KINDS.iter().any(|kind| kind.fields.contains(&name));
    let fields = fields_of(&json, known).map_err(malformed(&path))?;
    drop(json);
    let state = State::of(fields, malformed(&path)).map_err(|error| match error {
        Error::Damaged { .. } => error,
        error => Error::damaged(&path, error.to_string()),
    })?;
    Ok(state)
}

/// The content of a new `checkpoint.json`: the fields of the parts, the configurations, and the checksums.
///
/// # Errors
/// Returns an error if a value cannot be written as JSON.
pub(super) fn state_to_write(
    identity: &Identity<'_>,
    parts: impl FnOnce(&mut Fields) -> Result<()>,
    files: &Files,
) -> Result<Vec<u8>> {
    let mut fields = Fields::default();
    fields.insert("format_version", &FORMAT)?;
    parts(&mut fields)?;
    let (kind, config) = (identity.kind.to_owned(), &identity.network);
    fields.insert("network", &NetworkState { kind, config })?;
    fields.insert("diffusion", identity.diffusion)?;
    fields.insert("train", identity.train)?;
    fields.insert("files", files)?;
    serde_json::to_vec_pretty(&fields).map_err(Error::external)
}

impl State {
    /// Parses and checks the fields. `malformed` makes an error of one of JSON.
    ///
    /// Only resuming a run checks that this build supports its training configuration: the weights can be read in any
    /// case.
    ///
    /// # Errors
    /// Returns an error that names the first field that is not valid, or the first number that no run can reach.
    fn of(mut fields: Fields, malformed: impl Fn(serde_json::Error) -> Error) -> Result<Self> {
        fn head<T: DeserializeOwned>(
            fields: &mut Fields,
            name: &str,
            malformed: &impl Fn(serde_json::Error) -> Error,
        ) -> Result<T> {
            match fields.take(name) {
                Some(text) => serde_json::from_str(text.get()).map_err(malformed),
                None => serde_json::from_str("null")
                    .map_err(|_| Error::external(format!("missing field `{name}`"))),
            }
        }
        let version: u32 = head(&mut fields, "format_version", &malformed)?;
        let state = Self {
            network: head(&mut fields, "network", &malformed)?,
            diffusion: head(&mut fields, "diffusion", &malformed)?,
            train: head(&mut fields, "train", &malformed)?,
            files: head(&mut fields, "files", &malformed)?,
            progress: Progress::of(&fields)?,
            fields,
        };
        KINDS.iter().try_for_each(|kind| (kind.check)(&state.fields, state.progress.step))?;
        state.network.check()?;
        match &state.files {
            None if version > 1 => {
                return Err(Error::config("files", "missing", "present since format 2"));
            }
            Some(files) => files.check(&state.train)?,
            None => {}
        }
        Ok(state)
    }

    /// Returns the training configuration with the number of steps, the reports and the use of memory of another one.
    /// With a cool-down, or with a schedule that ends at `steps`, the number of steps also changes the learning rate of
    /// later updates.
    fn train_as_in(&self, other: &TrainConfig) -> TrainConfig {
        let own = self.train.clone();
        let TrainConfig { steps, log_every, loss_quartiles, keep_checkpoints, recompute, .. } =
            *other;
        TrainConfig { steps, log_every, loss_quartiles, keep_checkpoints, recompute, ..own }
    }

    /// # Errors
    /// Returns an error that ends with `remedy` if this is not a run with these configurations.
    pub fn must_match(&self, identity: &Identity<'_>, remedy: &'static str) -> Result<()> {
        let Identity { kind, network, train, diffusion, .. } = identity;
        if self.network.kind != *kind {
            return Err(mismatch("network.kind", &self.network.kind, kind, remedy));
        }
        compare("network", &self.network.value()?, network, remedy)?;
        if self.diffusion != **diffusion {
            compare("diffusion", &to_value(&self.diffusion)?, &to_value(diffusion)?, remedy)?;
        }
        let mut saved = to_value(&self.train_as_in(train))?;
        // The changes that the run has made since this checkpoint.
        let later = identity.history.iter().skip(self.progress.history.len());
        later.for_each(|change| change.apply("train", &mut saved));
        compare("train", &saved, &to_value(train)?, remedy)
    }

    /// Returns the changes by which a run with this identity differs from the training configuration of this
    /// checkpoint.
    ///
    /// # Errors
    /// Returns an error that ends with `remedy` if anything else differs, or a field that must not change.
    pub fn changes(&self, identity: &Identity<'_>, remedy: &'static str) -> Result<Vec<Change>> {
        let own = Identity { train: &self.train, ..identity.clone() };
        self.must_match(&own, remedy)?;
        let saved = to_value(&self.train_as_in(identity.train))?;
        let found = differences("train", &saved, &to_value(identity.train)?);
        let change = |(field, from, to): (String, Value, Value)| {
            let rest = field.strip_prefix("train.").unwrap_or_default();
            if !CHANGEABLE.contains(&rest.split('.').next().unwrap_or_default()) {
                return Err(mismatch(&field, &brief(&from), &brief(&to), remedy));
            }
            Ok(Change { step: self.progress.step, field, from, to })
        };
        found.into_iter().map(change).collect()
    }

    /// Returns whether the configurations of both states agree, so that they may belong to one run.
    pub fn is_of_the_run_of(&self, other: &Self) -> bool {
        let history = &other.progress.history;
        if self.progress.history.len() > history.len() {
            return other.is_of_the_run_of(self);
        }
        let (kind, train, diffusion) = (&other.network.kind, &other.train, &other.diffusion);
        other.network.value().is_ok_and(|network| {
            self.must_match(&Identity { kind, network, train, diffusion, history }, "").is_ok()
        })
    }
}

/// The fields of the training configuration that a resumed run may change. The others determine the parts of the run,
/// or the random numbers.
const CHANGEABLE: [&str; 11] = [
    "batch_size",
    "accumulation",
    "optimizer",
    "warmup_steps",
    "schedule",
    "cooldown",
    "clip_norm",
    "precision",
    "grad_scaler",
    "horizontal_flip",
    "class_dropout",
];

/// The configurations that identify a run. They change only by the changes of its history.
#[derive(Debug, Clone)]
pub(in crate::train) struct Identity<'a> {
    /// The kind of the network, and its configuration.
    pub kind: &'a str,
    pub network: Value,
    pub train: &'a TrainConfig,
    pub diffusion: &'a Diffusion,
    /// The changes of the configuration during the run.
    pub history: &'a [Change],
}

impl<'a> Identity<'a> {
    /// # Errors
    /// Returns an error if the network's configuration cannot be represented as JSON.
    pub fn new<N: Architecture>(
        network: &N,
        train: &'a TrainConfig,
        diffusion: &'a Diffusion,
        history: &'a [Change],
    ) -> Result<Self> {
        Ok(Self { kind: N::KIND, network: to_value(network)?, train, diffusion, history })
    }
}

pub(super) fn mismatch(field: &str, found: &str, expected: &str, remedy: &'static str) -> Error {
    let (found, expected) = (in_short(found), in_short(expected));
    Error::ConfigMismatch { field: field.into(), found, expected, remedy }
}

pub(super) fn to_value(config: &impl Serialize) -> Result<Value> {
    serde_json::to_value(config).map_err(Error::external)
}

/// # Errors
/// Returns an error that names the first field in which two configurations differ.
fn compare(field: &str, found: &Value, expected: &Value, remedy: &'static str) -> Result<()> {
    match differences(field, found, expected).first() {
        None => Ok(()),
        Some((field, found, expected)) => {
            Err(mismatch(field, &brief(found), &brief(expected), remedy))
        }
    }
}

/// Returns the fields in which two configurations differ, with both values. Of a list, only the first element that
/// differs is a field.
fn differences(field: &str, found: &Value, expected: &Value) -> Vec<(String, Value, Value)> {
    match (found, expected) {
        _ if found == expected => Vec::new(),
        // A field of the training configuration that has its default may be absent.
        (Value::Object(found), Value::Object(expected))
            if field == "train" || found.keys().eq(expected.keys()) =>
        {
            let keys: BTreeSet<&String> = found.keys().chain(expected.keys()).collect();
            let of = |key: &String| {
                let [found, expected] =
                    [found, expected].map(|map| map.get(key).unwrap_or(&Value::Null));
                differences(&format!("{field}.{key}"), found, expected)
            };
            keys.into_iter().flat_map(of).collect()
        }
        (Value::Array(found), Value::Array(expected)) if found.len() == expected.len() => {
            let different = (0..found.len()).find(|&i| found[i] != expected[i]);
            let of = |i| differences(&format!("{field}[{i}]"), &found[i], &expected[i]);
            different.map_or(Vec::new(), of)
        }
        _ => vec![(field.into(), found.clone(), expected.clone())],
    }
}

/// Formats a value as JSON, or a long list as its length.
fn brief(value: &Value) -> String {
    const LONG: usize = 80;
    let text = value.to_string();
    match value {
        Value::Array(list) if text.len() > LONG => format!("a list of {}", list.len()),
        _ => text,
    }
}
