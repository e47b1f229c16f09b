//! Weights files, which describe their network and their process in the metadata of a safetensors file.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::files::{write_synced, write_tensors};
use super::format::{check_version, fields_of};
use super::network::NetworkState;
use crate::error::{Error, Result, in_short};
use crate::files::make;
use crate::model::diffusers::{CONFIG, WEIGHTS};
use crate::model::tensor_file::{metadata_of, read_regular, tensors_of};
use crate::model::{Architecture, Parameters, UNet2DConfig};
use crate::process::diffusion::Diffusion;
use crate::sample::diffusers::SCHEDULER;
use crate::sample::pipeline::Described;
use crate::sample::{Sampler, SamplerConfig};
use crate::train::state::MAX_STEP;
use crate::train::stateful::within;

/// The key of the description in the metadata.
pub(super) const KEY: &str = "ddpm";

/// The format of the description that this version writes, and the newest format that it reads.
const FORMAT: u32 = 1;

/// The values of the bytes 0 and 255 in training; see [`normalized`](crate::data::normalized).
const PIXEL_RANGE: [f64; 2] = [-1.0, 1.0];

/// The description of the weights of a network of this kind after `step` updates, as JSON. The order of its fields is
/// fixed.
///
/// # Errors
/// Returns an error if a value cannot be written as JSON.
pub(super) fn describe(
    (kind, network): (&str, &impl Serialize),
    diffusion: &Diffusion,
    step: u64,
    sampling: Option<&SamplerConfig>,
) -> Result<String> {
    #[derive(Serialize)]
    struct Described<'a, C> {
        format_version: u32,
        step: u64,
        network: NetworkState<C>,
        diffusion: &'a Diffusion,
        pixel_range: [f64; 2],
        #[serde(skip_serializing_if = "Option::is_none")]
        sampling: Option<&'a SamplerConfig>,
    }
    let described = Described {
        format_version: FORMAT,
        step,
        network: NetworkState { kind: kind.to_owned(), config: network },
        diffusion,
        pixel_range: PIXEL_RANGE,
        sampling,
    };
    serde_json::to_string(&described).map_err(Error::external)
}

/// A weights file: a safetensors file with weights, and a description of their network and process. Sampling needs no
/// other file.
///
/// A [`Checkpoint`](crate::Checkpoint) has these weights files: `model.safetensors`, `ema.safetensors` and the further
/// averages. They can be copied and renamed. The description is the text of the key `ddpm` in the metadata of the file
/// (`__metadata__`), a JSON object:
///
/// | field | content |
/// | --- | --- |
/// | `format_version` | 1 |
/// | `step` | the number of updates |
/// | `network` | `kind`, and `config`: the configuration, which for the U-Net includes the shape of the images |
/// | `diffusion` | the schedule, and the meaning of the network's output |
/// | `pixel_range` | the values of the bytes 0 and 255: `[-1.0, 1.0]` |
/// | `sampling` | the sampler settings of the run, if they were set |
///
/// The whole file is in memory as long as this value exists.
///
/// ```no_run
/// use candle_core::Device;
/// use ddpm::UNetConfig;
/// use ddpm::train::WeightsFile;
///
/// let weights = WeightsFile::open("digits.safetensors")?;
/// let unet = weights.model::<UNetConfig>(&Device::Cpu)?;
/// let (channels, height, width) = weights.architecture::<UNetConfig>()?.image_shape();
/// let images = weights.sampler()?.sample(&unet, (16, channels, height, width), 0, &Device::Cpu)?;
/// # Ok::<(), ddpm::Error>(())
/// ```
pub struct WeightsFile {
    path: PathBuf,
    content: Vec<u8>,
    step: u64,
    network: NetworkState<Box<RawValue>>,
    diffusion: Diffusion,
    sampling: Option<SamplerConfig>,
}

