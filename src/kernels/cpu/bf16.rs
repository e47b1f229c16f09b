//! Matrix products of bf16 operands, summed in f32: by AMX tiles, by AVX-512's dot products of pairs,
//! or, where a machine has neither, by f32 arithmetic on the same values.

pub(super) use super::product::PANEL;
#[cfg(target_arch = "x86_64")]
use super::simd::Limit;
use super::simd::{Isa, simd_fn};

/// The depth of a product is a multiple of this, padded with zeros: what an AMX tile takes.
pub(super) const DEPTH: usize = 32;

/// The nearest bf16, ties to even, as its bits: the upper half of an f32's.
#[inline(always)]
pub(super) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // Rounding could carry a NaN's bits over into an infinity's.
    (if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }) as u16
}

/// What rounding leaves.
#[inline(always)]
pub(super) fn rest(x: f32, rounded: u16) -> f32 {
    x - f32::from_bits(u32::from(rounded) << 16)
}

/// Where entry (k, column) of a panel stands: pairs of rows are interleaved, so that the two values
/// that one instruction multiplies for a column lie side by side.
#[inline(always)]
pub(super) fn place(k: usize, column: usize) -> usize {
    (k / 2 * PANEL + column) * 2 + k % 2
}

/// Returns whether this machine has instructions for products of bf16 values, within the limit of the process.
pub(crate) fn has_bf16_products() -> bool {
    Unit::detect(Isa::detect()).is_native()
}

/// What multiplies bf16 values. There is none but by asking the machine, which is what makes it safe to
/// use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unit(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Pairs,
    Emulated(Isa),
}

impl Unit {
    /// The fastest of this machine, within this instruction set.
    pub fn detect(isa: Isa) -> Self {
        Self::of(isa).swap_remove(0)
    }

    /// Those of this machine, within this instruction set, the fastest first; never none.
    fn of(isa: Isa) -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if isa.kind() == super::simd::Kind::Avx512 {
            if Limit::of_process() == Limit::Amx && super::amx::available() {
                found.push(Self(Kind::Amx));
            }
            if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw") {
                found.push(Self(Kind::Pairs));
            }
        }
        found.push(Self(Kind::Emulated(isa)));
        found
    }

    /// Returns whether the unit has instructions for products of bf16 values.
    pub fn is_native(self) -> bool {
        !matches!(self.0, Kind::Emulated(_))
    }

    pub fn has_tiles(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self.0 == Kind::Amx {
            return true;
        }
        false
    }

    /// The instruction set that emulates it, if that is how it multiplies.
    #[cfg(test)]
    pub fn isa(self) -> Option<Isa> {
        if let Kind::Emulated(isa) = self.0 { Some(isa) } else { None }
    }

    /// All that this machine has, and tiles even where they must be emulated.
    #[cfg(test)]
    pub fn available() -> Vec<Self> {
        let mut found: Vec<_> = Isa::available().into_iter().flat_map(Self::of).collect();
        #[cfg(target_arch = "x86_64")]
        if !found.contains(&Self(Kind::Amx)) && super::amx::testable() {
            found.push(Self(Kind::Amx));
        }
        found
    }
}

/// One step of a product: where [`DEPTH`] columns of the left-hand side begin, and the rows of the
/// right-hand side that they meet.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Step {
    pub a: usize,
    pub b: usize,
}

/// A product's operands: `c = a b`, or `c += a b` where `accumulate`, for one panel of columns.
///
/// Row i of `c` begins at `i * c_row`, and that of a step's `a` at `i * a_row` from where the step
/// says. Pairs of a step's rows of `b` are `b_row` apart: in each, [`PANEL`] columns' two values side
/// by side. A sum runs through the steps in order, however many rows there are.
///
/// `c` and `a` have room for rows up to the next multiple of [`ROWS`], and `c` may hold anything there
/// afterwards.
pub(super) struct Product<'a> {
    pub c: &'a mut [f32],
    pub c_row: usize,
    pub rows: usize,
    pub a: &'a [u16],
    pub a_row: usize,
    pub b: &'a [u16],
    pub b_row: usize,
    pub steps: &'a [Step],
    pub accumulate: bool,
}

