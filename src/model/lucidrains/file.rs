use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::config::LucidrainsConfig;
use crate::error::{Error, Result};
use crate::model::image_size::ImageSize;
use crate::model::parameters::Parameters;
use crate::model::tensor_file::read_tensors;
use crate::process::NoiseSchedule;

/// The names before those of the process: of the averaged weights in a file of the trainer, and in a state dict.
const PREFIXES: [&str; 2] = ["ema.ema_model.", ""];

/// The largest difference of betas that have the same formula. The package computes the ends of its sigmoid schedule in
/// f32. Betas are wrong by up to 6.5e-6 with 1000 timesteps, and by up to 2.6e-5 with 4000.
fn same_beta(steps: usize) -> f64 {
    1e-5 * (steps as f64 / 1000.0).max(1.0)
}

/// A file of the Python package denoising-diffusion-pytorch: the weights of its `Unet`, and its noise schedule.
///
/// The `Trainer` of the package writes such a file (`model-10.pt`). Its averaged weights are read. The state dict of a
/// `GaussianDiffusion` or of a `Unet` is also such a file. Versions 1.9 to 2.3 wrote these files. No code of the file
/// is run.
///
/// Names and shapes determine the network, except for the size of the images, `sinusoidal_pos_emb_theta`, and
/// `resnet_block_groups` before version 2. The last two are assumed to be the package's defaults, and can be changed in
/// the configuration. The quantity that the network predicts, `objective`, is not in the file, either. Images are
/// assumed to be from -1 to 1, as with `auto_normalize`. Wrong values give wrong images without an error.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use ddpm::nn::LucidrainsFile;
/// use ddpm::process::Prediction;
/// use ddpm::{Diffusion, Sampler, Solver};
///
/// let file = LucidrainsFile::load("model-10.pt", DType::F32, &Device::Cpu)?;
/// let network = file.network(64)?; // image_size
/// let unet = file.weights().build(&network)?;
/// let diffusion = Diffusion::new(file.schedule()?, Prediction::Velocity); // objective="pred_v", the default
/// let sampler = Sampler::new(&diffusion, Solver::ddim(), 50)?;
/// let images = sampler.sample(&unet, (4, network.channels, 64, 64), 0, &Device::Cpu)?;
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug)]
pub struct LucidrainsFile {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    betas: Option<Tensor>,
    dtype: DType,
    device: Device,
}

impl LucidrainsFile {
    /// Reads a file.
    ///
    /// # Errors
    /// Returns the errors of [`Parameters::load`]. Returns an error if these are not the weights of such a network, and
    /// names the reason if it is of another version.
    pub fn load(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let read = |prefix: &str| read_tensors(path, prefix, dtype, device);
        let file = |tensors, betas| {
            Self { path: path.to_owned(), tensors, betas, dtype, device: device.clone() }.checked()
        };
        for process in PREFIXES {
            let tensors = read(&format!("{process}model."))?;
            if tensors.contains_key("init_conv.weight") {
                return file(tensors, read(&format!("{process}betas"))?.remove(""));
            }
        }
        file(read("")?, None)
    }

    fn checked(self) -> Result<Self> {
        let has = |name: &str| self.tensors.contains_key(name);
        let reason = if !has("init_conv.weight") || !has("downs.0.0.block1.proj.weight") {
            "these are not the weights of a Unet of denoising-diffusion-pytorch"
        } else if !has("mid_attn.mem_kv") {
            "mid_attn.mem_kv is missing: the network of a version before 1.9, or of another module than Unet, such as \
             classifier_free_guidance; it computes another function"
        } else {
            return Ok(self);
        };
        Err(self.refuse(reason))
    }

