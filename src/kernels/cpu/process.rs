//! The process's own arithmetic on images, and sums of gradients. candle's would do, but from 65,536
//! values on it runs on a second pool of threads, which spins against ours.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::kernels::cuda;
use crate::kernels::slices::{on_cpu_in_f32, with_values, with_values_mut, zeros};

/// Values that one thread takes at a time.
const CHUNK: usize = 1 << 12;

/// Whether the functions here take these two: f32 on the CPU, contiguous, of one shape, not empty, with
/// no gradient to pass on.
pub(crate) fn are_plain(x: &Tensor, y: &Tensor) -> bool {
    let suits = |t: &Tensor| on_cpu_in_f32(t) && t.is_contiguous() && !t.track_op();
    suits(x) && suits(y) && x.dims() == y.dims() && x.elem_count() > 0
}

/// `a x + b y`, of one shape (batch, ...), with a pair of factors for each of the batch or one for all.
pub(crate) fn weighted_sum(x: &Tensor, y: &Tensor, factors: &[[f64; 2]]) -> Result<Tensor> {
    let mut sum = zeros(x.elem_count())?;
    let image = sum.len() / factors.len();
    with_values([x, y], |[x, y]| {
        let images = sum.par_chunks_mut(image).zip(x.par_chunks(image)).zip(y.par_chunks(image));
        images.zip(factors).for_each(|(((sum, x), y), factors)| {
            let [a, b] = factors.map(|factor| factor as f32);
            let parts = sum.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(y.par_chunks(CHUNK));
            parts.for_each(|((sum, x), y)| {
                sum.iter_mut().zip(x).zip(y).for_each(|((sum, x), y)| *sum = a * x + b * y);
            });
        });
        Ok(())
    })?;
    Tensor::from_vec(sum, x.shape(), x.device())
}

/// `a x + b y` on a CUDA device, with the factors of each image's timestep `t` (batch) from `table`; the
/// second negated where that is asked for. None where there is no kernel for these.
#[cfg(feature = "cuda")]
pub(crate) fn mix(
    x: &Tensor,
    y: &Tensor,
    t: &Tensor,
    table: &[[f64; 2]],
    negate: bool,
) -> Result<Option<Tensor>> {
    if !cuda::are_plain(&[x, y]) || !t.device().same_device(x.device()) {
        return Ok(None);
    }
    cuda::mix(x, y, t, table, negate).map(Some)
}

/// `a x + b y`.
pub(crate) fn combine(x: &Tensor, a: f64, y: &Tensor, b: f64) -> Result<Tensor> {
    if are_plain(x, y) {
        return weighted_sum(x, y, &[[a, b]]);
    }
    #[cfg(feature = "cuda")]
    if cuda::are_plain(&[x, y]) {
        return cuda::combine(x, a, y, b);
    }
    x.affine(a, 0.0)? + y.affine(b, 0.0)?
}

/// What lies beyond `low` or `high` becomes that.
pub(crate) fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::are_plain(&[x]) {
        return cuda::clamp(x, low, high);
    }
    if !are_plain(x, x) {
        return x.clamp(low, high);
    }
    let values = with_values([x], |[x]| {
        Ok(x.par_iter().with_min_len(CHUNK).map(|x| x.clamp(low, high)).collect::<Vec<f32>>())
    })?;
    Tensor::from_vec(values, x.shape(), x.device())
}

/// `scale` times the sum of the squares of `output - target`, and its gradient with respect to
/// `output`, times `gradient_scale`, a scalar of f32, where it is given.
pub(crate) fn squared_error(
    output: &Tensor,
    target: &Tensor,
    scale: f64,
    gradient_scale: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if cuda::are_plain(&[output, target]) {
        return cuda::squared_error(output, target, scale, gradient_scale);
    }
    let gradient_scale = match gradient_scale {
        Some(scale) => f64::from(scale.to_scalar::<f32>()?),
        None => 1.0,
    };
    let factor = 2.0 * scale * gradient_scale;
    if !are_plain(output, target) {
        let error = (output - target)?;
        return Ok(((error.sqr()?.sum_all()? * scale)?, (error * factor)?));
    }
    let mut gradient = zeros(output.elem_count())?;
    let factor = factor as f32;
    let squares: Vec<f64> = with_values([output, target], |[output, target]| {
        let parts = output.par_chunks(CHUNK).zip(target.par_chunks(CHUNK));
        let parts = gradient.par_chunks_mut(CHUNK).zip(parts);
        // Collected, so that they are added in one order.
        Ok(parts
            .map(|(gradient, (output, target))| {
                let mut square = 0.0;
                for ((gradient, output), target) in gradient.iter_mut().zip(output).zip(target) {
                    let error = output - target;
                    square += f64::from(error) * f64::from(error);
                    *gradient = error * factor;
                }
                square
            })
            .collect())
    })?;
    let loss = Tensor::new((squares.iter().sum::<f64>() * scale) as f32, output.device())?;
    Ok((loss, Tensor::from_vec(gradient, output.shape(), output.device())?))
}

