//! The transposition of matrices, in blocks of vectors.

use super::simd::{Simd, simd_fn};

simd_fn! {
    /// Writes the transpose of a matrix of `size` (rows, columns). Rows of the matrix begin `from_row` values apart, and
    /// those of the transpose `to_row` values.
    pub(crate) fn transpose<S>(
        from: &[f32],
        from_row: usize,
        to: &mut [f32],
        to_row: usize,
        size: (usize, usize),
    ) {
        transpose_in::<S>(from, from_row, to, to_row, size);
    }
}

/// [`transpose`] within a function that has the instruction set enabled.
#[inline(always)]
pub(crate) fn transpose_in<S: Simd>(
    from: &[f32],
    from_row: usize,
    to: &mut [f32],
    to_row: usize,
    (rows, columns): (usize, usize),
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!((rows - 1) * from_row + columns <= from.len());
    assert!((columns - 1) * to_row + rows <= to.len());
    for row in (0..rows).step_by(S::WIDTH) {
        for column in (0..columns).step_by(S::WIDTH) {
            let (first, first_to) = (row * from_row + column, column * to_row + row);
            let (height, width) = ((rows - row).min(S::WIDTH), (columns - column).min(S::WIDTH));
            // A block reads whole vectors, also of columns that are not written.
            let readable = first + (S::WIDTH - 1) * from_row + S::WIDTH <= from.len();
            if height == S::WIDTH && readable {
                // SAFETY: the block is readable, and by the assertion `width` rows of its transpose are within `to`.
                unsafe {
                    let (from, to) = (from.as_ptr().add(first), to.as_mut_ptr().add(first_to));
                    S::transpose(from, from_row, to, to_row, width);
                }
                continue;
            }
            for i in 0..height {
                for j in 0..width {
                    to[first_to + j * to_row + i] = from[first + i * from_row + j];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::isa::Isa;
    use super::*;
    use crate::random_inputs::inputs;

    proptest! {
        #![proptest_config(inputs(64))]

        #[test]
        fn every_value_is_moved_and_no_other_memory_is_written(
            (rows, columns) in (0usize..40, 0usize..40),
            (more, more_to) in (0usize..5, 0usize..5),
        ) {
            let (from_row, to_row) = (columns + more, rows + more_to);
            let from: Vec<f32> = (0u16..).map(f32::from).take(rows * from_row).collect();
            for isa in Isa::available() {
                let mut to = vec![-1f32; columns * to_row];
                transpose(isa, &from, from_row, &mut to, to_row, (rows, columns));
                for (at, value) in to.iter().enumerate() {
                    let (column, row) = (at / to_row, at % to_row);
                    let expected = if row < rows { from[row * from_row + column] } else { -1.0 };
                    prop_assert_eq!(*value, expected);
                }
            }
        }
    }
}
