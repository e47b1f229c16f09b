use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::super::tests::{gpu, held, map, normal, precisions, unmap};
use super::*;
use crate::kernels::cuda::element::Element;
use crate::kernels::tests::{Normals, check, value_and_gradients};
use crate::random_inputs::inputs;

/// The kernels under test.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// The kernels that a network uses.
    Choice,
    /// Products of a library, with at most this many bytes of scores.
    Products(usize),
}

/// The output, and the gradient of `qkv`.
fn results(
    (precision, heads): (Precision, usize),
    by: By,
    qkv: &Tensor,
    dy: &Tensor,
) -> Result<[Tensor; 2]> {
    let gpu = gpu();
    let (batch, positions, channels) = dy.dims3()?;
    let shape = AttentionShape { positions, channels, heads };
    let line = |t: &Tensor| map(&gpu, &t.unsqueeze(1)?, precision);
    let (qkv, dy) = (line(qkv)?, line(dy)?);
    let attention = Attention { precision, batch, shape };
    let (y, d) = match by {
        By::Choice => {
            let (y, results) = attention.forward(&gpu, &qkv)?;
            let head = channels / heads;
            let half = matches!(precision, Precision::BF16 | Precision::F16);
            let fits = half && head.is_multiple_of(8) && head <= 256;
            assert_eq!(results.0.is_some(), fits && gpu.compiles_for(80), "{precision}, {shape:?}");
            let d = attention.backward(&gpu, &qkv, &results, &dy)?;
            (y, d)
        }
        By::Products(most) => {
            let products = ByProducts { most, ..attention.by_products() };
            (Rc::new(products.forward(&gpu, &qkv)?), products.backward(&gpu, &qkv, &dy)?)
        }
    };
    let back = |t: &Memory, channels| -> Result<Tensor> {
        unmap(&gpu, t, [batch, 1, positions, channels], precision)?.squeeze(1)
    };
    Ok([back(&y, channels)?, back(&d, 3 * channels)?])
}

fn attention_agrees(
    (batch, positions, head, heads): (usize, usize, usize, usize),
    by: By,
    normals: Normals,
) -> Result<()> {
    let channels = head * heads;
    for (precision, products) in precisions() {
        let half = Element::of(precision) != Element::F32;
        // Sums of parts in half precision are rounded more often.
        if half && matches!(by, By::Products(most) if most < positions * positions * 2) {
            continue;
        }
        let normal = |k, shape: &[usize]| normal(normals, k, shape, precision);
        let qkv = normal(4, &[batch, positions, 3 * channels]);
        let dy = normal(5, &[batch, positions, channels]);
        let bounds = products.attention_bounds(&qkv, &dy, heads)?;
        let exact = value_and_gradients(
            DType::F64,
            std::slice::from_ref(&qkv),
            |_| dy.clone(),
            |v| crate::kernels::attention(&v[0], heads),
        )?;
        let [y, d] = results((precision, heads), by, &qkv, &dy)?;
        check(&format!("{precision}, attention"), &y, &exact[0], &bounds[0]);
        check(&format!("{precision}, attention's gradient"), &d, &exact[1], &bounds[1]);
    }
    Ok(())
}

/// Heads of every width, parts of a tile and several tiles of positions.
#[test]
fn attention_without_scores_is_its_composition() {
    for sizes in [
        (2, 1, 8, 1),
        (2, 65, 16, 2),
        (1, 128, 32, 2),
        (2, 70, 64, 3),
        (1, 97, 40, 2),
        (1, 63, 96, 2),
        (1, 130, 128, 1),
        (2, 33, 200, 1),
        (1, 131, 256, 1),
        (1, 16, 256, 2),
    ] {
        attention_agrees(sizes, By::Choice, Normals(sizes.1 as u64)).unwrap();
    }
}