/// Rows that a tile has: products may compute so many where fewer are asked for.
pub(super) const ROWS: usize = 16;

pub(super) fn product(unit: Unit, product: Product) {
    let Product { c, c_row, rows, a, a_row, b, b_row, steps, accumulate } = product;
    if rows == 0 {
        return;
    }
    let last = rows.next_multiple_of(ROWS) - 1;
    let ends = steps.iter().fold((0, 0), |(a, b), step| (a.max(step.a), b.max(step.b)));
    assert!(last * c_row + PANEL <= c.len());
    assert!(steps.is_empty() || ends.0 + last * a_row + DEPTH <= a.len());
    assert!(steps.is_empty() || ends.1 + (DEPTH / 2 - 1) * b_row + 2 * PANEL <= b.len());
    match unit.0 {
        Kind::Emulated(isa) => {
            emulated(isa, c, c_row, rows, a, a_row, b, b_row, steps, accumulate);
        }
        #[cfg(target_arch = "x86_64")]
        Kind::Amx | Kind::Pairs => {
            let (c, a, b) = (c.as_mut_ptr(), a.as_ptr(), b.as_ptr());
            let operands = Operands { c, c_row, rows, a, a_row, b, b_row, steps, accumulate };
            // SAFETY: a `Unit` exists only where the machine has it; the assertions hold each row of each
            // step within its slice.
            unsafe {
                match unit.0 {
                    Kind::Amx => super::amx::product(operands),
                    _ => pairs::product(operands),
                }
            }
        }
    }
}

/// The operands of [`product`], for code that knows them to be whole.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub c: *mut f32,
    pub c_row: usize,
    pub rows: usize,
    pub a: *const u16,
    pub a_row: usize,
    pub b: *const u16,
    pub b_row: usize,
    pub steps: &'a [Step],
    pub accumulate: bool,
}

#[cfg(target_arch = "x86_64")]
impl Operands<'_> {
    /// Those of some of the rows.
    pub fn some(self, first: usize, rows: usize) -> Self {
        let c = self.c.wrapping_add(first * self.c_row);
        let a = self.a.wrapping_add(first * self.a_row);
        Self { c, a, rows, ..self }
    }
}

simd_fn! {
    fn emulated<S>(
        c: &mut [f32],
        c_row: usize,
        rows: usize,
        a: &[u16],
        a_row: usize,
        b: &[u16],
        b_row: usize,
        steps: &[Step],
        accumulate: bool,
    ) {
        let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        for i in 0..rows {
            let c = &mut c[i * c_row..][..PANEL];
            let mut sums = [0f32; PANEL];
            if accumulate {
                sums.copy_from_slice(c);
            }
            for step in steps {
                let pairs = a[step.a + i * a_row..][..DEPTH].chunks_exact(2);
                for (a, b) in pairs.zip(b[step.b..].chunks(b_row)) {
                    let (even, odd) = (value(a[0]), value(a[1]));
                    for (sum, b) in sums.iter_mut().zip(b[..2 * PANEL].chunks_exact(2)) {
                        *sum += even * value(b[0]) + odd * value(b[1]);
                    }
                }
            }
            c.copy_from_slice(&sums);
        }
    }
}

/// AVX-512's dot products of pairs.
#[cfg(target_arch = "x86_64")]
mod pairs {
    use std::arch::x86_64::*;

    use super::{DEPTH, Operands, PANEL};

    /// Rows that, with two vectors a row, leave registers for the operands.
    const ROWS: usize = 14;

    /// # Safety
    /// The machine must have AVX-512 with BF16, and all rows of all steps lie within memory that may be
    /// read, or written for `c`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn product(operands: Operands) {
        macro_rules! of_height {
            ($tile:ident, $($height:literal)*) => {
                match $tile.rows {
                    // SAFETY: passed on.
                    $($height => unsafe { tile::<$height>($tile) },)*
                    rows => assert!(rows == 0, "a tile of {rows} rows"),
                }
            };
        }
        let tiles = operands.rows.div_ceil(ROWS);
        for i in 0..tiles {
            let (first, last) = (i * operands.rows / tiles, (i + 1) * operands.rows / tiles);
            let some = operands.some(first, last - first);
            of_height!(some, 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        }
    }

