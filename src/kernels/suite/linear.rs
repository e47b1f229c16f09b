//! Linear layers of activated vectors.

use candle_core::{DType, Result, Tensor};
use proptest::prelude::*;

use super::{Expected, Subject, compare, rounded, size_of, subjects, sum_of};
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::reference;
use crate::kernels::tests::{F32, FUNCTION, Normals, Sums, value_and_gradients};
use crate::random_inputs::inputs;

/// A linear layer of activated vectors.
pub(crate) struct LinearCase {
    pub activation: VectorActivation,
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    pub dy: Tensor,
}

impl LinearCase {
    fn new(
        [batch, input, output]: [usize; 3],
        activation: VectorActivation,
        normals: Normals,
    ) -> Self {
        Self {
            activation,
            x: normals.tensor(0, &[batch, input]),
            weight: normals.tensor(1, &[output, input]),
            bias: normals.tensor(2, &[output]),
            dy: normals.tensor(3, &[batch, output]),
        }
    }

    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let products = subject.products();
        let [x, weight, dy] = [&self.x, &self.weight, &self.dy].map(|t| rounded(t, subject.maps()));
        let bias = &self.bias;
        let linear = |v: &[Tensor]| reference::linear::linear(&v[0], &v[1], &v[2]);
        let activated = |x: &Tensor| reference::linear::activated(self.activation, x);
        let exact = value_and_gradients(
            DType::F64,
            &[x.clone(), weight.clone(), bias.clone()],
            |_| dy.clone(),
            |v| linear(&[activated(&v[0])?, v[1].clone(), v[2].clone()]),
        )?;
        // The activated vectors are rounded to the maps' type.
        let x = x.to_dtype(DType::F64)?;
        let activated = activated(&x)?;
        let none = self.activation == VectorActivation::None;
        let function = if none { 0.0 } else { FUNCTION * F32 };
        let x_off = sum_of([(x.abs()? * function)?, products.storing(&activated)]);
        let inputs = [activated, weight.to_dtype(DType::F64)?, bias.to_dtype(DType::F64)?];
        let sums = Sums::of(&inputs, |_| dy.clone(), linear, linear)?;
        let (weight, d) = (size_of(&weight)?, size_of(&dy)?);
        let stored = (sums[0].exact.abs()? * 2.0)?.broadcast_add(&inputs[2].abs()?)?;
        // The derivatives of SiLU and GELU are at most 1.13.
        let slope = if none { 1.0 } else { 1.13 };
        let dx = sum_of([products.of(&sums[1]), products.storing(&sums[1].magnitude)]);
        let through = (&sums[1].magnitude * ((x.abs()? + 1.0)? * function)?)?;
        // Covers products of errors.
        let both = if none && products.stored == 0.0 { 1.0 } else { 1.05 };
        let bounds = [
            sum_of([products.of(&sums[0]), x_off.matmul(&weight.t()?)?, products.storing(&stored)]),
            sum_of([(dx * slope)?, through, products.storing(&exact[1])]),
            sum_of([products.of(&sums[2]), d.t()?.matmul(&x_off)?]),
            products.of(&sums[3]),
        ];
        let names = ["y", "dx", "dweight", "dbias"];
        let all = names.into_iter().zip(exact).zip(bounds);
        all.map(|((name, exact), bound)| Ok((name, exact, (bound * both)?))).collect()
    }

    fn check(&self) {
        let case =
            format!("{:?} of {:?}, {:?}", self.activation, self.x.dims(), self.weight.dims());
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.linear(self).unwrap(), &expected);
        }
    }
}

proptest! {
    #![proptest_config(inputs(96))]

    #[test]
    fn linear_layers_agree(
        sizes in [1usize..9, 1usize..40, 1usize..40],
        activation in prop_oneof![
            Just(VectorActivation::None), Just(VectorActivation::Silu), Just(VectorActivation::Gelu),
        ],
        seed: u64,
    ) {
        LinearCase::new(sizes, activation, Normals(seed)).check();
    }
}
