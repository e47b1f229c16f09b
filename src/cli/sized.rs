use super::recipe::Recipe;
use super::result::Result;
use crate::model::{DownBlockType, ImageSize, UNet2DConfig, UNetConfig, UpBlockType};
use crate::process::{Diffusion, NoiseSchedule, Prediction};
use crate::sample::SamplerConfig;
use crate::train::{AdamConfig, EmaConfig, TrainConfig};

/// The smallest side of the feature maps in the bottleneck, if the size of the images allows it. Fewer pixels would
/// lose the positions of the parts of an image, which attention relates.
const BOTTLENECK: usize = 7;

/// The largest side of feature maps with attention. The cost of attention grows with the fourth power of the side.
const ATTENTION: usize = 16;

/// The side in pixels of the square images for which the cosine schedule was designed. Hoogeboom et al. 2023, section 3.
const REFERENCE: f64 = 64.0;

/// Number of updates.
const STEPS: u64 = 20_000;

/// Number of updates from one report of the loss to the next.
const LOG_EVERY: u64 = 10;

/// The sides in pixels that the smallest feature maps of the network of Ho et al. may have: at least the 4 of the
/// paper, and at most the 16 of its other maps with attention.
const HO_BOTTLENECK: std::ops::RangeInclusive<usize> = 4..=ATTENTION;

/// The largest number of halvings of the network of Ho et al., that for their images of 256 x 256 pixels.
const HO_HALVINGS: u32 = 5;

/// Returns whether the images are small and grey, such as digits. They need less than photographs.
fn is_simple((channels, height, width): (usize, usize, usize)) -> bool {
    channels == 1 && height.max(width) <= 32
}

fn batch_size((_, height, width): (usize, usize, usize)) -> usize {
    match height.max(width) {
        ..=32 => 16,
        33..=64 => 8,
        _ => 4,
    }
}

impl Recipe<UNet2DConfig> {
    /// Chooses a network of Ho et al. 2020 and their recipe for images of `shape` (channels, height, width), and
    /// explains the choice of the network and of the process.
    ///
    /// The network halves the images at most five times, as long as both sides are whole numbers of at least 4 pixels:
    /// images of 32 x 32 to 4 x 4 pixels, and of 256 x 256 to 8 x 8 (Ho et al. 2020, appendix B). It has attention on
    /// feature maps whose larger side is 9 to 16 pixels, for the 16 x 16 of the paper, and on the smallest maps. The
    /// sides of the smallest maps must therefore be at most 16: the cost of attention grows with the fourth power of
    /// the side, and the paper has none on larger maps.
    ///
    /// The channels are those of the paper for 32 x 32 and 256 x 256 pixels, and those of Song et al. 2021 (DDIM) for
    /// 64 x 64: 128 at the full size, and half as many for grey images of at most 32 x 32 pixels. For more than 128
    /// pixels, the learning rate is 2e-5 and there is no dropout, as in the paper for 256 x 256 pixels; otherwise they
    /// are 2e-4 and 0.1, as for CIFAR-10.
    ///
    /// The process, the optimiser and the clipping are those of the paper. As for the network of the crate, there are
    /// 20,000 updates with a warm-up of a twentieth, at most 500, batches of 4 to 16 images, and no flips, because
    /// pictures of a folder may not be symmetric. The average has a warm-up: without one, an eighth of it would be the
    /// initial weights after as few updates.
    ///
    /// # Errors
    /// Returns an error that states the allowed sizes if no number of halvings suits.
    pub fn ho_for_images(shape: (usize, usize, usize)) -> Result<(Self, String)> {
        let (channels, height, width) = shape;
        let suits = |halvings: &u32| {
            [height, width].iter().all(|side| {
                side.is_multiple_of(1 << halvings) && HO_BOTTLENECK.contains(&(side >> halvings))
            })
        };
        let Some(halvings) = (1..=HO_HALVINGS).rev().find(suits) else {
            let [least, most] = [HO_BOTTLENECK.start(), HO_BOTTLENECK.end()];
            return Err(format!(
                "the images have {height} x {width} pixels; for the network of Ho et al., 1 to {HO_HALVINGS} halvings \
                 of height and width must leave whole numbers from {least} to {most}, as for 28, 32, 64, 96, 128, 256 \
                 or 512"
            )
            .into());
        };
        let multipliers: &[usize] = match halvings {
            ..=3 => &[1, 2, 2, 2],
            4 => &[1, 2, 2, 2, 4],
            _ => &[1, 1, 2, 2, 4, 4],
        };
        let first = if is_simple(shape) { 64 } else { 128 };
        let levels = 0..=halvings as usize;
        let attends =
            |level: &usize| (ATTENTION / 2 + 1..=ATTENTION).contains(&(height.max(width) >> level));
        let down = |level| match attends(&level) {
            true => DownBlockType::Attention,
            false => DownBlockType::Plain,
        };
        let up = |level| match attends(&level) {
            true => UpBlockType::Attention,
            false => UpBlockType::Plain,
        };
        let large = height.max(width) > 128;
        let network = UNet2DConfig {
            sample_size: ImageSize { height, width },
            in_channels: channels,
            out_channels: channels,
            down_block_types: levels.clone().map(down).collect(),
            up_block_types: levels.clone().rev().map(up).collect(),
            block_out_channels: levels.zip(multipliers).map(|(_, m)| m * first).collect(),
            dropout: if large { 0.0 } else { 0.1 },
            ..UNet2DConfig::cifar10()
        };
        let train = TrainConfig {
            steps: STEPS,
            batch_size: batch_size(shape),
            optimizer: AdamConfig::adam(if large { 2e-5 } else { 2e-4 }),
            warmup_steps: TrainConfig::recommended_warmup(STEPS),
            ema: Some(EmaConfig { decay: 0.9999, warmup: true }),
            horizontal_flip: false,
            log_every: LOG_EVERY,
            ..TrainConfig::ho()
        };
        let reason = format!(
            "{}, {:?} channels, attention at 9 to {ATTENTION} pixels and at the smallest size; noise on the linear \
             schedule",
            halved((height, width), halvings),
            network.block_out_channels,
        );
        let recipe = Self::new(network, Diffusion::ddpm(), train);
        Ok((Self { warmup_follows_steps: true, ..recipe }, reason))
    }
}

