//! Networks in folders of the Python library diffusers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::image_size::ImageSize;
use super::parameters::Parameters;
use super::tensor_file::{read_regular, read_tensors};
use super::unet2d_config::UNet2DConfig;
use crate::error::{Error, Result, in_short};

/// Options of `UNet2DModel` of which the crate has only these values.
const FIXED: [Fixed; 6] = [
    ("_class_name", &["\"UNet2DModel\""]),
    ("act_fn", &["\"silu\"", "\"swish\""]),
    ("class_embed_type", &["null"]),
    ("mid_block_scale_factor", &["1", "1.0"]),
    ("mid_block_type", &["\"UNetMidBlock2D\""]),
    ("time_embedding_type", &["\"positional\""]),
];

/// An option that has an effect only with other values of the options above.
const WITHOUT_EFFECT: &str = "num_train_timesteps";

/// The last part of the names of an attention's layers in earlier versions of diffusers, and today.
const RENAMED: [(&str, &str); 4] =
    [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];

/// The name of a file of weights that the crate writes.
pub(crate) const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// The names of files of weights, in the order in which they are preferred.
const ALL_WEIGHTS: [&str; 2] = [WEIGHTS, "diffusion_pytorch_model.bin"];

/// The name of the configuration of a network.
pub(crate) const CONFIG: &str = "config.json";

/// The version of diffusers with which written folders are tested.
pub(crate) const VERSION: &str = "0.42.1";

