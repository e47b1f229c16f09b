//! Concatenation of feature maps (pixels, channels), their product with a mask (batch, channels), and tables of
//! vectors.

use rayon::prelude::*;

/// Number of pixels that one thread copies at a time.
const ROW: usize = 32;

/// Writes `y` with the channels of `a`, then those of `b`, in each pixel.
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

/// The inverse of [`concatenate`].
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

/// Writes `y`: each channel of each image of `x` times its factor in the mask.
pub(crate) fn scale_maps(x: &[f32], mask: &[f32], channels: usize, y: &mut [f32]) {
    let image = x.len() / (mask.len() / channels);
    let images = y.par_chunks_mut(image).zip(x.par_chunks(image));
    images.zip(mask.par_chunks(channels)).for_each(|((y, x), mask)| {
        for (y, x) in y.chunks_mut(channels).zip(x.chunks(channels)) {
            y.iter_mut().zip(x).zip(mask).for_each(|((y, x), mask)| *y = x * mask);
        }
    });
}

/// Adds to each vector of `y` a row of `table`, whose number is in `index`. The vectors and rows have length `columns`,
/// and the table has all rows.
pub(crate) fn add_class(table: &[f32], columns: usize, index: &[u32], y: &mut [f32]) {
    for (y, &row) in y.chunks_exact_mut(columns).zip(index) {
        let row = &table[row as usize * columns..][..columns];
        y.iter_mut().zip(row).for_each(|(y, row)| *y += row);
    }
}

/// Writes to each row of `sums` the sum of the vectors of `x` whose number in `index` is that of the row, in the order
/// of the vectors.
pub(crate) fn sums_by_class(x: &[f32], columns: usize, index: &[u32], sums: &mut [f32]) {
    sums.fill(0.0);
    for (x, &row) in x.chunks_exact(columns).zip(index) {
        let sums = &mut sums[row as usize * columns..][..columns];
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
    }
}