/// Computes a scalar on the device of `x`: 0 if every value is finite, and NaN otherwise.
pub(crate) fn finiteness(x: &Tensor) -> Result<Tensor> {
    if are_plain(x, x) {
        let finite = with_values([x], |[x]| {
            Ok(x.par_chunks(CHUNK).all(|x| x.iter().all(|x| x.is_finite())))
        })?;
        return Tensor::new(if finite { 0f32 } else { f32::NAN }, x.device());
    }
    // A value that is not finite gives NaN when it is subtracted from itself.
    Ok(squared_error(x, x, 1.0, None)?.0)
}

/// Makes `sum` its sum with `more`; in place, if both are plain, and in every tensor that shares its
/// values.
pub(crate) fn add_to(sum: &mut Tensor, more: &Tensor) -> Result<()> {
    #[cfg(feature = "cuda")]
    if cuda::are_plain(&[sum, more]) {
        return cuda::add_to(sum, more);
    }
    if !are_plain(sum, more) {
        *sum = (&*sum + more)?;
        return Ok(());
    }
    with_values_mut(sum, |sum| {
        with_values([more], |[more]| {
            add_values(sum, more);
            Ok(())
        })
    })
}

/// Adds `more` to `sum`, value by value.
pub(crate) fn add_values(sum: &mut [f32], more: &[f32]) {
    sum.par_chunks_mut(CHUNK).zip(more.par_chunks(CHUNK)).for_each(|(sum, more)| {
        sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    });
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::tests::{F32, Normals, check};
    use crate::random_inputs::inputs;

    proptest! {
        #![proptest_config(inputs(32))]

        /// In f64, and for what takes gradients, the composition runs.
        #[test]
        fn kernels_agree_with_their_compositions(
            batch in 1usize..5,
            len in prop_oneof![1usize..9, 3000usize..9000],
            (a, b) in (-2f64..2.0, -2f64..2.0),
            seed: u64,
        ) {
            let normal = |k| Normals(seed).tensor(k, &[batch, len]);
            let exact = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let values = |t: &Tensor| exact(t).flatten_all().unwrap().to_vec1::<f64>().unwrap();
            // The error of `count` roundings of terms of these magnitudes.
            let roundings = |count: f64, size: &Tensor| (size.abs().unwrap() * (count * F32)).unwrap();
            let (x, y) = (normal(0), normal(1));
            let (x64, y64) = (exact(&x), exact(&y));
            // Each term's factor, product and sum.
            let of_combined = |x: &Tensor, a: f64, y: &Tensor, b: f64| {
                let size = combine(&x.abs().unwrap(), a.abs(), &y.abs().unwrap(), b.abs());
                roundings(3.001, &size.unwrap())
            };

            let found = combine(&x, a, &y, b).unwrap();
            let bound = of_combined(&x64, a, &y64, b);
            check("combined", &found, &combine(&x64, a, &y64, b).unwrap(), &bound);
            let taking = Var::from_tensor(&x).unwrap();
            let differentiable = combine(&taking, a, &y, b).unwrap();
            prop_assert!(differentiable.track_op());
            check("differentiable", &found, &exact(&differentiable), &(bound * 2.0).unwrap());

            let factors: Vec<[f64; 2]> = (0..batch).map(|k| [a + k as f64, b]).collect();
            let found = weighted_sum(&x, &y, &factors).unwrap();
            for (k, [a, b]) in factors.into_iter().enumerate() {
                let (x, y) = (x64.get(k).unwrap(), y64.get(k).unwrap());
                let expected = combine(&x, a, &y, b).unwrap();
                check("sum", &found.get(k).unwrap(), &expected, &of_combined(&x, a, &y, b));
            }

            let found = clamp(&x, -0.5, 0.7).unwrap();
            prop_assert_eq!(values(&found), values(&x.clamp(-0.5f32, 0.7f32).unwrap()));

            let by = Tensor::new(b as f32, &Device::Cpu).unwrap();
            let (loss, gradient) = squared_error(&x, &y, 0.3, Some(&by)).unwrap();
            let (exact_loss, exact_gradient) = squared_error(&x64, &y64, 0.3, Some(&by)).unwrap();
            check("loss", &loss, &exact_loss, &roundings(3.001, &exact_loss));
            check("gradient", &gradient, &exact_gradient, &roundings(3.001, &exact_gradient));

            for t in [&x, &x64, differentiable.as_ref()] {
                prop_assert_eq!(values(&finiteness(t).unwrap()), [0.0]);
            }
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut row = values(&x64);
                row[len / 2] = bad;
                let x64 = Tensor::from_vec(row, (batch, len), &Device::Cpu).unwrap();
                for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
                    let flag = finiteness(&x64.to_dtype(dtype).unwrap()).unwrap();
                    prop_assert!(values(&flag)[0].is_nan(), "{bad} in {dtype:?}");
                }
            }

            let mut sum = x.copy().unwrap();
            add_to(&mut sum, &y).unwrap();
            let expected = (&x64 + &y64).unwrap();
            check("sum in place", &sum, &expected, &roundings(1.0, &expected));
            let mut sum = x64.clone();
            add_to(&mut sum, &y64).unwrap();
            prop_assert_eq!(values(&sum), values(&(&x64 + &y64).unwrap()));
        }
    }
}
