use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::error::Result;

/// Computes the products of each row of `a` with each row of `b`, `A B^T`, row by row. A row has `size` values.
///
/// Each element is a sum in an order that depends only on the sizes, not on the number of threads.
pub(super) fn products(a: Vec<f64>, b: Vec<f64>, size: usize) -> Result<Vec<f64>> {
    if a.is_empty() || b.is_empty() {
        return Ok(vec![]);
    }
    let rows = |values: Vec<f64>| {
        let count = values.len() / size;
        Tensor::from_vec(values, (count, size), &Device::Cpu)
    };
    Ok(rows(a)?.matmul(&rows(b)?.t()?)?.flatten_all()?.to_vec1()?)
}

/// Converts features to f64.
pub(super) fn doubles(features: &[f32]) -> Vec<f64> {
    features.iter().copied().map(f64::from).collect()
}

/// Transposes a matrix whose rows have `size` values.
pub(super) fn transposed(a: &[f64], size: usize) -> Vec<f64> {
    let rows = a.len().checked_div(size).unwrap_or_default();
    let mut columns = vec![0.0; a.len()];
    columns.par_chunks_exact_mut(rows.max(1)).enumerate().for_each(|(j, column)| {
        column.iter_mut().zip(a[j..].iter().step_by(size)).for_each(|(to, from)| *to = *from);
    });
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_the_rows() {
        let a = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let b = vec![1.0, 0.0, -1.0];
        assert_eq!(products(a.clone(), b, 3).unwrap(), [-2.0, -2.0]);
        assert_eq!(transposed(&a, 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert!(products(vec![], a, 3).unwrap().is_empty());
    }
}
