//! How maps are laid out for bf16 products: for each output pixel of a row, and each input row, the
//! strip of values under the kernel's width. What a kernel's rows need then lies whole rows apart,
//! so a convolution is one product, whose steps say where each row begins, and nothing is copied for
//! the kernel's height.
//!
//! Several small images lie side by side, as if they were one wide one.

use std::ops::Range;

use super::bf16::{DEPTH, rest, round};
use super::patches::Patches;
use super::simd::{Isa, simd_fn};
use super::values::sized;

/// Some output rows of some images.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub images: Range<usize>,
    pub rows: Range<usize>,
}

/// What the strips are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The left-hand side: a row for each pixel, its strip's values.
    Left,
    /// The right-hand side: a row for each pixel, but pairs of pixels interleaved. An odd pixel at a
    /// row's end is paired with zeros.
    Right,
}

/// The strips of a chunk, of some of the input's channels.
#[derive(Debug, Clone)]
pub(super) struct Strips {
    pub sizes: Patches,
    pub channels: Range<usize>,
    pub chunk: Chunk,
    pub side: Side,
}

impl Strips {
    /// Values of a strip, (kernel, channels), up to the next multiple of [`DEPTH`] with zeros.
    pub fn width(&self) -> usize {
        strip_width(&self.sizes, self.channels.len())
    }

    /// Pixels of a row of all images.
    pub fn pitch(&self) -> usize {
        self.chunk.images.len() * self.image_pitch()
    }

    fn image_pitch(&self) -> usize {
        match self.side {
            Side::Left => self.sizes.w_out,
            Side::Right => self.sizes.w_out.next_multiple_of(2),
        }
    }

    /// Output pixels.
    pub fn pixels(&self) -> usize {
        self.chunk.rows.len() * self.pitch()
    }

    /// Input rows are apart by the stride for one row of the kernel: those between them have places of
    /// their own.
    fn phases(&self) -> usize {
        self.sizes.stride().min(self.sizes.kernel)
    }

    /// Input rows of a phase.
    fn phase_rows(&self) -> usize {
        self.chunk.rows.len() + (self.sizes.kernel - 1) / self.sizes.stride()
    }

    /// Values of the layout, and of zeros behind it, which products may read for pixels beyond the last.
    pub fn len(&self) -> usize {
        self.values() + DEPTH * self.width()
    }

    fn values(&self) -> usize {
        self.phases() * self.phase_rows() * self.pitch() * self.width()
    }

    /// Where the strips of the kernel's row `ky` begin.
    pub fn origin(&self, ky: usize) -> usize {
        let stride = self.sizes.stride();
        let row = ky % stride * self.phase_rows() + ky / stride;
        row * self.pitch() * self.width()
    }

    /// Lays out the strips of `x`: rounded, and if `to` has two parts, what that leaves as the second
    /// one. Each has [`len`](Self::len) values.
    pub fn fill(&self, isa: Isa, x: &[f32], to: [&mut [u16]; 2], line: &mut Vec<u16>) {
        let g = &self.sizes;
        let (c, pad) = (self.channels.len(), g.kernel / 2);
        // A row of the map, with zeros on both sides.
        let line_len = (g.w + 2 * pad) * c;
        let parts = if to[1].is_empty() { 1 } else { 2 };
        let line = sized(line, parts * line_len);
        line.fill(0);
        let (first, second) = line.split_at_mut(line_len);
        let inner = pad * c..(pad + g.w) * c;
        let row_len = self.image_pitch() * self.width();
        let [to, to_rest] = to;
        for to in [&mut *to, &mut *to_rest] {
            if !to.is_empty() {
                to[self.values()..].fill(0);
            }
        }
        for at in 0..self.phases() * self.phase_rows() {
            let (phase, i) = (at / self.phase_rows(), at % self.phase_rows());
            let y = (self.chunk.rows.start + i) * g.stride() + phase;
            for (j, k) in self.chunk.images.clone().enumerate() {
                let place = (at * self.chunk.images.len() + j) * row_len;
                let row = place..place + row_len;
                let Some(y) = y.checked_sub(pad).filter(|&y| y < g.h) else {
                    to[row.clone()].fill(0);
                    if parts == 2 {
                        to_rest[row].fill(0);
                    }
                    continue;
                };
                let x = &x[k * g.x_len()..][..g.x_len()];
                let channels = self.channels.clone();
                let rest = if parts == 2 { &mut second[inner.clone()] } else { &mut [][..] };
                round_row(isa, g, x, y, channels, &mut first[inner.clone()], rest);
                self.cut(isa, first, &mut to[row.clone()]);
                if parts == 2 {
                    self.cut(isa, second, &mut to_rest[row]);
                }
            }
        }
    }

