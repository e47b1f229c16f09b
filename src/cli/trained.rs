use std::path::{Path, PathBuf};

use candle_core::Device;
use clap::ValueEnum;
use serde::Serialize;

use super::result::Result;
use crate::engine::Model;
use crate::error;
use crate::model::{UNet, UNetConfig};
use crate::process::Diffusion;
use crate::sample::SamplerConfig;
use crate::train::{Checkpoint, WeightsFile};

/// The weights to sample from: the averaged weights, or those of the last update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(
    missing_docs,
    reason = "clap would print a list of documented variants instead of their names"
)]
pub enum Weights {
    Ema,
    Model,
}

/// A trained U-Net, which the option `--checkpoint` names.
#[derive(Debug)]
#[non_exhaustive]
pub enum Trained {
    /// The directory of a checkpoint.
    Checkpoint(Box<Checkpoint>),
    /// A weights file, such as `ema.safetensors` of a checkpoint.
    File(Box<WeightsFile>),
}

impl Trained {
    /// The directory or the file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.dir(),
            Self::File(file) => file.path(),
        }
    }

    /// The number of updates of the weights.
    pub fn step(&self) -> u64 {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.step(),
            Self::File(file) => file.step(),
        }
    }

    /// The process that the network learned to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.diffusion(),
            Self::File(file) => file.diffusion(),
        }
    }

    /// The sampler settings of the run, if it recorded them.
    pub fn sampling(&self) -> Option<&SamplerConfig> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.sampling(),
            Self::File(file) => file.sampling(),
        }
    }

    /// The network's configuration.
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoint::architecture`].
    pub fn architecture(&self) -> error::Result<UNetConfig> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.architecture(),
            Self::File(file) => file.architecture(),
        }
    }

    /// The weights that [`model`](Self::model) uses: the requested ones, otherwise the averaged ones. `None` for a
    /// weights file, which does not state which weights it holds.
    pub fn weights(&self, asked: Option<Weights>) -> Option<Weights> {
        match self {
            Self::Checkpoint(_) => Some(asked.unwrap_or(Weights::Ema)),
            Self::File(_) => None,
        }
    }

    /// The file of the weights that [`model`](Self::model) uses.
    pub fn weights_file(&self, asked: Option<Weights>) -> PathBuf {
        match self {
            Self::Checkpoint(checkpoint) => match asked {
                Some(Weights::Model) => checkpoint.model_file(),
                Some(Weights::Ema) | None => checkpoint.ema_file(),
            },
            Self::File(file) => file.path().into(),
        }
    }

    /// Builds the network. With a weights file, `asked` has no effect.
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoint::ema`].
    pub fn model(&self, asked: Option<Weights>, device: &Device) -> Result<Model<UNet>> {
        match self {
            Self::Checkpoint(checkpoint) => Ok(match asked {
                Some(Weights::Model) => checkpoint.model::<UNetConfig>(device)?,
                Some(Weights::Ema) | None => checkpoint.ema::<UNetConfig>(device)?,
            }),
            Self::File(file) => Ok(file.model::<UNetConfig>(device)?),
        }
    }
}
