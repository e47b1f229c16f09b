use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::choices::ExtractorChoice;
use super::network::NetworkConfig;
use super::recipe::{HELD_OUT_EVERY, Recipe};
use super::result::Result;
use crate::data::folder::FolderConfig;
use crate::error::Error;
use crate::files;
use crate::model::{Architecture, UNet2DConfig, UNetConfig};
use crate::observe::Judge;
use crate::process::Diffusion;
use crate::sample::SamplerConfig;
use crate::train::{TrainConfig, Trainer};

/// The configuration with which a run began: the content of the file `config.json` in its directory. With the same
/// files of images, it reproduces the run.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, bound = "N: Architecture")]
pub(super) struct RunConfig<N> {
    pub network: N,
    pub diffusion: Diffusion,
    pub train: TrainConfig,
    pub sampling: SamplerConfig,
    pub save_every: u64,
    pub sample_every: u64,
    pub sample_count: usize,
    // Files of earlier versions lack the following fields.
    #[serde(default)]
    pub held_out: usize,
    #[serde(default = "held_out_every")]
    pub held_out_every: u64,
    #[serde(default)]
    pub gradient_norms: u64,
    #[serde(default)]
    pub tensorboard: bool,
    #[serde(default)]
    pub judge: usize,
    #[serde(default = "judge_share")]
    pub judge_share: f64,
    #[serde(default)]
    pub extractor: Option<ExtractorChoice>,
    /// The settings of the images, if they are a folder of pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<FolderConfig>,
}

/// Reads the settings of the images from the file of a [`RunConfig`], whatever its network is.
///
/// # Errors
/// Returns an error if the file cannot be read, or if it is not JSON with such settings.
pub(super) fn read_images(path: &Path) -> Result<Option<FolderConfig>> {
    #[derive(Deserialize)]
    struct Images {
        images: Option<FolderConfig>,
    }
    let text = fs::read(path).map_err(Error::io(path))?;
    let config = serde_json::from_slice::<Images>(&text);
    Ok(config.map_err(|e| format!("{}: {e}", path.display()))?.images)
}

/// The [kind](Architecture::KIND) of the network in a configuration, if only one kind has these fields.
fn network_kind(text: &[u8]) -> Option<&'static str> {
    #[derive(Deserialize)]
    struct Network {
        network: Value,
    }
    fn is<N: Architecture>(network: &Value) -> Option<&'static str> {
        N::deserialize(network).is_ok().then_some(N::KIND)
    }
    let Network { network } = serde_json::from_slice(text).ok()?;
    match (is::<UNetConfig>(&network), is::<UNet2DConfig>(&network)) {
        (Some(kind), None) | (None, Some(kind)) => Some(kind),
        _ => None,
    }
}

fn held_out_every() -> u64 {
    HELD_OUT_EVERY
}

fn judge_share() -> f64 {
    Judge::SHARE
}

impl<N: NetworkConfig> RunConfig<N> {
    /// The configuration of a new run, with the settings of its images if they are a folder of pictures.
    pub fn new(trainer: &Trainer<N>, recipe: &Recipe<N>, images: Option<FolderConfig>) -> Self {
        Self {
            network: trainer.architecture().clone(),
            diffusion: trainer.diffusion().clone(),
            train: trainer.config().clone(),
            sampling: recipe.sampling,
            save_every: recipe.save_every,
            sample_every: recipe.sample_every,
            sample_count: recipe.sample_count,
            held_out: recipe.held_out,
            held_out_every: recipe.held_out_every,
            gradient_norms: recipe.gradient_norms,
            tensorboard: recipe.tensorboard,
            judge: recipe.judge,
            judge_share: recipe.judge_share,
            extractor: recipe.extractor.clone(),
            images,
        }
    }

    /// # Errors
    /// Returns an error if the file cannot be read, or names the field that is not valid.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).map_err(Error::io(path))?;
        let config = serde_json::from_slice::<Self>(&text).map_err(|e| {
            let path = path.display();
            match network_kind(&text) {
                Some(kind) if kind != N::KIND => format!(
                    "{path}: the network is {kind}, and this run trains {}; select the network by --network \
                     (unet, or ho for unet2d), if this program has the option",
                    N::KIND
                ),
                _ => format!("{path}: {e}"),
            }
        })?;
        for (field, value) in [
            ("save_every", config.save_every),
            ("sample_every", config.sample_every),
            ("held_out_every", config.held_out_every),
        ] {
            if value == 0 {
                return Err(Error::config(field, value, "at least 1").into());
            }
        }
        if !(1..=1024).contains(&config.sample_count) {
            return Err(Error::config("sample_count", config.sample_count, "from 1 to 1024").into());
        }
        if config.judge == 1 {
            return Err(Error::config("judge", config.judge, "0, or at least 2").into());
        }
        if !(config.judge_share > 0.0 && config.judge_share <= 1.0) {
            let allowed = "above 0, up to 1";
            return Err(Error::config("judge_share", config.judge_share, allowed).into());
        }
        config.network.validate()?;
        config.diffusion.validate()?;
        config.train.validate()?;
        config.sampling.sampler(&config.diffusion)?;
        config.images.as_ref().map_or(Ok(()), FolderConfig::validate)?;
        Ok(config)
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(files::write(path, format!("{}\n", serde_json::to_string_pretty(self)?).as_bytes())?)
    }

    /// Replaces the configuration of a recipe.
    pub fn replace(self, recipe: &Recipe<N>) -> Recipe<N> {
        let watched = self.watch(recipe);
        let Self { network, diffusion, train, sampling, held_out, .. } = self;
        Recipe { network, diffusion, train, sampling, held_out, ..watched }
    }

    /// Replaces the values of a recipe that a checkpoint does not hold, except for the number of held-out images.
    pub fn watch(&self, recipe: &Recipe<N>) -> Recipe<N> {
        Recipe {
            save_every: self.save_every,
            sample_every: self.sample_every,
            sample_count: self.sample_count,
            held_out_every: self.held_out_every,
            gradient_norms: self.gradient_norms,
            tensorboard: self.tensorboard,
            judge: self.judge,
            judge_share: self.judge_share,
            extractor: self.extractor.clone(),
            ..recipe.clone()
        }
    }
}
