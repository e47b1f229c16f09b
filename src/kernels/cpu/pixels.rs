//! Elementwise arithmetic on images and gradients.

use rayon::prelude::*;

use crate::kernels::op::loss::Loss;

/// Number of values that one thread handles at a time.
const CHUNK: usize = 1 << 12;

/// Writes `a x + b y` for images of one size, with a pair of factors for each image or one pair for all.
pub(crate) fn weighted_sum(x: &[f32], y: &[f32], factors: &[[f64; 2]], sum: &mut [f32]) {
    let image = sum.len() / factors.len();
    let images = sum.par_chunks_mut(image).zip(x.par_chunks(image)).zip(y.par_chunks(image));
    images.zip(factors).for_each(|(((sum, x), y), factors)| {
        let [a, b] = factors.map(|factor| factor as f32);
        let parts = sum.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(y.par_chunks(CHUNK));
        parts.for_each(|((sum, x), y)| {
            sum.iter_mut().zip(x).zip(y).for_each(|((sum, x), y)| *sum = a * x + b * y);
        });
    });
}

/// Writes the values of `x`, clamped to [`low`, `high`].
pub(crate) fn clamp_values(x: &[f32], low: f32, high: f32, y: &mut [f32]) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x.clamp(low, high));
    });
}

/// Returns the sum of the squares of `output - target`, and writes `factor` times the difference.
pub(crate) fn squared_errors(
    output: &[f32],
    target: &[f32],
    factor: f32,
    gradient: &mut [f32],
) -> f64 {
    let parts = output.par_chunks(CHUNK).zip(target.par_chunks(CHUNK));
    let parts = gradient.par_chunks_mut(CHUNK).zip(parts);
    // Collected, so that the order of the sum is fixed.
    let squares: Vec<f64> = parts
        .map(|(gradient, (output, target))| {
            let mut square = 0.0;
            for ((gradient, output), target) in gradient.iter_mut().zip(output).zip(target) {
                let error = output - target;
                square += f64::from(error) * f64::from(error);
                *gradient = error * factor;
            }
            square
        })
        .collect();
    squares.iter().sum()
}

/// Returns the sum of the losses of all errors, weighted for each image, and writes `factor` times its gradient.
pub(crate) fn losses(
    loss: Loss,
    error: &[f32],
    weights: &[f32],
    factor: f32,
    gradient: &mut [f32],
) -> f64 {
    let (image, f, delta) = (error.len() / weights.len(), loss.function(), loss.delta() as f32);
    let images = gradient.par_chunks_mut(image).zip(error.par_chunks(image)).zip(weights);
    // Collected, so that the order of the sum is fixed.
    let sums: Vec<f64> = images
        .map(|((gradient, error), &weight)| {
            let mut sum = 0.0;
            for (gradient, &error) in gradient.iter_mut().zip(error) {
                let (value, slope) = f(error, delta);
                sum += f64::from(value);
                *gradient = slope * weight * factor;
            }
            sum * f64::from(weight)
        })
        .collect();
    sums.iter().sum()
}

/// Returns whether no value is infinite or NaN.
pub(crate) fn all_finite(values: &[f32]) -> bool {
    values.par_chunks(CHUNK).all(|values| values.iter().all(|value| value.is_finite()))
}

/// Adds `more` to `sum`.
pub(crate) fn add_values(sum: &mut [f32], more: &[f32]) {
    sum.par_chunks_mut(CHUNK).zip(more.par_chunks(CHUNK)).for_each(|(sum, more)| {
        sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    });
}
