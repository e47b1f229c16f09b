use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::files::Checksum;
use crate::error::{Error, Result, in_short};
use crate::model::Architecture;
use crate::model::tensor_file::open_regular;
use crate::process::diffusion::Diffusion;
use crate::sample::SamplerConfig;
use crate::train::config::TrainConfig;
use crate::train::optim::scaler::ScalerState;
use crate::train::state::Fields;

/// File names: `STATE` holds everything except tensors. Each of the others holds the tensors of one part.
pub(super) const STATE: &str = "checkpoint.json";
pub(super) const MODEL: &str = "model.safetensors";
pub(super) const EMA: &str = "ema.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";

/// The name of the file of a part's tensors.
pub(super) fn file_of(part: &str) -> String {
    format!("{part}.safetensors")
}

/// The format that this version writes, and the newest that it reads. Format 1 had no checksums.
pub(super) const FORMAT: u32 = 2;

/// The largest `checkpoint.json` that is read; a custom schedule of a million steps fits.
const MAX_STATE_BYTES: u64 = 64 << 20;

/// The longest configuration of a network that is read.
const MAX_NETWORK_BYTES: usize = 1 << 20;

/// The content of `checkpoint.json`: everything except the tensors.
///
/// `C` is the network's configuration. It is kept as text until its type is known, because a parsed value would
/// take many times the memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State<C = Box<RawValue>> {
    pub format_version: u32,
    pub step: u64,
    pub images_seen: u64,
    /// Number of images in the data set, once one was used.
    pub dataset_len: Option<u64>,
    pub ema_updates: u64,
    /// Present with [`Precision::F16`](crate::Precision::F16).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_scaler: Option<ScalerState>,
    pub network: NetworkState<C>,
    pub diffusion: Diffusion,
    pub train: TrainConfig,
    /// The sampler settings of the run, if it recorded them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplerConfig>,
    /// Present since format 2.
    pub files: Option<Files>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkState<C> {
    pub kind: String,
    pub config: C,
}

/// Checksums of the files of tensors.
#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Files {
    #[serde(rename = "model.safetensors")]
    pub model: Checksum,
    #[serde(rename = "ema.safetensors", default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<Checksum>,
    #[serde(rename = "optimizer.safetensors")]
    pub optimizer: Checksum,
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
    let malformed = |e: serde_json::Error| Error::damaged(&path, in_short(&e.to_string()));

    /// The version, read before the other fields, which a newer version may have changed.
    #[derive(Deserialize)]
    struct Version {
        format_version: Option<Box<RawValue>>,
    }
    let version: Version = serde_json::from_slice(&json).map_err(malformed)?;
    let Some(version) = version.format_version else {
        return Err(Error::damaged(path, "format_version is missing"));
    };
    match version.get().parse::<u64>() {
        Ok(found) if found > u64::from(FORMAT) => {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            return Err(Error::NewerFormat { path, found, supported: FORMAT });
        }
        Ok(1..) => {}
        _ => {
            let found = in_short(version.get());
            let reason = format!("format_version is {found}; it must be from 1 to {FORMAT}");
            return Err(Error::damaged(path, reason));
        }
    }
    let state: State = serde_json::from_slice(&json).map_err(malformed)?;
    state.check().map_err(|e| Error::damaged(&path, e.to_string()))?;
    Ok(state)
}

/// The fields of `checkpoint.json` that the parts of a run save.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartFields {
    step: u64,
    images_seen: u64,
    dataset_len: Option<u64>,
    #[serde(default)]
    ema_updates: u64,
    #[serde(default)]
    grad_scaler: Option<ScalerState>,
    #[serde(default)]
    sampling: Option<SamplerConfig>,
}

impl State<Value> {
    /// Builds the state to write from the fields of the parts and the checksums of their files.
    ///
    /// # Errors
    /// Returns an error if there is a field or a file that the format does not have.
    pub fn new(identity: &Identity<'_>, fields: Fields, files: Fields) -> Result<Self> {
        let PartFields { step, images_seen, dataset_len, ema_updates, grad_scaler, sampling } =
            from_fields(fields)?;
        let (kind, config) = (identity.kind.to_owned(), identity.network.clone());
        Ok(Self {
            format_version: FORMAT,
            step,
            images_seen,
            dataset_len,
            ema_updates,
            grad_scaler,
            network: NetworkState { kind, config },
            diffusion: identity.diffusion.clone(),
            train: identity.train.clone(),
            sampling,
            files: Some(from_fields(files)?),
        })
    }
}

fn from_fields<T: serde::de::DeserializeOwned>(fields: Fields) -> Result<T> {
    serde_json::from_value(Value::Object(fields)).map_err(Error::external)
}

