//! Sums over pixels and over the batch, in an order that does not depend on the number of threads.

use rayon::prelude::*;

/// Returns the sums over the pixels of each image: (batch, channels).
pub(crate) fn sums_by_image(maps: &[f32], batch: usize, channels: usize) -> Vec<f64> {
    let image = maps.len() / batch;
    let mut sums = vec![0f64; batch * channels];
    sums.par_chunks_mut(channels).zip(maps.par_chunks(image)).for_each(|(sums, image)| {
        let mut run = vec![0f32; channels];
        // Short runs in f32, which vectorise, then f64.
        for pixels in image.chunks(32 * channels) {
            run.fill(0.0);
            for pixel in pixels.chunks(channels) {
                run.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value);
            }
            sums.iter_mut().zip(&run).for_each(|(sum, run)| *sum += f64::from(*run));
        }
    });
    sums
}

/// Writes the sums over the batch of (batch, channels) to `sums` (channels).
pub(crate) fn sum_over_batch<T: Copy + Into<f64>>(values: &[T], sums: &mut [f32]) {
    let channels = sums.len();
    for (i, sum) in sums.iter_mut().enumerate() {
        let column = values.iter().skip(i).step_by(channels);
        *sum = column.map(|&value| value.into()).sum::<f64>() as f32;
    }
}
