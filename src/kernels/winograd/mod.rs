//! 3x3 convolutions at stride 1 by Winograd's F(2x2, 3x3): 16 products where the plain form takes
//! 36 multiplications a channel pair. Winograd 1980; Lavin and Gray 2016.
//!
//! With tiles `d` of 4x4 pixels that overlap by 2, `y = A^T [(G w G^T) * (B^T d B)] A`, the inner
//! product summed over input channels: one matrix product for each of the 16 places in a tile. The
//! gradient of the input is a convolution with the kernel turned round, that of the weights
//! `G^T [sum over tiles (A dy A^T) (B^T d B)] G`.
//!
//! Channels-last maps make each transform arithmetic of whole vectors of channels.

mod transforms;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use self::transforms::{
    kernel_gradient, transform_gradient, transform_input, transform_kernels, transform_output,
};
use super::product::{Left, PANEL, panel_product};
use super::simd::Isa;
use super::values::sized;

/// Places in a tile's transform.
const PLACES: usize = 16;

/// Tiles' transforms that are worked on at a time, in bytes: half of a usual second-level cache.
const BLOCK_BYTES: usize = 512 << 10;

/// Tiles below which a block would waste the weights it reads.
const MIN_BLOCK_TILES: usize = 28;

/// Panels of output channels that one thread takes at a time: more would leave the sums too large
/// for the cache, fewer transform the input too often.
const GROUP: usize = 2;

/// The most memory that sums of parts take, unless one part alone needs more.
const SUMS_BYTES: usize = 8 << 20;

/// Tiles below which a part of its own would cost more than it gains.
const MIN_PART_TILES: usize = 256;

thread_local! {
    /// Transforms, reused from call to call.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| f(sized(scratch, len)))
}

/// Maps (batch, h, w, channels) on both sides of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Maps {
    pub batch: usize,
    pub h: usize,
    pub w: usize,
}

impl Maps {
    fn tiles_x(self) -> usize {
        self.w.div_ceil(2)
    }

    fn tiles_y(self) -> usize {
        self.h.div_ceil(2)
    }

    /// Rows of tiles in the whole batch.
    fn tile_rows(self) -> usize {
        self.batch * self.tiles_y()
    }

    /// Image and first pixel row of a row of tiles.
    fn place(self, tile_row: usize) -> (usize, usize) {
        (tile_row / self.tiles_y(), 2 * (tile_row % self.tiles_y()))
    }

    /// Pixel rows before a row of tiles, in the whole batch.
    fn pixel_row(self, tile_row: usize) -> usize {
        let (image, y) = self.place(tile_row);
        image * self.h + y
    }

    /// Cuts `maps` of `channels` into blocks of `rows` rows of tiles, each with its first one.
    fn blocks_mut(
        self,
        mut maps: &mut [f32],
        channels: usize,
        rows: usize,
    ) -> Vec<(usize, &mut [f32])> {
        let mut blocks = Vec::with_capacity(self.tile_rows().div_ceil(rows));
        for first in (0..self.tile_rows()).step_by(rows) {
            let last = (first + rows).min(self.tile_rows());
            let pixels = (self.pixel_row(last) - self.pixel_row(first)) * self.w;
            let (block, rest) = maps.split_at_mut(pixels * channels);
            blocks.push((first, block));
            maps = rest;
        }
        blocks
    }
}

/// Values from one place of a tile to the next. An odd number of cache lines, so that the 16 places
/// that a transform writes at once do not fall into the same few sets of the cache.
fn place_stride(values: usize) -> usize {
    (values.div_ceil(16) | 1) * 16
}

/// Weights (out, in, 3, 3), transformed and packed: panels of output channels, each (16, in,
/// [`PANEL`]).
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    values: Vec<f32>,
    input: usize,
    output: usize,
}

impl Packed {
    /// For the convolution itself.
    pub fn forward(isa: Isa, weight: &[f32], output: usize, input: usize) -> Self {
        let mut packed = Self { values: Vec::new(), input, output };
        packed.fill(isa, |o, i| (o * input + i) * 9, weight, false);
        packed
    }

    /// For the gradient of the convolution's input, which is a convolution of the output's.
    pub fn backward(isa: Isa, weight: &[f32], output: usize, input: usize) -> Self {
        let mut packed = Self { values: Vec::new(), input: output, output: input };
        packed.fill(isa, |i, o| (o * input + i) * 9, weight, true);
        packed
    }

