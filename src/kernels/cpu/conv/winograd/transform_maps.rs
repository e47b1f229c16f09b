//! The transforms of maps of F(2x2, 3x3): from pixels to the places of tiles, and back.

use std::ops::Range;

use super::lines::{gradient_line, input_line, output_line};
use super::places::{Places, each, place, with_places};
use super::rows::Source;
use super::tiles::{PixelRows, TileRow};
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::simd::{Simd, simd_fn};
use crate::kernels::op::place::Place;

simd_fn! {
    /// Computes `B^T d B` of each tile in a row of tiles. Pixels beyond the edges of the map are 0.
    pub(super) fn transform_input<S>(v: &mut [f32], row: TileRow, places: Places, source: Source<'_>) {
        let TileRow { first, stride, .. } = row;
        let Source { rows, pixel: distance, w, before, channels: count, doubled } = source;
        let tiles = (w + 2 * before - 2).div_ceil(2);
        let scale = if doubled { 2 } else { 1 };
        assert!(places.count() * stride <= v.len() && (first + tiles) * count <= stride);
        let v = v.as_mut_ptr();
        for tile in 0..tiles {
            // Pixel (y, x) of the tile, if it is within the map.
            let pixel = |y: usize, x: usize| -> Option<*const f32> {
                let (row, x) = (rows[y]?, (2 * tile + x).checked_sub(before)?);
                (x < w).then(|| row[x / scale * distance..][..count].as_ptr())
            };
            let pixels: [[Option<*const f32>; 4]; 4] =
                each!(Y in 0 1 2 3 => each!(X in 0 1 2 3 => pixel(Y, X)));
            // SAFETY: pixels have `count` values each, and the loops below end there. By the
            // assertion, the places of tile `first + tile` are within `v`.
            unsafe {
                let v = v.add((first + tile) * count);
                let mut c = 0;
                while c + S::WIDTH <= count {
                    with_places!(places, input_tile::<S>(v.add(c), stride, &pixels, c));
                    c += S::WIDTH;
                }
                while c < count {
                    with_places!(places, input_tile::<f32>(v.add(c), stride, &pixels, c));
                    c += 1;
                }
            }
        }
    }
}

/// # Safety
/// Each pixel must be readable, and each place writable, for a vector.
#[inline(always)]
unsafe fn input_tile<S: Simd, const INNER: bool>(
    v: *mut f32,
    stride: usize,
    pixels: &[[Option<*const f32>; 4]; 4],
    c: usize,
) {
    // SAFETY: the caller guarantees the requirements.
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
                if let Some(place) = place::<INNER>(y, x) {
                    value.store(v.add(place * stride));
                }
            }
        }
    }
}

