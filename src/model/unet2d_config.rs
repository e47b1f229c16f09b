use serde::{Deserialize, Serialize};

use super::image_size::ImageSize;
use crate::error::{Error, Result, check_fraction, list_in_short};
use crate::layers::MAX_CHANNELS;

/// The shape of a [`UNet2D`](crate::nn::UNet2D).
///
/// The fields have the names and the meaning of the configuration of `UNet2DModel` in the Python library diffusers. In
/// JSON, a field that is absent has the default of that library.
///
/// ```
/// use ddpm::nn::UNet2DConfig;
///
/// let small = UNet2DConfig {
///     block_out_channels: vec![32, 64, 64, 64],
///     norm_num_groups: 8,
///     ..UNet2DConfig::cifar10()
/// };
/// small.validate()?;
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default = "UNet2DConfig::unspecified")]
pub struct UNet2DConfig {
    /// Height and width of the images, each at most 65,536, and divisible by 2 once for each level after the first.
    pub sample_size: ImageSize,
    /// Channels of the images: 1 for grey, 3 for colour; at most 65,536.
    pub in_channels: usize,
    /// Channels of the output: `in_channels`, or twice as many if the network also outputs the variance of the reverse
    /// process. Such a network needs
    /// [`ObjectiveConfig::variational_bound`](crate::train::ObjectiveConfig::variational_bound).
    pub out_channels: usize,
    /// If true, the network first computes `2 x - 1` of its input.
    pub center_input_sample: bool,
    /// Length of the time embedding, from 1 to 65,536. `None` is 4 times the first of `block_out_channels`.
    pub time_embedding_dim: Option<usize>,
    /// The frequencies of the sinusoids of the timestep fall to 1 / 10000 at number `half - freq_shift`, where `half`
    /// is half of the first of `block_out_channels`. 0 or 1, as in the code of Ho et al. 2020.
    pub freq_shift: usize,
    /// If true, the cosines of the timestep precede the sines.
    pub flip_sin_to_cos: bool,
    /// The kind of each level on the down path, beginning with the full size.
    pub down_block_types: Vec<DownBlockType>,
    /// The kind of each level on the up path, beginning with the smallest size.
    pub up_block_types: Vec<UpBlockType>,
    /// Channels of the feature maps of each level, beginning with the full size: 1 to 16 multiples of
    /// `norm_num_groups`, each at most 65,536. The first is even and at least 4.
    pub block_out_channels: Vec<usize>,
    /// Number of residual blocks of a level on the down path, from 1 to 64. There is one more on the up path.
    pub layers_per_block: usize,
    /// The zeros around the map of a downsampling convolution: 1 for one row or column on each side, 0 for one on the
    /// right and one at the bottom.
    pub downsample_padding: usize,
    /// The method by which levels of type [`Attention`](DownBlockType::Attention) halve the size. The types of other
    /// levels determine their method.
    pub downsample_type: Resampling,
    /// The method by which levels of type [`Attention`](UpBlockType::Attention) double the size. The types of other
    /// levels determine their method.
    pub upsample_type: Resampling,
    /// Probability that a value inside a residual block is dropped during training; at least 0 and less than 1.
    pub dropout: f64,
    /// Number of channels of a head of attention, which divides the channels of each level with attention. `None` for
    /// one head, or for `num_attention_heads`.
    pub attention_head_dim: Option<usize>,
    /// Number of heads of each attention, which divides the channels of each level with attention. `None` if
    /// `attention_head_dim` determines the heads. At most one of the two fields is set. `UNet2DModel` of diffusers lacks
    /// this field. Networks of OpenAI that were trained with `num_heads` need it: their heads have more channels at wider
    /// levels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_attention_heads: Option<usize>,
    /// Number of groups of a normalisation.
    pub norm_num_groups: usize,
    /// Number of groups of the normalisation before the attention at the smallest size. `None` is `norm_num_groups`.
    /// With [`TimeConditioning::ScaleShift`], `None` omits this normalisation.
    pub attn_norm_num_groups: Option<usize>,
    /// Number added to the variance in a normalisation; positive.
    pub norm_eps: f64,
    /// The effect of the time embedding in a residual block.
    pub resnet_time_scale_shift: TimeConditioning,
    /// If true, the block at the smallest size has attention.
    pub add_attention: bool,
    /// Number of vectors of classes, from 1 to 65,536; `None` for a network without classes. The vector of an image's
    /// class is added to the time embedding. As in diffusers, each vector belongs to a class, and a pass without
    /// classes is an error.
    pub num_class_embeds: Option<usize>,
    /// If true, the last of at least two vectors of classes stands for images without a class, so the network has
    /// `num_class_embeds - 1` classes. Training hides classes at random, and samples can be guided. Diffusers lacks
    /// this field. There, the last class is like the others, and the caller chooses it for images without a class.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub null_class: bool,
    /// Number by which timesteps are multiplied in the time embedding, from 0.001 to 1000. It is 1 in diffusers, which
    /// lacks this field. It is `1000 / T` in networks of OpenAI that were trained with `rescale_timesteps` on `T`
    /// timesteps.
    #[serde(skip_serializing_if = "is_one")]
    pub time_scale: f64,
}

