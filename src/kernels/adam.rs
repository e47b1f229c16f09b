use rayon::prelude::*;

use super::simd::{Isa, simd_fn};

/// One update of Adam, as factors of what it adds up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamStep {
    /// Of the mean, and of the gradient in it; both times in f64, since 1 - 0.999 in f32 is off by
    /// 5e-5 of itself.
    pub mean: [f32; 2],
    /// Of the mean square, and of the gradient's square in it.
    pub square: [f32; 2],
    pub eps: f32,
    /// The learning rate, over what corrects the bias of the mean.
    pub step_size: f32,
    /// One over the root of what corrects the bias of the mean square.
    pub root_scale: f32,
    /// Of the weight, before it is updated: decoupled decay.
    pub keep: f32,
    /// Of the weight, in the gradient: L2 decay.
    pub l2: f32,
    /// Of the gradient: clipping.
    pub gradient_scale: f32,
    /// Of the average, and of the weight in it.
    pub average: [f32; 2],
}

/// Values that one thread updates at a time.
const CHUNK: usize = 1 << 14;

impl AdamStep {
    /// Updates a weight, the means of its gradient and of its square, and its average, reading and
    /// writing each value once.
    pub fn apply(
        &self,
        isa: Isa,
        weight: &mut [f32],
        gradient: &[f32],
        (mean, square): (&mut [f32], &mut [f32]),
        average: Option<&mut [f32]>,
    ) {
        let state = mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK));
        let chunks = weight.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).zip(state);
        match average {
            Some(average) => chunks.zip(average.par_chunks_mut(CHUNK)).for_each(
                |(((weight, gradient), (mean, square)), average)| {
                    update(isa, self, weight, gradient, mean, square);
                    follow(isa, self.average, average, weight);
                },
            ),
            None => chunks.for_each(|((weight, gradient), (mean, square))| {
                update(isa, self, weight, gradient, mean, square);
            }),
        }
    }
}

impl AdamStep {
    /// Moves the average of a weight that was not updated.
    pub fn follow(&self, isa: Isa, average: &mut [f32], weight: &[f32]) {
        follow(isa, self.average, average, weight);
    }
}

simd_fn! {
    fn update<S>(
        step: &AdamStep,
        weight: &mut [f32],
        gradient: &[f32],
        mean: &mut [f32],
        square: &mut [f32],
    ) {
        let AdamStep { eps, step_size, root_scale, keep, l2, gradient_scale, .. } = *step;
        let ([beta1, gain1], [beta2, gain2]) = (step.mean, step.square);
        let values = weight.iter_mut().zip(gradient).zip(mean).zip(square);
        for (((weight, gradient), mean), square) in values {
            let gradient = gradient * gradient_scale + *weight * l2;
            *mean = *mean * beta1 + gradient * gain1;
            *square = *square * beta2 + gradient * gradient * gain2;
            let root = square.sqrt() * root_scale + eps;
            *weight = *weight * keep - *mean * step_size / root;
        }
    }
}

simd_fn! {
    /// Moves an average towards the weight.
    fn follow<S>(factors: [f32; 2], average: &mut [f32], weight: &[f32]) {
        let [decay, gain] = factors;
        for (average, weight) in average.iter_mut().zip(weight) {
            *average = *average * decay + weight * gain;
        }
    }
}

/// The sum of squares, in f64 over short runs; the same for any number of threads.
pub(crate) fn sum_of_squares(isa: Isa, values: &[f32]) -> f64 {
    // Collected, since a parallel sum's order would depend on the threads.
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(|chunk| squares(isa, chunk)).collect();
    sums.iter().sum()
}

simd_fn! {
    fn squares<S>(values: &[f32]) -> f64 {
        let mut lanes = [0f64; 16];
        let mut chunks = values.chunks_exact(16);
        for chunk in &mut chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(*value) * f64::from(*value);
            }
        }
        let rest: f64 = chunks.remainder().iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        lanes.iter().sum::<f64>() + rest
    }
}
