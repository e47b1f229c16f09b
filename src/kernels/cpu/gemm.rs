//! Products of matrices that lie in memory as it happens: the right-hand side is packed into panels
//! first. On the calling thread alone, so the order of sums is always the same.

use std::cell::RefCell;

use rayon::prelude::*;

use super::product::{Left, PANEL, panel_product};
use super::simd::Isa;
use super::values::sized;

/// A matrix within a slice: element (i, j) stands at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// `rows` rows, one after the other.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// `rows` rows that begin `row_stride` values apart.
    pub fn with_stride(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// Lays some columns out as a panel of [`PANEL`], the last ones zero where there are no more.
    fn pack_panel(&self, first: usize, panel: &mut [f32]) {
        let count = PANEL.min(self.cols - first);
        for (k, row) in panel.chunks_exact_mut(PANEL).enumerate() {
            let begin = k * self.row_stride + first * self.col_stride;
            if self.col_stride == 1 {
                row[..count].copy_from_slice(&self.data[begin..][..count]);
            } else {
                let values = self.data[begin..].iter().step_by(self.col_stride);
                row[..count].iter_mut().zip(values).for_each(|(to, from)| *to = *from);
            }
            row[count..].fill(0.0);
        }
    }
}

/// A right-hand side, packed: panels of columns, each (rows, [`PANEL`]).
pub(crate) struct Panels {
    values: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl Panels {
    /// Of the matrix whose element (i, j) is `values[row_at(i) + col_at(j)]`. `memory` is used where it is
    /// large enough.
    pub(super) fn gather(
        values: &[f32],
        (rows, cols): (usize, usize),
        row_at: impl Fn(usize) -> usize + Sync,
        col_at: impl Fn(usize) -> usize + Sync,
        mut memory: Vec<f32>,
    ) -> Self {
        let packed = sized(&mut memory, cols.div_ceil(PANEL) * rows * PANEL);
        packed.par_chunks_exact_mut((rows * PANEL).max(1)).enumerate().for_each(|(i, panel)| {
            let mut columns = [0; PANEL];
            let count = PANEL.min(cols - i * PANEL);
            let columns = &mut columns[..count];
            for (j, at) in columns.iter_mut().enumerate() {
                *at = col_at(i * PANEL + j);
            }
            for (k, row) in panel.chunks_exact_mut(PANEL).enumerate() {
                let values = &values[row_at(k)..];
                row.iter_mut().zip(&*columns).for_each(|(to, at)| *to = values[*at]);
                row[count..].fill(0.0);
            }
        });
        Self { values: memory, rows, cols }
    }

    pub fn into_memory(self) -> Vec<f32> {
        self.values
    }
}

thread_local! {
    /// A panel, and a product's part that does not fill one, reused from call to call. Nothing may wait
    /// for other threads while they are borrowed: this one could be given work that borrows them again.
    static PANELS: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// `c = a b`, or `c += a b` where `accumulate`; rows of `c` begin `c_row` values apart.
pub(super) fn gemm(isa: Isa, (c, c_row): (&mut [f32], usize), a: Mat, b: Mat, accumulate: bool) {
    PANELS.with_borrow_mut(|(packed, rest)| {
        let packed = sized(packed, b.rows * PANEL);
        for first in (0..b.cols).step_by(PANEL) {
            b.pack_panel(first, packed);
            multiply(isa, (&mut *c, c_row), a, packed, (first, b.cols, b.rows), accumulate, rest);
        }
    });
}

/// As [`gemm`], with the right-hand side packed before.
pub(super) fn gemm_packed(
    isa: Isa,
    (c, c_row): (&mut [f32], usize),
    a: Mat,
    b: &Panels,
    accumulate: bool,
) {
    PANELS.with_borrow_mut(|(_, rest)| {
        for first in (0..b.cols).step_by(PANEL) {
            let panel = &b.values[first * b.rows..][..b.rows * PANEL];
            let place = (first, b.cols, b.rows);
            multiply(isa, (&mut *c, c_row), a, panel, place, accumulate, rest);
        }
    });
}

/// One panel's columns, from `first` on, of a product with `cols` columns and sums of `depth` terms.
fn multiply(
    isa: Isa,
    (c, c_row): (&mut [f32], usize),
    a: Mat,
    panel: &[f32],
    (first, cols, depth): (usize, usize, usize),
    accumulate: bool,
    rest: &mut Vec<f32>,
) {
    assert_eq!(a.cols, depth);
    if a.rows == 0 {
        return;
    }
    let left = Left { data: a.data, row: a.row_stride, col: a.col_stride };
    let count = PANEL.min(cols - first);
    if count == PANEL {
        return panel_product(isa, &mut c[first..], c_row, a.rows, left, panel, depth, accumulate);
    }
    let rest = sized(rest, a.rows * PANEL);
    panel_product(isa, rest, PANEL, a.rows, left, panel, depth, false);
    for (i, rest) in rest.chunks_exact(PANEL).enumerate() {
        let c = &mut c[i * c_row + first..][..count];
        if accumulate {
            c.iter_mut().zip(rest).for_each(|(c, rest)| *c += rest);
        } else {
            c.copy_from_slice(&rest[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::tests::{F32, Normals, roundings};
    use crate::random_inputs::inputs;

    fn is_that_of_the_definition(
        (m, n, k): (usize, usize, usize),
        (more_a, more_b, more_c): (usize, usize, usize),
        (transpose_a, transpose_b, accumulate): (bool, bool, bool),
        normals: Normals,
    ) {
        let size = |transpose, rows, cols| if transpose { (cols, rows) } else { (rows, cols) };
        let mat = |values, transpose, (rows, cols), stride| {
            let mat = Mat::with_stride(values, rows, cols, stride);
            if transpose { mat.transposed() } else { mat }
        };
        let (a_size, b_size) = (size(transpose_a, m, k), size(transpose_b, k, n));
        let (a_row, b_row, c_row) = (a_size.1 + more_a, b_size.1 + more_b, n + more_c);
        let (a, b_values) =
            (normals.values(0, a_size.0 * a_row), normals.values(1, b_size.0 * b_row));
        let before = normals.values(2, m * c_row);
        let at = |values: &[f32], transpose, row, i: usize, j: usize| {
            f64::from(values[if transpose { j * row + i } else { i * row + j }])
        };
        for isa in Isa::available() {
            let (a_mat, b_mat) =
                (mat(&a, transpose_a, a_size, a_row), mat(&b_values, transpose_b, b_size, b_row));
            let mut found = [before.clone(), before.clone()];
            gemm(isa, (&mut found[0], c_row), a_mat, b_mat, accumulate);
            let Mat { data, rows, cols, row_stride, col_stride } = b_mat;
            let b = Panels::gather(
                data,
                (rows, cols),
                |i| i * row_stride,
                |j| j * col_stride,
                vec![f32::NAN; 9],
            );
            gemm_packed(isa, (&mut found[1], c_row), a_mat, &b, accumulate);
            assert_eq!(&found[0], &found[1]);
            let b = &b_values;
            for (place, found) in found[0].iter().enumerate() {
                let (i, j) = (place / c_row, place % c_row);
                let there = f64::from(before[place]);
                if j >= n {
                    assert_eq!(f64::from(*found), there, "beyond the row");
                    continue;
                }
                let mut sum = if accumulate { there } else { 0.0 };
                let mut magnitude = sum.abs();
                for l in 0..k {
                    let term = at(&a, transpose_a, a_row, i, l) * at(b, transpose_b, b_row, l, j);
                    (sum, magnitude) = (sum + term, magnitude + term.abs());
                }
                let (off, bound) = (
                    (f64::from(*found) - sum).abs(),
                    roundings((k + usize::from(accumulate)) as f64) * F32 * magnitude,
                );
                assert!(off <= bound, "{isa:?}: {found}, not {sum}: off by {off:e} > {bound:e}");
            }
        }
    }

    #[test]
    fn a_product_of_nothing_is_that_of_the_definition() {
        is_that_of_the_definition((0, 64, 0), (0, 0, 0), (false, false, false), Normals(4));
    }

    proptest! {
        #![proptest_config(inputs(96))]

        #[test]
        fn products_are_those_of_the_definition(
            sizes in (0usize..40, 0usize..70, 0usize..40),
            more in (0usize..5, 0usize..5, 0usize..5),
            how in any::<(bool, bool, bool)>(),
            seed: u64,
        ) {
            is_that_of_the_definition(sizes, more, how, Normals(seed));
        }
    }
}