fn is_one(number: &f64) -> bool {
    *number == 1.0
}

/// The kind of a level on the down path of a [`UNet2D`](crate::nn::UNet2D).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DownBlockType {
    /// Residual blocks. A convolution of stride 2 halves the size.
    #[serde(rename = "DownBlock2D")]
    Plain,
    /// Residual blocks, each followed by attention.
    #[serde(rename = "AttnDownBlock2D")]
    Attention,
    /// Residual blocks, of which the last halves the size.
    #[serde(rename = "ResnetDownsampleBlock2D")]
    Resnet,
}

/// The kind of a level on the up path of a [`UNet2D`](crate::nn::UNet2D).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UpBlockType {
    /// Residual blocks. A convolution of the repeated pixels doubles the size.
    #[serde(rename = "UpBlock2D")]
    Plain,
    /// Residual blocks, each followed by attention.
    #[serde(rename = "AttnUpBlock2D")]
    Attention,
    /// Residual blocks, of which the last doubles the size.
    #[serde(rename = "ResnetUpsampleBlock2D")]
    Resnet,
}

/// The change of the size between two levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Resampling {
    /// A convolution, of stride 2 or of repeated pixels.
    Conv,
    /// A residual block, which averages two by two pixels, or repeats pixels.
    Resnet,
}

/// The effect of the time embedding in a residual block of a [`UNet2D`](crate::nn::UNet2D).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TimeConditioning {
    /// A number is added to each channel between the two convolutions. Ho et al. 2020.
    Default,
    /// The second normalised map is multiplied by `1 + scale`, and `shift` is added. Dhariwal and Nichol 2021.
    ScaleShift,
}

impl UNet2DConfig {
    /// The network of Ho et al. 2020 for 32x32 colour images (`google/ddpm-cifar10-32`): 35.7 million weights,
    /// attention at 16x16 and at the smallest size, dropout 0.1.
    pub fn cifar10() -> Self {
        use {DownBlockType as Down, UpBlockType as Up};
        Self {
            sample_size: 32.into(),
            freq_shift: 1,
            flip_sin_to_cos: false,
            down_block_types: vec![Down::Plain, Down::Attention, Down::Plain, Down::Plain],
            up_block_types: vec![Up::Plain, Up::Plain, Up::Attention, Up::Plain],
            block_out_channels: vec![128, 256, 256, 256],
            downsample_padding: 0,
            dropout: 0.1,
            attention_head_dim: None,
            norm_eps: 1e-6,
            ..Self::unspecified()
        }
    }

