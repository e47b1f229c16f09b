use super::recipe::Recipe;
use super::result::Result;
use crate::model::UNetConfig;
use crate::process::{Diffusion, NoiseSchedule, Prediction};
use crate::sample::SamplerConfig;
use crate::train::TrainConfig;

/// The smallest side of the feature maps in the bottleneck, if the size of the images allows it. Fewer pixels would
/// lose the positions of the parts of an image, which attention relates.
const BOTTLENECK: usize = 7;

/// The largest side of feature maps with attention. The cost of attention grows with the fourth power of the side.
const ATTENTION: usize = 16;

/// The side in pixels of the square images for which the cosine schedule was designed. Hoogeboom et al. 2023, section 3.
const REFERENCE: f64 = 64.0;

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
        // Small grey pictures, such as digits, need less than photographs.
        let first = if channels == 1 && large <= 32 { 32 } else { 64 };
        let hidden_dims = (0..=levels).map(|level| (first << level).min(256)).collect::<Vec<_>>();
        let attention_levels: Vec<usize> =
            (1..levels as usize).filter(|level| large >> level <= ATTENTION).collect();
        let batch_size = match large {
            ..=32 => 16,
            33..=64 => 8,
            _ => 4,
        };
        let mut schedule = NoiseSchedule::cosine(1000)?;
        let mut shifted = String::new();
        let side = ((height * width) as f64).sqrt();
        if side > REFERENCE {
            let shift = 2.0 * (REFERENCE / side).ln();
            schedule = schedule.shifted(shift)?;
            shifted = format!(", its log-SNR shifted by {shift:.2} for {height} x {width} pixels");
        }
        let network = UNetConfig {
            image_size: crate::model::ImageSize { height, width },
            channels,
            hidden_dims,
            attention_levels,
            ..UNetConfig::mnist()
        };
        let train = TrainConfig { log_every: 10, ..TrainConfig::recommended(20_000, batch_size) };
        let bottleneck = format!("{} x {}", height >> levels, width >> levels);
        let halvings = if levels == 1 { "halving" } else { "halvings" };
        let reason = format!(
            "{levels} {halvings} to {bottleneck} pixels, {:?} channels, attention at {ATTENTION} pixels and less; velocity \
             on the cosine schedule{shifted}",
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
}
