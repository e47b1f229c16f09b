//! Matrices in slices, and right-hand sides packed into panels.

use rayon::prelude::*;

use super::micro::{Left, PANEL};
use crate::kernels::cpu::memory::sized;

/// A matrix within a slice: element (i, j) is at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Creates a matrix of `rows` contiguous rows.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Creates a matrix of `rows` rows that begin `row_stride` values apart.
    pub(crate) fn with_stride(
        data: &'a [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    pub(crate) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Returns the matrix as the left-hand side of a product of this depth, and its number of rows.
    pub(super) fn left(self, depth: usize) -> (usize, Left<'a>) {
        assert_eq!(self.cols, depth);
        (self.rows, Left::new(self.data, self.row_stride, self.col_stride))
    }

    /// Returns the matrix of `count` rows from `first` on.
    pub(crate) fn rows_from(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows);
        Self { data: &self.data[first * self.row_stride..], rows: count, ..self }
    }

    /// Number of values of the packed matrix.
    pub(crate) fn packed_len(&self) -> usize {
        self.cols.div_ceil(PANEL) * self.rows * PANEL
    }

    /// Packs the matrix to [`sized`] memory.
    pub(crate) fn packed(self, memory: &mut Vec<f32>) -> Panels<'_> {
        let Self { rows, cols, .. } = self;
        let packed = sized(memory, self.packed_len());
        let panels = packed.par_chunks_exact_mut((rows * PANEL).max(1)).enumerate();
        panels.for_each(|(i, panel)| self.pack_panel(i * PANEL, panel));
        Panels::new(packed, rows, cols)
    }

    /// Copies [`PANEL`] columns from `first` on to a panel. Columns beyond the last are zero.
    pub(super) fn pack_panel(&self, first: usize, panel: &mut [f32]) {
        let count = PANEL.min(self.cols - first);
        for (block, panel) in panel.chunks_mut(LINE * PANEL).enumerate() {
            let begin = block * LINE * self.row_stride + first * self.col_stride;
            if self.row_stride == 1 && self.col_stride != 1 {
                let rows = panel.len() / PANEL;
                for j in 0..count {
                    let values = &self.data[begin + j * self.col_stride..][..rows];
                    let places = panel[j..].iter_mut().step_by(PANEL);
                    places.zip(values).for_each(|(to, from)| *to = *from);
                }
                panel.chunks_exact_mut(PANEL).for_each(|row| row[count..].fill(0.0));
                continue;
            }
            for (k, row) in panel.chunks_exact_mut(PANEL).enumerate() {
                let begin = begin + k * self.row_stride;
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
}

/// Values of a transposed column that are copied at a time: a cache line.
const LINE: usize = 16;

/// A packed right-hand side: panels of columns, each (rows, [`PANEL`]).
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    values: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl<'a> Panels<'a> {
    /// Returns the panels that [`pack`] wrote to `values`.
    pub(crate) fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { values, rows, cols }
    }

    /// Returns the columns from `first` on, a multiple of [`PANEL`].
    pub(crate) fn columns_from(self, first: usize) -> Self {
        assert!(first.is_multiple_of(PANEL) && first <= self.cols);
        Self { values: &self.values[first * self.rows..], cols: self.cols - first, ..self }
    }

    /// Returns the panel that begins with column `first`, and those after it.
    pub(super) fn panels_from(&self, first: usize) -> &'a [f32] {
        &self.values[first * self.rows..]
    }
}

/// Packs the matrix whose element (i, j) is `values[row_at(i) + col_at(j)]` to [`sized`] memory.
pub(crate) fn pack(
    values: &[f32],
    (rows, cols): (usize, usize),
    row_at: impl Fn(usize) -> usize + Sync,
    col_at: impl Fn(usize) -> usize + Sync,
    memory: &mut Vec<f32>,
) {
    let packed = sized(memory, cols.div_ceil(PANEL) * rows * PANEL);
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
}
