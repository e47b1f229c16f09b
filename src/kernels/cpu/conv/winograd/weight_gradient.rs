//! The gradient of the weights: `G^T [sum over tiles (A dy A^T) (B^T d B)] G`.
//!
//! The division of the batch into parts depends only on the shapes. That of the output channels into groups also depends
//! on the number of threads, but the order of the sums of a channel does not depend on its group. The bits are therefore
//! the same for any number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::rows::Rows;
use super::tiles::{MIN_BLOCK_TILES, TileRow, Tiles, kernel_stride, place_stride, with_scratch};
use super::transforms::{kernel_gradient, transform_gradient, transform_input};
use crate::kernels::cpu::conv::algorithm::Input;
use crate::kernels::cpu::gemm::micro::{Left, PANEL, PanelProduct, panel_product};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::sized;

/// Panels of output channels per task: the first number that leaves work for every thread. With more, the sums of wide
/// layers would not fit in the caches. With fewer, the input is transformed more often.
const GROUPS: [usize; 3] = [4, 2, 1];

/// Bytes of the transforms of a block of tiles. The sums, one tile of a product at a time, are read and written once per
/// block, so a block is larger than in the forward pass.
const BYTES: usize = 3 << 19;

/// Maximum number of tiles in a block: the depth of a product.
const MAX_BLOCK_TILES: usize = 128;

/// Maximum memory for the sums of parts. One part alone may need more.
const SUMS_BYTES: usize = 9 << 20;

/// Minimum number of output pixels in a part. With fewer, a part would cost more time than it saves.
const MIN_PART_PIXELS: usize = 1024;

/// The division of the sums into tasks.
pub(super) struct Division {
    /// Number of values of the sums of a panel of output channels.
    panel_len: usize,
    panels: usize,
    /// Number of parts of the batch, each of so many rows of tiles.
    parts: usize,
    part_rows: usize,
    /// Panels per task.
    group: usize,
}

impl Division {
    pub(super) fn of(tiles: Tiles, c_in: usize, c_out: usize) -> Self {
        let panel_len = tiles.size.count() * kernel_stride(c_in);
        let panels = c_out.div_ceil(PANEL);
        let [height, width] = tiles.size.output();
        let worthwhile = tiles.tile_rows() * tiles.tiles_x() * height * width / MIN_PART_PIXELS;
        let most = SUMS_BYTES / (panels * panel_len * size_of::<f32>());
        let part_rows = tiles.tile_rows().div_ceil(most.min(worthwhile).clamp(1, 16));
        let parts = tiles.tile_rows().div_ceil(part_rows);
        let tasks = |group: &usize| parts * panels.div_ceil(*group);
        let work_for_all = |group: &usize| tasks(group) >= 2 * rayon::current_num_threads();
        let group = GROUPS.into_iter().find(work_for_all).unwrap_or(1);
        Self { panel_len, panels, parts, part_rows, group }
    }

    /// Number of groups of panels, of which each transforms the input.
    pub(super) fn groups(&self) -> usize {
        self.panels.div_ceil(self.group)
    }
}

/// Writes the gradient of the weights, (out, in, 3, 3), from `x` (batch, h, w, in), or half that size if it
/// is doubled, and `dy` (batch, h, w, out).
pub(super) fn weight_gradient(
    isa: Isa,
    tiles: Tiles,
    x: Input<'_>,
    dy: &[f32],
    dweight: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let c_in = x.map.len() / tiles.input_pixels();
    let c_out = dy.len() / (tiles.batch * tiles.h * tiles.w);
    assert_eq!(dweight.len(), c_out * c_in * 9);
    let Division { panel_len, panels, parts, part_rows, group } = Division::of(tiles, c_in, c_out);
    let sums_len = panels * panel_len;
    let sums = sized(scratch, parts * sums_len);

    sums.par_chunks_mut(sums_len).enumerate().for_each(|(part, sums)| {
        sums.par_chunks_mut(group * panel_len).enumerate().for_each(|(i, sums)| {
            let rows = part * part_rows..((part + 1) * part_rows).min(tiles.tile_rows());
            let channels = i * group * PANEL..((i + 1) * group * PANEL).min(c_out);
            sum_transformed(isa, tiles, (x, c_in), (dy, c_out), rows, channels, sums);
        });
    });
    let sums = &*sums;
    dweight.par_chunks_mut(PANEL * c_in * 9).enumerate().for_each(|(panel, dweight)| {
        let sums = &sums[panel * panel_len..];
        kernel_gradient(isa, dweight, sums, (parts, sums_len), c_in, tiles.size);
    });
}

/// Writes the sum of `(A dy A^T) (B^T d B)` over some rows of tiles, for some output channels, to `sums`, panels of
/// (places, in, PANEL), with places [`kernel_stride`] apart.
fn sum_transformed(
    isa: Isa,
    tiles: Tiles,
    (x, c_in): (Input<'_>, usize),
    (dy, c_out): (&[f32], usize),
    rows: Range<usize>,
    channels: Range<usize>,
    sums: &mut [f32],
) {
    let panels = channels.len().div_ceil(PANEL);
    let (size, count) = (tiles.size, tiles.size.count());
    let bytes = count * (c_in + panels * PANEL) * size_of::<f32>();
    let most = (BYTES / bytes).clamp(MIN_BLOCK_TILES, MAX_BLOCK_TILES);
    let step = (most / tiles.tiles_x()).clamp(1, rows.len());
    let most = step * tiles.tiles_x();
    let (v_stride, d_stride) = (place_stride(most * c_in), place_stride(most * PANEL));
    let zeros_len = c_in.max(panels * PANEL);
    let lines_len = Rows::memory_len(tiles, x, c_in);
    with_scratch(count * (v_stride + panels * d_stride) + lines_len + zeros_len, |scratch| {
        let (v, scratch) = scratch.split_at_mut(count * v_stride);
        let (d, scratch) = scratch.split_at_mut(count * panels * d_stride);
        let (lines, zeros) = scratch.split_at_mut(lines_len);
        zeros.fill(0.0);
        let mut x = Rows::new(tiles, x, lines);
        for first in rows.clone().step_by(step) {
            let last = (first + step).min(rows.end);
            for tile_row in first..last {
                let begin = (tile_row - first) * tiles.tiles_x();
                let row = TileRow { first: begin, stride: v_stride, size };
                transform_input(isa, v, row, x.under(tile_row), zeros);
                let line = tiles.w * c_out;
                let dy =
                    &dy[tiles.pixel_row(tile_row) * line..tiles.pixel_row(tile_row + 1) * line];
                let row = TileRow { stride: d_stride, ..row };
                transform_gradient(isa, d, row, (dy, tiles.w, c_out), channels.clone(), zeros);
            }
            let depth = (last - first) * tiles.tiles_x();
            // The tiles of one place stay in the first-level cache for all panels.
            let places = (0..count).flat_map(|at| (0..panels).map(move |panel| (at, panel)));
            for (at, panel) in places {
                let i = panel * count + at;
                let product = PanelProduct {
                    c: &mut sums[i * kernel_stride(c_in)..][..c_in * PANEL],
                    c_row: PANEL,
                    rows: c_in,
                    a: Left::new(&v[at * v_stride..], 1, c_in),
                    b: &d[i * d_stride..],
                    depth,
                    accumulate: first > rows.start,
                    next: &[],
                };
                panel_product(isa, product);
            }
        }
    });
}
