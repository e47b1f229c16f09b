//! The transforms of F(2x2, 3x3) in one direction, which interpolate at 0, ±1 and infinity.

use crate::kernels::cpu::simd::Simd;

/// `B^T d`.
#[inline(always)]
pub(super) fn input_line<S: Simd>(d: [S; 4]) -> [S; 4] {
    [d[0].sub(d[2]), d[1].add(d[2]), d[2].sub(d[1]), d[1].sub(d[3])]
}

/// `A^T m`.
#[inline(always)]
pub(super) fn output_line<S: Simd>(m: [S; 4]) -> [S; 2] {
    [m[0].add(m[1]).add(m[2]), m[1].sub(m[2]).sub(m[3])]
}

/// `A dy`.
#[inline(always)]
pub(super) fn gradient_line<S: Simd>(d: [S; 2]) -> [S; 4] {
    [d[0], d[0].add(d[1]), d[0].sub(d[1]), S::splat(0.0).sub(d[1])]
}

/// `G w`.
#[inline(always)]
pub(super) fn kernel_line<S: Simd>(w: [S; 3]) -> [S; 4] {
    let (half, ends) = (S::splat(0.5), w[0].add(w[2]));
    [w[0], ends.add(w[1]).mul(half), ends.sub(w[1]).mul(half), w[2]]
}

/// `G^T u`.
#[inline(always)]
pub(super) fn kernel_gradient_line<S: Simd>(u: [S; 4]) -> [S; 3] {
    let half = S::splat(0.5);
    let (sum, difference) = (u[1].add(u[2]).mul(half), u[1].sub(u[2]).mul(half));
    [u[0].add(sum), difference, u[3].add(sum)]
}