simd_fn! {
    /// Writes the pixel rows of a row of tiles: `A^T m A` of each tile, plus the values that are added to
    /// it.
    pub(super) fn transform_output<S>(
        pixels: PixelRows<'_>,
        m: &[f32],
        row: TileRow,
        places: Places,
    ) {
        let PixelRows { y, place, w, shift, residual, accumulate, rectifier } = pixels;
        let Place { first: channel, of } = place;
        let TileRow { first, stride, .. } = row;
        let channels = shift.len();
        let tiles = w.div_ceil(2);
        let row = channels.next_multiple_of(PANEL);
        let rows = y.len() / (w * of);
        assert!(places.count() * stride <= m.len() && (first + tiles) * row <= stride);
        assert!(residual.is_none_or(|r| r.len() == y.len()));
        assert!((1..=2).contains(&rows) && y.len() == rows * w * of && channel + channels <= of);
        for tile in 0..tiles {
            let columns = (w - 2 * tile).min(2);
            let begin = 2 * tile * of + channel;
            let down = if rows == 2 { Some(w * of) } else { None };
            let right = (columns == 2).then_some(of);
            let out = OutputTile {
                m: m[(first + tile) * row..].as_ptr(),
                stride,
                y: y[begin..].as_mut_ptr(),
                residual: residual.map(|r| r[begin..].as_ptr()),
                shift: shift.as_ptr(),
                down,
                right,
                accumulate,
                highest: rectifier.highest(),
            };
            let mut c = 0;
            // SAFETY: by the assertions, all pixels of the tile are within `y`, and all of its places
            // within `m`.
            unsafe {
                while c + S::WIDTH <= channels {
                    with_places!(places, output_tile::<S>(&out, c));
                    c += S::WIDTH;
                }
                while c < channels {
                    with_places!(places, output_tile::<f32>(&out, c));
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
    /// Distances to the pixels below and to the right, if the map has them.
    down: Option<usize>,
    right: Option<usize>,
    accumulate: bool,
    /// The greatest value, if the least is 0.
    highest: Option<f32>,
}

/// # Safety
/// All of the tile must be readable, and its pixels writable, for a vector at `c`.
#[inline(always)]
unsafe fn output_tile<S: Simd, const INNER: bool>(tile: &OutputTile, c: usize) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let shift = S::load(tile.shift.add(c));
        let columns = each!(X in 0 1 2 3 => {
            output_line(each!(Y in 0 1 2 3 => match place::<INNER>(Y, X) {
                Some(place) => S::load(tile.m.add(place * tile.stride + c)),
                None => S::splat(0.0),
            }))
        });
        let rows = each!(Y in 0 1 => output_line(each!(X in 0 1 2 3 => columns[X][Y])));
        for (y, row) in rows.into_iter().enumerate() {
            let Some(down) = (if y == 0 { Some(0) } else { tile.down }) else { continue };
            for (x, value) in row.into_iter().enumerate() {
                let Some(right) = (if x == 0 { Some(0) } else { tile.right }) else { continue };
                let place = down + right + c;
                let mut value = value.add(shift);
                if let Some(residual) = tile.residual {
                    value = value.add(S::load(residual.add(place)));
                }
                if tile.accumulate {
                    value = value.add(S::load(tile.y.add(place)));
                }
                if let Some(highest) = tile.highest {
                    value = value.at_least(S::splat(0.0)).at_most(S::splat(highest));
                }
                value.store(tile.y.add(place));
            }
        }
    }
}

simd_fn! {
    /// Computes `A dy A^T` of some channels of each tile in a row of tiles, in panels. Place p of tile k in
    /// panel q begins at `d[(q * places + p) * stride + (first + k) * PANEL]`. `dy` holds the pixel rows of
    /// the row of tiles, of this width and number of channels.
    pub(super) fn transform_gradient<S>(
        d: &mut [f32],
        row: TileRow,
        places: Places,
        dy: &[f32],
        size: (usize, usize),
        some: Range<usize>,
    ) {
        let TileRow { first, stride, .. } = row;
        let (w, channels) = size;
        let tiles = w.div_ceil(2);
        let panels = some.len().div_ceil(PANEL);
        let rows = dy.len() / (w * channels);
        assert!(some.end <= channels && panels * places.count() * stride <= d.len());
        assert!((first + tiles) * PANEL <= stride && dy.len() == rows * w * channels);
        let d = d.as_mut_ptr();
        for tile in 0..tiles {
            let pixel = |y: usize, x: usize| -> Option<*const f32> {
                let x = 2 * tile + x;
                (y < rows && x < w).then(|| dy[(y * w + x) * channels..][some.clone()].as_ptr())
            };
            let pixels = [[pixel(0, 0), pixel(0, 1)], [pixel(1, 0), pixel(1, 1)]];
            for c in (0..panels * PANEL).step_by(S::WIDTH) {
                // SAFETY: pixels have `some.len()` values each, and no vector goes beyond. By the
                // assertions, places are within `d`.
                unsafe {
                    let panel = c / PANEL * places.count() * stride;
                    let d = d.add(panel + (first + tile) * PANEL + c % PANEL);
                    if c + S::WIDTH <= some.len() {
                        with_places!(places, gradient_tile::<S>(d, stride, &pixels, c));
                    } else {
                        for lane in 0..S::WIDTH {
                            let inside = c + lane < some.len();
                            let pixels = if inside { pixels } else { [[None; 2]; 2] };
                            let (d, c) = (d.add(lane), c + lane);
                            with_places!(places, gradient_tile::<f32>(d, stride, &pixels, c));
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
unsafe fn gradient_tile<S: Simd, const INNER: bool>(
    d: *mut f32,
    stride: usize,
    pixels: &[[Option<*const f32>; 2]; 2],
    c: usize,
) {
    // SAFETY: the caller guarantees the requirements.
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
                if let Some(place) = place::<INNER>(y, x) {
                    value.store(d.add(place * stride));
                }
            }
        }
    }
}
