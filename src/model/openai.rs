//! Networks of OpenAI's improved-diffusion and guided-diffusion.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::image_size::ImageSize;
use super::parameters::Parameters;
use super::tensor_file::read_tensors;
use super::unet2d_config::{
    DownBlockType, Resampling, TimeConditioning, UNet2DConfig, UpBlockType,
};
use crate::error::{Error, Result};

/// The number of groups of every normalisation.
const GROUPS: usize = 32;

/// The layers of a residual block, and their names in [`UNet2D`](super::unet2d::UNet2D).
const RES: [(&str, &str); 6] = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];

/// The layers outside of the two paths.
const OTHERS: [(&str, &str); 6] = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb", "class_embedding"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
];

/// The settings of a `UNetModel` of OpenAI's improved-diffusion or guided-diffusion (Nichol and Dhariwal 2021, Dhariwal
/// and Nichol 2021) that do not follow from its weights.
///
/// [`load`](Self::load) reads such a network as a [`UNet2D`](crate::nn::UNet2D). Both compute the same function. A
/// file of weights, such as `256x256_diffusion_uncond.pt`, is a state dict without a configuration. The settings are
/// options of the programs that trained the network.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use ddpm::nn::{AttentionHeads, OpenAi};
///
/// let settings = OpenAi::new(256, AttentionHeads::Channels(64)); // image_size, num_head_channels
/// let file = "256x256_diffusion_uncond.pt";
/// let (config, weights) = settings.load(file, DType::F32, &Device::Cpu)?;
/// let unet = weights.build(&config)?;
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OpenAi {
    /// The size of the images, `image_size`.
    pub image_size: ImageSize,
    /// The heads of attention. Networks with other heads have weights of the same shapes, so wrong heads give wrong
    /// images without an error.
    pub heads: AttentionHeads,
    /// True if all queries precede all keys and values in the projections of an attention: `use_new_attention_order`.
    /// Otherwise the queries, keys and values of a head are together.
    pub new_attention_order: bool,
    /// Number by which timesteps are multiplied: `1000 / T` for a network that was trained with `rescale_timesteps` on
    /// `T` timesteps (`diffusion_steps`), otherwise 1. A wrong number gives wrong images without an error.
    pub time_scale: f64,
    /// The dropout, for further training.
    pub dropout: f64,
}

/// The heads of attention of an [`OpenAi`] network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttentionHeads {
    /// A number of heads, `num_heads`, which divides the channels of each level with attention.
    Count(usize),
    /// A number of channels per head, `num_head_channels`.
    Channels(usize),
}

impl OpenAi {
    /// The settings for images of this size with these heads, without the new order of attention, without dropout, and
    /// for the timesteps of the process.
    ///
    /// `num_heads` is 4 in both programs if it is not given, and published networks have other heads. The heads have
    /// therefore no default here.
    pub fn new(image_size: impl Into<ImageSize>, heads: AttentionHeads) -> Self {
        Self {
            image_size: image_size.into(),
            heads,
            new_attention_order: false,
            time_scale: 1.0,
            dropout: 0.0,
        }
    }

    /// Reads the weights of a network, and derives its configuration from their names and shapes. The weights take no
    /// gradients.
    ///
    /// # Errors
    /// Returns the errors of [`Parameters::load`]. Returns an error if these are not the weights of such a network, or
    /// if the heads do not divide the channels of a level with attention. A `UNet2D` cannot compute the function of a
    /// network whose number of sinusoids differs from the channels of the first level, so this is an error, too.
    pub fn load(
        &self,
        path: impl AsRef<Path>,
        dtype: DType,
        device: &Device,
    ) -> Result<(UNet2DConfig, Parameters)> {
        let path = path.as_ref();
        let weights = Weights {
            path: path.to_owned(),
            tensors: read_tensors(path, "", dtype, device)?,
            renamed: BTreeMap::new(),
        };
        let shape = Shape::of(&weights)?;
        let config = self.config(&weights, &shape)?;
        config.validate().map_err(|error| weights.refuse(error.to_string()))?;
        let tensors = self.renamed(weights, &shape)?;
        Ok((config, Parameters::frozen(path, tensors, dtype, device)))
    }