    /// The values of absent fields. The size of the images has no default, so 0 is refused.
    fn unspecified() -> Self {
        use {DownBlockType as Down, UpBlockType as Up};
        Self {
            sample_size: 0.into(),
            in_channels: 3,
            out_channels: 3,
            center_input_sample: false,
            time_embedding_dim: None,
            freq_shift: 0,
            flip_sin_to_cos: true,
            down_block_types: vec![Down::Plain, Down::Attention, Down::Attention, Down::Attention],
            up_block_types: vec![Up::Attention, Up::Attention, Up::Attention, Up::Plain],
            block_out_channels: vec![224, 448, 672, 896],
            layers_per_block: 2,
            downsample_padding: 1,
            downsample_type: Resampling::Conv,
            upsample_type: Resampling::Conv,
            dropout: 0.0,
            attention_head_dim: Some(8),
            num_attention_heads: None,
            norm_num_groups: 32,
            attn_norm_num_groups: None,
            norm_eps: 1e-5,
            resnet_time_scale_shift: TimeConditioning::Default,
            add_attention: true,
            num_class_embeds: None,
            null_class: false,
            time_scale: 1.0,
        }
    }

    /// The shape of the images: (channels, height, width).
    pub fn image_shape(&self) -> (usize, usize, usize) {
        (self.in_channels, self.sample_size.height, self.sample_size.width)
    }

    /// The number of classes, if the network has classes.
    pub fn classes(&self) -> Option<usize> {
        self.num_class_embeds.map(|vectors| vectors.saturating_sub(self.null_class.into()))
    }

    /// Returns whether the network also outputs the variance.
    pub fn learns_variance(&self) -> bool {
        self.out_channels != self.in_channels
    }

    /// The length of the time embedding.
    pub(super) fn time_dim(&self) -> usize {
        self.time_embedding_dim.unwrap_or_else(|| 4 * self.block_out_channels[0])
    }

    /// The number of heads of an attention over maps of this many channels.
    pub(super) fn heads(&self, channels: usize) -> usize {
        let by_channels = || self.attention_head_dim.map_or(1, |head| channels / head);
        self.num_attention_heads.unwrap_or_else(by_channels)
    }

    /// The number of groups of the normalisation before the attention at the smallest size.
    pub(super) fn middle_groups(&self) -> Option<usize> {
        let default = self.resnet_time_scale_shift == TimeConditioning::Default;
        self.attn_norm_num_groups.or(default.then_some(self.norm_num_groups))
    }

