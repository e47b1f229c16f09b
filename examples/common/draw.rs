//! Images from a sampler, a part at a time: memory is that of a part, however many there are.

use candle_core::{Device, Tensor};
use ddpm::{Denoiser, Sampler};

use super::cli::Result;
use super::progress::Progress;
use super::random::Random;
use super::{interrupt, pictures};

/// Images in a part.
const PART: usize = 100;

/// Draws images of `shape` (count, channels, height, width), and gives their pixels as files have
/// them. Each part has a seed of its own, the first one the seed itself, so that an image depends on
/// the seed and its place alone. `seen` is told of each step of each part, by the step's index.
pub fn draw(
    sampler: &Sampler,
    model: &impl Denoiser,
    shape: (usize, usize, usize, usize),
    seed: u64,
    device: &Device,
    mut seen: impl FnMut(usize, &Tensor) -> Result<()>,
) -> Result<Vec<u8>> {
    let (count, channels, height, width) = shape;
    let steps = sampler.timesteps().len();
    let mut progress = Progress::new((count.div_ceil(PART) * steps) as u64, 0);
    let (mut pixels, mut seeds, mut seed) = (vec![], Random(seed), seed);
    for (part, start) in (0..count).step_by(PART).enumerate() {
        let shape = (PART.min(count - start), channels, height, width);
        let mut images = None;
        for step in sampler.steps(model, shape, seed, device)? {
            interrupt::check()?;
            let step = step?;
            seen(step.index, &step.x)?;
            progress.advance((part * steps + step.index + 1) as u64);
            images = Some(step.x);
        }
        pixels.extend(pictures::bytes(&images.ok_or("the sampler has no steps")?)?);
        seed = seeds.next();
    }
    progress.finish();
    Ok(pixels)
}
