use rayon::prelude::*;

use super::features::Features;
use super::product::{doubles, products};
use crate::error::Result;

/// Number of distances in memory: 32 MB.
const HELD: usize = 1 << 22;
/// Number of images of the second set whose products are computed together.
const TILE: usize = 1024;

/// The squared distances of one image of a set from all images of another.
///
/// `|x|^2 + |y|^2 - 2 x . y` is computed by fast products, but rounds by more than small distances. A decision for
/// which this rounding matters uses the sum of the squared differences instead. Equal images thus have the distance 0,
/// and equal pairs equal distances.
pub(super) struct Distances<'a> {
    x: &'a [f32],
    others: &'a Features,
    approximate: &'a [f64],
    /// The rounding of an approximate distance is at most `unit (|x|^2 + |y|^2)`.
    unit: f64,
    square: f64,
    squares: &'a [f64],
}

impl Distances<'_> {
    fn rounding(&self, j: usize) -> f64 {
        self.unit * (self.square + self.squares[j])
    }

    /// The squared distance of image `j`.
    fn exact(&self, j: usize) -> f64 {
        let pairs = self.x.iter().zip(self.others.image(j));
        pairs.map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum()
    }

    /// Returns whether the squared distance of image `j` is at most `limit`.
    pub fn within(&self, j: usize, limit: f64) -> bool {
        let (distance, rounding) = (self.approximate[j], self.rounding(j));
        if (distance - limit).abs() > rounding {
            return distance < limit;
        }
        self.exact(j) <= limit
    }

    /// Returns the `k` nearest images except `without`, with their squared distances, the nearest first. Of equally
    /// near images the first is returned. There are at least `k` others.
    pub fn nearest(&self, k: usize, without: Option<usize>) -> Vec<(f64, usize)> {
        let others = || (0..self.approximate.len()).filter(|&j| Some(j) != without);
        let mut greatest: Vec<f64> =
            others().map(|j| self.approximate[j] + self.rounding(j)).collect();
        let (_, limit, _) = greatest.select_nth_unstable_by(k - 1, f64::total_cmp);
        let mut nearest: Vec<(f64, usize)> = others()
            .filter(|&j| self.approximate[j] - self.rounding(j) <= *limit)
            .map(|j| (self.exact(j), j))
            .collect();
        nearest.sort_unstable_by(|(a, i), (b, j)| a.total_cmp(b).then(i.cmp(j)));
        nearest.truncate(k);
        nearest
    }
}

/// Calls `f` with the index and the distances of each image of `a` from those of `b`. Returns the results in order. The
/// memory is that of [`HELD`] distances and of [`TILE`] images, for any number of images.
pub(super) fn map<T: Send>(
    a: &Features,
    b: &Features,
    f: impl Fn(usize, &Distances<'_>) -> T + Sync,
) -> Result<Vec<T>> {
    a.check_size(b)?;
    let size = a.size();
    let squares = |features: &Features| -> Vec<f64> {
        let square = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum();
        features.values().par_chunks_exact(size.max(1)).map(square).collect()
    };
    let (of_a, of_b) = (squares(a), squares(b));
    // The products of two values are exact in f64. Three sums of `size` terms are rounded.
    let unit = 2.0 * (size as f64 + 4.0) * f64::EPSILON;
    let rows = (HELD / b.count().max(1)).clamp(1, TILE);
    let mut results = Vec::with_capacity(a.count());
    let mut approximate = vec![0.0; rows * b.count()];
    for (block, x) in a.values().chunks(rows * size.max(1)).enumerate() {
        let first = block * rows;
        for (tile, y) in b.values().chunks(TILE * size).enumerate() {
            let width = y.len() / size;
            let products = products(doubles(x), doubles(y), size)?;
            let targets = approximate.par_chunks_exact_mut(b.count()).enumerate();
            targets.zip(products.par_chunks_exact(width)).for_each(|((i, row), products)| {
                let row = &mut row[tile * TILE..][..width];
                for ((to, product), square) in
                    row.iter_mut().zip(products).zip(&of_b[tile * TILE..])
                {
                    *to = of_a[first + i] + square - 2.0 * product;
                }
            });
        }
        let distances = x.par_chunks_exact(size).zip(approximate.par_chunks_exact(b.count()));
        results.par_extend(distances.enumerate().map(|(i, (x, approximate))| {
            let (square, squares) = (of_a[first + i], &of_b[..]);
            f(first + i, &Distances { x, others: b, approximate, unit, square, squares })
        }));
    }
    Ok(results)
}

/// Computes the squared distance of each image from its `k`-th nearest other image. There are more than `k` images.
pub(super) fn radii(features: &Features, k: usize) -> Result<Vec<f64>> {
    map(features, features, |i, distances| distances.nearest(k, Some(i))[k - 1].0)
}
