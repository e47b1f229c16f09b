//! 3x3 convolutions at stride 1 by Winograd's F(2x2, 3x3): 16 products where the plain form takes
//! 36 multiplications a channel pair. Winograd 1980; Lavin and Gray 2016.
//!
//! With tiles `d` of 4x4 pixels that overlap by 2, `y = A^T [(G w G^T) * (B^T d B)] A`, the inner
//! product summed over input channels: one matrix product for each of the 16 places in a tile. The
//! gradient of the input is a convolution with the kernel turned round, that of the weights
//! `G^T [sum over tiles (A dy A^T) (B^T d B)] G`.
//!
//! Channels-last maps make each transform arithmetic of whole vectors of channels.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::product::{Left, PANEL, panel_product};
use super::simd::{Isa, Simd, simd_fn};

/// Places in a tile's transform.
const PLACES: usize = 16;

/// Tiles' transforms that are worked on at a time, in bytes: half of a usual second-level cache.
const BLOCK_BYTES: usize = 512 << 10;

/// Tiles below which a block would waste the weights it reads.
const MIN_BLOCK_TILES: usize = 28;

/// The array of an expression's values. Not `array::map`: a closure that stays a function of its own
/// is compiled without the instruction set.
macro_rules! each {
    ($i:ident in $($n:literal)+ => $value:expr) => {
        [$({
            const $i: usize = $n;
            $value
        }),+]
    };
}

thread_local! {
    /// Transforms, reused from call to call: fresh memory would cost a page fault every 4 KiB.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        f(&mut scratch[..len])
    })
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

simd_fn! {
    /// `G w G^T` of a panel's kernels for one input channel.
    fn transform_kernels<S>(
        values: &mut [f32], rows: usize, row: usize, taps: &[[f32; PANEL]; 9],
    ) {
        assert!(values.len() >= PLACES * rows * PANEL && row < rows);
        for j in (0..PANEL).step_by(S::WIDTH) {
            // SAFETY: `j` and the vector after it lie within PANEL; places, by the assertion,
            // within `values`.
            unsafe {
                let columns = each!(X in 0 1 2 => {
                    kernel_line(each!(Y in 0 1 2 => S::load(taps[3 * Y + X].as_ptr().add(j))))
                });
                let lines = each!(Y in 0 1 2 3 => kernel_line(each!(X in 0 1 2 => columns[X][Y])));
for (y, line) in lines.into_iter().enumerate() {
for (x, u) in line.into_iter().enumerate() {
                        u.store(values.as_mut_ptr().add(((4 * y + x) * rows + row) * PANEL + j));
                    }
                }
            }
        }
    }
}

/// `G w`.
#[inline(always)]
fn kernel_line<S: Simd>(w: [S; 3]) -> [S; 4] {
    let (half, ends) = (S::splat(0.5), w[0].add(w[2]));
    [w[0], ends.add(w[1]).mul(half), ends.sub(w[1]).mul(half), w[2]]
}

simd_fn! {
    /// `B^T d B` of each tile in a row of tiles: tile k's place p goes to `v[p * stride + (first +
    /// k) * channels]`. Beyond the image's edges pixels are 0.
    fn transform_input<S>(
        v: &mut [f32],
        stride: usize,
        first: usize,
        image: &[f32],
        size: (usize, usize, usize),
        top: usize,
    ) {
        let (h, w, channels) = size;
        let tiles = w.div_ceil(2);
        assert!(PLACES * stride <= v.len() && (first + tiles) * channels <= stride);
        assert_eq!(image.len(), h * w * channels);
        let v = v.as_mut_ptr();
        for tile in 0..tiles {
            // Pixel (y, x) of the tile, where it is within the image.
            let pixel = |y: usize, x: usize| -> Option<*const f32> {
                let (y, x) = ((top + y).wrapping_sub(1), (2 * tile + x).wrapping_sub(1));
                (y < h && x < w).then(|| image[(y * w + x) * channels..].as_ptr())
            };
            let pixels: [[Option<*const f32>; 4]; 4] =
                each!(Y in 0 1 2 3 => each!(X in 0 1 2 3 => pixel(Y, X)));
            // SAFETY: pixels have `channels` values each, and the loops below end there; the place
            // of tile `first + tile` lies within `v` by the assertion.
            unsafe {
                let v = v.add((first + tile) * channels);
                let mut c = 0;
                while c + S::WIDTH <= channels {
                    input_tile::<S>(v.add(c), stride, &pixels, c);
                    c += S::WIDTH;
                }
                while c < channels {
                    input_tile::<f32>(v.add(c), stride, &pixels, c);
                    c += 1;
                }
            }
        }
    }
}

