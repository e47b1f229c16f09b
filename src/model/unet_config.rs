use serde::{Deserialize, Serialize};

use super::image_size::ImageSize;
use super::time_embedding::check_dim;
use crate::error::{Error, Result, check_fraction, list_in_short};
use crate::kernels::op::norm::GROUPS;

/// The shape of a [`UNet`](crate::UNet).
///
/// ```
/// use ddpm::UNetConfig;
///
/// let wide = UNetConfig { hidden_dims: vec![64, 128, 256], ..UNetConfig::mnist() };
/// wide.validate()?;
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UNetConfig {
    /// Height and width of the images, each at most 65,536, and divisible by 2 once for each halving.
    pub image_size: ImageSize,
    /// Channels of the images: 1 for grey, 3 for colour; at most 65,536.
    pub channels: usize,
    /// Channels of the feature maps: at full size, and then after each block on the down path. There are 2 to 16
    /// entries, and one level of resolution fewer. Each entry is a multiple of 8, the number of groups of a
    /// GroupNorm. At least one entry is more than 8.
    ///
    /// The output of a residual block with 8 output channels does not depend on the timestep. The block adds one
    /// number to each channel, but the GroupNorm after it has one channel per group, and subtracts the mean of the
    /// channel. In `[8, 16]` this applies to the two blocks on the up path. A network with only such blocks is an
    /// error.
    pub hidden_dims: Vec<usize>,
    /// Length of the time embedding: even, at least 4.
    pub time_dim: usize,
    /// The levels with attention, each at most once. Level `i`, from 0 to `hidden_dims.len() - 2`, works at `image_size
    /// / 2^i` pixels in each direction; the entries are not sizes in pixels. The bottleneck always has attention.
    // Checkpoints store this field under the name of an earlier version.
    #[serde(rename = "attention_resolutions", alias = "attention_levels")]
    pub attention_levels: Vec<usize>,
    /// Probability that a whole feature map inside a residual block is dropped during training; at least 0 and less
    /// than 1.
    pub dropout: f64,
    /// Number of classes on which the network can be conditioned, from 1 to 65,536; `None` for a network without
    /// classes. A vector per class is added to the time embedding. One more vector stands for no class, so a trained
    /// network also draws images without a condition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
    /// Whether the network also outputs the variance of the reverse process, in as many further channels as the images
    /// have. Such a network needs
    /// [`ObjectiveConfig::variational_bound`](crate::train::ObjectiveConfig::variational_bound).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub learned_variance: bool,
}

impl UNetConfig {
    /// The configuration for 28x28 grey digits: 2.3 million weights, attention at the bottleneck.
    pub fn mnist() -> Self {
        Self {
            image_size: 28.into(),
            channels: 1,
            hidden_dims: vec![32, 64, 128],
            time_dim: 128,
            attention_levels: vec![],
            dropout: 0.0,
            classes: None,
            learned_variance: false,
        }
    }

    /// The configuration for 32x32 colour images: 21.4 million weights, attention at 16x16 and at the bottleneck,
    /// dropout 0.02.
    pub fn cifar10() -> Self {
        Self {
            image_size: 32.into(),
            channels: 3,
            hidden_dims: vec![128, 256, 256, 256],
            attention_levels: vec![1],
            dropout: 0.02,
            ..Self::mnist()
        }
    }

    /// The shape of the images: (channels, height, width).
    pub fn image_shape(&self) -> (usize, usize, usize) {
        (self.channels, self.image_size.height, self.image_size.width)
    }

    /// The number of levels, which is the number of times that the size is halved.
    pub fn levels(&self) -> usize {
        self.hidden_dims.len().saturating_sub(1)
    }

    /// Checks whether a network can be built with this configuration. [`UNet::new`](crate::UNet::new) calls this.
    ///
    /// # Errors
    /// Returns an error that names the first invalid field, its value and the allowed values.
    pub fn validate(&self) -> Result<()> {
        const MAX: usize = 1 << 16;
        let within = |field, value: usize, least: usize| {
            if (least..=MAX).contains(&value) {
                return Ok(());
            }
            Err(Error::config(field, value, format!("from {least} to {MAX}")))
        };
        within("channels", self.channels, 1)?;
        let ImageSize { height, width } = self.image_size;
        within("image_size", height, 1)?;
        within("image_size", width, 1)?;
        self.classes.map_or(Ok(()), |classes| within("classes", classes, 1))?;
        within("time_dim", self.time_dim, 4)?;
        check_dim(self.time_dim)?;
        let dims = &self.hidden_dims;
        let refuse_dims =
            |expected: String| Err(Error::config("hidden_dims", list_in_short(dims), expected));
        if !(2..=16).contains(&dims.len()) {
            return refuse_dims("2 to 16 numbers".into());
        }
        if dims.iter().any(|&d| d == 0 || d > MAX || !d.is_multiple_of(GROUPS)) {
            return refuse_dims(format!("multiples of {GROUPS} from {GROUPS} to {MAX}"));
        }
        if dims.iter().all(|&d| d == GROUPS) {
            return refuse_dims(format!(
                "more than {GROUPS} in at least one entry: with {GROUPS} channels GroupNorm has one channel per \
                 group, and subtracts the time embedding"
            ));
        }
        let divisor = 1 << self.levels();
        if let Some(size) = [height, width].into_iter().find(|size| !size.is_multiple_of(divisor)) {
            let expected = format!(
                "a multiple of {divisor}, because hidden_dims halves it {} times",
                self.levels()
            );
            return Err(Error::config("image_size", size, expected));
        }
        let attend = &self.attention_levels;
        let twice = |i: usize| attend[..i].contains(&attend[i]);
        // The check stops at the first unknown or repeated level, at most one entry beyond the number of levels.
        if (0..attend.len()).any(|i| attend[i] >= self.levels() || twice(i)) {
            let size = |level: usize| match (height >> level, width >> level) {
                (height, width) if height == width => height.to_string(),
                (height, width) => format!("{height} x {width}"),
            };
            let sizes: Vec<_> = (0..self.levels()).map(size).collect();
            let expected = format!(
                "levels from 0 to {}, each at most once, of {} pixels; the bottleneck, of {} pixels, always has \
                 attention",
                self.levels() - 1,
                sizes.join(", "),
                size(self.levels()),
            );
            return Err(Error::config("attention_levels", list_in_short(attend), expected));
        }
        check_fraction("dropout", self.dropout)
    }
}
