//! Operands of products of bf16 values: their rounding and their layout.

use crate::kernels::cpu::gemm::micro::PANEL;

/// The depth of a product is a multiple of this number, padded with zeros. It is the depth of an AMX tile.
pub(crate) const DEPTH: usize = 32;

/// Rows of an AMX tile. A product may compute this many rows even if fewer are needed.
pub(crate) const ROWS: usize = 16;

/// Rounds to the nearest bf16, ties to even. Returns its bits, the upper half of an f32.
#[inline(always)]
pub(crate) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // Rounding could turn the bits of a NaN into those of an infinity.
    (if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }) as u16
}

/// Returns the error of a rounding, which is exact in f32.
#[inline(always)]
pub(crate) fn rest(x: f32, rounded: u16) -> f32 {
    x - f32::from_bits(u32::from(rounded) << 16)
}

/// Returns the position of entry (k, column) in a panel. Pairs of rows are interleaved, so that the two
/// values that one instruction multiplies for a column are adjacent.
#[inline(always)]
pub(crate) fn place(k: usize, column: usize) -> usize {
    (k / 2 * PANEL + column) * 2 + k % 2
}

/// One step of a product: the first of [`DEPTH`] columns of the left-hand side, and the first of the rows
/// of the right-hand side by which they are multiplied.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Step {
    pub a: usize,
    pub b: usize,
}

/// A product with one panel of columns: `c = a b`, or `c += a b` if `accumulate`.
///
/// `C`, `A` and `B` are slices or pointers. The units of a machine take pointers, after the bounds have
/// been checked.
///
/// Row i of `c` begins at `i * c_row`. In a step, row i of `a` begins `i * a_row` after the step's position
/// in `a`. Pairs of rows of the step's `b` are `b_row` apart. Each pair holds the two adjacent values of
/// [`PANEL`] columns. A sum adds the steps in order, for any number of rows.
///
/// `c` and `a` have room for rows up to the next multiple of [`ROWS`]. The additional rows of `c` may be
/// overwritten with arbitrary values.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a, C, A, B> {
    pub c: C,
    pub c_row: usize,
    pub rows: usize,
    pub a: A,
    pub a_row: usize,
    pub b: B,
    pub b_row: usize,
    pub steps: &'a [Step],
    pub accumulate: bool,
}

/// A product of slices.
pub(crate) type SliceProduct<'a> = Product<'a, &'a mut [f32], &'a [u16], &'a [u16]>;

/// A product of memory whose size has been checked.
#[cfg(target_arch = "x86_64")]
pub(crate) type RawProduct<'a> = Product<'a, *mut f32, *const u16, *const u16>;

impl<'a> SliceProduct<'a> {
    /// # Panics
    /// Panics if a row of a step, up to the next multiple of [`ROWS`], is not within its slice.
    pub(super) fn check(&self) {
        let last = self.rows.next_multiple_of(ROWS) - 1;
        let ends = self.steps.iter().fold((0, 0), |(a, b), step| (a.max(step.a), b.max(step.b)));
        let none = self.steps.is_empty();
        assert!(last * self.c_row + PANEL <= self.c.len());
        assert!(none || ends.0 + last * self.a_row + DEPTH <= self.a.len());
        assert!(none || ends.1 + (DEPTH / 2 - 1) * self.b_row + 2 * PANEL <= self.b.len());
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn into_raw(self) -> RawProduct<'a> {
        let Self { c, c_row, rows, a, a_row, b, b_row, steps, accumulate } = self;
        let (c, a, b) = (c.as_mut_ptr(), a.as_ptr(), b.as_ptr());
        Product { c, c_row, rows, a, a_row, b, b_row, steps, accumulate }
    }
}

#[cfg(target_arch = "x86_64")]
impl RawProduct<'_> {
    /// Returns the product restricted to some of the rows.
    pub(super) fn some(self, first: usize, rows: usize) -> Self {
        let c = self.c.wrapping_add(first * self.c_row);
        let a = self.a.wrapping_add(first * self.a_row);
        Self { c, a, rows, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_even() {
        for bits in (0..=u32::MAX).step_by(977) {
            let x = f32::from_bits(bits);
            let expected = half::bf16::from_f32(x);
            if x.is_nan() {
                assert!(half::bf16::from_bits(round(x)).is_nan());
            } else {
                assert_eq!(round(x), expected.to_bits(), "{x}");
            }
        }
    }
}
