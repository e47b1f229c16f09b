//! The division of maps into tiles that overlap by 2 pixels, and into blocks of tiles.

use std::cell::RefCell;
use std::ops::Range;

use super::places::Places;
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::memory::sized;
use crate::kernels::op::activation::Rectifier;
use crate::kernels::op::conv::ConvShape;
use crate::kernels::op::place::Place;

/// Bytes of the transforms of a block of tiles: half of a usual second-level cache.
const BLOCK_BYTES: usize = 512 << 10;

/// Minimum number of tiles in a block. With fewer, reading the weights would take most of the time.
pub(super) const MIN_BLOCK_TILES: usize = 28;

/// Rows of a product that are computed at once, with the most registers.
const ROWS: usize = 14;

thread_local! {
    /// Transforms, reused from call to call. Nothing may wait for other threads while they are borrowed:
    /// this thread could be given work that borrows them again.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with memory for `len` values that begins at a cache line.
pub(super) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| f(sized(scratch, len)))
}

/// The size of tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::kernels::cpu::conv) enum Size {
    /// F(2x2, 3x3): tiles of 4x4 pixels, with these places.
    Small(Places),
    /// F(2x4, 3x3): tiles of 4 rows by 6 columns, with all places.
    Wide,
    /// F(4x4, 3x3): tiles of 6x6 pixels, with all places.
    Large,
}

impl Size {
    /// Number of places of a tile.
    pub(super) fn count(self) -> usize {
        match self {
            Self::Small(places) => places.count(),
            Self::Wide => 24,
            Self::Large => 36,
        }
    }

    /// Height and width of the output of a tile.
    pub(in crate::kernels::cpu::conv) fn output(self) -> [usize; 2] {
        match self {
            Self::Small(_) => [2, 2],
            Self::Wide => [2, 4],
            Self::Large => [4, 4],
        }
    }

    /// Pixel rows under a tile.
    pub(super) fn rows(self) -> usize {
        self.output()[0] + 2
    }
}

/// The tiles of the maps (batch, h, w, channels) on both sides of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiles {
    pub batch: usize,
    /// Height of the output. It is that of the map over which the kernel moves, or less by 2 if the kernel stays within
    /// the map.
    pub h: usize,
    pub w: usize,
    /// Rows and columns of zeros before the map over which the kernel moves: 1, or 0 if the kernel stays within it.
    pub before: usize,
    /// True if each pixel of the input is doubled in both directions. The input is passed before doubling.
    pub doubled: bool,
    pub size: Size,
}

impl Tiles {
    /// The tiles of a convolution. If it doubles pixels, tiles are small, with the outer places.
    pub(super) fn of(shape: &ConvShape, size: Size) -> Self {
        let ConvShape { batch, h_out: h, w_out: w, .. } = *shape;
        let doubled = shape.upsamples();
        debug_assert!(doubled == (size == Size::Small(Places::Outer)));
        Self { batch, h, w, before: shape.padding()[0], doubled, size }
    }

    /// Pixels of the input, before they are doubled.
    pub(super) fn input_pixels(self) -> usize {
        let scale = if self.doubled { 4 } else { 1 };
        let [h, w] = self.map();
        self.batch * h * w / scale
    }

    /// Height and width of the map over which the kernel moves.
    pub(super) fn map(self) -> [usize; 2] {
        [self.h, self.w].map(|size| size + 2 - 2 * self.before)
    }

    /// The same tiles for the gradient of the output, as the input of a convolution.
    pub(super) fn of_output(self) -> Self {
        Self { doubled: false, ..self }
    }

    /// Tiles in a row.
    pub(super) fn tiles_x(self) -> usize {
        self.w.div_ceil(self.size.output()[1])
    }

    /// Rows of tiles in an image.
    fn tiles_y(self) -> usize {
        self.h.div_ceil(self.size.output()[0])
    }

    /// Rows of tiles in the whole batch.
    pub(super) fn tile_rows(self) -> usize {
        self.batch * self.tiles_y()
    }

