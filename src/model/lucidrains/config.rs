use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, check_fraction, list_in_short};
use crate::layers::MAX_CHANNELS;
use crate::model::image_size::ImageSize;

/// The largest number of channels of a feature map. A level divides a map into four times as many channels to halve it.
const MAX_WIDTH: usize = MAX_CHANNELS / 4;

/// The shape of a [`LucidrainsUNet`](crate::nn::LucidrainsUNet).
///
/// The fields have the names and the meaning of the arguments of `Unet` in the Python package
/// denoising-diffusion-pytorch, except for `num_mem_kv`, an argument of its attentions. [`LucidrainsFile`](crate::nn::LucidrainsFile) derives them from a file of weights.
///
/// ```
/// use ddpm::nn::LucidrainsConfig;
///
/// let small = LucidrainsConfig { dropout: 0.1, ..LucidrainsConfig::new(32, 16) };
/// small.validate()?;
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LucidrainsConfig {
    /// Height and width of the images, each at most 65,536, and divisible by 2 once for each level after the first. An
    /// argument of `GaussianDiffusion`.
    pub image_size: ImageSize,
    /// Channels of the images: 1 for grey, 3 for colour; at most 65,536.
    pub channels: usize,
    /// The unit of `dim_mults`, from 4 to 16,384, and even. The time embedding has `4 dim` values.
    pub dim: usize,
    /// Channels of the first feature maps, from 1 to 16,384.
    pub init_dim: usize,
    /// Channels of the feature maps after each level, divided by `dim`: 1 to 16 numbers, beginning with the full size.
    /// The product with `dim` is at most 16,384.
    pub dim_mults: Vec<usize>,
    /// If true, the network also outputs the variance of the reverse process.
    pub learned_variance: bool,
    /// Number of learned sines and cosines of the timestep: even, from 2 to 65,536. `None` for sinusoids of fixed
    /// frequencies. The package also has random frequencies that are not trained; here these are trained, too.
    pub learned_sinusoidal_dim: Option<usize>,
    /// The inverse of the last frequency of fixed sinusoids; positive.
    pub sinusoidal_pos_emb_theta: f64,
    /// Probability that a value inside a residual block is dropped during training; at least 0 and less than 1.
    pub dropout: f64,
    /// Number of heads of attention at each level.
    pub attn_heads: Vec<usize>,
    /// Number of channels of a head at each level. `attn_heads * attn_dim_head` is from 1 to 21,845.
    pub attn_dim_head: Vec<usize>,
    /// For each level, true for softmax attention, and false for linear attention.
    pub full_attn: Vec<bool>,
    /// Number of learned keys and values of an attention, at most 65,536.
    pub num_mem_kv: usize,
    /// Number of groups of the normalisations in residual blocks, in versions 1.9 to 1.11 of the package. It divides
    /// the channels of all feature maps. `None` for version 2, which normalises by the root mean square.
    pub resnet_block_groups: Option<usize>,
}

impl LucidrainsConfig {
    /// The default network of the package for colour images: four levels with 1, 2, 4 and 8 times `dim` channels, and
    /// four heads of 32 channels. The last level has softmax attention, and the others linear attention.
    pub fn new(image_size: impl Into<ImageSize>, dim: usize) -> Self {
        Self {
            image_size: image_size.into(),
            channels: 3,
            dim,
            init_dim: dim,
            dim_mults: vec![1, 2, 4, 8],
            learned_variance: false,
            learned_sinusoidal_dim: None,
            sinusoidal_pos_emb_theta: 10_000.0,
            dropout: 0.0,
            attn_heads: vec![4; 4],
            attn_dim_head: vec![32; 4],
            full_attn: vec![false, false, false, true],
            num_mem_kv: 4,
            resnet_block_groups: None,
        }
    }

    /// The shape of the images: (channels, height, width).
    pub fn image_shape(&self) -> (usize, usize, usize) {
        (self.channels, self.image_size.height, self.image_size.width)
    }

    /// The number by which height and width of images must be divisible.
    pub(super) fn divisor(&self) -> usize {
        1 << (self.dim_mults.len() - 1)
    }

    /// Checks whether a network can be built with this configuration.
    /// [`LucidrainsUNet::new`](crate::nn::LucidrainsUNet::new) calls this.
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
        let even = |field, value: usize, [least, most]: [usize; 2]| {
            if (least..=most).contains(&value) && value.is_multiple_of(2) {
                return Ok(());
            }
            Err(Error::config(field, value, format!("even, from {least} to {most}")))
        };
        within("channels", self.channels, [1, MAX_CHANNELS])?;
        even("dim", self.dim, [4, MAX_WIDTH])?;
        within("init_dim", self.init_dim, [1, MAX_WIDTH])?;
        let dim = self.learned_sinusoidal_dim;
        dim.map_or(Ok(()), |dim| even("learned_sinusoidal_dim", dim, [2, MAX_CHANNELS]))?;
        let theta = self.sinusoidal_pos_emb_theta;
        if !(theta > 0.0 && theta.is_finite()) {
            return Err(Error::config("sinusoidal_pos_emb_theta", theta, "positive and finite"));
        }
        check_fraction("dropout", self.dropout)?;
        within("num_mem_kv", self.num_mem_kv, [0, MAX_CHANNELS])?;
        self.validate_levels()?;
        let ImageSize { height, width } = self.image_size;
        for size in [height, width] {
            if !(1..=MAX_CHANNELS).contains(&size) || !size.is_multiple_of(self.divisor()) {
                let expected = format!("a multiple of {}, at most {MAX_CHANNELS}", self.divisor());
                return Err(Error::config("image_size", size, expected));
            }
        }
        Ok(())
    }

    fn validate_levels(&self) -> Result<()> {
        let (mults, most) = (&self.dim_mults, MAX_WIDTH / self.dim);
        let fits = |mult: &usize| (1..=most).contains(mult);
        if !(1..=16).contains(&mults.len()) || !mults.iter().all(fits) {
            let expected = format!("1 to 16 numbers from 1 to {most}");
            return Err(Error::config("dim_mults", list_in_short(mults), expected));
        }
        if let Some(groups) = self.resnet_block_groups {
            let mut widths = [self.init_dim].into_iter().chain(mults.iter().map(|m| m * self.dim));
            if groups == 0 || !widths.all(|width| width.is_multiple_of(groups)) {
                let expected = "a divisor of init_dim and of dim times each of dim_mults";
                return Err(Error::config("resnet_block_groups", groups, expected));
            }
        }
        for (field, count) in [
            ("number of attn_heads", self.attn_heads.len()),
            ("number of attn_dim_head", self.attn_dim_head.len()),
            ("number of full_attn", self.full_attn.len()),
        ] {
            if count != mults.len() {
                let expected = format!("{}, that of dim_mults", mults.len());
                return Err(Error::config(field, count, expected));
            }
        }
        let most = MAX_CHANNELS / 3;
        for (heads, of_head) in self.attn_heads.iter().zip(&self.attn_dim_head) {
            if !heads.checked_mul(*of_head).is_some_and(|all| (1..=most).contains(&all)) {
                let (value, expected) =
                    (format!("{heads} * {of_head}"), format!("from 1 to {most}"));
                return Err(Error::config("attn_heads * attn_dim_head", value, expected));
            }
        }
        Ok(())
    }
}
