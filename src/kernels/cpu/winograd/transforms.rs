//! From pixels to the places of tiles, and back. See [`winograd`](super).

use std::ops::Range;

use super::Places;
use crate::kernels::cpu::product::PANEL;
use crate::kernels::cpu::simd::{Simd, simd_fn};

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

/// Where the values of a tile's place (y, x) stand, if it has any: see [`Places`].
#[inline(always)]
fn place<const INNER: bool>(y: usize, x: usize) -> Option<usize> {
    match INNER {
        true => Some(4 * y + x),
        false if y == 2 || x == 2 => None,
        false => Some(3 * (y - y / 3) + x - x / 3),
    }
}

/// Calls the function of a tile for the places that it has.
macro_rules! with_places {
    ($places:expr, $f:ident::<$s:ident>($($argument:expr),* $(,)?)) => {
        match $places {
            Places::All => $f::<$s, true>($($argument),*),
            Places::Outer => $f::<$s, false>($($argument),*),
        }
    };
}

simd_fn! {
    /// `G w G^T` of a panel's kernels for one input channel; place (y, x) is multiplied with the
    /// factors of y and of x.
    pub(super) fn transform_kernels<S>(
        values: &mut [f32],
        rows: usize,
        row: usize,
        taps: &[[f32; PANEL]; 9],
        places: Places,
        factors: [f32; 4],
    ) {
        assert!(values.len() >= places.count() * rows * PANEL && row < rows);
        for j in (0..PANEL).step_by(S::WIDTH) {
            // SAFETY: `j` and the vector after it lie within PANEL; places, by the assertion,
            // within `values`.
            unsafe {
                let values = values.as_mut_ptr().add(row * PANEL + j);
                with_places!(places, kernel_tile::<S>(values, rows * PANEL, taps, j, factors));
            }
        }
    }
}

