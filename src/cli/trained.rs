use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::ValueEnum;
use serde::Serialize;

use super::arguments::quoted;
use super::network::Network;
use super::result::Result;
use crate::denoiser::{Denoiser, Trainable};
use crate::error::{self, Error};
use crate::model::{Architecture, LucidrainsConfig, UNet2DConfig};
use crate::precision::Precision;
use crate::process::Diffusion;
use crate::sample::{DiffusersFolder, SamplerConfig};
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

/// A trained network, which the option `--checkpoint` names.
#[derive(Debug)]
#[non_exhaustive]
pub enum Trained {
    /// The directory of a checkpoint.
    Checkpoint(Box<Checkpoint>),
    /// A weights file, such as `ema.safetensors` of a checkpoint.
    File(Box<WeightsFile>),
    /// A folder of diffusers.
    Diffusers(Box<DiffusersFolder>),
}

impl Trained {
    /// Opens a checkpoint, a weights file or a folder of diffusers.
    ///
    /// # Errors
    /// Returns an error if `path` is none of these, or if a weights file does not describe its network and its process.
    /// Returns an error if certain weights are `asked` for and `path` is not a checkpoint.
    pub fn open(path: &Path, asked: Option<Weights>) -> Result<Self> {
        let opened = Self::find(path)?;
        if asked.is_some() && opened.weights(asked).is_none() {
            let path = path.display();
            return Err(
                format!("--weights is for the directory of a checkpoint, not {path}").into()
            );
        }
        Ok(opened)
    }

    fn find(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|e| e == "safetensors") && !path.is_dir() {
            return Ok(Self::File(Box::new(WeightsFile::open(path)?)));
        }
        if DiffusersFolder::is_at(path) {
            return Ok(Self::Diffusers(Box::new(DiffusersFolder::open(path)?)));
        }
        let opened = Checkpoint::open(path).map(|found| Self::Checkpoint(Box::new(found)));
        opened.map_err(|error| {
            let nested = path.join("checkpoint");
            match error {
                Error::NoCheckpoint { .. } if nested.is_dir() => {
                    let nested = quoted(&nested.to_string_lossy());
                    format!("{error}; --checkpoint {nested} is one").into()
                }
                _ => error.into(),
            }
        })
    }

    /// The directory or the file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.dir(),
            Self::File(file) => file.path(),
            Self::Diffusers(folder) => folder.path(),
        }
    }

    /// The number of updates of the weights, if it is known.
    pub fn step(&self) -> Option<u64> {
        match self {
            Self::Checkpoint(checkpoint) => Some(checkpoint.step()),
            Self::File(file) => Some(file.step()),
            Self::Diffusers(_) => None,
        }
    }

    /// The process that the network learned to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.diffusion(),
            Self::File(file) => file.diffusion(),
            Self::Diffusers(folder) => folder.diffusion(),
        }
    }

    /// The sampler settings of the run or of the folder, if it recorded them.
    pub fn sampling(&self) -> Option<&SamplerConfig> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.sampling(),
            Self::File(file) => file.sampling(),
            Self::Diffusers(folder) => Some(folder.sampling()),
        }
    }

    /// The network's configuration.
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoint::architecture`], also if the network is of a kind that the programs do not
    /// know.
    pub fn architecture(&self) -> error::Result<Network> {
        match self {
            Self::Checkpoint(saved) => Network::of(saved),
            Self::File(file) => match file.network_kind() {
                UNet2DConfig::KIND => file.architecture().map(Network::UNet2D),
                LucidrainsConfig::KIND => file.architecture().map(Network::Lucidrains),
                _ => file.architecture().map(Network::UNet),
            },
            Self::Diffusers(folder) => Ok(Network::UNet2D(folder.network().clone())),
        }
    }

    /// The weights that [`model`](Self::model) uses: the requested ones, otherwise the averaged ones. `None` for a
    /// weights file or a folder of diffusers, which do not state which weights they hold.
    pub fn weights(&self, asked: Option<Weights>) -> Option<Weights> {
        match self {
            Self::Checkpoint(_) => Some(asked.unwrap_or(Weights::Ema)),
            Self::File(_) | Self::Diffusers(_) => None,
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
            Self::Diffusers(folder) => folder.weights_file(),
        }
    }

    /// Builds the network. `asked` has an effect only with a checkpoint.
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoint::ema`], and an error if the network does not support a setting.
    pub fn model(
        &self,
        asked: Option<Weights>,
        settings: NetworkSettings,
        device: &Device,
    ) -> Result<Box<dyn Denoiser>> {
        match self.architecture()? {
            Network::UNet(network) => settings.applied(self.build(&network, asked, device)?),
            Network::UNet2D(network) => settings.applied(self.build(&network, asked, device)?),
            Network::Lucidrains(network) => settings.applied(self.build(&network, asked, device)?),
        }
    }

    fn build<N: Architecture>(
        &self,
        network: &N,
        asked: Option<Weights>,
        device: &Device,
    ) -> error::Result<N::Model> {
        match (self, asked) {
            (Self::Checkpoint(saved), Some(Weights::Model)) => saved.model::<N>(device),
            (Self::Checkpoint(saved), Some(Weights::Ema) | None) => saved.ema::<N>(device),
            (Self::File(file), _) => file.model::<N>(device),
            (Self::Diffusers(folder), _) => folder.weights(DType::F32, device)?.build(network),
        }
    }
}

/// Settings of a network that are not part of its configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct NetworkSettings {
    /// The precision of products.
    pub precision: Precision,
    /// True if weights are packed again in each pass. See [`Trainable::set_recompute`].
    pub recompute: bool,
}

impl NetworkSettings {
    fn applied<T: Trainable + 'static>(self, mut model: T) -> Result<Box<dyn Denoiser>> {
        model.set_precision(self.precision)?;
        model.set_recompute(self.recompute)?;
        Ok(Box::new(model))
    }
}
