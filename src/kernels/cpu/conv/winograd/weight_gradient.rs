//! The gradient of the weights: `G^T [sum over tiles (A dy A^T) (B^T d B)] G`.
//!
//! The division of the batch into parts depends only on the shapes. The division of the channels into tasks also
//! depends on the number of threads, but the order of the sums of a channel does not depend on its task. The bits are
//! therefore the same for any number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::super::parts::parts;
use super::rows::Rows;
use super::tiles::{MIN_BLOCK_TILES, TileRow, Tiles, kernel_stride, place_stride, with_scratch};
use super::transforms::{kernel_gradient, transform_gradient, transform_input};
use crate::kernels::cpu::conv::algorithm::Input;
use crate::kernels::cpu::gemm::micro::{Left, PANEL, PanelProduct, panel_product};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::sized;
use crate::kernels::op::place::Place;

/// Panels of output channels per task. With more, the sums of wide layers would not fit in the caches. With fewer, the
/// input is transformed more often.
const GROUPS: [usize; 3] = [4, 2, 1];

/// Minimum number of input channels in a task, if it does not have all. With fewer, transforming the gradient of the
/// output for each of them would take longer than the products.
const MIN_CHANNELS: usize = 64;

/// Bytes of the transforms of a block of tiles. The sums, one tile of a product at a time, are read and written once
/// per block, so a block is larger than in the forward pass.
const BYTES: usize = 3 << 19;

/// Maximum number of tiles in a block: the depth of a product.
const MAX_BLOCK_TILES: usize = 128;

/// The division of the sums into tasks. Each has a part of the batch, a group of panels of output channels, and some
/// input channels.
pub(super) struct Division {
    /// Number of parts of the batch, each of so many rows of tiles.
    parts: usize,
    part_rows: usize,
    panels: usize,
    /// Panels per task.
    group: usize,
    /// Input channels per task.
    chunk: usize,
    /// Number of tasks that have the same part and panels.
    chunks: usize,
    /// Number of values of the sums of a panel and its input channels.
    panel_len: usize,
}

impl Division {
    pub(super) fn of(tiles: Tiles, c_in: usize, c_out: usize) -> Self {
        let panels = c_out.div_ceil(PANEL);
        let [height, width] = tiles.size.output();
        let pixels = tiles.tile_rows() * tiles.tiles_x() * height * width;
        let sums = panels * tiles.size.count() * kernel_stride(c_in);
        let part_rows = tiles.tile_rows().div_ceil(parts(pixels, sums));
        let parts = tiles.tile_rows().div_ceil(part_rows);

        // Fewer channels make the blocks of tiles longer, which does not matter if there is only one.
        let one_block = part_rows * tiles.tiles_x() <= MAX_BLOCK_TILES;
        let most_chunks = if one_block { 1 } else { (c_in / MIN_CHANNELS).max(1) };
        let divisions = GROUPS.into_iter().flat_map(|group| {
            let counts = (0..).map(|i| 1 << i).take_while(|&chunks| chunks <= most_chunks);
            counts.map(move |chunks| (group.min(panels), chunks))
        });
        let transformed = |&(group, chunks): &(usize, usize)| {
            (c_in * panels.div_ceil(group) + panels * PANEL * chunks, chunks)
        };
        let work_for_all = |&(group, chunks): &(usize, usize)| {
            parts * panels.div_ceil(group) * chunks >= 2 * rayon::current_num_threads()
        };
        // The division that transforms the fewest channels, among those that leave work for every thread. If there is
        // none, the division into the most tasks.
        let most = (1, 1 << most_chunks.ilog2());
        let (group, chunks) =
            divisions.filter(work_for_all).min_by_key(transformed).unwrap_or(most);
        // Whole vectors.
        let chunk = c_in.div_ceil(chunks).next_multiple_of(16);
        let chunks = c_in.div_ceil(chunk);
        let panel_len = tiles.size.count() * kernel_stride(chunk);
        Self { parts, part_rows, panels, group, chunk, chunks, panel_len }
    }

    /// Number of groups of panels, of which each transforms the input.
    pub(super) fn groups(&self) -> usize {
        self.panels.div_ceil(self.group)
    }

    /// Number of values of the sums of a task.
    fn task_len(&self) -> usize {
        self.group * self.panel_len
    }

    /// Number of values of the sums of a part.
    fn part_len(&self) -> usize {
        self.groups() * self.chunks * self.task_len()
    }

    /// The input channels of a chunk.
    fn channels(&self, chunk: usize, c_in: usize) -> Range<usize> {
        (chunk * self.chunk).min(c_in)..((chunk + 1) * self.chunk).min(c_in)
    }

    /// The position of a panel and a chunk among the sums of a part.
    fn first(&self, panel: usize, chunk: usize) -> usize {
        let task = panel / self.group * self.chunks + chunk;
        task * self.task_len() + panel % self.group * self.panel_len
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
    let division = Division::of(tiles, c_in, c_out);
    let part_len = division.part_len();
    let sums = sized(scratch, division.parts * part_len);

    sums.par_chunks_mut(part_len).enumerate().for_each(|(part, sums)| {
        sums.par_chunks_mut(division.task_len()).enumerate().for_each(|(task, sums)| {
            let Division { part_rows, group, chunks, .. } = division;
            let rows = part * part_rows..((part + 1) * part_rows).min(tiles.tile_rows());
            let panel = task / chunks * group;
            let outputs = panel * PANEL..((panel + group) * PANEL).min(c_out);
            let inputs = division.channels(task % chunks, c_in);
            let sums = (sums, division.panel_len);
            sum_transformed(isa, tiles, (x, inputs), (dy, c_out, outputs), rows, sums);
        });
    });
    let sums = &*sums;
    dweight.par_chunks_mut(PANEL * c_in * 9).enumerate().for_each(|(panel, dweight)| {
        for chunk in 0..division.chunks {
            let inputs = division.channels(chunk, c_in);
            let place = Place { first: inputs.start, of: c_in };
            let sums = &sums[division.first(panel, chunk)..];
            kernel_gradient(
                isa,
                dweight,
                sums,
                (division.parts, part_len),
                (inputs.len(), place),
                tiles.size,
            );
        }
    });
}

/// Writes the sum of `(A dy A^T) (B^T d B)` over some rows of tiles, for some input and output channels, to `sums`,
/// panels of (places, in, PANEL). Panels are `panel_len` values apart, and places [`kernel_stride`].
fn sum_transformed(
    isa: Isa,
    tiles: Tiles,
    (x, inputs): (Input<'_>, Range<usize>),
    (dy, c_out, outputs): (&[f32], usize, Range<usize>),
    rows: Range<usize>,
    (sums, panel_len): (&mut [f32], usize),
) {
    let (c_in, panels) = (inputs.len(), outputs.len().div_ceil(PANEL));
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
        let mut x = Rows::new(tiles, x, inputs.clone(), lines);
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
                transform_gradient(isa, d, row, (dy, tiles.w, c_out), outputs.clone(), zeros);
            }
            let depth = (last - first) * tiles.tiles_x();
            // The tiles of one place stay in the first-level cache for all panels.
            let places = (0..count).flat_map(|at| (0..panels).map(move |panel| (at, panel)));
            for (at, panel) in places {
                let i = panel * count + at;
                let product = PanelProduct {
                    c: &mut sums[panel * panel_len + at * kernel_stride(c_in)..][..c_in * PANEL],
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
