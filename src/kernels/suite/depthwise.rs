//! Depthwise convolutions.

use candle_core::{DType, Result, Tensor};
use proptest::prelude::*;

use super::{Expected, compare, subjects};
use crate::kernels::op::depthwise::DepthwiseShape;
use crate::kernels::reference;
use crate::kernels::tests::{F32, Normals, roundings};
use crate::random_inputs::inputs;

/// A depthwise convolution.
pub(crate) struct DepthwiseCase {
    pub shape: DepthwiseShape,
    pub x: Tensor,
    pub weight: Tensor,
    /// (channels)
    pub bias: Tensor,
}

impl DepthwiseCase {
    fn expected(&self) -> Result<Expected> {
        let sum = |change: fn(&Tensor) -> Result<Tensor>| -> Result<Tensor> {
            let of = |t: &Tensor| change(&t.to_dtype(DType::F64)?);
            let y =
                reference::depthwise::depthwise(&of(&self.x)?, &of(&self.weight)?, &self.shape)?;
            y.broadcast_add(&of(&self.bias)?)
        };
        let y = sum(|t| Ok(t.clone()))?;
        // The products and the bias.
        let bound = (sum(Tensor::abs)? * (roundings((self.shape.kernel.pow(2) + 2) as f64) * F32))?;
        let relu = y.relu()?;
        // Limits do not increase errors.
        Ok(vec![
            ("relu6", relu.minimum(6.0)?, bound.clone()),
            ("relu", relu, bound.clone()),
            ("y", y, bound),
        ])
    }

    fn check(&self) {
        let (case, expected) = (format!("{:?}", self.shape), self.expected().unwrap());
        for subject in subjects() {
            compare(&*subject, &case, subject.depthwise(self).unwrap(), &expected);
        }
    }
}

proptest! {
    #![proptest_config(inputs(96))]

    #[test]
    fn depthwise_convolutions_agree(
        [batch, h, w, channels] in [1usize..4, 1usize..12, 1usize..12, 1usize..40],
        (kernel, stride) in (prop_oneof![Just(3usize), Just(5), 1usize..8], 1usize..4),
        seed: u64,
    ) {
        let (x, weight) = ([batch, h, w, channels], [channels, 1, kernel, kernel]);
        let normal = |k, dims: &[usize]| Normals(seed).tensor(k, dims);
        DepthwiseCase {
            shape: DepthwiseShape::new(x, weight, stride).unwrap(),
            x: normal(0, &x),
            weight: normal(1, &weight),
            bias: normal(2, &[channels]),
        }
        .check();
    }
}
