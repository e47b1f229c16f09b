//! The noise of a batch.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The noise that is added to the images of a batch. The default is standard normal noise, independent of the images.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NoiseConfig {
    /// Standard deviation of a normal number that is added to all noise of a channel of an image; at least 0. A network
    /// trained without the offset hardly changes the mean of an image, and thus draws neither dark nor bright images.
    /// Usually 0.1. Lin et al. 2024 describe the problem; [zero terminal SNR](crate::NoiseSchedule::zero_terminal_snr)
    /// solves it without a change of the noise.
    pub offset: f64,
    /// Whether the noise tensors of a batch are exchanged so that the sum of the squared distances between images and
    /// their noise is least. The noise of the batch as a whole does not change. Li et al. 2024, [Immiscible
    /// Diffusion](https://arxiv.org/abs/2406.12303), algorithm 1. If only a part of a batch is computed, noise is
    /// exchanged within that part.
    pub immiscible: bool,
}

impl NoiseConfig {
    /// # Errors
    /// Returns an error if the offset is negative or not finite.
    pub(super) fn validate(&self) -> Result<()> {
        if self.offset >= 0.0 && self.offset.is_finite() {
            return Ok(());
        }
        Err(Error::config("noise.offset", self.offset, "finite, at least 0"))
    }
}

/// Exchanges the noise of the images, both (batch, ...), so that the sum of squared distances is least.
pub(super) fn paired(images: &Tensor, noise: &Tensor) -> Result<Tensor> {
    // |x - e|² is |x|² + |e|² - 2 x e, and only the last term depends on the assignment.
    let (flat, batch) = (|t: &Tensor| t.flatten_from(1), images.dim(0)?);
    let (images, flat_noise) = (flat(images)?, flat(noise)?);
    let products = if images.device().is_cpu() {
        products(&rows(&images)?, &rows(&flat_noise)?)
    } else {
        rows(&images.matmul(&flat_noise.t()?)?)?.concat()
    };
    let costs: Vec<f64> = products.into_iter().map(|product| -f64::from(product)).collect();
    let order: Vec<u32> = assignment(&costs, batch).into_iter().map(|k| k as u32).collect();
    let order = Tensor::from_vec(order, batch, &Device::Cpu)?.to_device(noise.device())?;
    Ok(noise.index_select(&order, 0)?)
}

fn rows(x: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(x.to_dtype(DType::F32)?.to_vec2()?)
}

/// Computes the products of all rows of `x` with all rows of `y`. The order of the sums is fixed.
fn products(x: &[Vec<f32>], y: &[Vec<f32>]) -> Vec<f32> {
    const LANES: usize = 16;
    let product = |x: &[f32], y: &[f32]| {
        let mut sums = [0f32; LANES];
        let (xs, x_rest) = x.as_chunks::<LANES>();
        let (ys, y_rest) = y.as_chunks::<LANES>();
        for (x, y) in xs.iter().zip(ys) {
            for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
                *sum += x * y;
            }
        }
        sums.iter().chain(&[x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum()]).sum::<f32>()
    };
    x.par_iter().flat_map_iter(|x| y.iter().map(move |y| product(x, y))).collect()
}

/// Solves the linear assignment problem: returns for each row of the matrix of costs (n, n) its own column, so that the
/// sum of the costs is least. Kuhn 1955 and Munkres 1957, by shortest augmenting paths, in O(n³).
fn assignment(costs: &[f64], n: usize) -> Vec<usize> {
    // Column n is not a part of the problem: it holds the row whose column is being searched.
    let (mut of_row, mut of_column) = (vec![0.0; n], vec![0.0; n + 1]);
    let mut row_of: Vec<Option<usize>> = vec![None; n + 1];
    for row in 0..n {
        row_of[n] = Some(row);
        let (mut least, mut from) = (vec![f64::INFINITY; n], vec![n; n]);
        let mut used = vec![false; n + 1];
        let mut column = n;
        while let Some(row) = row_of[column] {
            used[column] = true;
            let (mut delta, mut next) = (f64::INFINITY, n);
            for j in (0..n).filter(|&j| !used[j]) {
                let reduced = costs[row * n + j] - of_row[row] - of_column[j];
                if reduced < least[j] {
                    (least[j], from[j]) = (reduced, column);
                }
                if least[j] < delta {
                    (delta, next) = (least[j], j);
                }
            }
            // Costs that are not finite have no order.
            if next == n {
                return (0..n).collect();
            }
            for j in 0..=n {
                match row_of[j] {
                    Some(row) if used[j] => {
                        of_row[row] += delta;
                        of_column[j] -= delta;
                    }
                    _ if j < n => least[j] -= delta,
                    _ => {}
                }
            }
            column = next;
        }
        // Shifts the rows along the path.
        while column != n {
            let before = from[column];
            row_of[column] = row_of[before];
            column = before;
        }
    }
    let mut columns = vec![0; n];
    for (column, row) in row_of[..n].iter().enumerate() {
        if let Some(row) = row {
            columns[*row] = column;
        }
    }
    columns
}