    /// `first(column, row)` is where a kernel begins; `turned` reads it from its end.
    fn fill(
        &mut self,
        isa: Isa,
        first: impl Fn(usize, usize) -> usize + Sync,
        weight: &[f32],
        turned: bool,
    ) {
        let (rows, columns) = (self.input, self.output);
        let panel_len = PLACES * rows * PANEL;
        self.values.resize(columns.div_ceil(PANEL) * panel_len, 0.0);
        self.values.par_chunks_mut(panel_len).enumerate().for_each(|(panel, values)| {
            let count = PANEL.min(columns - panel * PANEL);
            let mut taps = [[0f32; PANEL]; 9];
            for row in 0..rows {
                for column in 0..count {
                    let kernel = &weight[first(panel * PANEL + column, row)..][..9];
                    for (tap, taps) in taps.iter_mut().enumerate() {
                        taps[column] = kernel[if turned { 8 - tap } else { tap }];
                    }
                }
                transform_kernels(isa, values, rows, row, &taps);
            }
        });
    }
}

/// What a convolution's output is made of beside the products.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// Added to each pixel: (channels).
    pub bias: Option<&'a [f32]>,
    /// Added to each pixel of an image: (batch, channels).
    pub per_image: Option<&'a [f32]>,
    /// Added: of the output's shape.
    pub residual: Option<&'a [f32]>,
    /// Whether the output is added to what is there.
    pub accumulate: bool,
}

impl Epilogue<'_> {
    /// What is added to each pixel of an image.
    pub fn shift(&self, image: usize, shift: &mut [f32]) {
        let channels = shift.len();
        match self.bias {
            Some(bias) => shift.copy_from_slice(bias),
            None => shift.fill(0.0),
        }
        if let Some(values) = self.per_image {
            let values = &values[image * channels..][..channels];
            shift.iter_mut().zip(values).for_each(|(shift, value)| *shift += value);
        }
    }
}

/// Rows of tiles in a block, for so many values a tile and place.
fn block_rows(maps: Maps, values: usize, threads: usize) -> usize {
    let tiles = (BLOCK_BYTES / (PLACES * values * size_of::<f32>())).max(MIN_BLOCK_TILES);
    // Small batches leave something for every thread.
    let share = maps.tile_rows().div_ceil(threads);
    (tiles / maps.tiles_x()).clamp(1, share.max(1))
}

/// The convolution of `x` (batch, h, w, in) to `y` (batch, h, w, out).
pub(crate) fn convolve(
    isa: Isa,
    maps: Maps,
    x: &[f32],
    weight: &Packed,
    epilogue: Epilogue<'_>,
    y: &mut [f32],
) {
    let (c_in, c_out) = (weight.input, weight.output);
    let panels = c_out.div_ceil(PANEL);
    let padded = panels * PANEL;
    assert_eq!(x.len(), maps.batch * maps.h * maps.w * c_in);
    assert_eq!(y.len(), maps.batch * maps.h * maps.w * c_out);
    let rows = block_rows(maps, c_in + padded, rayon::current_num_threads());
    let image = maps.h * maps.w * c_in;
    maps.blocks_mut(y, c_out, rows).into_par_iter().for_each(|(first, y)| {
        let last = (first + rows).min(maps.tile_rows());
        let tiles = (last - first) * maps.tiles_x();
        let (v_stride, m_stride) = (place_stride(tiles * c_in), place_stride(tiles * padded));
        with_scratch(PLACES * (v_stride + m_stride) + c_out, |scratch| {
            let (v, scratch) = scratch.split_at_mut(PLACES * v_stride);
            let (m, shift) = scratch.split_at_mut(PLACES * m_stride);
            for tile_row in first..last {
                let (k, top) = maps.place(tile_row);
                let x = &x[k * image..][..image];
                let begin = (tile_row - first) * maps.tiles_x();
                transform_input(isa, v, v_stride, begin, x, (maps.h, maps.w, c_in), top);
            }
            for panel in 0..panels {
                for place in 0..PLACES {
                    let b = &weight.values[(panel * PLACES + place) * c_in * PANEL..];
                    let a = Left { data: &v[place * v_stride..], row: c_in, col: 1 };
                    let m =
                        &mut m[place * m_stride + panel * PANEL..][..(tiles - 1) * padded + PANEL];
                    panel_product(isa, m, padded, tiles, a, b, c_in, false);
                }
            }
            let origin = maps.pixel_row(first) * maps.w * c_out;
            let mut shifted = None;
            for tile_row in first..last {
                let (k, _) = maps.place(tile_row);
                if shifted != Some(k) {
                    epilogue.shift(k, shift);
                    shifted = Some(k);
                }
                let line = maps.w * c_out;
                let span = maps.pixel_row(tile_row) * line..maps.pixel_row(tile_row + 1) * line;
                let begin = (tile_row - first) * maps.tiles_x();
                let residual = epilogue.residual.map(|r| &r[span.clone()]);
                let y = &mut y[span.start - origin..span.end - origin];
                let size = (maps.w, c_out);
                transform_output(
                    isa,
                    y,
                    m,
                    m_stride,
                    begin,
                    size,
                    shift,
                    residual,
                    epilogue.accumulate,
                );
            }
        });
    });
}

