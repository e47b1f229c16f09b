//! The network of a checkpoint or a weights file: its kind and its configuration.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::{Error, Result, in_short};
use crate::model::{Architecture, Parameters};
use crate::train::stateful::within;

/// The greatest length in bytes of a network's configuration.
const MAX_BYTES: u64 = 1 << 20;

/// `C` is the network's configuration. It is kept as text until its type is known, because a parsed value would
/// take many times the memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkState<C> {
    pub kind: String,
    pub config: C,
}

impl NetworkState<Box<RawValue>> {
    /// # Errors
    /// Returns an error if the configuration is too long.
    pub fn check(&self) -> Result<()> {
        within("length of network.config", self.config.get().len() as u64, MAX_BYTES)
    }

    /// Returns the configuration as a JSON value, because its type is not known here.
    pub fn value(&self) -> Result<Value> {
        serde_json::from_str(self.config.get()).map_err(Error::external)
    }

    /// Returns the configuration, which was read from the file `path`.
    ///
    /// # Errors
    /// Returns an error if the network is of another kind, or if `N` does not accept the configuration.
    pub fn architecture<N: Architecture>(&self, path: &Path) -> Result<N> {
        if self.kind != N::KIND {
            return Err(Error::ConfigMismatch {
                field: "network.kind".into(),
                found: in_short(&self.kind),
                expected: N::KIND.into(),
                remedy: "ask for a network of that kind",
            });
        }
        serde_json::from_str(self.config.get()).map_err(|error| damaged(path, error))
    }

    /// Builds the network with these weights. The configuration was read from the file `path`.
    ///
    /// # Errors
    /// Returns the errors of [`architecture`](Self::architecture), and an error if the weights are not exactly those of
    /// the network.
    pub fn build<N: Architecture>(&self, path: &Path, weights: &Parameters) -> Result<N::Model> {
        weights.build(&self.architecture::<N>(path)?).map_err(|error| match error {
            Error::Config { .. } => damaged(path, error),
            error => error,
        })
    }
}

fn damaged(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::damaged(path, format!("network.config: {}", in_short(&error.to_string())))
}