/// The values that the crate has of an option, as JSON.
type Fixed = (&'static str, &'static [&'static str]);

/// The options in a configuration file of diffusers.
pub(crate) struct Options {
    path: PathBuf,
    values: Map<String, Value>,
}

impl Options {
    /// # Errors
    /// Returns an error if the file cannot be read or is not a JSON object.
    pub fn read(path: PathBuf) -> Result<Self> {
        match serde_json::from_slice(&read_regular(&path)?) {
            Ok(values) => Ok(Self { path, values }),
            Err(error) => Err(Error::Data { path, reason: error.to_string() }),
        }
    }

    /// The error of an option that the crate lacks.
    pub fn refuse(&self, reason: String) -> Error {
        Error::Data { path: self.path.clone(), reason }
    }

    /// Removes options of which the crate has only these values.
    ///
    /// # Errors
    /// Returns an error that names the first option with another value.
    pub fn check(&mut self, fixed: &[Fixed]) -> Result<()> {
        for (name, allowed) in fixed {
            let Some(value) = self.values.remove(*name) else { continue };
            let value = value.to_string();
            if !allowed.contains(&&*value) {
                let (value, expected) = (in_short(&value), allowed.join(" or "));
                return Err(self.refuse(format!("{name} is {value}; it must be {expected}")));
            }
        }
        Ok(())
    }

    /// Returns whether an option has this text as its value.
    pub fn is(&self, name: &str, text: &str) -> bool {
        self.values.get(name).is_some_and(|value| value == text)
    }

    /// Removes an option that has no effect.
    pub fn ignore(&mut self, name: &str) {
        self.values.remove(name);
    }

    /// Parses all options, except those about the file, whose names begin with an underscore. Every field of `T` has a
    /// default.
    ///
    /// # Errors
    /// Returns an error that names the first option that is not one of `T`.
    pub fn parse<T: DeserializeOwned>(&mut self) -> Result<T> {
        self.values.retain(|name, _| !name.starts_with('_'));
        for (name, value) in &self.values {
            if let Err(error) = serde_json::from_value::<T>(json!({ name: value })) {
                let value = value.to_string();
                return Err(self.refuse(format!("{name} is {}: {error}", in_short(&value))));
            }
        }
        let all = serde_json::from_value(Value::Object(self.values.clone()));
        all.map_err(|error| self.refuse(error.to_string()))
    }
}

impl UNet2DConfig {
    /// Reads the configuration of a `UNet2DModel` from `config.json` in a folder of diffusers.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or is not JSON. Returns an error that names the option and its value
    /// if the crate lacks it, or if the configuration is not [valid](Self::validate).
    pub fn from_diffusers(folder: impl AsRef<Path>) -> Result<Self> {
        let mut options = Options::read(folder.as_ref().join(CONFIG))?;
        options.check(&FIXED)?;
        options.ignore(WITHOUT_EFFECT);
        // `UNet2DModel` ignores options that it does not know.
        if let Some(heads) = options.values.get("num_attention_heads").filter(|h| !h.is_null()) {
            let reason = format!("num_attention_heads is {heads}; UNet2DModel lacks this option");
            return Err(options.refuse(reason));
        }
        if let Some(size) = options.values.get_mut("sample_size")
            && let Some([height, width]) = size.as_array().map(Vec::as_slice)
        {
            *size = json!({ "height": height, "width": width });
        }
        let config: Self = options.parse()?;
        config.validate().map_err(|error| options.refuse(error.to_string()))?;
        Ok(config)
    }

    /// The content of `config.json` for `UNet2DModel`.
    ///
    /// # Errors
    /// Returns an error if diffusers lacks a value, or if a value cannot be written as JSON.
    pub(crate) fn to_diffusers(&self) -> Result<Value> {
        if self.time_scale != 1.0 {
            let expected = "1 in a folder of diffusers, which lacks other values";
            return Err(Error::config("time_scale", self.time_scale, expected));
        }
        let own = Self {
            num_attention_heads: None,
            attention_head_dim: self.head_dim_of_all_levels()?,
            ..self.clone()
        };
        let mut options = json!({
            "_class_name": "UNet2DModel",
            "_diffusers_version": VERSION,
            "act_fn": "silu",
            "class_embed_type": null,
            "mid_block_scale_factor": 1,
            "time_embedding_type": "positional",
        });
        let own = serde_json::to_value(own).map_err(Error::external)?;
        if let (Value::Object(options), Value::Object(own)) = (&mut options, own) {
            options.extend(own);
        }
        let ImageSize { height, width } = self.sample_size;
        if height != width {
            options["sample_size"] = json!([height, width]);
        }
        Ok(options)
    }

    /// The number of channels of a head, which is the same at all levels; `None` for one head.
    ///
    /// # Errors
    /// Returns an error if levels with attention have heads of different numbers of channels.
    fn head_dim_of_all_levels(&self) -> Result<Option<usize>> {
        let Some(heads) = self.num_attention_heads.filter(|&heads| heads != 1) else {
            return Ok(self.attention_head_dim);
        };
        let channels = self.attentive_channels();
        if channels.windows(2).any(|pair| pair[0] != pair[1]) {
            let expected = format!(
                "1 in a folder of diffusers, which has a number of channels per head; the levels with attention have \
                 {channels:?} channels"
            );
            return Err(Error::config("num_attention_heads", heads, expected));
        }
        Ok(channels.first().map(|channels| channels / heads))
    }
}

/// Returns the file in which a folder of diffusers has weights, or the list of several files.
pub(crate) fn weights_file(folder: &Path) -> PathBuf {
    let lists = ALL_WEIGHTS.map(|name| format!("{name}.index.json"));
    let names = ALL_WEIGHTS.iter().zip(&lists).flat_map(|(name, list)| [*name, list]);
    let mut files = names.map(|name| folder.join(name));
    files.find(|file| file.exists()).unwrap_or_else(|| folder.join(WEIGHTS))
}

impl Parameters {
    /// Reads the weights of a network from a folder of diffusers: `diffusion_pytorch_model.safetensors`, or
    /// `diffusion_pytorch_model.bin`, or the files that `diffusion_pytorch_model.safetensors.index.json` or
    /// `diffusion_pytorch_model.bin.index.json` lists. They take no gradients. Attentions may have the names of earlier
    /// versions of diffusers.
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use ddpm::nn::{Parameters, UNet2DConfig};
    ///
    /// let folder = "ddpm-cifar10-32";
    /// let weights = Parameters::load_diffusers(folder, DType::F32, &Device::Cpu)?;
    /// let unet = weights.build(&UNet2DConfig::from_diffusers(folder)?)?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns the errors of [`load`](Self::load), and an error if the list of files is not valid.
    pub fn load_diffusers(folder: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let path = weights_file(folder.as_ref());
        let tensors = match path.extension().is_some_and(|extension| extension == "json") {
            true => read_shards(folder.as_ref(), &path, dtype, device)?,
            false => read_tensors(&path, "", dtype, device)?,
        };
        let tensors = tensors.into_iter().map(|(name, tensor)| (renamed(name), tensor)).collect();
        Ok(Self::frozen(&path, tensors, dtype, device))
    }
}

/// The list of the files of a network.
#[derive(Deserialize)]
struct Index {
    /// The file of each weight.
    weight_map: BTreeMap<String, String>,
}

/// Reads the weights that `index` lists.
fn read_shards(
    folder: &Path,
    index: &Path,
    dtype: DType,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let refuse = |reason: String| Error::Data { path: index.to_owned(), reason };
    let list: Index =
        serde_json::from_slice(&read_regular(index)?).map_err(|error| refuse(error.to_string()))?;
    let mut files: Vec<&String> = list.weight_map.values().collect();
    files.sort();
    files.dedup();
    let mut all = BTreeMap::new();
    for file in files {
        // A path could lead out of the folder.
        if Path::new(file).file_name() != Some(file.as_ref()) {
            let expected = "the names of files in the folder";
            return Err(refuse(format!("lists {}; it must list {expected}", in_short(file))));
        }
        all.extend(read_tensors(&folder.join(file), "", dtype, device)?);
    }
    Ok(all)
}

/// Returns the present name of a weight.
fn renamed(name: String) -> String {
    let parts = |name: &str| {
        let (layer, kind) = name.rsplit_once('.')?;
        let (attention, layer) = layer.rsplit_once('.')?;
        let (_, today) = RENAMED.into_iter().find(|(earlier, _)| *earlier == layer)?;
        attention.contains("attentions.").then(|| format!("{attention}.{today}.{kind}"))
    };
    parts(&name).unwrap_or(name)
}
