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
use crate::kernels::op::conv::{Addends, ConvShape, Scale};
use crate::kernels::op::norm::NormConfig;
use crate::kernels::tests::Normals;
use crate::random_inputs::inputs;

/// Compares the bits of a convolution of a normalised map, and of the gradient of its weights, with those of the two
/// operations one after the other on one thread.
fn has_the_bits_of_two_operations(
    shape: ConvShape,
    (config, modulated): (NormConfig, bool),
    threads: usize,
    normals: Normals,
) {
    let ConvShape { batch, c_in, c_out, .. } = shape;
    let x = normals.values(0, batch * shape.input_len());
    let weight = normals.values(1, c_out * shape.patch());
    let dy = normals.values(2, batch * shape.output_len());
    let [scale, bias] = [3, 4].map(|i| normals.values(i, c_in));
    let by = normals.values(5, batch * 2 * c_in);
    let residual = normals.values(6, dy.len());
    let epilogue = Epilogue { add: Addends::residual(&residual[..]), ..Epilogue::default() };
    let among = |threads: usize| ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for isa in Isa::available() {
        let norm = Normalization { isa, config, weight: &scale, bias: &bias };
        let stats = norm.stats(batch, &x);
        let known = match modulated {
            true => Modulated { norm, by: &by }.known(&stats),
            false => norm.known(&stats),
        };
        let mut n = vec![f32::NAN; x.len()];
        known.write(&x, &mut n);
        let normed = Input { map: &x, norm: Some(&known) };
        for math in [Math::F32, Math::F32Large] {
            let plan = Plan::new(isa, shape, math);
            let forward = |x: Input<'_>| {
                let packed = plan.pack(&weight, &mut Workspace::dirty(100));
                let mut y = vec![f32::NAN; dy.len()];
                plan.forward(x, &packed, epilogue, &mut y);
                y
            };
            let gradient = |x: Input<'_>| {
                let mut dweight = vec![f32::NAN; weight.len()];
                plan.weight_gradient(x, &dy, &mut dweight, &mut Workspace::dirty(100));
                dweight
            };
            let expected = among(1).install(|| [forward((&n).into()), gradient((&n).into())]);
            let found = among(threads).install(|| {
                // With few rows of tiles per thread, the two operations are faster.
                let normalizes = plan.normalizes();
                assert!(normalizes || batch * shape.h_out.div_ceil(4) < 4 * threads);
                let few = plan.weight_gradient_normalizes();
                assert!(few || c_out > 32);
                [normalizes.then(|| forward(normed)), few.then(|| gradient(normed))]
            });
            for (found, expected) in found.into_iter().zip(expected) {
                assert!(found.is_none_or(|found| {
                    found.iter().map(|x| x.to_bits()).eq(expected.iter().map(|x| x.to_bits()))
                }));
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
        (groups, of_group) in (1usize..4, 8usize..15),
        c_out in prop_oneof![8usize..40, 120usize..140],
        within: bool,
        silu: bool,
        modulated: bool,
        threads in 1usize..5,
        seed: u64,
    ) {
        let scale = if within && h.min(w) > 2 { Scale::StrideWithin(1) } else { Scale::Stride(1) };
        let c_in = groups * of_group;
        let shape = ConvShape::new([batch, h, w, c_in], &[c_out, c_in, 3, 3], scale).unwrap();
        let activation = if silu { Activation::Silu } else { Activation::None };
        let config = NormConfig { groups, eps: 1e-5, activation };
        has_the_bits_of_two_operations(shape, (config, modulated), threads, Normals(seed));
    }
}
