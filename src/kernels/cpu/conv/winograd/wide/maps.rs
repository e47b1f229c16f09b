//! The transforms of maps: from pixels to the places of tiles, and back.

use std::ops::Range;

use super::super::places::each;
use super::super::rows::Source;
use super::super::tiles::{PixelRows, Size, TileRow};
use super::columns::{gradient_column, input_column, output_column, with_height};
use super::lines::{gradient_line, input_line, output_line};
use crate::kernels::cpu::gemm::micro::PANEL;
use crate::kernels::cpu::simd::{Simd, simd_fn};
use crate::kernels::op::place::Place;

simd_fn! {
    /// Computes `B^T d B` of each tile in a row of tiles. Pixels beyond the edges of the map are read from `zeros`.
    pub(in super::super) fn transform_input<S>(
        v: &mut [f32],
        row: TileRow,
        source: Source<'_>,
        zeros: &[f32],
    ) {
        let TileRow { first, stride, size } = row;
        let Source { rows, pixel: distance, w, before, channels: count, doubled } = source;
        let tiles = (w + 2 * before - 2).div_ceil(4);
        assert!(size.count() * stride <= v.len() && (first + tiles) * count <= stride && !doubled);
        let zeros = zeros[..count].as_ptr();
        let v = v.as_mut_ptr();
        for tile in 0..tiles {
            let pixel = |y: usize, x: usize| -> Option<*const f32> {
                let (row, x) = (rows[y]?, (4 * tile + x).checked_sub(before)?);
                (x < w).then(|| row[x * distance..][..count].as_ptr())
            };
            let pixels: [[*const f32; 6]; 6] = each!(Y in 0 1 2 3 4 5 => {
                each!(X in 0 1 2 3 4 5 => match pixel(Y, X) {
                    Some(pixel) => pixel,
                    None => zeros,
                })
            });
            // SAFETY: pixels have `count` values each, and the loops below end there. By the assertion, the places
            // of tile `first + tile` are within `v`.
            unsafe {
                let v = v.add((first + tile) * count);
                let mut c = 0;
                while c + S::WIDTH <= count {
                    with_height!(size, input_tile::<S>(v.add(c), stride, &pixels, c));
                    c += S::WIDTH;
                }
                while c < count {
                    with_height!(size, input_tile::<f32>(v.add(c), stride, &pixels, c));
                    c += 1;
                }
            }
        }
    }
}

/// # Safety
/// Each pixel must be readable, and each place writable, for a vector.
#[inline(always)]
unsafe fn input_tile<S: Simd, const TALL: bool>(
    v: *mut f32,
    stride: usize,
    pixels: &[[*const f32; 6]; 6],
    c: usize,
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let columns = each!(X in 0 1 2 3 4 5 => {
            input_column::<S, TALL>(each!(Y in 0 1 2 3 4 5 => {
                if TALL || Y < 4 { S::load(pixels[Y][X].add(c)) } else { S::splat(0.0) }
            }))
        });
        each!(Y in 0 1 2 3 4 5 => if TALL || Y < 4 {
            let line = input_line(each!(X in 0 1 2 3 4 5 => columns[X][Y]));
            each!(X in 0 1 2 3 4 5 => line[X].store(v.add((6 * Y + X) * stride)));
        });
    }
}