/// # Safety
/// Each place must be writable for a vector, and `taps` readable for one at `j`.
#[inline(always)]
unsafe fn kernel_tile<S: Simd, const INNER: bool>(
    values: *mut f32,
    stride: usize,
    taps: &[[f32; PANEL]; 9],
    j: usize,
    factors: [f32; 4],
) {
    // SAFETY: passed on.
    unsafe {
        let columns = each!(X in 0 1 2 => {
            kernel_line(each!(Y in 0 1 2 => S::load(taps[3 * Y + X].as_ptr().add(j))))
        });
        let lines = each!(Y in 0 1 2 3 => kernel_line(each!(X in 0 1 2 => columns[X][Y])));
        for (y, line) in lines.into_iter().enumerate() {
            for (x, u) in line.into_iter().enumerate() {
                if let Some(place) = place::<INNER>(y, x) {
                    u.mul(S::splat(factors[y] * factors[x])).store(values.add(place * stride));
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

/// An image that is cut into tiles.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub image: &'a [f32],
    /// Of the map that the tiles lie on.
    pub h: usize,
    pub w: usize,
    pub channels: usize,
    /// Whether each pixel of the image stands for four of that map.
    pub doubled: bool,
}

simd_fn! {
    /// `B^T d B` of each tile in a row of tiles: tile k's place p goes to `v[p * stride + (first +
    /// k) * channels]`. Beyond the map's edges pixels are 0.
    pub(super) fn transform_input<S>(
        v: &mut [f32],
        stride: usize,
        first: usize,
        source: Source<'_>,
        top: usize,
        places: Places,
    ) {
        let Source { image, h, w, channels, doubled } = source;
        let tiles = w.div_ceil(2);
        let scale = if doubled { 2 } else { 1 };
        assert!(places.count() * stride <= v.len() && (first + tiles) * channels <= stride);
        assert_eq!(image.len(), (h / scale) * (w / scale) * channels);
        let v = v.as_mut_ptr();
        for tile in 0..tiles {
            // Pixel (y, x) of the tile, where it is within the map.
            let pixel = |y: usize, x: usize| -> Option<*const f32> {
                let (y, x) = ((top + y).checked_sub(1)?, (2 * tile + x).checked_sub(1)?);
                let inside = y < h && x < w;
                inside.then(|| {
                    let pixel = y / scale * (w / scale) + x / scale;
                    image[pixel * channels..][..channels].as_ptr()
                })
            };
            let pixels: [[Option<*const f32>; 4]; 4] =
                each!(Y in 0 1 2 3 => each!(X in 0 1 2 3 => pixel(Y, X)));
            // SAFETY: pixels have `channels` values each, and the loops below end there; the place
            // of tile `first + tile` lies within `v` by the assertion.
            unsafe {
                let v = v.add((first + tile) * channels);
                let mut c = 0;
                while c + S::WIDTH <= channels {
                    with_places!(places, input_tile::<S>(v.add(c), stride, &pixels, c));
                    c += S::WIDTH;
                }
                while c < channels {
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
                if let Some(place) = place::<INNER>(y, x) {
                    value.store(v.add(place * stride));
                }
            }
        }
    }
}

/// `B^T d`.
#[inline(always)]
fn input_line<S: Simd>(d: [S; 4]) -> [S; 4] {
    [d[0].sub(d[2]), d[1].add(d[2]), d[2].sub(d[1]), d[1].sub(d[3])]
}

simd_fn! {
    /// `A^T m A` of each tile in a row of tiles, and what is added to it; `y` and `residual` are the
    /// pixel rows of the row of tiles, one or two.
    pub(super) fn transform_output<S>(
        y: &mut [f32],
        m: &[f32],
        stride: usize,
        first: usize,
        size: (usize, usize),
        shift: &[f32],
        residual: Option<&[f32]>,
        accumulate: bool,
        places: Places,
    ) {
        let (w, channels) = size;
        let tiles = w.div_ceil(2);
        let row = channels.div_ceil(PANEL) * PANEL;
        let rows = y.len() / (w * channels);
        assert!(places.count() * stride <= m.len() && (first + tiles) * row <= stride);
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
    /// To the pixels below and to the right, where the map has them.
    down: Option<usize>,
    right: Option<usize>,
    accumulate: bool,
}

/// # Safety
/// All of the tile must be readable, and its pixels writable, for a vector at `c`.
#[inline(always)]
unsafe fn output_tile<S: Simd, const INNER: bool>(tile: &OutputTile, c: usize) {
    // SAFETY: passed on.
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
                value.store(tile.y.add(place));
            }
        }
    }
}

/// `A^T m`.
#[inline(always)]
fn output_line<S: Simd>(m: [S; 4]) -> [S; 2] {
    [m[0].add(m[1]).add(m[2]), m[1].sub(m[2]).sub(m[3])]
}

simd_fn! {
    /// `A dy A^T` of some channels of each tile in a row of tiles, in panels: place p of tile k in
    /// panel q goes to `d[(q * places + p) * stride + (first + k) * PANEL]`.
    pub(super) fn transform_gradient<S>(
        d: &mut [f32],
        stride: usize,
        first: usize,
        dy: &[f32],
        size: (usize, usize),
        some: Range<usize>,
        places: Places,
    ) {
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
                // SAFETY: pixels have `some.len()` values each, and no vector goes beyond; the
                // assertions hold places within `d`.
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
                if let Some(place) = place::<INNER>(y, x) {
                    value.store(d.add(place * stride));
                }
            }
        }
    }
}

/// `A dy`.
#[inline(always)]
fn gradient_line<S: Simd>(d: [S; 2]) -> [S; 4] {
    [d[0], d[0].add(d[1]), d[0].sub(d[1]), S::splat(0.0).sub(d[1])]
}

simd_fn! {
    /// `G^T u G` for a panel of output channels: `u` (places, in, PANEL), the sum of `parts` such
    /// that are `part_len` apart, to `dweight` (out, in, 9).
    pub(super) fn kernel_gradient<S>(
        dweight: &mut [f32],
        u: &[f32],
        part_len: usize,
        parts: usize,
        c_in: usize,
        places: Places,
    ) {
        assert!((parts - 1) * part_len + places.count() * c_in * PANEL <= u.len());
        let count = dweight.len() / (c_in * 9);
        assert!(count <= PANEL);
        let mut taps = [[0f32; PANEL]; 9];
        let parts = (parts, part_len);
        for i in 0..c_in {
            for j in (0..PANEL).step_by(S::WIDTH) {
                // SAFETY: `j` and the vector after it lie within PANEL, every place within `u`.
                unsafe {
                    let u = u.as_ptr().add(i * PANEL + j);
                    with_places!(places, kernel_gradient_tile::<S>(&mut taps, j, u, c_in * PANEL, parts));
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

/// # Safety
/// Each place of each part must be readable, and `taps` writable at `j`, for a vector.
#[inline(always)]
unsafe fn kernel_gradient_tile<S: Simd, const INNER: bool>(
    taps: &mut [[f32; PANEL]; 9],
    j: usize,
    u: *const f32,
    stride: usize,
    (parts, part_len): (usize, usize),
) {
    // SAFETY: passed on.
    unsafe {
        let columns = each!(X in 0 1 2 3 => {
            kernel_gradient_line(each!(Y in 0 1 2 3 => match place::<INNER>(Y, X) {
                Some(place) => {
                    let u = u.add(place * stride);
                    let mut sum = S::load(u);
                    for part in 1..parts {
                        sum = sum.add(S::load(u.add(part * part_len)));
                    }
                    sum
                }
                None => S::splat(0.0),
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

/// `G^T u`.
#[inline(always)]
fn kernel_gradient_line<S: Simd>(u: [S; 4]) -> [S; 3] {
    let half = S::splat(0.5);
    let (sum, difference) = (u[1].add(u[2]).mul(half), u[1].sub(u[2]).mul(half));
    [u[0].add(sum), difference, u[3].add(sum)]
}
