//! The transposition of blocks by the instructions of x86. Pairs of instructions gather the four values of a column of
//! four rows, in each part of 128 bits. The parts are then brought into order.

use std::arch::x86_64::*;

/// # Safety
/// The requirements of [`Simd::transpose`](super::Simd::transpose) apply.
#[inline(always)]
pub(super) unsafe fn avx512(
    from: *const f32,
    from_row: usize,
    to: *mut f32,
    to_row: usize,
    columns: usize,
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let mut parts = [_mm512_setzero_ps(); 16];
        for i in 0..4 {
            let from = from.add(4 * i * from_row);
            let (r0, r1) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(from_row)));
            let from = from.add(2 * from_row);
            let (r2, r3) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(from_row)));
            let a = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
            let b = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
            let c = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
            let d = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
            parts[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            parts[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            parts[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            parts[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        let mut out = [_mm512_setzero_ps(); 16];
        for j in 0..4 {
            // The even and the odd parts of two rows.
            let even = _mm512_shuffle_f32x4::<0x88>(parts[j], parts[4 + j]);
            let odd = _mm512_shuffle_f32x4::<0xdd>(parts[j], parts[4 + j]);
            let more_even = _mm512_shuffle_f32x4::<0x88>(parts[8 + j], parts[12 + j]);
            let more_odd = _mm512_shuffle_f32x4::<0xdd>(parts[8 + j], parts[12 + j]);
            out[j] = _mm512_shuffle_f32x4::<0x88>(even, more_even);
            out[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, more_odd);
            out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even, more_even);
            out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd, more_odd);
        }
        for (j, row) in out.into_iter().enumerate() {
            if j < columns {
                _mm512_storeu_ps(to.add(j * to_row), row);
            }
        }
    }
}

/// # Safety
/// The requirements of [`Simd::transpose`](super::Simd::transpose) apply.
#[inline(always)]
pub(super) unsafe fn avx2(
    from: *const f32,
    from_row: usize,
    to: *mut f32,
    to_row: usize,
    columns: usize,
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let mut parts = [_mm256_setzero_ps(); 8];
        for i in 0..2 {
            let from = from.add(4 * i * from_row);
            let (r0, r1) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(from_row)));
            let from = from.add(2 * from_row);
            let (r2, r3) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(from_row)));
            let a = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
            let b = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
            let c = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
            let d = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
            parts[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
            parts[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
            parts[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
            parts[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
        }
        for j in 0..4 {
            let low = _mm256_permute2f128_ps::<0x20>(parts[j], parts[4 + j]);
            let high = _mm256_permute2f128_ps::<0x31>(parts[j], parts[4 + j]);
            for (column, row) in [(j, low), (4 + j, high)] {
                if column < columns {
                    _mm256_storeu_ps(to.add(column * to_row), row);
                }
            }
        }
    }
}
