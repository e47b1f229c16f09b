//! 3x3 convolutions at stride 1 by Winograd's F(2x2, 3x3): 16 products where the plain form takes
//! 36 multiplications a channel pair. Winograd 1980; Lavin and Gray 2016.
//!
//! With tiles `d` of 4x4 pixels that overlap by 2, `y = A^T [(G w G^T) * (B^T d B)] A`, the inner
//! product summed over input channels: one matrix product for each of the 16 places in a tile. The
//! gradient of the input is a convolution with the kernel turned round, that of the weights
//! `G^T [sum over tiles (A dy A^T) (B^T d B)] G`.
//!
//! Where each pixel is doubled before the convolution, the inner two lines of every tile are equal,
//! their difference is zero, and with it 7 of the 16 places: 9 products are left. Those maps are never
//! written down: tiles are read from the pixels that were doubled.
//!
//! Channels-last maps make each transform arithmetic of whole vectors of channels.

mod transforms;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use self::transforms::{
    Source, kernel_gradient, transform_gradient, transform_input, transform_kernels,
    transform_output,
};
use super::product::{Left, PANEL, panel_product};
use super::simd::Isa;
use super::values::sized;

/// Places of a tile's transform, whose values can be other than zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Places {
    /// All 4 by 4.
    All,
    /// Without the third of each direction: those of doubled pixels.
    Outer,
}

impl Places {
    fn count(self) -> usize {
        match self {
            Self::All => 16,
            Self::Outer => 9,
        }
    }
}

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
    /// Transforms, reused from call to call. Nothing may wait for other threads while it is borrowed:
    /// this one could be given work that borrows it again.
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
    /// Whether the input's pixels are each doubled in both directions: it is given without.
    pub doubled: bool,
}

impl Maps {
    fn places(self) -> Places {
        if self.doubled { Places::Outer } else { Places::All }
    }

    /// Pixels of the input as it is given.
    fn input_pixels(self) -> usize {
        let scale = if self.doubled { 4 } else { 1 };
        self.batch * self.h * self.w / scale
    }

    /// Image `k` of the input.
    fn input(self, x: &[f32], k: usize) -> Source<'_> {
        let image = x.len() / self.batch;
        let channels = x.len() / self.input_pixels();
        let Self { h, w, doubled, .. } = self;
        Source { image: &x[k * image..][..image], h, w, channels, doubled }
    }

    /// Image `k` of the output's gradient, as the input of a convolution.
    fn output(self, dy: &[f32], k: usize) -> Source<'_> {
        Self { doubled: false, ..self }.input(dy, k)
    }

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

/// Weights (out, in, 3, 3), transformed and packed: panels of output channels, each (places, in,
/// [`PANEL`]).
pub(crate) struct Packed {
    values: Vec<f32>,
    input: usize,
    output: usize,
}

impl Packed {
    /// For the convolution itself. `memory` is used where it is large enough.
    pub fn forward(
        isa: Isa,
        maps: Maps,
        weight: &[f32],
        (output, input): (usize, usize),
        memory: Vec<f32>,
    ) -> Self {
        let mut packed = Self { values: memory, input, output };
        packed.fill(isa, maps.places(), |o, i| (o * input + i) * 9, weight, None);
        packed
    }

    /// For the gradient of the convolution's input, which is a convolution of the output's.
    pub fn backward(
        isa: Isa,
        maps: Maps,
        weight: &[f32],
        (output, input): (usize, usize),
        memory: Vec<f32>,
    ) -> Self {
        let mut packed = Self { values: memory, input: output, output: input };
        // A doubled pixel's gradient is the sum of a tile's four, `[1 1] A^T m A [1 1]^T`, and
        // `[1 1] A^T = [1 2 0 -1]`.
        let factors = if maps.doubled { [1.0, 2.0, 0.0, -1.0] } else { [1.0; 4] };
        packed.fill(isa, maps.places(), |i, o| (o * input + i) * 9, weight, Some(factors));
        packed
    }

    pub fn into_memory(self) -> Vec<f32> {
        self.values
    }

