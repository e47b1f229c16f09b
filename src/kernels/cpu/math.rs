//! Elementary functions of vectors.

use super::simd::{Simd, lanes};

/// `e^x`, within two units in the last place. Results beyond the range of f32 are its largest or smallest
/// value. The range reduction is that of Cody and Waite, and the polynomial is from the Cephes library.
///
/// The operations, and therefore the bits of the result, are the same in vectors of any width.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: S) -> S {
    // Adding this number rounds to an integer, which is then in the lowest bits.
    let round = S::splat(12_582_912.0);
    let x = x.at_least(S::splat(-87.0)).at_most(S::splat(88.0));
    let shifted = x.mul(S::splat(std::f32::consts::LOG2_E)).add(round);
    let n = shifted.sub(round);
    // ln 2 in two parts, so that r is exact.
    let r = x.sub(n.mul(S::splat(0.693_359_4))).add(n.mul(S::splat(2.121_944_4e-4)));
    let mut p = S::splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul(r).add(S::splat(coefficient));
    }
    p.mul(r).mul(r).add(r).add(S::splat(1.0)).mul(shifted.power_of_two())
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

    #[test]
    fn exp_is_that_of_the_standard_library() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 2.5e-7, "e^{x} = {found}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY) > 1e38);
        assert_eq!(sigmoid(f32::NEG_INFINITY), 1.0 / (1.0 + exp(88.0)));
    }

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
    fn exp_has_the_same_bits_in_vectors_of_any_width() {
        for length in (0..70).chain([1000]) {
            let mut values: Vec<f32> = (0..length).map(|i| (i as f32 * 1.7).sin() * 95.0).collect();
            for (value, special) in values.iter_mut().skip(3).step_by(7).zip([
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                -0.0,
                f32::MIN_POSITIVE / 8.0,
            ]) {
                *value = special;
            }
            let expected: Vec<u32> = values.iter().map(|&x| exp(x).to_bits()).collect();
            for isa in Isa::available() {
                let mut found = values.clone();
                each(isa, &mut found);
                assert!(found.iter().map(|x| x.to_bits()).eq(expected.iter().copied()), "{isa:?}");
            }
        }
    }
}