    fn config(&self, weights: &Weights, shape: &Shape) -> Result<UNet2DConfig> {
        let Shape { channels, attends, layers, by_block } = shape;
        let [_, in_channels, ..] = weights.dims::<4>("input_blocks.0.0.weight")?;
        let [out_channels, ..] = weights.dims::<4>("out.2.weight")?;
        if in_channels > 4 {
            let reason = format!(
                "{in_channels} channels of the input: a network for super-resolution, which the crate lacks"
            );
            return Err(weights.refuse(reason));
        }
        let [time_dim, sinusoids] = weights.dims("time_embed.0.weight")?;
        if sinusoids != channels[0] {
            let found = format!("{sinusoids} sinusoids of the timestep");
            let expected = format!("{}, the channels of the first level", channels[0]);
            return Err(weights.refuse(format!("{found}; it must be {expected}")));
        }
        let classes = match weights.tensors.contains_key("label_emb.weight") {
            true => Some(weights.dims::<2>("label_emb.weight")?[0]),
            false => None,
        };
        let [modulation, _] = weights.dims("middle_block.0.emb_layers.1.weight")?;
        let last = channels[channels.len() - 1];
        let modulates = modulation == 2 * last;
        let resampling = if *by_block { Resampling::Resnet } else { Resampling::Conv };
        let down = |&attends: &bool| match (attends, by_block) {
            (true, _) => DownBlockType::Attention,
            (false, true) => DownBlockType::Resnet,
            (false, false) => DownBlockType::Plain,
        };
        let up = |&attends: &bool| match (attends, by_block) {
            (true, _) => UpBlockType::Attention,
            (false, true) => UpBlockType::Resnet,
            (false, false) => UpBlockType::Plain,
        };
        let (attention_head_dim, num_attention_heads) = match self.heads {
            AttentionHeads::Channels(channels) => (Some(channels), None),
            AttentionHeads::Count(1) => (None, None),
            AttentionHeads::Count(heads) => (None, Some(heads)),
        };
        Ok(UNet2DConfig {
            sample_size: self.image_size,
            in_channels,
            out_channels,
            time_embedding_dim: (time_dim != 4 * channels[0]).then_some(time_dim),
            freq_shift: 0,
            flip_sin_to_cos: true,
            down_block_types: attends.iter().map(down).collect(),
            up_block_types: attends.iter().rev().map(up).collect(),
            block_out_channels: channels.clone(),
            layers_per_block: *layers,
            downsample_padding: 1,
            downsample_type: resampling,
            upsample_type: resampling,
            dropout: self.dropout,
            attention_head_dim,
            num_attention_heads,
            norm_num_groups: GROUPS,
            attn_norm_num_groups: Some(GROUPS),
            norm_eps: 1e-5,
            resnet_time_scale_shift: match modulates {
                true => TimeConditioning::ScaleShift,
                false => TimeConditioning::Default,
            },
            num_class_embeds: classes,
            time_scale: self.time_scale,
            ..UNet2DConfig::cifar10()
        })
    }

    /// Returns the weights by their names in `UNet2D`.
    fn renamed(&self, mut weights: Weights, shape: &Shape) -> Result<BTreeMap<String, Tensor>> {
        let Shape { channels, attends, layers, by_block } = shape;
        let levels = channels.len();
        for (old, new) in OTHERS {
            weights.rename(old, new);
        }
        weights.rename_res("middle_block.0", "mid_block.resnets.0");
        weights.rename_res("middle_block.2", "mid_block.resnets.1");
        self.rename_attention(&mut weights, "middle_block.1", "mid_block.attentions.0")?;
        let mut input = 0;
        let mut next = || {
            input += 1;
            format!("input_blocks.{input}")
        };
        for (level, &attends) in attends.iter().enumerate() {
            let new = format!("down_blocks.{level}");
            for layer in 0..*layers {
                let old = next();
                weights.rename_res(&format!("{old}.0"), &format!("{new}.resnets.{layer}"));
                if attends {
                    let new = format!("{new}.attentions.{layer}");
                    self.rename_attention(&mut weights, &format!("{old}.1"), &new)?;
                }
            }
            if level + 1 < levels {
                let (old, new) = (next(), format!("{new}.downsamplers.0"));
                match by_block {
                    true => weights.rename_res(&format!("{old}.0"), &new),
                    false => weights.rename(&format!("{old}.0.op"), &format!("{new}.conv")),
                }
            }
        }
        for output in 0..levels * (layers + 1) {
            let (up, layer) = (output / (layers + 1), output % (layers + 1));
            let (old, new) = (format!("output_blocks.{output}"), format!("up_blocks.{up}"));
            weights.rename_res(&format!("{old}.0"), &format!("{new}.resnets.{layer}"));
            let attends = attends[levels - 1 - up];
            if attends {
                let new = format!("{new}.attentions.{layer}");
                self.rename_attention(&mut weights, &format!("{old}.1"), &new)?;
            }
            if layer == *layers && up + 1 < levels {
                let old = format!("{old}.{}", if attends { 2 } else { 1 });
                let new = format!("{new}.upsamplers.0");
                match by_block {
                    true => weights.rename_res(&old, &new),
                    false => weights.rename(&format!("{old}.conv"), &format!("{new}.conv")),
                }
            }
        }
        // Others keep their names, so that the network refuses them.
        weights.renamed.append(&mut weights.tensors);
        Ok(weights.renamed)
    }

