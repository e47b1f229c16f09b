//! 3x3 convolutions at stride 1 by Winograd's method. F(2x2, 3x3) takes 16 multiplications per tile and pair of channels
//! instead of 36. Winograd 1980; Lavin and Gray 2016.
//!
//! With tiles `d` of 4x4 pixels that overlap by 2, `y = A^T [(G w G^T) * (B^T d B)] A`. The inner product
//! is summed over input channels: one matrix product for each of the 16 places of a tile. The gradient of
//! the input is a convolution with the rotated kernel. The gradient of the weights is
//! `G^T [sum over tiles (A dy A^T) (B^T d B)] G`.
//!
//! If the kernel stays within the map, there is no row of zeros before the first tile.
//!
//! If each pixel is doubled before the convolution, the inner two lines of every tile are equal. Their
//! difference is zero, and so are 7 of the 16 places: 9 products remain. The doubled maps are never
//! written: tiles are read from the pixels before they are doubled.
//!
//! Maps that are not doubled have larger tiles, from [`MIN_WIDE`] or [`MIN_LARGE`] pixels on. F(2x4, 3x3) has tiles of
//! 4 rows by 6 columns: 24 multiplications instead of 72. F(4x4, 3x3) has tiles of 6x6 pixels: 36 multiplications instead
//! of 144. The transforms of F(4x4, 3x3) amplify rounding errors more, so this size is used only if the arithmetic allows
//! it.
//!
//! On channels-last maps, each transform is arithmetic of whole vectors of channels.

mod lines;
mod places;
mod rows;
mod tiles;
mod transform_kernels;
mod transform_maps;
mod transforms;
mod weight_gradient;
mod wide;

use std::ops::Range;

use rayon::prelude::*;

use self::places::Places;
use self::rows::Rows;
pub(super) use self::tiles::Size;
use self::tiles::{
    PixelRows, TileRow, Tiles, block_rows, kernel_stride, place_stride, with_scratch,
};
use self::transform_kernels::{KERNELS, Taps};
use self::transforms::{transform_input, transform_kernels, transform_output};
use self::weight_gradient::{Division, weight_gradient};
use super::algorithm::{Algorithm, Input, Math, Packed, Workspace};
use super::epilogue::Epilogue;
use super::im2col::Im2col;
use crate::kernels::cpu::gemm::micro::{Left, PANEL, PanelProduct, panel_product};
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::{from_line, sized};
use crate::kernels::cpu::transpose::transpose;
use crate::kernels::op::conv::ConvShape;
use crate::kernels::op::place::Place;

/// Channels below which transforming tiles costs more than it saves.
const MIN_CHANNELS: usize = 8;

/// Tasks per thread, if pixel rows are normalised. Neighbouring tasks both normalise the rows at their border, so more
/// tasks would take more time.
const TASKS: usize = 4;

/// Minimum rows of tiles per thread of a convolution that normalises its input.
const LEAST_ROWS: usize = 4;

/// The least height and width of a map for tiles of 4 rows by 6 columns. There are 1.5 times as many transformed weights
/// as for tiles of 4x4 pixels. At maps of 7x7 and 8x8 pixels, reading the weights takes as long as the products save.
const MIN_WIDE: usize = 14;

/// The least height and width of a map for tiles of 6x6 pixels. With 5 or 6 pixels, no products would be saved, and with
/// fewer, the weights take most of the time.
const MIN_LARGE: usize = 7;

/// 3x3 convolutions at stride 1.
#[derive(Debug, Clone, Copy)]
pub(super) struct Winograd {
    isa: Isa,
    shape: ConvShape,
    size: Size,
}

impl Winograd {
    /// Returns the algorithm for 3x3 kernels at stride 1, if there are enough channels.
    pub(super) fn suits(isa: Isa, shape: &ConvShape, math: Math) -> Option<Self> {
        let suits = shape.kernel == [3, 3]
            && shape.stride() == 1
            && (!shape.begins_at_edge() || shape.stays_within())
            && shape.c_in.min(shape.c_out) >= MIN_CHANNELS;
        let least = shape.h.min(shape.w);
        let size = match math {
            _ if shape.upsamples() => Size::Small(Places::Outer),
            Math::F32Large if least >= MIN_LARGE => Size::Large,
            Math::F32 if least >= MIN_WIDE => Size::Wide,
            _ => Size::Small(Places::All),
        };
        suits.then_some(Self { isa, shape: *shape, size })
    }

