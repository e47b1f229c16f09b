//! What moves whole feature maps, or scales them: (pixels, channels), and (batch, channels) for masks.
//! candle's own operations are the compositions.

use rayon::prelude::*;

/// Pixels that one thread copies at a time.
const ROW: usize = 32;

/// `y` from the channels of `a` and of `b`, one after the other in each pixel.
pub(crate) fn concatenate([a, b]: [&[f32]; 2], [first, second]: [usize; 2], y: &mut [f32]) {
    let rows = a.par_chunks(ROW * first).zip(b.par_chunks(ROW * second));
    y.par_chunks_mut(ROW * (first + second)).zip(rows).for_each(|(y, (a, b))| {
        let pixels = a.chunks_exact(first).zip(b.chunks_exact(second));
        for (y, (a, b)) in y.chunks_exact_mut(first + second).zip(pixels) {
            y[..first].copy_from_slice(a);
            y[first..].copy_from_slice(b);
        }
    });
}

/// The parts of what [`concatenate`] gives.
pub(crate) fn split(y: &[f32], [first, second]: [usize; 2], [a, b]: [&mut [f32]; 2]) {
    let rows = a.par_chunks_mut(ROW * first).zip(b.par_chunks_mut(ROW * second));
    y.par_chunks(ROW * (first + second)).zip(rows).for_each(|(y, (a, b))| {
        let pixels = a.chunks_exact_mut(first).zip(b.chunks_exact_mut(second));
        for (y, (a, b)) in y.chunks_exact(first + second).zip(pixels) {
            a.copy_from_slice(&y[..first]);
            b.copy_from_slice(&y[first..]);
        }
    });
}

/// `y` from `x`, each channel of an image times the mask's factor for it.
pub(crate) fn scale_maps(x: &[f32], mask: &[f32], channels: usize, y: &mut [f32]) {
    let image = x.len() / (mask.len() / channels);
    let images = y.par_chunks_mut(image).zip(x.par_chunks(image));
    images.zip(mask.par_chunks(channels)).for_each(|((y, x), mask)| {
        for (y, x) in y.chunks_mut(channels).zip(x.chunks(channels)) {
            y.iter_mut().zip(x).zip(mask).for_each(|((y, x), mask)| *y = x * mask);
        }
    });
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::tests::Normals;
    use crate::random_inputs::inputs;

    proptest! {
        #![proptest_config(inputs(64))]

        #[test]
        fn kernels_agree_with_candle(
            batch in 1usize..4,
            pixels in 1usize..80,
            channels in [1usize..40, 1usize..40],
            seed: u64,
        ) {
            let [first, second] = channels;
            let normal = |k, shape: &[usize]| Normals(seed).tensor(k, shape);
            let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let a = normal(0, &[batch, pixels, first]);
            let b = normal(1, &[batch, pixels, second]);
            let both = values(&Tensor::cat(&[&a, &b], 2).unwrap());
            let mut y = vec![f32::NAN; both.len()];
            concatenate([&values(&a), &values(&b)], channels, &mut y);
            prop_assert_eq!(&y, &both);

            let mut parts = [vec![f32::NAN; a.elem_count()], vec![f32::NAN; b.elem_count()]];
            split(&both, channels, parts.each_mut().map(|part| &mut part[..]));
            prop_assert_eq!(&parts, &[values(&a), values(&b)]);

            let mask = normal(2, &[batch, 1, first]);
            let mut y = vec![f32::NAN; a.elem_count()];
            scale_maps(&values(&a), &values(&mask), first, &mut y);
            prop_assert_eq!(y, values(&a.broadcast_mul(&mask).unwrap()));
        }
    }
}