/// Formats the number of halvings of images, and the size after them.
fn halved((height, width): (usize, usize), halvings: u32) -> String {
    let plural = if halvings == 1 { "halving" } else { "halvings" };
    format!("{halvings} {plural} to {} x {} pixels", height >> halvings, width >> halvings)
}

impl Recipe {
    /// Chooses a network and a recipe for images of `shape` (channels, height, width), and explains the choice of the
    /// network and of the process.
    ///
    /// The network halves the images until a side would be less than 7 pixels, at most five times. It has attention on
    /// feature maps with sides of up to 16 pixels. The process predicts velocity on the cosine schedule. For images of
    /// more than 64 x 64 pixels, the schedule is shifted to less signal, because neighbouring pixels reveal more of each
    /// other. The log-SNR falls by `2 ln(d / 64)` for square images of side `d` (Hoogeboom et al. 2023, section 3). For
    /// other images, `d` is the geometric mean of height and width, the side of a square with as many pixels.
    ///
    /// # Errors
    /// Returns an error if height or width is odd.
    pub fn for_images(shape: (usize, usize, usize)) -> Result<(Self, String)> {
        let (channels, height, width) = shape;
        let (small, large) = (height.min(width), height.max(width));
        let halves = |levels: u32| {
            let parts = 1 << levels;
            height.is_multiple_of(parts) && width.is_multiple_of(parts)
        };
        let deep_enough = |levels: &u32| halves(*levels) && small >> levels >= BOTTLENECK;
        let Some(levels) = (1..=5).filter(deep_enough).max().or_else(|| halves(1).then_some(1))
        else {
            let expected = "even numbers, because the network halves them";
            return Err(format!(
                "the images have {height} x {width} pixels; it must be {expected}"
            )
            .into());
        };
        let first = if is_simple(shape) { 32 } else { 64 };
        let hidden_dims = (0..=levels).map(|level| (first << level).min(256)).collect::<Vec<_>>();
        let attention_levels: Vec<usize> =
            (1..levels as usize).filter(|level| large >> level <= ATTENTION).collect();
        let mut schedule = NoiseSchedule::cosine(1000)?;
        let mut shifted = String::new();
        let side = ((height * width) as f64).sqrt();
        if side > REFERENCE {
            let shift = 2.0 * (REFERENCE / side).ln();
            schedule = schedule.shifted(shift)?;
            shifted = format!(", its log-SNR shifted by {shift:.2} for {height} x {width} pixels");
        }
        let network = UNetConfig {
            image_size: ImageSize { height, width },
            channels,
            hidden_dims,
            attention_levels,
            ..UNetConfig::mnist()
        };
        let train = TrainConfig::recommended(STEPS, batch_size(shape));
        let train = TrainConfig { log_every: LOG_EVERY, ..train };
        let reason = format!(
            "{}, {:?} channels, attention at {ATTENTION} pixels and less; velocity \
             on the cosine schedule{shifted}",
            halved((height, width), levels),
            network.hidden_dims,
        );
        let diffusion = Diffusion::new(schedule, Prediction::Velocity);
        let sampling = SamplerConfig::recommended();
        let recipe = Self::new(network, diffusion, train);
        Ok((Self { sampling, warmup_follows_steps: true, ..recipe }, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_even_size_has_a_valid_network() {
        for (height, width) in
            [(8, 8), (28, 28), (32, 32), (64, 64), (48, 80), (96, 2), (256, 256), (1024, 512)]
        {
            for channels in [1, 3, 4] {
                let (recipe, reason) = Recipe::for_images((channels, height, width)).unwrap();
                recipe.network.validate().unwrap();
                recipe.train.validate().unwrap();
                recipe.diffusion.validate().unwrap();
                assert_eq!(recipe.network.image_shape(), (channels, height, width));
                assert_eq!(reason.contains("shifted"), height * width > 64 * 64, "{reason}");
                let levels = recipe.network.levels();
                assert!(height.min(width) >> levels >= BOTTLENECK || levels == 1, "{reason}");
            }
        }
        let message = Recipe::for_images((3, 33, 64)).unwrap_err().to_string();
        let expected = "the images have 33 x 64 pixels; it must be even numbers, because the network halves them";
        assert_eq!(message, expected);
    }

    #[test]
    fn the_schedule_is_shifted_by_the_number_of_pixels() {
        // Four times the pixels have a quarter of the SNR, and eight times an eighth.
        let log_snr = |height, width| {
            let (recipe, _) = Recipe::for_images((3, height, width)).unwrap();
            recipe.diffusion.schedule().log_snr(500.0).unwrap()
        };
        let reference = log_snr(64, 64);
        let cosine = NoiseSchedule::cosine(1000).unwrap().log_snr(500.0).unwrap();
        assert_eq!(reference, cosine);
        for (height, width, factor) in
            [(128, 128, 4.0f64), (64, 512, 8.0), (512, 64, 8.0), (512, 512, 64.0), (8, 512, 1.0)]
        {
            let fall = reference - log_snr(height, width);
            assert!((fall - factor.ln()).abs() < 1e-9, "{height} x {width}: {fall}");
        }
    }
    #[test]
    fn sizes_that_halve_well_have_a_network_of_ho_et_al() {
        // The network of the paper for CIFAR-10, and its channels for 256 x 256 pixels.
        let (cifar10, reason) = Recipe::ho_for_images((3, 32, 32)).unwrap();
        assert_eq!(cifar10.network, UNet2DConfig::cifar10());
        assert!(reason.starts_with("3 halvings to 4 x 4 pixels, [128, 256, 256, 256]"), "{reason}");
        let expected = TrainConfig {
            steps: 20_000,
            batch_size: 16,
            warmup_steps: 500,
            ema: Some(EmaConfig { decay: 0.9999, warmup: true }),
            horizontal_flip: false,
            log_every: cifar10.train.log_every,
            ..TrainConfig::ho()
        };
        assert_eq!(cifar10.train, expected);
        assert!(cifar10.warmup_follows_steps);
        for ((channels, height, width), expected, attention) in [
            ((3, 64, 64), &[128, 256, 256, 256, 512][..], &[2][..]),
            ((4, 256, 256), &[128, 128, 256, 256, 512, 512], &[4]),
            ((3, 512, 512), &[128, 128, 256, 256, 512, 512], &[5]),
            ((1, 28, 28), &[64, 128, 128], &[1]),
            ((1, 64, 32), &[128, 256, 256, 256], &[2]),
            ((3, 8, 12), &[128, 256], &[0]),
            ((3, 96, 128), &[128, 256, 256, 256, 512], &[3]),
        ] {
            let shape = (channels, height, width);
            let (recipe, reason) = Recipe::ho_for_images(shape).unwrap();
            let Recipe { network, train, diffusion, .. } = recipe;
            network.validate().unwrap();
            train.validate().unwrap();
            assert_eq!(diffusion, Diffusion::ddpm());
            assert_eq!(network.image_shape(), shape);
            assert_eq!(network.block_out_channels, expected, "{reason}");
            let kinds = network.down_block_types.iter().enumerate();
            let found = kinds.filter(|(_, kind)| **kind == DownBlockType::Attention);
            assert_eq!(found.map(|(level, _)| level).collect::<Vec<_>>(), attention, "{shape:?}");
            let mirrored =
                network.up_block_types.iter().rev().map(|k| *k == UpBlockType::Attention);
            let down = network.down_block_types.iter().map(|k| *k == DownBlockType::Attention);
            assert!(mirrored.eq(down));
            let large = height.max(width) > 128;
            assert_eq!(train.optimizer.learning_rate, if large { 2e-5 } else { 2e-4 });
            assert_eq!(network.dropout, if large { 0.0 } else { 0.1 });
        }
        for (height, width) in [(33, 64), (4, 8), (250, 250), (1024, 1024), (32, 256), (2, 2)] {
            let message = Recipe::ho_for_images((3, height, width)).unwrap_err().to_string();
            let expected = format!(
                "the images have {height} x {width} pixels; for the network of Ho et al., 1 to 5 halvings of height \
                 and width must leave whole numbers from 4 to 16, as for 28, 32, 64, 96, 128, 256 or 512"
            );
            assert_eq!(message, expected);
        }
    }
}