    /// The size of the tiles.
    pub(super) fn size(&self) -> Size {
        self.size
    }

    fn tiles(&self) -> Tiles {
        Tiles::of(&self.shape, self.size)
    }

    /// Packs the weights (out, in, 3, 3) of the convolution: panels of output channels, each (places, in, [`PANEL`]),
    /// with places [`kernel_stride`] apart.
    fn pack_forward(&self, weight: &[f32], memory: &mut Vec<f32>) {
        let ConvShape { c_in, c_out, .. } = self.shape;
        self.pack_kernels(weight, (c_in, c_out), [9, 9 * c_in], None, memory);
    }

    /// Packs the weights for the gradient of the input, which is a convolution of the gradient of the
    /// output.
    fn pack_backward(&self, weight: &[f32], memory: &mut Vec<f32>) {
        let ConvShape { c_in, c_out, .. } = self.shape;
        // The gradient of a doubled pixel is the sum of the four of a tile, `[1 1] A^T m A [1 1]^T`, and
        // `[1 1] A^T = [1 2 0 -1]`.
        let factors = if self.shape.upsamples() { [1.0, 2.0, 0.0, -1.0] } else { [1.0; 4] };
        self.pack_kernels(weight, (c_out, c_in), [9 * c_in, 9], Some(factors), memory);
    }

    /// Packs the kernels of a convolution of `rows` channels to `columns`. Kernels of successive rows begin
    /// `strides[0]` values apart, and those of successive columns `strides[1]`. With factors, the kernels are rotated
    /// by 180 degrees, and their places multiplied.
    fn pack_kernels(
        &self,
        weight: &[f32],
        (rows, columns): (usize, usize),
        strides: [usize; 2],
        rotated: Option<[f32; 4]>,
        memory: &mut Vec<f32>,
    ) {
        let (isa, size, [row, column]) = (self.isa, self.tiles().size, strides);
        let factors = rotated.unwrap_or([1.0; 4]);
        let panel_len = size.count() * kernel_stride(rows);
        let packed = sized(memory, columns.div_ceil(PANEL) * panel_len);
        packed.par_chunks_mut(panel_len).enumerate().for_each(|(panel, values)| {
            let count = PANEL.min(columns - panel * PANEL);
            let mut taps: Taps = [[[0f32; PANEL]; 9]; KERNELS];
            for first in (0..rows).step_by(KERNELS) {
                let taps = &mut taps[..KERNELS.min(rows - first)];
                let weight = &weight[first * row + panel * PANEL * column..];
                // If the kernels of successive rows are contiguous, they are transposed as one matrix.
                let at_once = if row == 9 { taps.len() } else { 1 };
                for (i, taps) in taps.chunks_mut(at_once).enumerate() {
                    let size = (count, 9 * taps.len());
                    let to = taps.as_flattened_mut().as_flattened_mut();
                    transpose(isa, &weight[i * row..], column, to, PANEL, size);
                }
                for (i, taps) in taps.iter_mut().enumerate() {
                    if rotated.is_some() {
                        taps.reverse();
                    }
                    transform_kernels(isa, values, (first + i, rows), taps, size, factors);
                }
            }
        });
    }