    /// Checks whether a network can be built with this configuration. [`UNet2D::new`](crate::nn::UNet2D::new) calls
    /// this.
    ///
    /// # Errors
    /// Returns an error that names the first invalid field, its value and the allowed values.
    pub fn validate(&self) -> Result<()> {
        let within = |field, value: usize, [least, most]: [usize; 2]| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(Error::config(field, value, format!("from {least} to {most}")))
        };
        let channels = [1, MAX_CHANNELS];
        within("in_channels", self.in_channels, channels)?;
        if ![self.in_channels, 2 * self.in_channels].contains(&self.out_channels) {
            let expected = format!(
                "in_channels, which is {}, or twice as many for a learned variance",
                self.in_channels
            );
            return Err(Error::config("out_channels", self.out_channels, expected));
        }
        within("norm_num_groups", self.norm_num_groups, channels)?;
        // The kernels compute in f32.
        if !(self.norm_eps as f32 >= f32::MIN_POSITIVE && (self.norm_eps as f32).is_finite()) {
            return Err(Error::config("norm_eps", self.norm_eps, "positive and finite in f32"));
        }
        within("layers_per_block", self.layers_per_block, [1, 64])?;
        within("downsample_padding", self.downsample_padding, [0, 1])?;
        within("freq_shift", self.freq_shift, [0, 1])?;
        if !(0.001..=1000.0).contains(&self.time_scale) {
            return Err(Error::config("time_scale", self.time_scale, "from 0.001 to 1000"));
        }
        self.time_embedding_dim
            .map_or(Ok(()), |dim| within("time_embedding_dim", dim, channels))?;
        match (self.num_class_embeds, self.null_class) {
            (Some(n), false) => within("num_class_embeds", n, channels)?,
            (Some(n), true) => within("num_class_embeds", n, [2, MAX_CHANNELS + 1])?,
            (None, false) => {}
            (None, true) => {
                let expected = "false, because num_class_embeds is none";
                return Err(Error::config("null_class", true, expected));
            }
        }
        check_fraction("dropout", self.dropout)?;
        self.validate_levels()?;
        self.validate_size()?;
        self.validate_attention()
    }

    fn validate_levels(&self) -> Result<()> {
        let (dims, groups) = (&self.block_out_channels, self.norm_num_groups);
        let refuse = |expected: String| {
            Err(Error::config("block_out_channels", list_in_short(dims), expected))
        };
        if !(1..=16).contains(&dims.len()) {
            return refuse("1 to 16 numbers".into());
        }
        if dims.iter().any(|&d| d == 0 || d > MAX_CHANNELS || !d.is_multiple_of(groups)) {
            return refuse(format!("multiples of norm_num_groups, {groups}, up to {MAX_CHANNELS}"));
        }
        if dims[0] < 4 || !dims[0].is_multiple_of(2) {
            return refuse("even and at least 4 in the first entry".into());
        }
        if self.time_embedding_dim.is_none() && 4 * dims[0] > MAX_CHANNELS {
            return refuse(format!(
                "at most {} in the first entry, unless time_embedding_dim is given",
                MAX_CHANNELS / 4
            ));
        }
        let adds = self.resnet_time_scale_shift == TimeConditioning::Default;
        if adds && dims.iter().all(|&d| d == groups) {
            return refuse(format!(
                "more than {groups} in at least one entry: with {groups} channels a normalisation has one channel \
                 per group, and subtracts the time embedding"
            ));
        }
        for (field, count) in [
            ("number of down_block_types", self.down_block_types.len()),
            ("number of up_block_types", self.up_block_types.len()),
        ] {
            if count != dims.len() {
                let expected = format!("{}, that of block_out_channels", dims.len());
                return Err(Error::config(field, count, expected));
            }
        }
        Ok(())
    }

    fn validate_size(&self) -> Result<()> {
        let ImageSize { height, width } = self.sample_size;
        let halvings = self.block_out_channels.len() - 1;
        let divisor = 1 << halvings;
        for size in [height, width] {
            if !(1..=MAX_CHANNELS).contains(&size) || !size.is_multiple_of(divisor) {
                let expected = format!(
                    "a multiple of {divisor}, because the levels halve it {halvings} times, at most {MAX_CHANNELS}"
                );
                return Err(Error::config("sample_size", size, expected));
            }
        }
        Ok(())
    }

    /// The channels of each level with attention.
    pub(super) fn attentive_channels(&self) -> Vec<usize> {
        let dims = &self.block_out_channels;
        let down = self.down_block_types.iter().zip(dims);
        let down = down.filter(|(kind, _)| **kind == DownBlockType::Attention);
        let up = self.up_block_types.iter().rev().zip(dims);
        let up = up.filter(|(kind, _)| **kind == UpBlockType::Attention);
        let middle = dims.last().filter(|_| self.add_attention);
        down.map(|(_, &d)| d).chain(up.map(|(_, &d)| d)).chain(middle.copied()).collect()
    }

    fn validate_attention(&self) -> Result<()> {
        if let (Some(heads), Some(head)) = (self.num_attention_heads, self.attention_head_dim) {
            let expected = format!(
                "none, because attention_head_dim is {head} (8 by default); one of the two must be none"
            );
            return Err(Error::config("num_attention_heads", heads, expected));
        }
        let attentive = self.attentive_channels();
        for (field, divisor) in [
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
        ] {
            if let Some(divisor) = divisor
                && let Some(channels) =
                    attentive.iter().find(|&&d| divisor == 0 || !d.is_multiple_of(divisor))
            {
                let expected =
                    format!("a divisor of the {channels} channels of a level with attention");
                return Err(Error::config(field, divisor, expected));
            }
        }
        let middle = self.block_out_channels.last().filter(|_| self.add_attention);
        if let (Some(groups), Some(&channels)) = (self.attn_norm_num_groups, middle)
            && (groups == 0 || !channels.is_multiple_of(groups))
        {
            let expected = format!("a divisor of the {channels} channels of the last level");
            return Err(Error::config("attn_norm_num_groups", groups, expected));
        }
        Ok(())
    }
}