    /// Renames an attention, and divides its projection. Convolutions over one position become linear layers.
    fn rename_attention(&self, weights: &mut Weights, old: &str, new: &str) -> Result<()> {
        weights.rename(&format!("{old}.norm"), &format!("{new}.group_norm"));
        let linear = |tensor: Tensor| match tensor.dims() {
            &[output, input, 1] => tensor.reshape((output, input)),
            _ => Ok(tensor),
        };
        for part in ["weight", "bias"] {
            if let Some(tensor) = weights.tensors.remove(&format!("{old}.proj_out.{part}")) {
                weights.renamed.insert(format!("{new}.to_out.0.{part}"), linear(tensor)?);
            }
            let Some(all) = weights.tensors.remove(&format!("{old}.qkv.{part}")) else { continue };
            let all = linear(all)?;
            let shape = all.dims().to_vec();
            let rows = shape.first().copied().unwrap_or(0);
            let heads = match self.heads {
                _ if self.new_attention_order => 1,
                AttentionHeads::Count(heads) => heads,
                AttentionHeads::Channels(of_head) => rows / 3 / of_head,
            };
            if heads == 0 || rows % (3 * heads) != 0 {
                // It keeps its name, so that the network refuses it.
                weights.renamed.insert(format!("{old}.qkv.{part}"), all);
                continue;
            }
            let divided = all.reshape((heads, 3, rows / 3 / heads, ()))?;
            for (k, name) in ["to_q", "to_k", "to_v"].into_iter().enumerate() {
                let mut of_one = shape.clone();
                of_one[0] = rows / 3;
                let tensor = divided.narrow(1, k, 1)?.contiguous()?.reshape(of_one)?;
                weights.renamed.insert(format!("{new}.{name}.{part}"), tensor);
            }
        }
        Ok(())
    }
}

/// The shape of a network, as its names tell it.
struct Shape {
    /// The channels of each level, beginning with the full size.
    channels: Vec<usize>,
    /// For each level, true if it has attention.
    attends: Vec<bool>,
    /// The number of residual blocks of a level on the down path.
    layers: usize,
    /// True if residual blocks change the size, instead of convolutions.
    by_block: bool,
}

impl Shape {
    fn of(weights: &Weights) -> Result<Self> {
        let has = |name: String| weights.tensors.contains_key(&name);
        let is_block = |i: &usize| has(format!("output_blocks.{i}.0.in_layers.0.weight"));
        let blocks = (0..).take_while(is_block).count();
        if blocks == 0 {
            return Err(weights.refuse(weights.other().into()));
        }
        let attends = |i: usize| has(format!("output_blocks.{i}.1.qkv.weight"));
        // Only the up path tells a block that changes the size from one that keeps it.
        let upsampler = |i: usize| {
            let slot = if attends(i) { 2 } else { 1 };
            let by = |layer: &str| has(format!("output_blocks.{i}.{slot}.{layer}.weight"));
            match (by("in_layers.0"), by("conv")) {
                (true, _) => Some(true),
                (false, true) => Some(false),
                (false, false) => None,
            }
        };
        let first = (0..blocks).find_map(|i| Some((i, upsampler(i)?)));
        let (of_level, by_block) = first.map_or((blocks, false), |(i, by_block)| (i + 1, by_block));
        if of_level < 2 || blocks % of_level != 0 {
            let found = format!("{blocks} output_blocks, of which number {} doubles", of_level - 1);
            return Err(weights.refuse(format!("{found} the size first, are not whole levels")));
        }
        let mut shape = Self { channels: vec![], attends: vec![], layers: of_level - 1, by_block };
        for level in (0..blocks / of_level).rev() {
            let i = level * of_level;
            let [channels] = weights.dims(&format!("output_blocks.{i}.0.out_layers.0.weight"))?;
            shape.channels.push(channels);
            shape.attends.push(attends(i));
        }
        Ok(shape)
    }
}

/// The weights of a file.
struct Weights {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    /// Those that have the names of `UNet2D` by now.
    renamed: BTreeMap<String, Tensor>,
}

impl Weights {
    /// The dimensions of a weight.
    fn dims<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let found = self.tensors.get(name).map(Tensor::dims);
        found.and_then(|dims| dims.try_into().ok()).ok_or_else(|| {
            self.refuse(match found {
                Some(dims) => format!("{name} has shape {dims:?}; it must have {N} dimensions"),
                None => format!("{name} is missing; {}", self.other()),
            })
        })
    }

    /// The reason why the names are not those of a `UNetModel`.
    fn other(&self) -> &'static str {
        let ends_with = |end: &str| self.tensors.keys().any(|name| name.ends_with(end));
        if ends_with("downs.0.0.block1.proj.weight") {
            return "this is a network of denoising-diffusion-pytorch, which LucidrainsFile reads, and convert with \
                    --objective";
        }
        if ends_with("input_blocks.0.0.weight") {
            return "without output_blocks, this is a classifier, or the names have a prefix";
        }
        "these are not the weights of a UNetModel of improved-diffusion or guided-diffusion"
    }

    fn refuse(&self, reason: String) -> Error {
        Error::data(&self.path, reason)
    }

    /// Renames a layer.
    fn rename(&mut self, old: &str, new: &str) {
        for part in ["weight", "bias"] {
            if let Some(tensor) = self.tensors.remove(&format!("{old}.{part}")) {
                self.renamed.insert(format!("{new}.{part}"), tensor);
            }
        }
    }

    /// Renames a residual block.
    fn rename_res(&mut self, old: &str, new: &str) {
        for (layer, renamed) in RES {
            self.rename(&format!("{old}.{layer}"), &format!("{new}.{renamed}"));
        }
    }
}