impl WeightsFile {
    /// Writes a weights file of a network that another program trained, and whose number of updates is therefore 0. The
    /// file is complete or does not exist.
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use ddpm::sample::DiffusersFolder;
    /// use ddpm::train::WeightsFile;
    ///
    /// let folder = DiffusersFolder::open("ddpm-cifar10-32")?;
    /// let weights = folder.weights(DType::F32, &Device::Cpu)?;
    /// let sampling = Some(folder.sampling());
    /// let path = "cifar10.safetensors";
    /// WeightsFile::create(path, folder.network(), &weights, folder.diffusion(), sampling)?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if these are not exactly the weights of the network, or if the process or the sampler settings
    /// are not valid. Returns an error if the file cannot be written.
    pub fn create<N: Architecture>(
        path: impl AsRef<Path>,
        network: &N,
        weights: &Parameters,
        diffusion: &Diffusion,
        sampling: Option<&SamplerConfig>,
    ) -> Result<()> {
        diffusion.validate()?;
        sampling.map_or(Ok(()), |sampling| sampling.sampler(diffusion).map(drop))?;
        weights.build(network)?;
        let description = describe((N::KIND, network), diffusion, 0, sampling)?;
        let tensors = named(weights);
        make(path.as_ref(), |path| {
            write_tensors(path, &tensors, Some((KEY, &description)), 0).map(drop)
        })
    }