impl State {
    /// Checks the numbers. Whether this build supports the training configuration is checked only when a run is
    /// resumed: the weights can be read in any case.
    ///
    /// # Errors
    /// Returns an error that names the first number that no run can reach.
    fn check(&self) -> Result<()> {
        let within = |field, value, most| {
            if value > most {
                return Err(Error::config(field, value, format!("at most {most}")));
            }
            Ok(())
        };
        within("step", self.step, MAX_STEP)?;
        // Leaves room to add as many images again without an overflow.
        within("images_seen", self.images_seen, u64::MAX / 2)?;
        // At most one per update.
        within("ema_updates", self.ema_updates, self.step)?;
        if let Some(scaler) = self.grad_scaler {
            within("grad_scaler.skipped", scaler.skipped, self.step)?;
        }
        let length = self.network.config.get().len();
        within("length of network.config", length as u64, MAX_NETWORK_BYTES as u64)?;
        match &self.files {
            None if self.format_version > 1 => {
                Err(Error::config("files", "missing", "present since format 2"))
            }
            Some(files) if files.ema.is_some() != self.train.ema.is_some() => {
                let presence = |yes| if yes { "present" } else { "absent" };
                let value = presence(files.ema.is_some());
                let expected = format!("{}, as train.ema is", presence(self.train.ema.is_some()));
                Err(Error::config("files.ema.safetensors", value, expected))
            }
            _ => Ok(()),
        }
    }

    /// The fields that parts of a run saved.
    ///
    /// # Errors
    /// Returns an error if a value cannot be represented as JSON.
    pub fn fields(&self) -> Result<Fields> {
        let Self { step, images_seen, dataset_len, ema_updates, grad_scaler, sampling, .. } = *self;
        let fields =
            PartFields { step, images_seen, dataset_len, ema_updates, grad_scaler, sampling };
        match to_value(&fields)? {
            Value::Object(fields) => Ok(fields),
            _ => Ok(Fields::new()),
        }
    }

    /// The network's configuration as a JSON value, because its type is not known here.
    fn network_value(&self) -> Result<Value> {
        serde_json::from_str(self.network.config.get()).map_err(Error::external)
    }

    /// # Errors
    /// Returns an error that ends with `remedy` if this is not a run with these configurations.
    pub fn must_match(&self, identity: &Identity<'_>, remedy: &'static str) -> Result<()> {
        let Identity { kind, network, train, diffusion } = identity;
        if self.network.kind != *kind {
            return Err(mismatch("network.kind", &self.network.kind, kind, remedy));
        }
        compare("network", &self.network_value()?, network, remedy)?;
        if self.diffusion != **diffusion {
            compare("diffusion", &to_value(&self.diffusion)?, &to_value(diffusion)?, remedy)?;
        }
        // These fields change the length of a run and its reports, but not its results.
        let TrainConfig { steps, log_every, keep_checkpoints, .. } = **train;
        let saved = TrainConfig { steps, log_every, keep_checkpoints, ..self.train.clone() };
        compare("train", &to_value(&saved)?, &to_value(train)?, remedy)
    }

    /// Returns whether the configurations of both states agree, so that they may belong to one run.
    pub fn is_of_the_run_of(&self, other: &Self) -> bool {
        let (kind, train, diffusion) = (&other.network.kind, &other.train, &other.diffusion);
        other.network_value().is_ok_and(|network| {
            self.must_match(&Identity { kind, network, train, diffusion }, "").is_ok()
        })
    }
}

/// The configurations that identify a run. They do not change during the run.
#[derive(Debug)]
pub(in crate::train) struct Identity<'a> {
    /// The kind of the network, and its configuration.
    pub kind: &'a str,
    pub network: Value,
    pub train: &'a TrainConfig,
    pub diffusion: &'a Diffusion,
}

impl<'a> Identity<'a> {
    /// # Errors
    /// Returns an error if the network's configuration cannot be represented as JSON.
    pub fn new<N: Architecture>(
        network: &N,
        train: &'a TrainConfig,
        diffusion: &'a Diffusion,
    ) -> Result<Self> {
        Ok(Self { kind: N::KIND, network: to_value(network)?, train, diffusion })
    }
}

/// The largest step of a run, limited by the addresses of random numbers.
pub(in crate::train) const MAX_STEP: u64 = (1 << 40) - 1;

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
    if let (Value::Object(found), Value::Object(expected)) = (found, expected)
        && found.keys().eq(expected.keys())
    {
        return found.iter().try_for_each(|(key, value)| {
            compare(&format!("{field}.{key}"), value, &expected[key], remedy)
        });
    }
    if found == expected {
        return Ok(());
    }
    if let (Value::Array(found), Value::Array(expected)) = (found, expected)
        && found.len() == expected.len()
        && let Some(i) = (0..found.len()).find(|&i| found[i] != expected[i])
    {
        return compare(&format!("{field}[{i}]"), &found[i], &expected[i], remedy);
    }
    Err(mismatch(field, &brief(found), &brief(expected), remedy))
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
