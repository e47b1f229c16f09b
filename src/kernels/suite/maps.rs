//! Concatenation, masks, and repeated and summed pixels.

use candle_core::{DType, Device, Result, Tensor};
use proptest::prelude::*;

use super::{Expected, Subject, compare, rounded, subjects, sum_of};
use crate::kernels::reference;
use crate::kernels::tests::{Normals, Sums};
use crate::random_inputs::inputs;

/// Two maps with a mask for the first: (batch, 1, 1, channels).
pub(crate) struct MapsCase {
    pub a: Tensor,
    pub b: Tensor,
    pub mask: Tensor,
}

impl MapsCase {
    fn check(&self) {
        for subject in subjects() {
            let [a, b, mask] = [&self.a, &self.b, &self.mask].map(|t| rounded(t, subject.maps()));
            let scaled = a.broadcast_mul(&mask).unwrap();
            let stored = subject.products().storing(&scaled.to_dtype(DType::F64).unwrap());
            let copied = |name, t: Tensor| (name, t.clone(), t.zeros_like().unwrap());
            let expected = vec![
                copied("concatenated", Tensor::cat(&[&a, &b], 3).unwrap()),
                copied("first", a),
                copied("second", b),
                ("scaled", scaled, stored),
            ];
            let case = format!("{:?} and {:?}", self.a.dims(), self.b.dims());
            compare(&*subject, &case, subject.maps_of(self).unwrap(), &expected);
        }
    }
}

/// A map of even height and width, whose pixels are repeated and summed.
pub(crate) struct PixelsCase {
    pub x: Tensor,
    pub factor: f32,
}

impl PixelsCase {
    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let x = rounded(&self.x, subject.maps());
        let factor = f64::from(self.factor);
        let products = subject.products();
        let repeat = |v: &[Tensor]| reference::pixels::upsample_nearest_2x(&v[0]);
        let sum = |v: &[Tensor]| reference::pixels::average_pixels(&v[0])? * 4.0;
        let one = std::slice::from_ref(&x);
        let ones = |dims: &[usize]| Tensor::ones(dims, DType::F64, &Device::Cpu).unwrap();
        let repeated = Sums::of(one, ones, repeat, repeat)?.swap_remove(0);
        let summed = Sums::of(one, ones, sum, sum)?.swap_remove(0);
        // The factor is a power of two.
        let times = |name, sums: &Sums| -> Result<(&'static str, Tensor, Tensor)> {
            let (exact, bound) = ((&sums.exact * factor)?, (products.of(sums) * factor)?);
            let bound = sum_of([bound, products.storing(&exact)]);
            Ok((name, exact, bound))
        };
        Ok(vec![times("repeated", &repeated)?, times("summed", &summed)?])
    }

    fn check(&self) {
        let case = format!("{:?} times {}", self.x.dims(), self.factor);
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.pixels(self).unwrap(), &expected);
        }
    }
}

proptest! {
    #![proptest_config(inputs(96))]

    #[test]
    fn repeated_and_summed_pixels_agree(
        [batch, h, w, channels] in [1usize..4, 1usize..5, 1usize..5, 1usize..40],
        factor in prop_oneof![Just(1f32), Just(0.25)],
        seed: u64,
    ) {
        PixelsCase { x: Normals(seed).tensor(0, &[batch, 2 * h, 2 * w, channels]), factor }.check();
    }

    #[test]
    fn concatenation_and_masks_agree(
        [batch, h, w] in [1usize..4, 1usize..9, 1usize..9],
        [first, second] in [1usize..40, 1usize..40],
        seed: u64,
    ) {
        let normal = |k, shape: &[usize]| Normals(seed).tensor(k, shape);
        MapsCase {
            a: normal(0, &[batch, h, w, first]),
            b: normal(1, &[batch, h, w, second]),
            mask: normal(2, &[batch, 1, 1, first]),
        }.check();
    }
}
