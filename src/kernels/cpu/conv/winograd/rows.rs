//! The pixel rows that a row of tiles reads. Rows that are normalised are written to memory that the following rows of
//! tiles use again, so they stay in the cache.

use std::ops::Range;

use super::tiles::Tiles;
use crate::kernels::cpu::conv::algorithm::Input;

/// The greatest number of pixel rows under a row of tiles.
const MAX_ROWS: usize = 6;

/// The pixel rows under a row of tiles.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// Each begins with the first of the channels, before pixels are doubled. `None` is a row beyond the edges of the
    /// map.
    pub rows: [Option<&'a [f32]>; MAX_ROWS],
    /// Distance between the pixels of a row.
    pub pixel: usize,
    /// Width of the map that the tiles are on.
    pub w: usize,
    /// Columns of zeros before the map: 0 or 1.
    pub before: usize,
    /// Number of channels that are read.
    pub channels: usize,
    /// True if each pixel of a row is two pixels of the map.
    pub doubled: bool,
}

/// Reads the rows of a map for one row of tiles after the other.
pub(super) struct Rows<'a> {
    tiles: Tiles,
    input: Input<'a>,
    /// The channels that are read.
    channels: Range<usize>,
    /// Normalised rows of these channels. Row `y` of an image is at position `y % count`, where `count` is the number of
    /// pixel rows under a row of tiles.
    memory: &'a mut [f32],
    /// The image in memory, and the range of its rows.
    held: (usize, Range<usize>),
}

impl<'a> Rows<'a> {
    /// Number of values in memory for the normalised rows of this many channels.
    pub(super) fn memory_len(tiles: Tiles, input: Input<'_>, channels: usize) -> usize {
        if input.norm.is_some() { tiles.size.rows() * tiles.map()[1] * channels } else { 0 }
    }

    /// Reads some channels of `input`. If it is normalised, its pixels are not doubled, and `memory` has
    /// [`memory_len`](Self::memory_len) values.
    pub(super) fn new(
        tiles: Tiles,
        input: Input<'a>,
        channels: Range<usize>,
        memory: &'a mut [f32],
    ) -> Self {
        assert!(channels.end <= input.map.len() / tiles.input_pixels());
        assert!(input.norm.is_none() || !tiles.doubled);
        assert!(memory.len() >= Self::memory_len(tiles, input, channels.len()));
        Self { tiles, input, channels, memory, held: (0, 0..0) }
    }

    /// Returns the rows under a row of tiles.
    pub(super) fn under(&mut self, tile_row: usize) -> Source<'_> {
        let Self { tiles, input, .. } = *self;
        let (k, top) = tiles.place(tile_row);
        let (scale, [h, w]) = (if tiles.doubled { 2 } else { 1 }, tiles.map());
        let all = input.map.len() / tiles.input_pixels();
        let (row, image) = (w / scale * all, input.map.len() / tiles.batch);
        let channels = self.channels.clone();
        let own = w * channels.len();
        let image = &input.map[k * image..][..image];
        let count = tiles.size.rows();
        let first = top.saturating_sub(tiles.before);
        let needed = first..(top + count - tiles.before).min(h);
        if let Some(norm) = input.norm {
            let held = if self.held.0 == k { self.held.1.clone() } else { 0..0 };
            for y in needed.clone().filter(|y| !held.contains(y)) {
                let to = &mut self.memory[y % count * own..][..own];
                norm.write_pixels(k, &image[y * row..][..row], channels.clone(), to);
            }
            self.held = (k, needed.clone());
        }
        let mut rows = [None; MAX_ROWS];
        for (row_of_tile, place) in rows.iter_mut().enumerate() {
            let y = (top + row_of_tile).checked_sub(tiles.before).filter(|y| needed.contains(y));
            *place = y.map(|y| match input.norm {
                Some(_) => &self.memory[y % count * own..][..own],
                None => &image[y / scale * row..][channels.start..row],
            });
        }
        let pixel = if input.norm.is_some() { channels.len() } else { all };
        let (before, channels, doubled) = (tiles.before, channels.len(), tiles.doubled);
        Source { rows, pixel, w, before, channels, doubled }
    }
}
