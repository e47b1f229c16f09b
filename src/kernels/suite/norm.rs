//! Normalisations.

use candle_core::{DType, Result, Tensor};
use proptest::prelude::*;

use super::{Expected, Subject, compare, rounded, subjects};
use crate::kernels::op::activation::Activation;
use crate::kernels::op::norm::{EPS, NormConfig};
use crate::kernels::reference;
use crate::kernels::tests::{F32, Normalization, Normals, Products, value_and_gradients};
use crate::random_inputs::inputs;

/// A normalisation, with `more` that is added to the gradient of `x`.
pub(crate) struct NormCase {
    pub config: NormConfig,
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    pub dy: Tensor,
    pub more: Option<Tensor>,
}

impl NormCase {
    pub fn new(
        [batch, h, w]: [usize; 3],
        ([groups, group], eps): ([usize; 2], f64),
        (activation, more): (Activation, bool),
        mean: f64,
        normals: Normals,
    ) -> Self {
        let dims = [batch, h, w, groups * group];
        Self {
            config: NormConfig { groups, eps, activation },
            x: (normals.tensor(0, &dims) + mean).unwrap(),
            weight: normals.tensor(1, &dims[3..]),
            bias: normals.tensor(2, &dims[3..]),
            dy: normals.gradient(&dims),
            more: more.then(|| normals.tensor(4, &dims)),
        }
    }

    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let Self { config, weight, bias, .. } = self;
        let map = |t: &Tensor| rounded(t, subject.maps());
        let (x, dy) = (map(&self.x), map(&self.dy));
        let inputs = [x.clone(), weight.clone(), bias.clone()];
        let mut exact = value_and_gradients(
            DType::F64,
            &inputs,
            |_| dy.clone(),
            |v| reference::norm::group_norm(&v[0], &v[1], &v[2], *config),
        )?;
        let (run, stored) = subject.norm_arithmetic();
        let NormConfig { groups, eps, activation } = *config;
        let norm = Normalization { groups, weight, bias, eps, activation, run };
        let mut bounds = norm.bounds(&x, &dy)?;
        let mut store = [stored; 2];
        if let Some(more) = &self.more {
            exact[1] = (&exact[1] + map(more).to_dtype(DType::F64)?)?;
            store[1] += F32;
        }
        for ((bound, exact), stored) in bounds.iter_mut().zip(&exact).zip(store) {
            if stored > 0.0 {
                let stored = Products { stored, ..subject.products() };
                // One percent covers products of errors.
                *bound = ((bound.clone() + stored.storing(exact))? * 1.01)?;
            }
        }
        let [y, dx, dweight, dbias] = exact.try_into().expect("a value and three gradients");
        let [of_y, of_dx, of_dweight, of_dbias] = bounds;
        Ok(vec![
            ("y", y.clone(), of_y.clone()),
            ("again", y, of_y),
            ("dx", dx, of_dx),
            ("dweight", dweight, of_dweight),
            ("dbias", dbias, of_dbias),
        ])
    }

    fn check(&self) {
        let case = format!("{:?} of {:?}", self.config, self.x.dims());
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.normalization(self).unwrap(), &expected);
        }
    }
}

/// Such groups have a deviation of 0, and gradients that consist of rounding errors.
#[test]
fn normalisations_of_one_value_agree() {
    for activation in [Activation::None, Activation::Silu] {
        for mean in [0.0, 30.0] {
            NormCase::new([3, 1, 1], ([5, 1], EPS), (activation, false), mean, Normals(5)).check();
        }
    }
}

/// The gradient of the weight nearly cancels. The error of the mean, times the sum of the gradients of all
/// outputs, is more than 4e-5 of it.
#[test]
fn a_normalisation_whose_gradient_nearly_cancels_agrees() {
    NormCase::new([3, 3, 6], ([1, 1], EPS), (Activation::None, false), 30.0, Normals(34153))
        .check();
}

/// Four vectors of AVX-512, two, one, and single channels.
#[test]
fn a_normalisation_of_every_number_of_vectors_agrees() {
    for silu in [Activation::Silu, Activation::None] {
        NormCase::new([2, 9, 5], ([5, 23], EPS), (silu, true), 1.0, Normals(115)).check();
    }
}

proptest! {
    #![proptest_config(inputs(96))]

    #[test]
    fn normalisations_agree(
        map in [1usize..6, 1usize..12, 1usize..12],
        // Groups, and channels of each: up to 160 channels, several groups of vectors.
        groups in prop_oneof![[1usize..9, 1usize..5], [1usize..9, 1usize..21]],
        eps in prop_oneof![Just(EPS), Just(1e-6), Just(1e-3)],
        silu: bool,
        more: bool,
        mean in prop_oneof![Just(0f64), Just(30.0)],
        seed: u64,
    ) {
        let activation = if silu { Activation::Silu } else { Activation::None };
        NormCase::new(map, (groups, eps), (activation, more), mean, Normals(seed)).check();
    }
}