    /// The image and the first pixel row of a row of tiles.
    pub(super) fn place(self, tile_row: usize) -> (usize, usize) {
        (tile_row / self.tiles_y(), self.size.output()[0] * (tile_row % self.tiles_y()))
    }

    /// Pixel rows before a row of tiles, in the whole batch.
    pub(super) fn pixel_row(self, tile_row: usize) -> usize {
        let (image, y) = self.place(tile_row);
        image * self.h + y
    }

    /// Divides maps of `channels` channels into blocks of `rows` rows of tiles. Returns each block with
    /// its first row.
    pub(super) fn blocks_mut(
        self,
        maps: &mut [f32],
        channels: usize,
        rows: usize,
    ) -> Vec<(usize, &mut [f32])> {
        self.blocks_between(0..self.tile_rows(), maps, channels, rows)
    }

    /// Divides the part of maps that has the rows of tiles `all`, like [`blocks_mut`](Self::blocks_mut).
    pub(super) fn blocks_between(
        self,
        all: Range<usize>,
        mut maps: &mut [f32],
        channels: usize,
        rows: usize,
    ) -> Vec<(usize, &mut [f32])> {
        let mut blocks = Vec::with_capacity(all.len().div_ceil(rows));
        for first in all.clone().step_by(rows) {
            let last = (first + rows).min(all.end);
            let pixels = (self.pixel_row(last) - self.pixel_row(first)) * self.w;
            let (block, rest) = maps.split_at_mut(pixels * channels);
            blocks.push((first, block));
            maps = rest;
        }
        blocks
    }
}

/// Returns the distance between the values of two places of a tile. It is an odd number of cache lines, so
/// that the places that a transform writes at once do not fall into the same few sets of the cache.
pub(super) fn place_stride(values: usize) -> usize {
    (values.div_ceil(16) | 1) * 16
}

/// Returns the distance between the values of two places of the kernels of a panel, for this number of rows.
pub(super) fn kernel_stride(rows: usize) -> usize {
    place_stride(rows * PANEL)
}

/// The position of a row of tiles in the transforms of a block: place p of tile k begins at `p * stride +
/// (first + k) * channels`.
#[derive(Clone, Copy)]
pub(super) struct TileRow {
    pub first: usize,
    pub stride: usize,
    pub size: Size,
}

/// The pixel rows of a row of tiles of the output, and the values that are added to them.
pub(super) struct PixelRows<'a> {
    /// The rows of a map, of which the output is some channels.
    pub y: &'a mut [f32],
    pub place: Place,
    pub w: usize,
    /// Values added to each pixel: (channels).
    pub shift: &'a [f32],
    /// A map added to the output, of the size of `y`.
    pub residual: Option<&'a [f32]>,
    /// True if the output is added to the present values.
    pub accumulate: bool,
    /// The limits of the output.
    pub rectifier: Rectifier,
}

/// Returns the rows of tiles in a block, if each place of a tile has `values` values.
pub(super) fn block_rows(tiles: Tiles, values: usize, threads: usize) -> usize {
    let bytes = tiles.size.count() * values * size_of::<f32>();
    let count = (BLOCK_BYTES / bytes).max(MIN_BLOCK_TILES);
    // Small batches leave work for every thread.
    let share = tiles.tile_rows().div_ceil(threads);
    let most = (count / tiles.tiles_x()).clamp(1, share.max(1));
    // With few rows, equal shares of all threads matter more.
    if tiles.size != Size::Large || share <= count / tiles.tiles_x() {
        return most;
    }
    // There are few large tiles, so the last rows of a product that do not fill registers matter.
    let filled = |rows: usize| {
        let products = rows * tiles.tiles_x();
        products as f64 / products.next_multiple_of(ROWS) as f64
    };
    (1..=most).max_by(|&a, &b| filled(a).total_cmp(&filled(b))).unwrap_or(most)
}
