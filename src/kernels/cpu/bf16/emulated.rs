//! Products of bf16 values in f32 arithmetic, for machines without instructions for them.

use super::operands::{DEPTH, SliceProduct};
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::simd::simd_fn;

simd_fn! {
    pub(super) fn product<S>(product: SliceProduct<'_>) {
        let SliceProduct { c, c_row, rows, a, a_row, b, b_row, steps, accumulate } = product;
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