simd_fn! {
    /// Writes the pixel rows of a row of tiles: `A^T m A` of each tile, plus the values that are added to it.
    pub(in super::super) fn transform_output<S>(pixels: PixelRows<'_>, m: &[f32], row: TileRow) {
        let PixelRows { y, place, w, shift, residual, accumulate, rectifier } = pixels;
        let Place { first: channel, of } = place;
        let TileRow { first, stride, size } = row;
        let (channels, tiles, rows) = (shift.len(), w.div_ceil(4), y.len() / (w * of));
        let row = channels.next_multiple_of(PANEL);
        assert!(size.count() * stride <= m.len() && (first + tiles) * row <= stride);
        assert!(residual.is_none_or(|r| r.len() == y.len()));
        assert!((1..=size.output()[0]).contains(&rows) && y.len() == rows * w * of && channel + channels <= of);
        for tile in 0..tiles {
            let begin = 4 * tile * of + channel;
            let out = OutputTile {
                m: m[(first + tile) * row..].as_ptr(),
                stride,
                y: y[begin..].as_mut_ptr(),
                residual: residual.map(|r| r[begin..].as_ptr()),
                shift: shift.as_ptr(),
                size: (rows, (w - 4 * tile).min(4)),
                distances: (w * of, of),
                accumulate,
                highest: rectifier.highest(),
            };
            let mut c = 0;
            // SAFETY: by the assertions, all pixels of the tile are within `y`, and all of its places within `m`.
            unsafe {
                while c + S::WIDTH <= channels {
                    with_height!(size, output_tile::<S>(&out, c));
                    c += S::WIDTH;
                }
                while c < channels {
                    with_height!(size, output_tile::<f32>(&out, c));
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
    /// Height and width of the part of the tile within the map.
    size: (usize, usize),
    /// Distances to the pixels below and to the right.
    distances: (usize, usize),
    accumulate: bool,
    /// The greatest value, if the least is 0.
    highest: Option<f32>,
}

/// # Safety
/// All of the tile must be readable, and its pixels writable, for a vector at `c`.
#[inline(always)]
unsafe fn output_tile<S: Simd, const TALL: bool>(tile: &OutputTile, c: usize) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let shift = S::load(tile.shift.add(c));
        let columns = each!(X in 0 1 2 3 4 5 => {
            output_column::<S, TALL>(each!(Y in 0 1 2 3 4 5 => if TALL || Y < 4 {
                S::load(tile.m.add((6 * Y + X) * tile.stride + c))
            } else {
                S::splat(0.0)
            }))
        });
        each!(Y in 0 1 2 3 => if (TALL || Y < 2) && Y < tile.size.0 {
            let line = output_line(each!(X in 0 1 2 3 4 5 => columns[X][Y]));
            each!(X in 0 1 2 3 => if X < tile.size.1 {
                let place = Y * tile.distances.0 + X * tile.distances.1 + c;
                let mut value = line[X].add(shift);
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
            });
        });
    }
}

simd_fn! {
    /// Computes `A dy A^T` of some channels of each tile in a row of tiles, in panels. Place p of tile k in panel q
    /// begins at `d[(q * places + p) * stride + (first + k) * PANEL]`. `dy` holds the pixel rows of the row of tiles, of
    /// this width and number of channels. Pixels beyond the edges of the map, and channels that fill the last panel, are
    /// read from `zeros`.
    pub(in super::super) fn transform_gradient<S>(
        d: &mut [f32],
        row: TileRow,
        dy: &[f32],
        dy_size: (usize, usize),
        some: Range<usize>,
        zeros: &[f32],
    ) {
        let TileRow { first, stride, size } = row;
        let (w, channels) = dy_size;
        let (tiles, panels) = (w.div_ceil(4), some.len().div_ceil(PANEL));
        let rows = dy.len() / (w * channels);
        assert!(some.end <= channels && panels * size.count() * stride <= d.len());
        assert!((first + tiles) * PANEL <= stride && dy.len() == rows * w * channels);
        let zeros = zeros[..panels * PANEL].as_ptr();
        let d = d.as_mut_ptr();
        for tile in 0..tiles {
            let pixel = |y: usize, x: usize| -> *const f32 {
                let x = 4 * tile + x;
                if y < rows && x < w {
                    dy[(y * w + x) * channels..][some.clone()].as_ptr()
                } else {
                    zeros
                }
            };
            let pixels: [[*const f32; 4]; 4] =
                each!(Y in 0 1 2 3 => each!(X in 0 1 2 3 => pixel(Y, X)));
            for c in (0..panels * PANEL).step_by(S::WIDTH) {
                // SAFETY: pixels have `some.len()` values each, and `zeros` those of all panels. No vector goes
                // beyond. By the assertions, places are within `d`.
                unsafe {
                    let panel = c / PANEL * size.count() * stride;
                    let d = d.add(panel + (first + tile) * PANEL + c % PANEL);
                    if c + S::WIDTH <= some.len() {
                        with_height!(size, gradient_tile::<S>(d, stride, &pixels, c));
                    } else {
                        for lane in 0..S::WIDTH {
                            let inside = c + lane < some.len();
                            let pixels = if inside { pixels } else { [[zeros; 4]; 4] };
                            let (d, c) = (d.add(lane), c + lane);
                            with_height!(size, gradient_tile::<f32>(d, stride, &pixels, c));
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
unsafe fn gradient_tile<S: Simd, const TALL: bool>(
    d: *mut f32,
    stride: usize,
    pixels: &[[*const f32; 4]; 4],
    c: usize,
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let columns = each!(X in 0 1 2 3 => {
            gradient_column::<S, TALL>(each!(Y in 0 1 2 3 => {
                if TALL || Y < 2 { S::load(pixels[Y][X].add(c)) } else { S::splat(0.0) }
            }))
        });
        each!(Y in 0 1 2 3 4 5 => if TALL || Y < 4 {
            let line = gradient_line(each!(X in 0 1 2 3 => columns[X][Y]));
            each!(X in 0 1 2 3 4 5 => line[X].store(d.add((6 * Y + X) * stride)));
        });
    }
}