/// # Safety
/// Each pixel must be readable, and each place writable, for a vector.
#[inline(always)]
unsafe fn input_tile<S: Simd>(
    v: *mut f32,
    stride: usize,
    pixels: &[[Option<*const f32>; 4]; 4],
    c: usize,
) {
    // SAFETY: passed on.
    unsafe {
        let columns = each!(X in 0 1 2 3 => {
            input_line(each!(Y in 0 1 2 3 => match pixels[Y][X] {
                Some(pixel) => S::load(pixel.add(c)),
                None => S::splat(0.0),
            }))
        });
        let rows = each!(Y in 0 1 2 3 => input_line(each!(X in 0 1 2 3 => columns[X][Y])));
        for (y, row) in rows.into_iter().enumerate() {
            for (x, value) in row.into_iter().enumerate() {
                value.store(v.add((4 * y + x) * stride));
            }
        }
    }
}

/// `B^T d`.
#[inline(always)]
fn input_line<S: Simd>(d: [S; 4]) -> [S; 4] {
    [d[0].sub(d[2]), d[1].add(d[2]), d[2].sub(d[1]), d[1].sub(d[3])]
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

simd_fn! {
    /// `A^T m A` of each tile in a row of tiles, and what is added to it; `y` and `residual` are the
    /// pixel rows of the row of tiles, one or two.
    fn transform_output<S>(
        y: &mut [f32],
        m: &[f32],
        stride: usize,
        first: usize,
        size: (usize, usize),
        shift: &[f32],
        residual: Option<&[f32]>,
        accumulate: bool,
    ) {
        let (w, channels) = size;
        let tiles = w.div_ceil(2);
        let row = channels.div_ceil(PANEL) * PANEL;
        let rows = y.len() / (w * channels);
        assert!(PLACES * stride <= m.len() && (first + tiles) * row <= stride);
        assert!(shift.len() == channels && residual.is_none_or(|r| r.len() == y.len()));
        assert!((1..=2).contains(&rows) && y.len() == rows * w * channels);
        for tile in 0..tiles {
            let columns = (w - 2 * tile).min(2);
            let begin = 2 * tile * channels;
            let down = if rows == 2 { Some(w * channels) } else { None };
            let right = (columns == 2).then_some(channels);
            let out = OutputTile {
                m: m[(first + tile) * row..].as_ptr(),
                stride,
                y: y[begin..].as_mut_ptr(),
                residual: residual.map(|r| r[begin..].as_ptr()),
                shift: shift.as_ptr(),
                down,
                right,
                accumulate,
            };
            let mut c = 0;
            // SAFETY: the assertions hold all of the tile's pixels within `y`, and all of its
            // places within `m`.
            unsafe {
                while c + S::WIDTH <= channels {
                    out.write::<S>(c);
                    c += S::WIDTH;
                }
                while c < channels {
                    out.write::<f32>(c);
                    c += 1;
                }
            }
        }
    }
}

struct OutputTile {
    m: *const f32,
    stride: usize,
    y: *mut f32,
    residual: Option<*const f32>,
    shift: *const f32,
    /// To the pixels below and to the right, where the map has them.
    down: Option<usize>,
    right: Option<usize>,
    accumulate: bool,
}

impl OutputTile {
    /// # Safety
    /// All of the tile must be readable, and its pixels writable, for a vector at `c`.
    #[inline(always)]
    unsafe fn write<S: Simd>(&self, c: usize) {
        // SAFETY: passed on.
        unsafe {
            let shift = S::load(self.shift.add(c));
            let columns = each!(X in 0 1 2 3 => {
                let place = self.m.add(X * self.stride + c);
                output_line(each!(Y in 0 1 2 3 => S::load(place.add(4 * Y * self.stride))))
            });
            let rows = each!(Y in 0 1 => output_line(each!(X in 0 1 2 3 => columns[X][Y])));
            for (y, row) in rows.into_iter().enumerate() {
                let Some(down) = (if y == 0 { Some(0) } else { self.down }) else { continue };
                for (x, value) in row.into_iter().enumerate() {
                    let Some(right) = (if x == 0 { Some(0) } else { self.right }) else { continue };
                    let place = down + right + c;
                    let mut value = value.add(shift);
                    if let Some(residual) = self.residual {
                        value = value.add(S::load(residual.add(place)));
                    }
                    if self.accumulate {
                        value = value.add(S::load(self.y.add(place)));
                    }
                    value.store(self.y.add(place));
                }
            }
        }
    }
}

/// `A^T m`.
#[inline(always)]
fn output_line<S: Simd>(m: [S; 4]) -> [S; 2] {
    [m[0].add(m[1]).add(m[2]), m[1].sub(m[2]).sub(m[3])]
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

simd_fn! {
    /// `A dy A^T` of some channels of each tile in a row of tiles, in panels: place p of tile k in
    /// panel q goes to `d[(q * 16 + p) * stride + (first + k) * PANEL]`.
    fn transform_gradient<S>(
        d: &mut [f32],
        stride: usize,
        first: usize,
        dy: &[f32],
        size: (usize, usize),
        some: Range<usize>,
    ) {
        let (w, channels) = size;
        let tiles = w.div_ceil(2);
        let panels = some.len().div_ceil(PANEL);
        let rows = dy.len() / (w * channels);
        assert!(some.end <= channels && panels * PLACES * stride <= d.len());
        assert!((first + tiles) * PANEL <= stride && dy.len() == rows * w * channels);
        let d = d.as_mut_ptr();
        for tile in 0..tiles {
            let pixel = |y: usize, x: usize| -> Option<*const f32> {
                let x = 2 * tile + x;
                (y < rows && x < w).then(|| dy[(y * w + x) * channels..][some.clone()].as_ptr())
            };
            let pixels = [[pixel(0, 0), pixel(0, 1)], [pixel(1, 0), pixel(1, 1)]];
            for c in (0..panels * PANEL).step_by(S::WIDTH) {
                // SAFETY: pixels have `some.len()` values each, and no vector goes beyond; the
                // assertions hold places within `d`.
                unsafe {
                    let place = c / PANEL * PLACES * stride + (first + tile) * PANEL + c % PANEL;
                    let d = d.add(place);
                    if c + S::WIDTH <= some.len() {
                        gradient_tile::<S>(d, stride, &pixels, c);
                    } else {
                        for lane in 0..S::WIDTH {
                            let inside = c + lane < some.len();
                            let pixels = if inside { pixels } else { [[None; 2]; 2] };
                            gradient_tile::<f32>(d.add(lane), stride, &pixels, c + lane);
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// Each pixel must be readable, and each place writable, for a vector.
#[inline(always)]
unsafe fn gradient_tile<S: Simd>(
    d: *mut f32,
    stride: usize,
    pixels: &[[Option<*const f32>; 2]; 2],
    c: usize,
) {
    // SAFETY: passed on.
    unsafe {
        let columns = each!(X in 0 1 => {
            gradient_line(each!(Y in 0 1 => match pixels[Y][X] {
                Some(pixel) => S::load(pixel.add(c)),
                None => S::splat(0.0),
            }))
        });
        let rows = each!(Y in 0 1 2 3 => gradient_line(each!(X in 0 1 => columns[X][Y])));
        for (y, row) in rows.into_iter().enumerate() {
            for (x, value) in row.into_iter().enumerate() {
                value.store(d.add((4 * y + x) * stride));
            }
        }
    }
}

/// `A dy`.
#[inline(always)]
fn gradient_line<S: Simd>(d: [S; 2]) -> [S; 4] {
    [d[0], d[0].add(d[1]), d[0].sub(d[1]), S::splat(0.0).sub(d[1])]
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
    if scratch.len() < parts * sums_len {
        scratch.resize(parts * sums_len, 0.0);
    }
    let sums = &mut scratch[..parts * sums_len];

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

/// Panels of output channels that one thread takes at a time: more would leave the sums too large
/// for the cache, fewer transform the input too often.
const GROUP: usize = 2;

/// The most memory that sums of parts take, unless one part alone needs more.
const SUMS_BYTES: usize = 8 << 20;

/// Tiles below which a part of its own would cost more than it gains.
const MIN_PART_TILES: usize = 256;

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

simd_fn! {
    /// `G^T u G` for a panel of output channels: `u` (16, in, PANEL), the sum of `parts` such that
    /// are `part_len` apart, to `dweight` (out, in, 9).
    fn kernel_gradient<S>(
        dweight: &mut [f32],
        u: &[f32],
        part_len: usize,
        parts: usize,
        c_in: usize,
    ) {
        assert!((parts - 1) * part_len + PLACES * c_in * PANEL <= u.len());
        let count = dweight.len() / (c_in * 9);
        assert!(count <= PANEL);
        let mut taps = [[0f32; PANEL]; 9];
        for i in 0..c_in {
            for j in (0..PANEL).step_by(S::WIDTH) {
                // SAFETY: `j` and the vector after it lie within PANEL, every place within `u`.
                unsafe {
                    let columns = each!(X in 0 1 2 3 => {
                        kernel_gradient_line(each!(Y in 0 1 2 3 => {
                            let place = u.as_ptr().add(((4 * Y + X) * c_in + i) * PANEL + j);
                            let mut sum = S::load(place);
                            for part in 1..parts {
                                sum = sum.add(S::load(place.add(part * part_len)));
                            }
                            sum
                        }))
                    });
                    let rows = each!(Y in 0 1 2 => kernel_gradient_line(each!(X in 0 1 2 3 => columns[X][Y])));
for (y, row) in rows.into_iter().enumerate() {
for (x, value) in row.into_iter().enumerate() {
                            value.store(taps[3 * y + x].as_mut_ptr().add(j));
                        }
                    }
                }
            }
            for (o, dweight) in dweight.chunks_mut(c_in * 9).enumerate().take(count) {
                for (tap, value) in dweight[i * 9..][..9].iter_mut().enumerate() {
                    *value = taps[tap][o];
                }
            }
        }
    }
}

/// `G^T u`.
#[inline(always)]
fn kernel_gradient_line<S: Simd>(u: [S; 4]) -> [S; 3] {
    let half = S::splat(0.5);
    let (sum, difference) = (u[1].add(u[2]).mul(half), u[1].sub(u[2]).mul(half));
    [u[0].add(sum), difference, u[3].add(sum)]
}
