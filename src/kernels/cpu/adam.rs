use rayon::prelude::*;

use super::isa::Isa;
use super::simd::simd_fn;

/// The factors of one update of Adam. `backend/reference.rs` specifies the update as a composition, and
/// `backend/update.rs` computes its factors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamStep {
    /// Factors of the mean, and of the gradient in it. Both are rounded from f64, because 1 - 0.999 in f32 has a
    /// relative error of 5e-5.
    pub mean: [f32; 2],
    /// Factors of the mean square, and of the gradient's square in it.
    pub square: [f32; 2],
    pub eps: f32,
    /// The learning rate divided by the bias correction of the mean.
    pub step_size: f32,
    /// 1 / √(bias correction of the mean square).
    pub root_scale: f32,
    /// Factor of the weight before it is updated: decoupled decay.
    pub keep: f32,
    /// Factor of the weight in the gradient: L2 decay.
    pub l2: f32,
    /// Factor of the gradient: clipping.
    pub gradient_scale: f32,
    /// Factors of the average, and of the weight in it.
    pub average: [f32; 2],
}

/// Values that one thread updates at a time.
const CHUNK: usize = 1 << 14;

impl AdamStep {
    /// Updates a weight, the means of its gradient and of the gradient's square, and its average. Each value is read
    /// and written once.
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
                    move_towards(isa, self.average, average, weight);
                },
            ),
            None => chunks.for_each(|((weight, gradient), (mean, square))| {
                update(isa, self, weight, gradient, mean, square);
            }),
        }
    }

    /// Updates the average of a weight that was not updated.
    pub fn follow(&self, isa: Isa, average: &mut [f32], weight: &[f32]) {
        move_towards(isa, self.average, average, weight);
    }
}

/// Moves an average, which keeps the fraction `decay`, towards a weight.
pub(crate) fn follow(isa: Isa, decay: f64, average: &mut [f32], weight: &[f32]) {
    let factors = [decay as f32, (1.0 - decay) as f32];
    let chunks = average.par_chunks_mut(CHUNK).zip(weight.par_chunks(CHUNK));
    chunks.for_each(|(average, weight)| move_towards(isa, factors, average, weight));
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
    fn move_towards<S>(factors: [f32; 2], average: &mut [f32], weight: &[f32]) {
        let [decay, gain] = factors;
        for (average, weight) in average.iter_mut().zip(weight) {
            *average = *average * decay + weight * gain;
        }
    }
}

/// Returns the sum of squares, in f64. The result does not depend on the number of threads.
pub(crate) fn sum_of_squares(isa: Isa, values: &[f32]) -> f64 {
    // Collected, because the order of a parallel sum would depend on the threads.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{F32, Normals, roundings};
    use proptest::prelude::*;

    use crate::random_inputs::inputs;

    /// Returns whether the error is within `count` successive roundings of terms whose magnitudes sum to `size`.
    fn close(found: f32, expected: f64, size: f64, count: u8) -> bool {
        let bound = roundings(f64::from(count)) * F32 * size.max(1e-30);
        (f64::from(found) - expected).abs() <= bound
    }

    /// Counts that do not fill whole vectors, below and above the chunk of one thread.
    fn counts() -> impl Strategy<Value = usize> {
        prop_oneof![1usize..100, CHUNK - 3..CHUNK + 40, Just(2 * CHUNK + 1)]
    }

    proptest! {
        #![proptest_config(inputs(48))]

        #[test]
        fn update_is_the_formula_value_by_value(
            count in counts(),
            (keep, l2) in (0.5f32..1.0, 0f32..0.5),
            (step_size, root_scale) in (1e-4f32..1.0, 1f32..30.0),
            (gradient_scale, averaged) in (0.01f32..1.0, any::<bool>()),
            seed: u64,
        ) {
            let step = AdamStep {
                mean: [0.9, 0.1], square: [0.999, 0.001], eps: 1e-8, average: [0.75, 0.25],
                step_size, root_scale, keep, l2, gradient_scale,
            };
            let [weight, gradient, mean, average] = [0, 1, 2, 3].map(|k| Normals(seed).values(k, count));
            let square: Vec<f32> = Normals(seed).values(4, count).iter().map(|v| v * v).collect();
            for isa in Isa::available() {
                let (mut w, mut m, mut s) = (weight.clone(), mean.clone(), square.clone());
                let mut a = average.clone();
                step.apply(isa, &mut w, &gradient, (&mut m, &mut s), averaged.then_some(&mut a[..]));
                for i in 0..count {
                    let of = |values: &[f32]| f64::from(values[i]);
                    let (clipped, decayed) = (
                        of(&gradient) * f64::from(gradient_scale),
                        of(&weight) * f64::from(l2),
                    );
                    let (g, size) = (clipped + decayed, clipped.abs() + decayed.abs());
                    let [beta1, gain1] = step.mean.map(f64::from);
                    let expected = of(&mean) * beta1 + g * gain1;
                    let mean_size = of(&mean).abs() * beta1 + size * gain1;
                    prop_assert!(close(m[i], expected, mean_size, 4), "{isa:?}: mean {i}");
                    let [beta2, gain2] = step.square.map(f64::from);
                    let expected_square = of(&square) * beta2 + g * g * gain2;
                    let square_size = of(&square) * beta2 + size * size * gain2;
                    prop_assert!(close(s[i], expected_square, square_size, 7), "{isa:?}: square {i}");
                    // Computed from the moments that were found: their errors are checked separately.
                    let root = of(&s).sqrt() * f64::from(root_scale) + f64::from(step.eps);
                    let (kept, moved) =
                        (of(&weight) * f64::from(keep), of(&m) * f64::from(step_size) / root);
                    let size = kept.abs() + moved.abs();
                    prop_assert!(close(w[i], kept - moved, size, 6), "{isa:?}: weight {i}");
                    let (old, new) = (of(&average) * 0.75, of(&w) * 0.25);
                    if averaged {
                        let size = old.abs() + new.abs();
                        prop_assert!(close(a[i], old + new, size, 2), "{isa:?}: average {i}");
                    }
                }
                if averaged {
                    let mut alone = average.clone();
                    step.follow(isa, &mut alone, &w);
                    prop_assert_eq!(alone, a);
                } else {
                    prop_assert_eq!(&average, &a);
                }
            }
        }

        #[test]
        fn sum_of_squares_is_that_of_f64(count in counts(), seed: u64) {
            let values = Normals(seed).values(5, count);
            let expected: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            for isa in Isa::available() {
                let found = sum_of_squares(isa, &values);
                // The roundings of both sums.
                let bound = 2.0 * roundings(count as f64) * f64::EPSILON / 2.0 * expected;
                prop_assert!((found - expected).abs() <= bound, "{isa:?}: {found}, {expected}");
            }
        }
    }
}