    /// Reads a weights file. The tensors are checked when the network is built.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, if it is not a complete safetensors file, or if it has no
    /// description. Files of PyTorch or of an earlier version have no description. Returns an error that names the
    /// field if the description is not valid or has a newer format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let content = read_regular(&path)?;
        let Some(json) = metadata_of(&path, &content, KEY)? else {
            let reason = format!(
                "the metadata has no key `{KEY}`, which describes the network and the process; open the directory of \
                 the checkpoint instead, or load the weights with Parameters::load and the configuration of the network"
            );
            return Err(Error::data(path, reason));
        };
        check_version(&path, json.as_bytes(), FORMAT)?;
        Self::described(&path, content, &json)
            .map_err(|error| Error::damaged(path, format!("metadata `{KEY}`: {error}")))
    }

    /// # Errors
    /// Returns an error that names the first field that is not valid.
    fn described(path: &Path, content: Vec<u8>, json: &str) -> Result<Self> {
        let known = |name: &str| {
            let names =
                ["format_version", "step", "network", "diffusion", "pixel_range", "sampling"];
            names.contains(&name)
        };
        let fields = fields_of(json.as_bytes(), known)
            .map_err(|error| Error::external(in_short(&error.to_string())))?;
        let file = Self {
            path: path.to_owned(),
            content,
            step: fields.get("step")?,
            network: fields.get("network")?,
            diffusion: fields.get("diffusion")?,
            sampling: fields.get("sampling")?,
        };
        within("step", file.step, MAX_STEP)?;
        file.network.check()?;
        let range: [f64; 2] = fields.get("pixel_range")?;
        if range != PIXEL_RANGE {
            return Err(Error::config(
                "pixel_range",
                format!("{range:?}"),
                format!("{PIXEL_RANGE:?}"),
            ));
        }
        if let Some(sampling) = &file.sampling {
            let sampler = sampling.sampler(&file.diffusion);
            sampler.map_err(|error| Error::external(format!("sampling: {error}")))?;
        }
        Ok(file)
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of updates of the weights.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The process that the network learned to reverse.
    pub fn diffusion(&self) -> &Diffusion {
        &self.diffusion
    }

    /// The sampler settings of the run, if it [recorded](crate::Trainer::set_sampling) them.
    pub fn sampling(&self) -> Option<&SamplerConfig> {
        self.sampling.as_ref()
    }

    /// Creates a sampler with the settings of the run, or with [`SamplerConfig::usual`] if it recorded none.
    ///
    /// # Errors
    /// Returns the errors of [`Sampler::new`].
    pub fn sampler(&self) -> Result<Sampler> {
        let usual = SamplerConfig::usual(&self.diffusion);
        self.sampling.as_ref().unwrap_or(&usual).sampler(&self.diffusion)
    }

    /// The [kind](Architecture::KIND) of the network.
    pub fn network_kind(&self) -> &str {
        &self.network.kind
    }

    /// The network's configuration.
    ///
    /// # Errors
    /// Returns an error if the network is of another kind, or if `N` does not accept the configuration.
    pub fn architecture<N: Architecture>(&self) -> Result<N> {
        self.network.architecture(&self.path)
    }

    /// Builds the network with the weights of the file. They take no gradients.
    ///
    /// # Errors
    /// Returns the errors of [`architecture`](Self::architecture), and an error if the file does not hold exactly the
    /// weights of the network, all of them finite.
    pub fn model<N: Architecture>(&self, device: &Device) -> Result<N::Model> {
        self.network.build::<N>(&self.path, &self.parameters(device)?)
    }

    fn parameters(&self, device: &Device) -> Result<Parameters> {
        let tensors = tensors_of(&self.path, &self.content, DType::F32, device)?;
        Ok(Parameters::frozen(&self.path, tensors, DType::F32, device))
    }

    /// Writes the network, its process and sampler settings as a folder of diffusers. `DDPMPipeline.from_pretrained` or
    /// `DDIMPipeline.from_pretrained` opens it, and so does [`DiffusersFolder`](crate::sample::DiffusersFolder).
    /// `sampling` replaces the settings of the run. If there are none, they are
    /// [`usual`](SamplerConfig::usual)`().`[`for_diffusers`](SamplerConfig::for_diffusers)`()`. The folder is complete
    /// or does not exist.
    ///
    /// The number of sampling steps is an argument of a pipeline, and not a part of the folder. The pipelines give a
    /// network no classes.
    ///
    /// # Errors
    /// Returns an error that names the first setting that such a folder does not have, such as a network other than
    /// [`UNet2D`](crate::nn::UNet2D) or a solver other than `ddpm` or `ddim`. DDIM with clipping or even timesteps is
    /// such an error; [`for_diffusers`](SamplerConfig::for_diffusers) replaces these settings. Returns an error if
    /// `folder` exists, or cannot be written.
    pub fn export_diffusers(
        &self,
        folder: impl AsRef<Path>,
        sampling: Option<&SamplerConfig>,
    ) -> Result<()> {
        let folder = folder.as_ref();
        if self.network.kind != UNet2DConfig::KIND {
            let expected = "unet2d, because diffusers lacks the others";
            return Err(Error::config("network.kind", in_short(&self.network.kind), expected));
        }
        if folder.symlink_metadata().is_ok() {
            let expected = "a path at which there is nothing";
            return Err(Error::config("folder", folder.display(), expected));
        }
        let network: UNet2DConfig = self.architecture()?;
        let usual = SamplerConfig::usual(&self.diffusion).for_diffusers();
        let sampling = sampling.or(self.sampling.as_ref()).unwrap_or(&usual);
        let Described { index, scheduler } = Described::of(&network, &self.diffusion, sampling)?;
        let weights = self.parameters(&Device::Cpu)?;
        self.network.build::<UNet2DConfig>(&self.path, &weights)?;
        make(folder, |folder| {
            let write = |path: PathBuf, content: &Value| {
                write_synced(&path, format!("{content:#}\n").as_bytes())
            };
            let (unet, of_scheduler) = (folder.join("unet"), folder.join("scheduler"));
            for folder in [folder, &unet, &of_scheduler] {
                fs::create_dir(folder).map_err(Error::io(folder))?;
            }
            write(unet.join(CONFIG), &network.to_diffusers()?)?;
            write(of_scheduler.join(SCHEDULER), &scheduler)?;
            write(folder.join("model_index.json"), &index)?;
            let path = unet.join(WEIGHTS);
            write_tensors(&path, &named(&weights), Some(("format", "pt")), self.step).map(drop)
        })
    }
}

/// The weights that a network requested.
fn named(weights: &Parameters) -> BTreeMap<String, Tensor> {
    weights.vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect()
}

// A derived `Debug` would print the content.
impl fmt::Debug for WeightsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeightsFile")
            .field("path", &self.path)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}
