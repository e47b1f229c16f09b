//! Draws images from a sampler in parts, with the memory of one part for any number of images.

use candle_core::{Device, Tensor};
use ddpm::{Denoiser, Sampler};

use super::cli::Result;
use super::random::Random;
use super::tell::grouped;
use super::{interrupt, pictures};

/// Number of images that share a seed.
const SEEDED: usize = 100;

/// Number of images in memory at a time, a divisor of [`SEEDED`]. A GPU needs many to be fully used.
fn part(device: &Device) -> usize {
    if device.is_cpu() { 20 } else { SEEDED }
}

/// One step of one part.
pub struct Drawn<'a> {
    /// The index of the step within its part.
    pub index: usize,
    /// The images of the part after the step.
    pub x: &'a Tensor,
    /// The number of finished steps, of [`steps`] in total.
    pub done: usize,
}

/// The number of steps needed to draw `count` images.
pub fn steps(sampler: &Sampler, count: usize, device: &Device) -> usize {
    count.div_ceil(part(device)) * sampler.timesteps().len()
}

/// Draws images of `shape` (count, channels, height, width), and returns their pixels as bytes.
///
/// Each hundred has its own seed, and the first hundred has `seed`. An image therefore depends only on the seed and its
/// position. `seen` is called after each step. If the user stops the program, drawing ends with
/// [`Interrupted`](interrupt::Interrupted).
pub fn draw(
    sampler: &Sampler,
    model: &impl Denoiser,
    shape: (usize, usize, usize, usize),
    seed: u64,
    device: &Device,
    mut seen: impl FnMut(Drawn) -> Result<()>,
) -> Result<Vec<u8>> {
    let (count, channels, height, width) = shape;
    let mut pixels = Vec::new();
    let len = count * channels * height * width;
    pixels.try_reserve_exact(len).map_err(|_| {
        format!("not enough memory for the pixels of the images, {} bytes", grouped(len))
    })?;
    let part = part(device);
    let (mut seeds, mut seed, mut done) = (Random(seed), seed, 0);
    for start in (0..count).step_by(part) {
        let first = start % SEEDED;
        if start > 0 && first == 0 {
            seed = seeds.next();
        }
        let shape = (part.min(count - start), channels, height, width);
        let sampler = sampler.clone().first_image(first as u32);
        let mut images = None;
        for step in sampler.steps(model, shape, seed, device)? {
            interrupt::check()?;
            let step = step?;
            done += 1;
            seen(Drawn { index: step.index, x: &step.x, done })?;
            images = Some(step.x);
        }
        pixels.extend(pictures::bytes(&images.ok_or("the sampler has no steps")?)?);
    }
    Ok(pixels)
}
