//! Pooling.

use candle_core::{DType, Result, Tensor};
use proptest::prelude::*;

use super::{Expected, Subject, compare, rounded, subjects};
use crate::kernels::op::conv::Scale;
use crate::kernels::op::pool::{PoolShape, Pooling};
use crate::kernels::reference;
use crate::kernels::tests::{F32, Normals, roundings};
use crate::random_inputs::inputs;

/// A map whose pixels are pooled.
pub(crate) struct PoolCase {
    pub shape: PoolShape,
    pub x: Tensor,
}

impl PoolCase {
    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let x = rounded(&self.x, subject.maps());
        let max = reference::pool::pool(&x, Pooling::Max, &self.shape)?;
        let mean = |x: &Tensor| {
            reference::pool::pool(&x.to_dtype(DType::F64)?, Pooling::Average, &self.shape)
        };
        // The sum of the pixels of a window, the inverse of their number, and the product.
        let relative = roundings((self.shape.window.pow(2) + 2) as f64) * F32;
        let bound = (mean(&x.abs()?)? * relative)?;
        Ok(vec![("max", max.clone(), max.zeros_like()?), ("average", mean(&x)?, bound)])
    }

    fn check(&self) {
        let case = format!("{:?}", self.shape);
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.pooling(self).unwrap(), &expected);
        }
    }
}

proptest! {
    #![proptest_config(inputs(96))]

    #[test]
    fn poolings_agree(
        [batch, h, w, channels] in [1usize..4, 0usize..6, 0usize..6, 1usize..40],
        (window, scale) in prop_oneof![
            (prop_oneof![Just(1usize), Just(3)], (1usize..4).prop_map(Scale::Stride)),
            (1usize..5, (1usize..4).prop_map(Scale::StrideWithin)),
        ],
        seed: u64,
    ) {
        let dims = [batch, window + h, window + w, channels];
        let shape = PoolShape::new(dims, window, scale).unwrap();
        PoolCase { shape, x: Normals(seed).tensor(0, &dims) }.check();
    }
}