    /// The strips of one row of one image, from the row with its margins.
    fn cut(&self, isa: Isa, line: &[u16], to: &mut [u16]) {
        let g = &self.sizes;
        let (step, len) = (g.stride() * self.channels.len(), g.kernel * self.channels.len());
        let width = self.width();
        match self.side {
            Side::Left => {
                for (i, to) in to.chunks_exact_mut(width).enumerate() {
                    to[..len].copy_from_slice(&line[i * step..][..len]);
                    to[len..].fill(0);
                }
            }
            Side::Right => {
                for (i, to) in to.chunks_exact_mut(2 * width).enumerate() {
                    let even = &line[2 * i * step..][..len];
                    let (to, beyond) = to.split_at_mut(2 * len);
                    beyond.fill(0);
                    if 2 * i + 1 < g.w_out {
                        interleave(isa, even, &line[(2 * i + 1) * step..][..len], to);
                    } else {
                        let pairs = to.chunks_exact_mut(2).zip(even);
                        pairs.for_each(|(to, &even)| to.copy_from_slice(&[even, 0]));
                    }
                }
            }
        }
    }
}

/// Values of a strip of so many channels, up to the next multiple of [`DEPTH`].
pub(super) fn strip_width(sizes: &Patches, channels: usize) -> usize {
    (sizes.kernel * channels).next_multiple_of(DEPTH)
}

/// Rounds row `y` of the map that the kernel moves over.
fn round_row(
    isa: Isa,
    g: &Patches,
    x: &[f32],
    y: usize,
    channels: Range<usize>,
    to: &mut [u16],
    rest: &mut [u16],
) {
    if !g.upsamples() {
        let x = &x[y * g.w * g.c_in..][..g.w * g.c_in];
        return round_pixels(isa, x, g.c_in, channels, to, rest);
    }
    // Each pixel comes twice: rounded to where the row begins, then spread from its end.
    let (w, c) = (g.w / 2, channels.len());
    let x = &x[y / 2 * w * g.c_in..][..w * g.c_in];
    let half = if rest.is_empty() { 0 } else { w * c };
    round_pixels(isa, x, g.c_in, channels, &mut to[..w * c], &mut rest[..half]);
    for to in [to, rest] {
        if to.is_empty() {
            continue;
        }
        for pixel in (0..w).rev() {
            to.copy_within(pixel * c..(pixel + 1) * c, (2 * pixel + 1) * c);
            to.copy_within(pixel * c..(pixel + 1) * c, 2 * pixel * c);
        }
    }
}

/// Rounds some channels of pixels, and what that leaves to `left` unless it is empty.
pub(super) fn round_pixels(
    isa: Isa,
    x: &[f32],
    pixel: usize,
    channels: Range<usize>,
    to: &mut [u16],
    left: &mut [u16],
) {
    let count = channels.len();
    if count == pixel {
        return round_values(isa, x, to, left);
    }
    for (i, x) in x.chunks_exact(pixel).enumerate() {
        let place = i * count..(i + 1) * count;
        let left = if left.is_empty() { &mut [][..] } else { &mut left[place.clone()] };
        round_values(isa, &x[channels.clone()], &mut to[place], left);
    }
}

