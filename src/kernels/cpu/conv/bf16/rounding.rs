//! Values as one or two bf16 parts, and their transposition.

use std::ops::Range;

use crate::kernels::cpu::bf16::operands::{rest, round};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::simd::simd_fn;

/// The number of bf16 products in place of one product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Terms {
    One,
    Three,
}

impl Terms {
    /// The parts of the left and of the right factor that each product takes: 0 for the rounded value, 1
    /// for its error.
    pub(super) fn products(self) -> &'static [(usize, usize)] {
        match self {
            Self::One => &[(0, 0)],
            Self::Three => &[(0, 0), (0, 1), (1, 0)],
        }
    }

    /// The number of parts of a value.
    pub(super) fn parts(self) -> usize {
        match self {
            Self::One => 1,
            Self::Three => 2,
        }
    }
}

/// The memory of both parts of `len` values. The second is empty if there is one part.
pub(super) fn parts_of(values: &mut [u16], len: usize) -> [&mut [u16]; 2] {
    let (first, second) = values.split_at_mut(len);
    [first, second]
}

/// Rounds some channels of pixels. Writes the errors to `left`, unless it is empty.
pub(super) fn round_pixels(
    isa: Isa,
    x: &[f32],
    pixel: usize,
    channels: Range<usize>,
    to: &mut [u16],
    left: &mut [u16],
) {
    let count = channels.len();
    if count == pixel {
        return round_values(isa, x, to, left);
    }
    for (i, x) in x.chunks_exact(pixel).enumerate() {
        let place = i * count..(i + 1) * count;
        let left = if left.is_empty() { &mut [][..] } else { &mut left[place.clone()] };
        round_values(isa, &x[channels.clone()], &mut to[place], left);
    }
}

simd_fn! {
    fn round_values<S>(x: &[f32], to: &mut [u16], left: &mut [u16]) {
        for (to, &x) in to.iter_mut().zip(x) {
            *to = round(x);
        }
        for ((left, &x), &rounded) in left.iter_mut().zip(x).zip(&*to) {
            *left = round(rest(x, rounded));
        }
    }
}

/// Transposes `from` (rows, columns) to `to` (columns, rows), whose rows are `to_row` apart. The number of
/// rows is a multiple of 8.
pub(super) fn transpose(from: &[u16], columns: usize, to: &mut [u16], to_row: usize) {
    const SIDE: usize = 8;
    let whole = columns / SIDE * SIDE;
    for (row, from) in from.chunks_exact(SIDE * columns).enumerate() {
        for column in (0..whole).step_by(SIDE) {
            let block: [[u16; SIDE]; SIDE] = std::array::from_fn(|i| {
                let mut row = [0; SIDE];
                row.copy_from_slice(&from[i * columns + column..][..SIDE]);
                row
            });
            for (j, values) in transpose_block(block).into_iter().enumerate() {
                to[(column + j) * to_row + row * SIDE..][..SIDE].copy_from_slice(&values);
            }
        }
        for column in whole..columns {
            for i in 0..SIDE {
                to[column * to_row + row * SIDE + i] = from[i * columns + column];
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose_block(rows: [[u16; 8]; 8]) -> [[u16; 8]; 8] {
    use std::arch::x86_64::*;
    // SAFETY: SSE2 is part of x86-64. Eight u16 and a vector are the same bits.
    unsafe {
        let r: [__m128i; 8] = std::mem::transmute(rows);
        // Interleaves rows, then pairs of rows, then fours.
        let a = |i: usize| (_mm_unpacklo_epi16(r[i], r[i + 1]), _mm_unpackhi_epi16(r[i], r[i + 1]));
        let ((a0, a1), (a2, a3), (a4, a5), (a6, a7)) = (a(0), a(2), a(4), a(6));
        let b = |x, y| (_mm_unpacklo_epi32(x, y), _mm_unpackhi_epi32(x, y));
        let ((b0, b1), (b2, b3)) = (b(a0, a2), b(a1, a3));
        let ((b4, b5), (b6, b7)) = (b(a4, a6), b(a5, a7));
        let c = |x, y| [_mm_unpacklo_epi64(x, y), _mm_unpackhi_epi64(x, y)];
        std::mem::transmute([c(b0, b4), c(b1, b5), c(b2, b6), c(b3, b7)])
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transpose_block(rows: [[u16; 8]; 8]) -> [[u16; 8]; 8] {
    std::array::from_fn(|j| std::array::from_fn(|i| rows[i][j]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_matrix_has_rows_and_columns_exchanged() {
        for (rows, columns, more) in [(8, 1, 0), (8, 8, 3), (32, 21, 0), (64, 48, 8)] {
            let from: Vec<u16> = (0..rows * columns).map(|i| i as u16).collect();
            let to_row = rows + more;
            let mut to = vec![u16::MAX; columns * to_row];
            transpose(&from, columns, &mut to, to_row);
            for (at, &found) in to.iter().enumerate() {
                let (column, row) = (at / to_row, at % to_row);
                let expected = if row < rows { from[row * columns + column] } else { u16::MAX };
                assert_eq!(found, expected, "{rows} by {columns}: row {row}, column {column}");
            }
        }
    }
}
