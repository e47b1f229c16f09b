//! Images to be measured.

use candle_core::Device;
use ddpm::{Denoiser, Images, Sampler};

use super::classifier::SIZE;
use super::common::cli::Result;
use super::common::progress::Progress;
use super::common::{interrupt, pictures};
use super::random::Random;

/// Drawn at a time.
const BATCH: usize = 100;

/// Samples as files have them. Each batch has a seed of its own, the first one the seed itself:
/// the images of `sample`.
pub fn samples(
    sampler: &Sampler,
    model: &impl Denoiser,
    count: usize,
    seed: u64,
    device: &Device,
) -> Result<Images> {
    let total = count.div_ceil(BATCH) * sampler.timesteps().len();
    let mut progress = Progress::new(total as u64, 0);
    let (mut pixels, mut random, mut seed) = (vec![], Random(seed), seed);
    for (batch, start) in (0..count).step_by(BATCH).enumerate() {
        let shape = (BATCH.min(count - start), 1, SIZE, SIZE);
        let mut images = None;
        for step in sampler.steps(model, shape, seed, device)? {
            interrupt::check()?;
            let step = step?;
            progress.advance((batch * sampler.timesteps().len() + step.index + 1) as u64);
            images = Some(step.x);
        }
        let images = images.ok_or("the sampler has no steps")?.flatten_all()?.to_vec1()?;
        pixels.extend(images.into_iter().map(pictures::to_byte));
        seed = random.next();
    }
    progress.finish();
    Ok(Images::new(pixels, (1, SIZE, SIZE))?)
}

/// Every pixel on its own, all values alike.
pub fn noise(count: usize) -> Result<Images> {
    let mut random = Random(0);
    let pixels = (0..count * SIZE * SIZE).map(|_| random.below(256) as u8).collect();
    Ok(Images::new(pixels, (1, SIZE, SIZE))?)
}
