//! Convolutions of maps that are normalised as they are read.

use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

use super::algorithm::{Input, Math, Workspace};
use super::epilogue::Epilogue;
use super::plan::Plan;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::norm::Normalization;
use crate::kernels::cpu::norm::modulated::Modulated;
use crate::kernels::op::activation::Activation;
use crate::kernels::op::conv::{ConvShape, Scale};
use crate::kernels::op::norm::NormConfig;
use crate::kernels::tests::Normals;
use crate::random_inputs::inputs;

/// Compares the bits of a convolution of a normalised map, and of the gradient of its weights, with those of the two
/// operations one after the other.
fn has_the_bits_of_two_operations(shape: ConvShape, modulated: bool, normals: Normals) {
    let ConvShape { batch, c_in, c_out, .. } = shape;
    let x = normals.values(0, batch * shape.input_len());
    let weight = normals.values(1, c_out * shape.patch());
    let dy = normals.values(2, batch * shape.output_len());
    let [scale, bias] = [3, 4].map(|i| normals.values(i, c_in));
    let by = normals.values(5, batch * 2 * c_in);
    let config = NormConfig { groups: 1, eps: 1e-5, activation: Activation::Silu };
    for isa in Isa::available() {
        let norm = Normalization { isa, config, weight: &scale, bias: &bias };
        let stats = norm.stats(batch, &x);
        let known = match modulated {
            true => Modulated { norm, by: &by }.known(&stats),
            false => norm.known(&stats),
        };
        let mut n = vec![f32::NAN; x.len()];
        known.write(&x, &mut n);
        for math in [Math::F32, Math::F32Large] {
            let plan = Plan::new(isa, shape, math);
            let results = |x: Input<'_>| {
                let mut workspace = Workspace::dirty(100);
                let packed = plan.pack(&weight, &mut workspace);
                let mut y = vec![f32::NAN; dy.len()];
                plan.forward(x, &packed, Epilogue::default(), &mut y);
                let mut dweight = vec![f32::NAN; weight.len()];
                plan.weight_gradient(x, &dy, &mut dweight, &mut workspace);
                [y, dweight].map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
            };
            let expected = results((&n).into());
            if plan.normalizes() {
                assert_eq!(results(Input { map: &x, norm: Some(&known) }), expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(inputs(48))]

    #[test]
    fn a_map_can_be_normalised_as_it_is_read(
        [batch, h, w] in prop_oneof![
            [1usize..6, 1usize..12, 1usize..12],
            [1usize..3, 14usize..34, 14usize..34],
        ],
        [c_in, c_out] in prop_oneof![[8usize..40, 8usize..40], [8usize..20, 120usize..140]],
        within: bool,
        modulated: bool,
        threads in 1usize..4,
        seed: u64,
    ) {
        let scale = if within && h.min(w) > 2 { Scale::StrideWithin(1) } else { Scale::Stride(1) };
        let shape = ConvShape::new([batch, h, w, c_in], &[c_out, c_in, 3, 3], scale).unwrap();
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| has_the_bits_of_two_operations(shape, modulated, Normals(seed)));
    }
}