/// Parts of a batch, and parts of the queries of an image.
#[test]
fn attention_by_parts_is_its_composition() {
    for (sizes, most) in
        [((5, 9, 6, 2), 2 * 81 * 4), ((3, 10, 4, 2), 3 * 10 * 4), ((2, 7, 5, 1), 1)]
    {
        attention_agrees(sizes, By::Products(most), Normals(3)).unwrap();
    }
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

#[test]
fn attention_has_the_same_bits_twice() {
    for (precision, _) in precisions() {
        let normal = |k, shape: &[usize]| normal(Normals(11), k, shape, precision);
        let (qkv, dy) = (normal(0, &[2, 100, 3 * 128]), normal(1, &[2, 100, 128]));
        let run = || results((precision, 2), By::Choice, &qkv, &dy).unwrap();
        for (a, b) in run().iter().zip(&run()) {
            assert_eq!(bits(a).unwrap(), bits(b).unwrap(), "{precision}");
        }
        // The output of an image has the same bits in a batch and alone.
        let [qkv_1, dy_1] = [&qkv, &dy].map(|t| t.narrow(0, 1, 1).unwrap());
        let alone = results((precision, 2), By::Choice, &qkv_1, &dy_1).unwrap();
        if Element::of(precision) != Element::F32 {
            for (a, b) in run().iter().zip(&alone) {
                let of_batch = a.narrow(0, 1, 1).unwrap();
                assert_eq!(bits(&of_batch).unwrap(), bits(b).unwrap(), "{precision}");
            }
        }
    }
}

/// Query `i` has the score 40,000 / sqrt(channels) with key `i`, and 0 with the others. Its output is exactly value
/// `i`, unless the value is rounded to TF32.
#[test]
fn attention_with_large_scores_selects_values() -> Result<()> {
    let (positions, channels) = (100, 128);
    for (precision, _) in precisions() {
        if precision == Precision::High {
            continue;
        }
        let one = Tensor::eye(channels, DType::F32, &Device::Cpu)?.narrow(0, 0, positions)?;
        let large = (one * 200.0)?.unsqueeze(0)?;
        let normal = |k| normal(Normals(7), k, &[1, positions, channels], precision);
        let (v, dy) = (normal(0), normal(1));
        let qkv = Tensor::cat(&[&large, &large, &v], 2)?;
        let [y, d] = results((precision, 1), By::Choice, &qkv, &dy)?;
        assert_eq!(bits(&y)?, bits(&v)?, "{precision}");
        let part = |i| d.narrow(2, i * channels, channels);
        assert_eq!(bits(&part(2)?.contiguous()?)?, bits(&dy)?, "{precision}");
        // The gradient of a score is the difference of two equal sums, whose orders may differ.
        let sums = (dy.abs()? * v.abs()?)?.sum_keepdim(2)?;
        let most = sums.max_all()?.to_scalar::<f32>()? * channels as f32 * 4.0 * f32::EPSILON;
        let most = most * 200.0 / (channels as f32).sqrt();
        for i in [0, 1] {
            let found = part(i)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(found <= most, "{precision}: {found} above {most}");
        }
    }
    Ok(())
}

/// All scores are about -452,000, more than f16 holds. Each output is the mean of the values.
#[test]
fn attention_with_equal_scores_averages() -> Result<()> {
    let (positions, channels) = (70, 128);
    for (precision, _) in precisions() {
        let by_fused = Element::of(precision) != Element::F32 && gpu().compiles_for(80);
        // Scores that are stored in f16 are infinite. TF32 rounds values.
        if precision == Precision::High || !by_fused && precision == Precision::F16 {
            continue;
        }
        let dims = [1, positions, channels];
        let q = Tensor::full(200f32, &dims, &Device::Cpu)?;
        let normal = |k| normal(Normals(8), k, &dims, precision);
        let (v, dy) = (normal(0), normal(1));
        let qkv = Tensor::cat(&[&q, &q.neg()?, &v], 2)?;
        let [y, d] = results((precision, 1), By::Choice, &qkv, &dy)?;
        let dv = d.narrow(2, 2 * channels, channels)?;
        for (what, found, of) in [("y", y, v), ("dv", dv, dy)] {
            let mean = of.mean_keepdim(1)?.broadcast_as(&dims)?;
            let off = (found - &mean)?.abs()?.max_all()?.to_scalar::<f32>()?;
            let size = of.abs()?.mean_keepdim(1)?.max_all()?.to_scalar::<f32>()?;
            // 1/70 and the result are rounded to the type of maps.
            let unit = (held(&Tensor::new(&[1f32 / 70.0], &Device::Cpu)?, precision) * 70.0)?;
            let unit = (unit.to_vec1::<f32>()?[0] - 1.0).abs();
            let stored = if precision == Precision::BF16 { 1.0 / 256.0 } else { 1.0 / 2048.0 };
            assert!(off <= size * (unit + stored + 1e-5), "{precision}, {what}: {off}");
        }
        assert!(d.sum_all()?.to_scalar::<f32>()?.is_finite(), "{precision}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(inputs(24))]

    #[test]
    fn attention_of_small_heads_is_its_composition(
        sizes in (1usize..4, 1usize..20, prop_oneof![3 => 1usize..12, 1 => Just(8)], 1usize..4),
        seed: u64,
    ) {
        attention_agrees(sizes, By::Choice, Normals(seed)).unwrap();
    }
}

proptest! {
    #![proptest_config(inputs(8))]

    #[test]
    fn attention_of_wide_heads_is_its_composition(
        sizes in (1usize..3, 1usize..90, (1usize..33).prop_map(|k| 8 * k), 1usize..3),
        seed: u64,
    ) {
        attention_agrees(sizes, By::Choice, Normals(seed)).unwrap();
    }
}