    /// # Safety
    /// As [`product`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn tile<const M: usize>(operands: Operands) {
        let Operands { c, c_row, a, a_row, b, b_row, steps, accumulate, .. } = operands;
        // SAFETY: the caller's promise covers each of these elements; a vector of pairs and one of
        // bf16 values are the same bits.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            if accumulate {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let c = c.add(i * c_row);
                    *sums = [_mm512_loadu_ps(c), _mm512_loadu_ps(c.add(16))];
                }
            }
            let pairs = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
            for step in steps {
                let (mut a, mut b) = (a.add(step.a), b.add(step.b));
                for _ in 0..DEPTH / 2 {
                    let first = pairs(_mm512_loadu_epi16(b.cast()));
                    let second = pairs(_mm512_loadu_epi16(b.add(PANEL).cast()));
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let pair = a.add(i * a_row).cast::<i32>().read_unaligned();
                        let pair = pairs(_mm512_set1_epi32(pair));
                        sums[0] = _mm512_dpbf16_ps(sums[0], pair, first);
                        sums[1] = _mm512_dpbf16_ps(sums[1], pair, second);
                    }
                    a = a.wrapping_add(2);
                    b = b.wrapping_add(b_row);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                let c = c.add(i * c_row);
                _mm512_storeu_ps(c, sums[0]);
                _mm512_storeu_ps(c.add(16), sums[1]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{F32, Normals, roundings};
    use crate::random_inputs::inputs;
    use proptest::prelude::*;

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

    proptest! {
        #![proptest_config(inputs(64))]

        #[test]
        fn every_unit_multiplies(
            (rows, count) in (1usize..70, 0usize..5),
            (more_a, more_b, more_c) in (0usize..9, 0usize..9, 0usize..40),
            accumulate: bool,
            seed: u64,
        ) {
            let (a_row, b_row) = (DEPTH + more_a, 2 * (PANEL + more_b));
            let c_row = PANEL + more_c;
            // Steps that lie on each other, out of order, at any distance.
            let step = |i: usize| Step { a: (5 * i + 3) % 7, b: 2 * ((3 * i + 1) % 4) };
            let steps: Vec<Step> = (0..count).map(step).collect();
            let room = rows.next_multiple_of(ROWS);
            let normal = |k, len| Normals(seed).values(k, len);
            let bits = |values: &[f32]| values.iter().map(|&x| round(x)).collect::<Vec<u16>>();
            let (a, b) = (bits(&normal(0, room * a_row + 7)), bits(&normal(1, 16 * b_row + 8)));
            let before = normal(2, room * c_row);
            let value = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
            for unit in Unit::available() {
                let mut c = before.clone();
                product(unit, Product {
                    c: &mut c, c_row, rows, a: &a, a_row, b: &b, b_row, steps: &steps, accumulate,
                });
                for i in 0..rows {
                    for j in 0..c_row {
                        let at = i * c_row + j;
                        if j >= PANEL {
                            prop_assert_eq!(c[at], before[at], "beyond the panel");
                            continue;
                        }
                        let mut sum = if accumulate { f64::from(before[at]) } else { 0.0 };
                        let mut magnitude = sum.abs();
                        for step in &steps {
                            for k in 0..DEPTH {
                                let b = b[step.b + k / 2 * b_row + 2 * j + k % 2];
                                let term = value(a[step.a + i * a_row + k]) * value(b);
                                (sum, magnitude) = (sum + term, magnitude + term.abs());
                            }
                        }
                        let terms = DEPTH * count + usize::from(accumulate);
                        let bound = roundings(terms as f64) * F32 * magnitude;
                        let off = (f64::from(c[at]) - sum).abs();
                        prop_assert!(
                            off <= bound,
                            "{unit:?}: {}, not {sum}: off by {off:e}, more than {bound:e}", c[at]
                        );
                    }
                }
            }
        }
    }
}