simd_fn! {
    fn round_values<S>(x: &[f32], to: &mut [u16], left: &mut [u16]) {
        for (to, &x) in to.iter_mut().zip(x) {
            *to = round(x);
        }
        for ((left, &x), &rounded) in left.iter_mut().zip(x).zip(&*to) {
            *left = round(rest(x, rounded));
        }
    }
}

simd_fn! {
    fn interleave<S>(even: &[u16], odd: &[u16], to: &mut [u16]) {
        for ((to, &even), &odd) in to.chunks_exact_mut(2).zip(even).zip(odd) {
            (to[0], to[1]) = (even, odd);
        }
    }
}

/// Exchanges rows and columns: `from` (rows, columns), `to` (columns, rows), its rows `to_row` apart.
/// Rows are a multiple of 8.
pub(super) fn turn(from: &[u16], columns: usize, to: &mut [u16], to_row: usize) {
    const SIDE: usize = 8;
    let whole = columns / SIDE * SIDE;
    for (row, from) in from.chunks_exact(SIDE * columns).enumerate() {
        for column in (0..whole).step_by(SIDE) {
            let block: [[u16; SIDE]; SIDE] = std::array::from_fn(|i| {
                let mut row = [0; SIDE];
                row.copy_from_slice(&from[i * columns + column..][..SIDE]);
                row
            });
            for (j, values) in turn_block(block).into_iter().enumerate() {
                to[(column + j) * to_row + row * SIDE..][..SIDE].copy_from_slice(&values);
            }
        }
        for column in whole..columns {
            for i in 0..SIDE {
                to[column * to_row + row * SIDE + i] = from[i * columns + column];
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn turn_block(rows: [[u16; 8]; 8]) -> [[u16; 8]; 8] {
    use std::arch::x86_64::*;
    // SAFETY: SSE2 is part of x86-64; eight u16 and a vector are the same bits.
    unsafe {
        let r: [__m128i; 8] = std::mem::transmute(rows);
        // Pairs of rows, then of pairs, then of fours.
        let a = |i: usize| (_mm_unpacklo_epi16(r[i], r[i + 1]), _mm_unpackhi_epi16(r[i], r[i + 1]));
        let ((a0, a1), (a2, a3), (a4, a5), (a6, a7)) = (a(0), a(2), a(4), a(6));
        let b = |x, y| (_mm_unpacklo_epi32(x, y), _mm_unpackhi_epi32(x, y));
        let ((b0, b1), (b2, b3)) = (b(a0, a2), b(a1, a3));
        let ((b4, b5), (b6, b7)) = (b(a4, a6), b(a5, a7));
        let c = |x, y| [_mm_unpacklo_epi64(x, y), _mm_unpackhi_epi64(x, y)];
        std::mem::transmute([c(b0, b4), c(b1, b5), c(b2, b6), c(b3, b7)])
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn turn_block(rows: [[u16; 8]; 8]) -> [[u16; 8]; 8] {
    std::array::from_fn(|j| std::array::from_fn(|i| rows[i][j]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_exchanges_rows_and_columns() {
        for (rows, columns, more) in [(8, 1, 0), (8, 8, 3), (32, 21, 0), (64, 48, 8)] {
            let from: Vec<u16> = (0..rows * columns).map(|i| i as u16).collect();
            let to_row = rows + more;
            let mut to = vec![u16::MAX; columns * to_row];
            turn(&from, columns, &mut to, to_row);
            for (at, &found) in to.iter().enumerate() {
                let (column, row) = (at / to_row, at % to_row);
                let expected = if row < rows { from[row * columns + column] } else { u16::MAX };
                assert_eq!(found, expected, "{rows} by {columns}: row {row}, column {column}");
            }
        }
    }
}