    /// Computes the convolution of `x` (batch, h, w, c_in), or half that size if it is doubled, to `y`
    /// (batch, h, w, c_out).
    fn convolve(
        &self,
        x: Input<'_>,
        weight: &[f32],
        [c_in, c_out]: [usize; 2],
        epilogue: Epilogue<'_>,
        y: &mut [f32],
    ) {
        let (isa, maps) = (self.isa, self.tiles());
        let (size, place) = (maps.size, epilogue.place(c_out));
        let count = size.count();
        assert_eq!(x.map.len(), maps.input_pixels() * c_in);
        assert_eq!(y.len(), maps.batch * maps.h * maps.w * place.of);
        // The products of large tiles are transformed panel by panel. Those of all panels would not fit in the cache.
        let panels = c_out.div_ceil(PANEL);
        let at_once = if self.size == Size::Large { 1 } else { panels };
        let width = at_once * PANEL;
        let threads = rayon::current_num_threads();
        let rows = block_rows(maps, c_in + width, threads);
        let share = if x.norm.is_some() { maps.tile_rows() / (TASKS * threads) } else { 0 };
        let task_rows = share.next_multiple_of(rows).max(rows);
        maps.blocks_mut(y, place.of, task_rows).into_par_iter().for_each(|(task, y)| {
            let task = task..(task + task_rows).min(maps.tile_rows());
            let most = rows * maps.tiles_x();
            let (v_stride, m_stride) = (place_stride(most * c_in), place_stride(most * width));
            let lines_len = Rows::memory_len(maps, x, c_in);
            with_scratch(count * (v_stride + m_stride) + width + lines_len + c_in, |scratch| {
                let (v, scratch) = scratch.split_at_mut(count * v_stride);
                let (m, scratch) = scratch.split_at_mut(count * m_stride);
                let (shift, scratch) = scratch.split_at_mut(width);
                let (lines, zeros) = scratch.split_at_mut(lines_len);
                zeros.fill(0.0);
                let mut x = Rows::new(maps, x, 0..c_in, lines);
                for (first, y) in maps.blocks_between(task.clone(), y, place.of, rows) {
                    let block = first..(first + rows).min(task.end);
                    for (i, tile_row) in block.clone().enumerate() {
                        let row = TileRow { first: i * maps.tiles_x(), stride: v_stride, size };
                        transform_input(isa, v, row, x.under(tile_row), zeros);
                    }
                    let tiles = block.len() * maps.tiles_x();
                    for panel in (0..panels).step_by(at_once) {
                        let some = panel..panel + at_once;
                        self.multiply((v, v_stride), weight, (tiles, c_in), some, (m, m_stride));
                        let channel = panel * PANEL;
                        let shift = &mut shift[..width.min(c_out - channel)];
                        let m = (&*m, block.clone());
                        self.finish(m, m_stride, (c_out, channel), epilogue, shift, y);
                    }
                }
            });
        });
    }

    /// Writes the products of all places of some tiles and of the kernels of some panels, side by side.
    fn multiply(
        &self,
        (v, v_stride): (&[f32], usize),
        weight: &[f32],
        (tiles, c_in): (usize, usize),
        panels: Range<usize>,
        (m, m_stride): (&mut [f32], usize),
    ) {
        let (count, width) = (self.tiles().size.count(), panels.len() * PANEL);
        let kernels = |panel: usize, at: usize| {
            weight.get((panel * count + at) * kernel_stride(c_in)..).unwrap_or_default()
        };
        // The tiles of one place stay in the first-level cache for all panels.
        for at in 0..count {
            for panel in panels.clone() {
                let next = if panel + 1 < panels.end {
                    kernels(panel + 1, at)
                } else {
                    kernels(panels.start, at + 1)
                };
                let m = &mut m[at * m_stride + (panel - panels.start) * PANEL..];
                let product = PanelProduct {
                    c: &mut m[..(tiles - 1) * width + PANEL],
                    c_row: width,
                    rows: tiles,
                    a: Left::new(&v[at * v_stride..], c_in, 1),
                    b: kernels(panel, at),
                    depth: c_in,
                    accumulate: false,
                    next,
                };
                panel_product(self.isa, product);
            }
        }
    }

    /// Writes the output of some channels, `shift.len()` from `channel` of `c_out` on, to the pixels `y` of a block of
    /// rows of tiles. `shift` is memory for the values that are added to each pixel.
    fn finish(
        &self,
        (m, tile_rows): (&[f32], Range<usize>),
        stride: usize,
        (c_out, channel): (usize, usize),
        epilogue: Epilogue<'_>,
        shift: &mut [f32],
        y: &mut [f32],
    ) {
        let (maps, place) = (self.tiles(), epilogue.place(c_out));
        let line = maps.w * place.of;
        let origin = maps.pixel_row(tile_rows.start) * line;
        let mut shifted = None;
        for tile_row in tile_rows.clone() {
            let (k, _) = maps.place(tile_row);
            if shifted != Some(k) {
                epilogue.shift_of(k, c_out, channel, shift);
                shifted = Some(k);
            }
            let span = maps.pixel_row(tile_row) * line..maps.pixel_row(tile_row + 1) * line;
            let first = (tile_row - tile_rows.start) * maps.tiles_x();
            let pixels = PixelRows {
                y: &mut y[span.start - origin..span.end - origin],
                place: Place { first: place.first + channel, of: place.of },
                w: maps.w,
                shift,
                residual: epilogue.add.residual.map(|r| &r[span]),
                accumulate: epilogue.accumulate,
                rectifier: epilogue.rectifier,
            };
            transform_output(self.isa, pixels, m, TileRow { first, stride, size: maps.size });
        }
    }