    /// `first(column, row)` is where a kernel begins. `turned`, it is read from its end, and its
    /// places multiplied.
    fn fill(
        &mut self,
        isa: Isa,
        places: Places,
        first: impl Fn(usize, usize) -> usize + Sync,
        weight: &[f32],
        turned: Option<[f32; 4]>,
    ) {
        let (rows, columns) = (self.input, self.output);
        let factors = turned.unwrap_or([1.0; 4]);
        let panel_len = places.count() * rows * PANEL;
        sized(&mut self.values, columns.div_ceil(PANEL) * panel_len)
            .par_chunks_mut(panel_len)
            .enumerate()
            .for_each(|(panel, values)| {
                let count = PANEL.min(columns - panel * PANEL);
                let mut taps = [[0f32; PANEL]; 9];
                for row in 0..rows {
                    for column in 0..count {
                        let kernel = &weight[first(panel * PANEL + column, row)..][..9];
                        for (tap, taps) in taps.iter_mut().enumerate() {
                            taps[column] = kernel[if turned.is_some() { 8 - tap } else { tap }];
                        }
                    }
                    transform_kernels(isa, values, rows, row, &taps, places, factors);
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
    let bytes = maps.places().count() * values * size_of::<f32>();
    let tiles = (BLOCK_BYTES / bytes).max(MIN_BLOCK_TILES);
    // Small batches leave something for every thread.
    let share = maps.tile_rows().div_ceil(threads);
    (tiles / maps.tiles_x()).clamp(1, share.max(1))
}

/// The convolution of `x` (batch, h, w, in), or half that size where it is doubled, to `y` (batch, h,
/// w, out).
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
    let places = maps.places();
    assert_eq!(x.len(), maps.input_pixels() * c_in);
    assert_eq!(y.len(), maps.batch * maps.h * maps.w * c_out);
    let rows = block_rows(maps, c_in + padded, rayon::current_num_threads());
    maps.blocks_mut(y, c_out, rows).into_par_iter().for_each(|(first, y)| {
        let last = (first + rows).min(maps.tile_rows());
        let tiles = (last - first) * maps.tiles_x();
        let (v_stride, m_stride) = (place_stride(tiles * c_in), place_stride(tiles * padded));
        with_scratch(places.count() * (v_stride + m_stride) + c_out, |scratch| {
            let (v, scratch) = scratch.split_at_mut(places.count() * v_stride);
            let (m, shift) = scratch.split_at_mut(places.count() * m_stride);
            for tile_row in first..last {
                let (k, top) = maps.place(tile_row);
                let begin = (tile_row - first) * maps.tiles_x();
                transform_input(isa, v, v_stride, begin, maps.input(x, k), top, places);
            }
            for panel in 0..panels {
                for place in 0..places.count() {
                    let b = &weight.values[(panel * places.count() + place) * c_in * PANEL..];
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
                    places,
                );
            }
        });
    });
}

/// The gradient of the convolution's input, written or added to `dx`, from `dy` (batch, h, w, out).
pub(crate) fn input_gradient(
    isa: Isa,
    maps: Maps,
    dy: &[f32],
    weight: &Packed,
    dx: &mut [f32],
    accumulate: bool,
) {
    if !maps.doubled {
        let epilogue = Epilogue { accumulate, ..Epilogue::default() };
        return convolve(isa, maps, dy, weight, epilogue, dx);
    }
    // A pixel that was doubled lies under one tile; the sum over its places is all there is to do.
    let (c_in, c_out) = (weight.output, weight.input);
    let panels = c_in.div_ceil(PANEL);
    let padded = panels * PANEL;
    let places = maps.places().count();
    assert_eq!(dx.len(), maps.input_pixels() * c_in);
    assert_eq!(dy.len(), maps.batch * maps.h * maps.w * c_out);
    let rows = block_rows(maps, c_out, rayon::current_num_threads());
    let blocks = dx.par_chunks_mut(rows * maps.tiles_x() * c_in).enumerate();
    blocks.for_each(|(block, dx)| {
        let tiles = dx.len() / c_in;
        let v_stride = place_stride(tiles * c_out);
        with_scratch(places * v_stride + tiles * padded, |scratch| {
            let (v, sums) = scratch.split_at_mut(places * v_stride);
            for (i, begin) in (0..tiles).step_by(maps.tiles_x()).enumerate() {
                let (k, top) = maps.place(block * rows + i);
                let dy = maps.output(dy, k);
                transform_input(isa, v, v_stride, begin, dy, top, maps.places());
            }
            for panel in 0..panels {
                let sums = &mut sums[panel * PANEL..];
                for place in 0..places {
                    let b = &weight.values[(panel * places + place) * c_out * PANEL..];
                    let a = Left { data: &v[place * v_stride..], row: c_out, col: 1 };
                    panel_product(isa, sums, padded, tiles, a, b, c_out, place > 0);
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

/// The gradient of the weights, (out, in, 3, 3), to `dweight`: from `x` (batch, h, w, in), or half
/// that size where it is doubled, and `dy` (batch, h, w, out).
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
    let c_in = x.len() / maps.input_pixels();
    let c_out = dy.len() / (maps.batch * maps.h * maps.w);
    assert_eq!(dweight.len(), c_out * c_in * 9);
    let panel_len = maps.places().count() * c_in * PANEL;
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
        let sums = &sums[panel * panel_len..];
        kernel_gradient(isa, dweight, sums, sums_len, parts, c_in, maps.places());
    });
}

/// Adds `(A dy A^T) (B^T d B)`, summed over some rows of tiles, for some output channels, to `sums`:
/// panels of (places, in, PANEL).
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
    let (places, count) = (maps.places(), maps.places().count());
    let bytes = count * (c_in + panels * PANEL) * size_of::<f32>();
    let tiles = (BLOCK_BYTES / bytes).clamp(MIN_BLOCK_TILES, 64);
    let step = (tiles / maps.tiles_x()).clamp(1, rows.len());
    let tiles = step * maps.tiles_x();
    let (v_stride, d_stride) = (place_stride(tiles * c_in), place_stride(tiles * PANEL));
    with_scratch(count * (v_stride + panels * d_stride), |scratch| {
        let (v, d) = scratch.split_at_mut(count * v_stride);
        for first in rows.clone().step_by(step) {
            let last = (first + step).min(rows.end);
            for tile_row in first..last {
                let (k, top) = maps.place(tile_row);
                let begin = (tile_row - first) * maps.tiles_x();
                transform_input(isa, v, v_stride, begin, maps.input(x, k), top, places);
                let line = maps.w * c_out;
                let dy = &dy[maps.pixel_row(tile_row) * line..maps.pixel_row(tile_row + 1) * line];
                let size = (maps.w, c_out);
                transform_gradient(isa, d, d_stride, begin, dy, size, channels.clone(), places);
            }
            let tiles = (last - first) * maps.tiles_x();
            for (i, sums) in sums.chunks_mut(c_in * PANEL).enumerate() {
                let a = Left { data: &v[i % count * v_stride..], row: 1, col: c_in };
                panel_product(isa, sums, PANEL, c_in, a, &d[i * d_stride..], tiles, true);
            }
        }
    });
}
