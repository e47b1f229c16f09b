//! Modulated normalisations.

use candle_core::{DType, Result, Tensor};
use proptest::prelude::*;

use super::norm::NormCase;
use super::{Expected, compare, subjects};
use crate::kernels::op::activation::Activation;
use crate::kernels::op::norm::{EPS, NormConfig};
use crate::kernels::reference;
use crate::kernels::tests::{F32, Normalization, Normals, value_and_gradients};
use crate::random_inputs::inputs;

/// A normalisation modulated by scales and shifts (batch, 2 channels). The weights and biases of the images are exact
/// in f32, so each image has the error of a plain normalisation.
pub(crate) struct ModulatedCase {
    pub norm: NormCase,
    pub by: Tensor,
}

impl ModulatedCase {
    pub fn new(mut norm: NormCase, normals: Normals) -> Result<Self> {
        // Weights, biases and shifts have 8 binary digits after the point. Factors are powers of two.
        let few_digits = |t: &Tensor| (t * 256.0)?.round()? / 256.0;
        norm.weight = few_digits(&norm.weight)?;
        norm.bias = few_digits(&norm.bias)?;
        let dims = (norm.x.dim(0)?, norm.x.dim(3)?);
        let factors = normals.tensor(5, &[dims.0, dims.1]).clamp(-2f32, 2f32)?.round()?;
        let scale = ((factors * std::f64::consts::LN_2)?.exp()?.affine(16.0, 0.0)?.round()?
            / 16.0)?
            .affine(1.0, -1.0)?;
        let shift = few_digits(&normals.tensor(6, &[dims.0, dims.1]))?;
        Ok(Self { norm, by: Tensor::cat(&[scale, shift], 1)? })
    }

    /// The results of a subject whose f32 sums have at most `run` values.
    pub fn expected(&self, run: usize) -> Result<Expected> {
        let NormCase { config, x, weight, bias, dy, more } = &self.norm;
        let (batch, channels) = (x.dim(0)?, x.dim(3)?);
        let inputs = [x.clone(), weight.clone(), bias.clone(), self.by.clone()];
        let plain = NormConfig { activation: Activation::None, ..*config };
        let mut exact = value_and_gradients(
            DType::F64,
            &inputs,
            |_| dy.clone(),
            |v| {
                let n = reference::norm::group_norm(&v[0], &v[1], &v[2], plain)?;
                let by = v[3].unsqueeze(1)?.unsqueeze(1)?;
                reference::norm::modulated(&n, &by, config.activation)
            },
        )?;
        let [weight, bias] = [weight, bias].map(|t| t.to_dtype(DType::F64).unwrap());
        let (mut of_y, mut of_dx, mut of_by) = (vec![], vec![], vec![]);
        let zeros = weight.zeros_like()?;
        let (mut of_weight, mut of_bias) = (zeros.clone(), zeros);
        for k in 0..batch {
            let by = self.by.get(k)?.to_dtype(DType::F64)?;
            let factor = (by.narrow(0, 0, channels)? + 1.0)?;
            let own_weight = (&weight * &factor)?;
            let own_bias = ((&bias * &factor)? + by.narrow(0, channels, channels)?)?;
            let image = |t: &Tensor| t.narrow(0, k, 1);
            let NormConfig { groups, eps, activation } = *config;
            let (own_weight, own_bias) = (&own_weight, &own_bias);
            let norm =
                Normalization { groups, weight: own_weight, bias: own_bias, eps, activation, run };
            let [y, dx, dweight, dbias] = norm.bounds(&image(x)?, &image(dy)?)?;
            of_y.push(y);
            of_dx.push(dx);
            let scale = ((&dweight * weight.abs()?)? + (&dbias * bias.abs()?)?)?;
            of_by.push(Tensor::cat(&[scale, dbias.clone()], 0)?);
            of_weight = (of_weight + (dweight * &factor)?)?;
            of_bias = (of_bias + (dbias * &factor)?)?;
        }
        if let Some(more) = more {
            exact[1] = (&exact[1] + more.to_dtype(DType::F64)?)?;
        }
        let bounds = [
            Tensor::cat(&of_y, 0)?,
            Tensor::cat(&of_dx, 0)?,
            of_weight,
            of_bias,
            Tensor::stack(&of_by, 0)?,
        ];
        let names = ["y", "dx", "dweight", "dbias", "dby"];
        let all = names.into_iter().zip(exact).zip(bounds);
        // The sums of products round a few times more.
        let roundings = |exact: &Tensor| (exact.abs()? + 1.0)? * (8.0 * F32);
        let mut all: Expected = all
            .map(|((name, exact), bound)| {
                Ok((name, exact.clone(), ((bound * 1.05)? + roundings(&exact)?)?))
            })
            .collect::<Result<_>>()?;
        all.push(("again", all[0].1.clone(), all[0].2.clone()));
        Ok(all)
    }

    fn check(&self) {
        let case = format!("{:?} of {:?}, modulated", self.norm.config, self.norm.x.dims());
        for subject in subjects() {
            let (run, _) = subject.norm_arithmetic();
            let expected = self.expected(run).unwrap();
            compare(&*subject, &case, subject.modulated(self).unwrap(), &expected);
        }
    }
}

proptest! {
    #![proptest_config(inputs(96))]

    #[test]
    fn modulated_normalisations_agree(
        map in [1usize..6, 1usize..12, 1usize..12],
        groups in [1usize..9, 1usize..5],
        silu: bool,
        more: bool,
        seed: u64,
    ) {
        let activation = if silu { Activation::Silu } else { Activation::None };
        let norm = NormCase::new(map, (groups, EPS), (activation, more), 0.0, Normals(seed));
        ModulatedCase::new(norm, Normals(seed)).unwrap().check();
    }
}
