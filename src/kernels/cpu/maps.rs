//! Concatenation of feature maps (pixels, channels), their product with a mask (batch, channels), their scaling by two,
//! and tables of vectors.

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

/// Writes each pixel of `x`, times `factor`, to two by two pixels of `y`. Rows of `x` have `w` pixels of `c` channels.
/// The rows of all images are stacked.
pub(crate) fn repeat_pixels(x: &[f32], (w, c): (usize, usize), factor: f32, y: &mut [f32]) {
    y.par_chunks_mut(4 * w * c).zip(x.par_chunks(w * c)).for_each(|(y, x)| {
        let (top, bottom) = y.split_at_mut(2 * w * c);
        for (pair, x) in top.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
            let (left, right) = pair.split_at_mut(c);
            left.iter_mut().zip(x).for_each(|(y, x)| *y = factor * x);
            right.copy_from_slice(left);
        }
        bottom.copy_from_slice(top);
    });
}

/// Writes the sums of two by two pixels of `x`, times `factor`, to `y`. Rows of `x` have `w` pixels of `c` channels.
/// `w` and the height of an image are even.
pub(crate) fn sum_pixels(x: &[f32], (w, c): (usize, usize), factor: f32, y: &mut [f32]) {
    y.par_chunks_mut(w / 2 * c).zip(x.par_chunks(2 * w * c)).for_each(|(y, x)| {
        let (top, bottom) = x.split_at(w * c);
        let pairs = top.chunks_exact(2 * c).zip(bottom.chunks_exact(2 * c));
        for (y, (top, bottom)) in y.chunks_exact_mut(c).zip(pairs) {
            for (i, y) in y.iter_mut().enumerate() {
                *y = factor * ((top[i] + top[c + i]) + (bottom[i] + bottom[c + i]));
            }
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
