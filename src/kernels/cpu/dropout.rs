//! Dropout of single values. Its mask is not kept, because drawing it again takes little time.

use rayon::prelude::*;

use super::isa::Isa;
use super::simd::simd_fn;
use crate::random::{Dropout, Stream};

/// Counters of random numbers that are handled at once. Each counter gives four numbers.
const COUNTERS: usize = 16;

/// Values that one thread handles at a time.
const CHUNK: usize = 1 << 12;

/// Multiplies each value of `batch` images by its factor: 0 with probability `p`, and `1 / (1 - p)` otherwise. The
/// factors are those of [`Dropout::mask`].
pub(crate) fn drop_values(
    isa: Isa,
    (dropout, layer, p): (&Dropout, u16, f64),
    batch: usize,
    values: &mut [f32],
) {
    let (image, keep) = (values.len() / batch, Dropout::factor(p));
    let last = Dropout::last_dropped(p);
    values.par_chunks_mut(image).enumerate().for_each(|(k, values)| {
        let stream = dropout.stream(layer, k);
        values.par_chunks_mut(CHUNK).enumerate().for_each(|(i, values)| match last {
            Some(last) => scale(isa, values, &stream, i * CHUNK / 4, last, keep),
            None => values.iter_mut().for_each(|value| *value *= keep),
        });
    });
}

simd_fn! {
    /// Multiplies the values, whose random integers begin at the counter `first`, by their factors: 0 for integers up
    /// to `last`, and `keep` for others.
    fn scale<S>(values: &mut [f32], stream: &Stream, first: usize, last: u32, keep: f32) {
        for (i, values) in values.chunks_mut(4 * COUNTERS).enumerate() {
            let integers = stream.integers::<COUNTERS>((first + i * COUNTERS) as u32);
            let mut factors = [0f32; 4 * COUNTERS];
            for (part, integers) in integers.iter().enumerate() {
                for (counter, &integer) in integers.iter().enumerate() {
                    factors[4 * counter + part] = if integer > last { keep } else { 0.0 };
                }
            }
            for (value, factor) in values.iter_mut().zip(&factors) {
                *value *= factor;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result};

    use super::*;

    /// The sizes are not whole chunks, vectors or counters.
    #[test]
    fn factors_are_those_of_the_mask() -> Result<()> {
        let dropout = Dropout { first_sample: 3, ..Dropout::new(5, 9) };
        for (len, p) in [(3, 0.5), (131, 0.1), (2 * CHUNK + 77, 0.3), (40, 1e-12)] {
            let mask = dropout.mask(6, 2, len, p, DType::F32, &Device::Cpu).expect("memory");
            let mask = mask.flatten_all()?.to_vec1::<f32>()?;
            let values: Vec<f32> = (0..2 * len).map(|i| i as f32 - 50.5).collect();
            let expected: Vec<f32> = values.iter().zip(&mask).map(|(x, m)| x * m).collect();
            for isa in Isa::available() {
                let mut found = values.clone();
                drop_values(isa, (&dropout, 6, p), 2, &mut found);
                assert_eq!(found, expected, "{isa:?}, {len}, {p}");
            }
        }
        Ok(())
    }
}