/// The gradient of the weights, (out, in, 3, 3), to `dweight`: from `x` (batch, h, w, in) and `dy`
/// (batch, h, w, out).
///
/// The batch is cut into parts, and the output channels into groups, by their numbers alone: so the
/// order of sums does not depend on the number of threads.
pub(crate) fn weight_gradient(
    isa: Isa,
    maps: Maps,
    x: &[f32],
    dy: &[f32],
    dweight: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let pixels = maps.batch * maps.h * maps.w;
    let (c_in, c_out) = (x.len() / pixels, dy.len() / pixels);
    assert_eq!(dweight.len(), c_out * c_in * 9);
    let panel_len = PLACES * c_in * PANEL;
    let panels = c_out.div_ceil(PANEL);
    let sums_len = panels * panel_len;
    let worthwhile = maps.tile_rows() * maps.tiles_x() / MIN_PART_TILES;
    let parts = (SUMS_BYTES / (sums_len * size_of::<f32>())).min(worthwhile).clamp(1, 16);
    let part_rows = maps.tile_rows().div_ceil(parts);
    let parts = maps.tile_rows().div_ceil(part_rows);
    let sums = sized(scratch, parts * sums_len);

    sums.par_chunks_mut(sums_len).enumerate().for_each(|(part, sums)| {
        sums.par_chunks_mut(GROUP * panel_len).enumerate().for_each(|(group, sums)| {
            sums.fill(0.0);
            let rows = part * part_rows..((part + 1) * part_rows).min(maps.tile_rows());
            let channels = group * GROUP * PANEL..((group + 1) * GROUP * PANEL).min(c_out);
            add_transformed(isa, maps, (x, c_in), (dy, c_out), rows, channels, sums);
        });
    });
    let sums = &*sums;
    dweight.par_chunks_mut(PANEL * c_in * 9).enumerate().for_each(|(panel, dweight)| {
        kernel_gradient(isa, dweight, &sums[panel * panel_len..], sums_len, parts, c_in);
    });
}

/// Adds `(A dy A^T) (B^T d B)`, summed over some rows of tiles, for some output channels, to `sums`:
/// panels of (16, in, PANEL).
fn add_transformed(
    isa: Isa,
    maps: Maps,
    (x, c_in): (&[f32], usize),
    (dy, c_out): (&[f32], usize),
    rows: Range<usize>,
    channels: Range<usize>,
    sums: &mut [f32],
) {
    let panels = channels.len().div_ceil(PANEL);
    let values = c_in + panels * PANEL;
    let tiles = (BLOCK_BYTES / (PLACES * values * size_of::<f32>())).clamp(MIN_BLOCK_TILES, 64);
    let step = (tiles / maps.tiles_x()).clamp(1, rows.len());
    let tiles = step * maps.tiles_x();
    let (v_stride, d_stride) = (place_stride(tiles * c_in), place_stride(tiles * PANEL));
    let image = maps.h * maps.w * c_in;
    with_scratch(PLACES * (v_stride + panels * d_stride), |scratch| {
        let (v, d) = scratch.split_at_mut(PLACES * v_stride);
        for first in rows.clone().step_by(step) {
            let last = (first + step).min(rows.end);
            for tile_row in first..last {
                let (k, top) = maps.place(tile_row);
                let x = &x[k * image..][..image];
                let begin = (tile_row - first) * maps.tiles_x();
                transform_input(isa, v, v_stride, begin, x, (maps.h, maps.w, c_in), top);
                let line = maps.w * c_out;
                let dy = &dy[maps.pixel_row(tile_row) * line..maps.pixel_row(tile_row + 1) * line];
                let size = (maps.w, c_out);
                transform_gradient(isa, d, d_stride, begin, dy, size, channels.clone());
            }
            let tiles = (last - first) * maps.tiles_x();
            for (i, sums) in sums.chunks_mut(c_in * PANEL).enumerate() {
                let a = Left { data: &v[i % PLACES * v_stride..], row: 1, col: c_in };
                panel_product(isa, sums, PANEL, c_in, a, &d[i * d_stride..], tiles, true);
            }
        }
    });
}
