//! The vertical transforms of tiles of six columns. `TALL` is true for tiles of 6 rows. Those of 4 rows have the
//! transforms of F(2x2, 3x3) in this direction, and zeros, which are not used, as their last rows.

use super::super::lines as small;
use super::lines;
use crate::kernels::cpu::simd::Simd;

/// `B^T d`.
#[inline(always)]
pub(super) fn input_column<S: Simd, const TALL: bool>(d: [S; 6]) -> [S; 6] {
    if TALL {
        return lines::input_line(d);
    }
    let [v0, v1, v2, v3] = small::input_line([d[0], d[1], d[2], d[3]]);
    [v0, v1, v2, v3, S::splat(0.0), S::splat(0.0)]
}

/// `A^T m`.
#[inline(always)]
pub(super) fn output_column<S: Simd, const TALL: bool>(m: [S; 6]) -> [S; 4] {
    if TALL {
        return lines::output_line(m);
    }
    let [y0, y1] = small::output_line([m[0], m[1], m[2], m[3]]);
    [y0, y1, S::splat(0.0), S::splat(0.0)]
}

/// `A dy`.
#[inline(always)]
pub(super) fn gradient_column<S: Simd, const TALL: bool>(d: [S; 4]) -> [S; 6] {
    if TALL {
        return lines::gradient_line(d);
    }
    let [d0, d1, d2, d3] = small::gradient_line([d[0], d[1]]);
    [d0, d1, d2, d3, S::splat(0.0), S::splat(0.0)]
}

/// `G w`.
#[inline(always)]
pub(super) fn kernel_column<S: Simd, const TALL: bool>(w: [S; 3]) -> [S; 6] {
    if TALL {
        return lines::kernel_line(w);
    }
    let [u0, u1, u2, u3] = small::kernel_line(w);
    [u0, u1, u2, u3, S::splat(0.0), S::splat(0.0)]
}

/// `G^T u`.
#[inline(always)]
pub(super) fn kernel_gradient_column<S: Simd, const TALL: bool>(u: [S; 6]) -> [S; 3] {
    if TALL {
        return lines::kernel_gradient_line(u);
    }
    small::kernel_gradient_line([u[0], u[1], u[2], u[3]])
}

/// Calls a function of a tile. Its last generic argument states whether the tile is tall.
macro_rules! with_height {
    ($size:expr, $f:ident::<$s:ident>($($argument:expr),* $(,)?)) => {
        match $size {
            Size::Large => $f::<$s, true>($($argument),*),
            _ => $f::<$s, false>($($argument),*),
        }
    };
}
pub(super) use with_height;
