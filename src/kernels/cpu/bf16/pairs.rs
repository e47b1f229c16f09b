//! Products of bf16 values with the pairwise dot products of AVX-512.

use std::arch::x86_64::*;

use super::operands::{DEPTH, RawProduct};
use crate::kernels::cpu::gemm::micro::PANEL;

/// Rows of a tile. With two vectors per row, enough registers are left for the operands.
const ROWS: usize = 14;

/// # Safety
/// The machine must have AVX-512 with BF16. All rows of all steps must be within memory that may be
/// read, or written for `c`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn product(operands: RawProduct) {
    macro_rules! of_height {
        ($tile:ident, $($height:literal)*) => {
            match $tile.rows {
                // SAFETY: the caller guarantees the requirements.
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
/// The requirements of [`product`] apply.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile<const M: usize>(operands: RawProduct) {
    let RawProduct { c, c_row, a, a_row, b, b_row, steps, accumulate, .. } = operands;
    // SAFETY: the caller guarantees each of these elements. A vector of pairs and a vector of bf16
    // values are the same bits.
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
