//! Elementary functions of vectors.

use super::simd::{Simd, lanes};

/// `e^x`, within two units in the last place. Results beyond the range of f32 are its largest or smallest
/// value. The range reduction is that of Cody and Waite, and the polynomial is from the Cephes library. The last bit
/// depends on the instruction set, and on whether the value lies in a whole vector: single values use no fused
/// multiply-add.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: S) -> S {
    // Adding this number rounds to an integer, which is then in the lowest bits.
    let round = S::splat(12_582_912.0);
    let x = x.at_least(S::splat(-87.0)).at_most(S::splat(88.0));
    let shifted = x.mul_add(S::splat(std::f32::consts::LOG2_E), round);
    let n = shifted.sub(round);
    // ln 2 in two parts, so that the first difference is exact.
    let r = n.mul_add(S::splat(-0.693_359_4), x);
    let r = n.mul_add(S::splat(2.121_944_4e-4), r);
    let mut p = S::splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, S::splat(coefficient));
    }
    p.mul(r).mul_add(r, r).add(S::splat(1.0)).mul(shifted.power_of_two())
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(x: S) -> S {
    let one = S::splat(1.0);
    one.div(one.add(exp(S::splat(0.0).sub(x))))
}

/// The dot product of two rows.
#[inline(always)]
pub(crate) fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    let whole = a.len().min(b.len()) / S::WIDTH * S::WIDTH;
    let mut total = S::splat(0.0);
    for (a, b) in a[..whole].chunks_exact(S::WIDTH).zip(b[..whole].chunks_exact(S::WIDTH)) {
        // SAFETY: each chunk has the values of a vector.
        total = unsafe { S::load(a.as_ptr()).mul_add(S::load(b.as_ptr()), total) };
    }
    let sum: f32 = lanes(total)[..S::WIDTH].iter().sum();
    a[whole..].iter().zip(&b[whole..]).fold(sum, |sum, (a, b)| sum + a * b)
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::simd::{for_channels, simd_fn};
    use super::*;

    simd_fn! {
        fn each<S>(values: &mut [f32]) {
            let (values, len) = (values.as_mut_ptr(), values.len());
            // SAFETY: vectors begin where at least one vector of values is left.
            unsafe {
                for_channels!(i in len, one::<S>(values.add(i)));
            }
        }
    }

    #[inline(always)]
    unsafe fn one<S: Simd>(x: *mut f32) {
        // SAFETY: the pointer is to the test's own memory.
        unsafe { exp(S::load(x)).store(x) }
    }

    #[test]
    fn exp_is_that_of_the_standard_library() {
        let arguments: Vec<f32> = (-870_000..880_000).map(|i| i as f32 * 1e-4).collect();
        for (isa, length) in
            Isa::available().into_iter().flat_map(|isa| [(isa, 1 << 12), (isa, 31)])
        {
            let mut values = arguments.clone();
            // Most of 31 values lie in whole vectors, and the others do not.
            values.chunks_mut(length).for_each(|values| each(isa, values));
            for (x, found) in arguments.iter().zip(values) {
                let (found, expected) = (f64::from(found), f64::from(*x).exp());
                assert!((found / expected - 1.0).abs() < 2.5e-7, "{isa:?}: e^{x} = {found}");
            }
        }
    }

    #[test]
    fn exp_has_limits_in_vectors_of_any_width() {
        for isa in Isa::available() {
            for length in 1..20 {
                let mut values = vec![0f32; length];
                each(isa, &mut values);
                assert!(values.iter().all(|&value| value == 1.0), "{isa:?}");
                values.fill(f32::NAN);
                each(isa, &mut values);
                assert!(values.iter().all(|value| value.is_nan()), "{isa:?}");
                for (x, expected) in
                    [(f32::NEG_INFINITY, 0.0..2e-38), (f32::INFINITY, 1e38..f32::MAX)]
                {
                    values.fill(x);
                    each(isa, &mut values);
                    assert!(values.iter().all(|value| expected.contains(value)), "{isa:?}");
                }
            }
        }
        assert_eq!(sigmoid(f32::NEG_INFINITY), 1.0 / (1.0 + exp(88.0)));
    }
}
