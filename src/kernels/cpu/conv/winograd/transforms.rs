//! The transforms of tiles of every size.

use std::ops::Range;

use super::rows::Source;
use super::tiles::{PixelRows, Size, TileRow};
use super::{transform_kernels as small_kernels, transform_maps as small, wide};
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::op::place::Place;

/// Computes `B^T d B` of each tile in a row of tiles. Pixels beyond the edges of the map are 0: `zeros` has as many
/// zeros as there are channels.
pub(super) fn transform_input(
    isa: Isa,
    v: &mut [f32],
    row: TileRow,
    source: Source<'_>,
    zeros: &[f32],
) {
    match row.size {
        Size::Small(places) => small::transform_input(isa, v, row, places, source),
        Size::Wide | Size::Large => wide::transform_input(isa, v, row, source, zeros),
    }
}

/// Writes the pixel rows of a row of tiles: `A^T m A` of each tile, plus the values that are added to it. The channels of
/// `m` are those of whole panels.
pub(super) fn transform_output(isa: Isa, pixels: PixelRows<'_>, m: &[f32], row: TileRow) {
    match row.size {
        Size::Small(places) => small::transform_output(isa, pixels, m, row, places),
        Size::Wide | Size::Large => wide::transform_output(isa, pixels, m, row),
    }
}

/// Computes `A dy A^T` of some channels of each tile in a row of tiles, in panels. Place p of tile k in panel q begins
/// at `d[(q * places + p) * stride + (first + k) * PANEL]`. `dy` holds the pixel rows of the row of tiles, of this width
/// and number of channels. `zeros` has as many zeros as the panels have channels.
pub(super) fn transform_gradient(
    isa: Isa,
    d: &mut [f32],
    row: TileRow,
    (dy, w, channels): (&[f32], usize, usize),
    some: Range<usize>,
    zeros: &[f32],
) {
    let size = (w, channels);
    match row.size {
        Size::Small(places) => small::transform_gradient(isa, d, row, places, dy, size, some),
        Size::Wide | Size::Large => {
            wide::transform_gradient(isa, d, row, dy, size, some, zeros);
        }
    }
}

/// Computes `G w G^T` of a panel's kernels for input channel `row` of `rows`. Place (y, x) is multiplied by the factors
/// of y and of x. Those of wide and large tiles are 1.
pub(super) fn transform_kernels(
    isa: Isa,
    values: &mut [f32],
    (row, rows): (usize, usize),
    taps: &[[f32; PANEL]; 9],
    size: Size,
    factors: [f32; 4],
) {
    match size {
        Size::Small(places) => {
            small_kernels::transform_kernels(isa, values, rows, row, taps, places, factors);
        }
        Size::Wide | Size::Large => {
            debug_assert_eq!(factors, [1.0; 4]);
            wide::transform_kernels(isa, values, rows, row, taps, size);
        }
    }
}

/// Computes `G^T u G` for a panel of output channels and some input channels. `u` (places, in, PANEL) is the sum of
/// `parts` arrays that are `part_len` apart. Writes to `dweight` (out, all input channels, 9).
pub(super) fn kernel_gradient(
    isa: Isa,
    dweight: &mut [f32],
    u: &[f32],
    (parts, part_len): (usize, usize),
    (c_in, place): (usize, Place),
    size: Size,
) {
    let parts = (parts, part_len);
    match size {
        Size::Small(places) => {
            small_kernels::kernel_gradient(isa, dweight, u, parts, c_in, place, places);
        }
        Size::Wide | Size::Large => {
            wide::kernel_gradient(isa, dweight, u, parts, c_in, place, size);
        }
    }
}
