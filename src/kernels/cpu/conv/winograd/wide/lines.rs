//! The horizontal transforms of tiles of six columns, which are also the vertical ones of six rows.
//!
//! The polynomials are interpolated at 0, ±5/8, ±3/2 and infinity. The usual points 0, ±1, ±2 have twice the error.
//! With these points, the error of F(4x4, 3x3) is at most twice that of the sum of products of the definition (measured for 128 channels of
//! standard normals). Every coefficient of `A` and `B` is exact in f32.

use crate::kernels::cpu::simd::Simd;

/// The positive points.
const P: f64 = 0.625;
const Q: f64 = 1.5;
/// The squares of the points, their sum, and their product.
const P2: f64 = P * P;
const Q2: f64 = Q * Q;
const SUM: f64 = P2 + Q2;
const PRODUCT: f64 = P2 * Q2;
/// The inverses of the products of the differences of `P` and of `Q` from the other points.
const OF_P: f64 = 1.0 / (2.0 * P2 * (P2 - Q2));
const OF_Q: f64 = 1.0 / (2.0 * Q2 * (Q2 - P2));

#[inline(always)]
fn splat<S: Simd>(value: f64) -> S {
    S::splat(value as f32)
}

/// `B^T d`.
#[inline(always)]
pub(super) fn input_line<S: Simd>(d: [S; 6]) -> [S; 6] {
    let (p2, q2) = (splat(-P2), splat(-Q2));
    let (sum, product) = (splat(-SUM), splat(PRODUCT));
    let (even_p, odd_p) = (d[2].mul_add(q2, d[4]), d[1].mul_add(q2, d[3]));
    let (even_q, odd_q) = (d[2].mul_add(p2, d[4]), d[1].mul_add(p2, d[3]));
    [
        d[0].mul_add(product, d[2].mul_add(sum, d[4])),
        odd_p.mul_add(splat(P), even_p),
        odd_p.mul_add(splat(-P), even_p),
        odd_q.mul_add(splat(Q), even_q),
        odd_q.mul_add(splat(-Q), even_q),
        d[1].mul_add(product, d[3].mul_add(sum, d[5])),
    ]
}

/// `A^T m`.
#[inline(always)]
pub(super) fn output_line<S: Simd>(m: [S; 6]) -> [S; 4] {
    let (even_p, odd_p) = (m[1].add(m[2]), m[1].sub(m[2]));
    let (even_q, odd_q) = (m[3].add(m[4]), m[3].sub(m[4]));
    [
        m[0].add(even_p).add(even_q),
        odd_q.mul_add(splat(Q), odd_p.mul(splat(P))),
        even_q.mul_add(splat(Q2), even_p.mul(splat(P2))),
        odd_q.mul_add(splat(Q * Q2), odd_p.mul_add(splat(P * P2), m[5])),
    ]
}

/// `A dy`.
#[inline(always)]
pub(super) fn gradient_line<S: Simd>(d: [S; 4]) -> [S; 6] {
    let (even_p, odd_p) = (d[2].mul_add(splat(P2), d[0]), d[3].mul_add(splat(P2), d[1]));
    let (even_q, odd_q) = (d[2].mul_add(splat(Q2), d[0]), d[3].mul_add(splat(Q2), d[1]));
    [
        d[0],
        odd_p.mul_add(splat(P), even_p),
        odd_p.mul_add(splat(-P), even_p),
        odd_q.mul_add(splat(Q), even_q),
        odd_q.mul_add(splat(-Q), even_q),
        d[3],
    ]
}

/// `G w`.
#[inline(always)]
pub(super) fn kernel_line<S: Simd>(w: [S; 3]) -> [S; 6] {
    let even_p = w[2].mul_add(splat(P2), w[0]).mul(splat(OF_P));
    let even_q = w[2].mul_add(splat(Q2), w[0]).mul(splat(OF_Q));
    let (odd_p, odd_q) = (w[1].mul(splat(P * OF_P)), w[1].mul(splat(Q * OF_Q)));
    [
        w[0].mul(splat(1.0 / PRODUCT)),
        even_p.add(odd_p),
        even_p.sub(odd_p),
        even_q.add(odd_q),
        even_q.sub(odd_q),
        w[2],
    ]
}

/// `G^T u`.
#[inline(always)]
pub(super) fn kernel_gradient_line<S: Simd>(u: [S; 6]) -> [S; 3] {
    let even_p = u[1].add(u[2]).mul(splat(OF_P));
    let even_q = u[3].add(u[4]).mul(splat(OF_Q));
    let (odd_p, odd_q) = (u[1].sub(u[2]), u[3].sub(u[4]));
    [
        u[0].mul_add(splat(1.0 / PRODUCT), even_p.add(even_q)),
        odd_p.mul_add(splat(P * OF_P), odd_q.mul(splat(Q * OF_Q))),
        even_p.mul_add(splat(P2), even_q.mul_add(splat(Q2), u[5])),
    ]
}