    /// Derives the configuration of the network for images of this size. The dropout, which matters only for further
    /// training, is 0.
    ///
    /// # Errors
    /// Returns an error if the network has self-conditioning, which the crate lacks, or if the shapes do not fit each
    /// other. Returns an error if the levels cannot halve the size.
    pub fn network(&self, image_size: impl Into<ImageSize>) -> Result<LucidrainsConfig> {
        let [init_dim, channels, ..] = self.dims::<4>("init_conv.weight")?;
        let [outputs, ..] = self.dims::<4>("final_conv.weight")?;
        if ![channels, 2 * channels].contains(&outputs) {
            let found = format!("{channels} channels of the input and {outputs} of the output");
            let reason = "a network with self_condition or out_dim, which the crate lacks";
            return Err(self.refuse(format!("{found}: {reason}")));
        }
        let [time_dim, _] = self.dims("time_mlp.1.weight")?;
        let frequencies = self.tensors.get("time_mlp.0.weights");
        let has_groups = self.tensors.contains_key("downs.0.0.block1.norm.weight");
        let mut config = LucidrainsConfig {
            channels,
            init_dim,
            dim_mults: vec![],
            learned_variance: outputs != channels,
            learned_sinusoidal_dim: frequencies.map(|weights| 2 * weights.elem_count()),
            attn_heads: vec![],
            attn_dim_head: vec![],
            full_attn: vec![],
            resnet_block_groups: has_groups.then_some(8),
            ..LucidrainsConfig::new(image_size, time_dim / 4)
        };
        for level in 0.. {
            let name = |part: &str| format!("downs.{level}.{part}");
            if !self.tensors.contains_key(&name("0.block1.proj.weight")) {
                break;
            }
            // The last level keeps the size.
            let last = self.tensors.contains_key(&name("3.weight"));
            let [width, ..] =
                self.dims::<4>(&name(if last { "3.weight" } else { "3.1.weight" }))?;
            if config.dim == 0 || !width.is_multiple_of(config.dim) {
                let reason =
                    format!("level {level} has {width} channels, and dim is {}", config.dim);
                return Err(self.refuse(format!("{reason}; dim must divide the channels")));
            }
            let full = self.tensors.contains_key(&name("2.to_out.weight"));
            let [_, heads, a, b] = self.dims(&name("2.mem_kv"))?;
            let (of_head, keys) = if full { (b, a) } else { (a, b) };
            config.dim_mults.push(width / config.dim);
            config.attn_heads.push(heads);
            config.attn_dim_head.push(of_head);
            config.full_attn.push(full);
            config.num_mem_kv = keys;
        }
        config.validate().map_err(|error| self.refuse(error.to_string()))?;
        Ok(config)
    }

    /// The noise schedule: a linear, cosine or sigmoid schedule with the package's default arguments, if all betas of
    /// the file are those of this schedule, except for rounding. Otherwise it has the betas of the file.
    ///
    /// # Errors
    /// Returns an error if the file has no betas, as the state dict of a network alone, or if they are not those of a
    /// [`NoiseSchedule`].
    pub fn schedule(&self) -> Result<NoiseSchedule> {
        let Some(betas) = &self.betas else {
            let reason = "it has no betas, so its process is not a GaussianDiffusion";
            return Err(self.refuse(reason));
        };
        let betas =
            betas.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let steps = betas.len();
        let known = [
            NoiseSchedule::sigmoid(steps, -3.0, 3.0, 1.0),
            NoiseSchedule::cosine(steps),
            NoiseSchedule::linear_scaled(steps),
        ];
        let same = |schedule: &NoiseSchedule| {
            let mut pairs = schedule.betas().iter().zip(&betas);
            pairs.all(|(a, b)| (a - b).abs() <= same_beta(steps))
        };
        if let Some(schedule) = known.into_iter().flatten().find(same) {
            return Ok(schedule);
        }
        NoiseSchedule::from_betas(betas).map_err(|error| self.refuse(error.to_string()))
    }

    /// The weights, which take no gradients.
    pub fn weights(&self) -> Parameters {
        Parameters::frozen(&self.path, self.tensors.clone(), self.dtype, &self.device)
    }

    /// The dimensions of a weight.
    fn dims<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let found = self.tensors.get(name).map(Tensor::dims);
        found.and_then(|dims| dims.try_into().ok()).ok_or_else(|| {
            self.refuse(match found {
                Some(dims) => format!("{name} has shape {dims:?}; it must have {N} dimensions"),
                None => format!("{name} is missing"),
            })
        })
    }

    fn refuse(&self, reason: impl Into<String>) -> Error {
        Error::data(&self.path, reason)
    }
}