    /// Computes the gradient of the pixels that are doubled. Writes it to `dx`, or adds it to the values of
    /// `dx`. Such a pixel lies under one tile, so its gradient is the sum over the places of the tile.
    fn doubled_input_gradient(&self, dy: &[f32], weight: &[f32], dx: &mut [f32], accumulate: bool) {
        let (isa, maps) = (self.isa, self.tiles());
        let ConvShape { c_in, c_out, .. } = self.shape;
        let panels = c_in.div_ceil(PANEL);
        let padded = panels * PANEL;
        let places = maps.size.count();
        assert_eq!(dx.len(), maps.input_pixels() * c_in);
        assert_eq!(dy.len(), maps.batch * maps.h * maps.w * c_out);
        let rows = block_rows(maps, c_out, rayon::current_num_threads());
        let blocks = dx.par_chunks_mut(rows * maps.tiles_x() * c_in).enumerate();
        blocks.for_each(|(block, dx)| {
            let tiles = dx.len() / c_in;
            let v_stride = place_stride(tiles * c_out);
            with_scratch(places * v_stride + tiles * padded, |scratch| {
                let (v, sums) = scratch.split_at_mut(places * v_stride);
                let mut dy = Rows::new(maps.of_output(), dy.into(), 0..c_out, &mut []);
                for (i, begin) in (0..tiles).step_by(maps.tiles_x()).enumerate() {
                    let row = TileRow { first: begin, stride: v_stride, size: maps.size };
                    // Small tiles need no zeros.
                    transform_input(isa, v, row, dy.under(block * rows + i), &[]);
                }
                for panel in 0..panels {
                    let sums = &mut sums[panel * PANEL..];
                    for place in 0..places {
                        let product = PanelProduct {
                            c: &mut *sums,
                            c_row: padded,
                            rows: tiles,
                            a: Left::new(&v[place * v_stride..], c_out, 1),
                            b: &weight[(panel * places + place) * kernel_stride(c_out)..],
                            depth: c_out,
                            accumulate: place > 0,
                            next: &[],
                        };
                        panel_product(isa, product);
                    }
                }
                for (dx, sums) in dx.chunks_exact_mut(c_in).zip(sums.chunks_exact(padded)) {
                    if accumulate {
                        dx.iter_mut().zip(sums).for_each(|(dx, sum)| *dx += sum);
                    } else {
                        dx.copy_from_slice(&sums[..c_in]);
                    }
                }
            });
        });
    }
}

impl Algorithm for Winograd {
    fn pack(&self, weight: &[f32], workspace: &mut Workspace) -> Packed {
        let mut memory = std::mem::take(&mut workspace.values);
        self.pack_forward(weight, &mut memory);
        Packed::F32(memory)
    }

    fn normalizes(&self) -> bool {
        // With few rows of tiles per thread, most rows would be normalised twice.
        let rows = self.tiles().tile_rows() / rayon::current_num_threads();
        !self.shape.upsamples() && rows >= LEAST_ROWS
    }

    fn weight_gradient_normalizes(&self) -> bool {
        let ConvShape { c_in, c_out, .. } = self.shape;
        !self.shape.upsamples() && Division::of(self.tiles(), c_in, c_out).groups() == 1
    }

    fn forward(&self, x: Input<'_>, weight: &Packed, epilogue: Epilogue<'_>, y: &mut [f32]) {
        let ConvShape { c_in, c_out, .. } = self.shape;
        self.convolve(x, weight.f32(), [c_in, c_out], epilogue, y);
    }

    fn input_gradient(
        &self,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        workspace: &mut Workspace,
    ) {
        let ConvShape { c_in, c_out, .. } = self.shape;
        if self.shape.stays_within() {
            // The convolution of `dy` would need two rows of zeros on each side. No network needs this gradient.
            let im2col = Im2col { isa: self.isa, shape: self.shape };
            return im2col.input_gradient(dy, weight, dx, accumulate, workspace);
        }
        self.pack_backward(weight, &mut workspace.values);
        let weight = from_line(&workspace.values);
        if self.shape.upsamples() {
            return self.doubled_input_gradient(dy, weight, dx, accumulate);
        }
        let epilogue = Epilogue { accumulate, ..Epilogue::default() };
        self.convolve(dy.into(), weight, [c_out, c_in], epilogue, dx);
    }

    fn weight_gradient(
        &self,
        x: Input<'_>,
        dy: &[f32],
        dweight: &mut [f32],
        workspace: &mut Workspace,
    ) {
        weight_gradient(self.isa, self.tiles(), x, dy, dweight, &mut workspace.values);
    }
}
