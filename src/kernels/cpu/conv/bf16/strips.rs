//! The layout of maps for bf16 products: im2col along rows only.
//!
//! For each output pixel of a row, and each input row, the strip of values under the width of the kernel is
//! copied. The values for the rows of the kernel are then whole rows apart. A convolution is thus one
//! product, whose steps begin at these rows. Nothing is copied for the height of the kernel.
//!
//! Several small images lie side by side, as if they were one wide image.

use std::ops::Range;

use super::rounding::round_pixels;
use crate::kernels::cpu::bf16::operands::DEPTH;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::sized;
use crate::kernels::cpu::simd::simd_fn;
use crate::kernels::op::conv::ConvShape;

/// A chunk: some output rows of some images.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub images: Range<usize>,
    pub rows: Range<usize>,
}

/// The side of a product to which the strips belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// A row for each pixel: the values of its strip.
    Left,
    /// A row for each pixel, with pairs of pixels interleaved. An odd pixel at the end of a row is paired
    /// with zeros.
    Right,
}

/// The strips of a chunk, of some channels of the input.
#[derive(Debug, Clone)]
pub(super) struct Strips {
    pub shape: ConvShape,
    pub channels: Range<usize>,
    pub chunk: Chunk,
    pub side: Side,
}

impl Strips {
    /// Values of a strip, (kernel width, channels), up to the next multiple of [`DEPTH`] with zeros.
    pub(super) fn width(&self) -> usize {
        strip_width(&self.shape, self.channels.len())
    }

    /// Pixels of a row of all images.
    pub(super) fn pitch(&self) -> usize {
        self.chunk.images.len() * self.image_pitch()
    }

    fn image_pitch(&self) -> usize {
        match self.side {
            Side::Left => self.shape.w_out,
            Side::Right => self.shape.w_out.next_multiple_of(2),
        }
    }

    /// Output pixels.
    pub(super) fn pixels(&self) -> usize {
        self.chunk.rows.len() * self.pitch()
    }

    /// The input rows for one row of the kernel are `stride` rows apart. Each of the rows between them
    /// belongs to another phase.
    fn phases(&self) -> usize {
        self.shape.stride().min(self.shape.kernel[0])
    }

    /// Input rows of a phase.
    fn phase_rows(&self) -> usize {
        self.chunk.rows.len() + (self.shape.kernel[0] - 1) / self.shape.stride()
    }

    /// Values of the layout, and of the zeros after it, which products may read for pixels beyond the
    /// last.
    pub(super) fn len(&self) -> usize {
        self.values() + DEPTH * self.width()
    }

    fn values(&self) -> usize {
        self.phases() * self.phase_rows() * self.pitch() * self.width()
    }

    /// Returns the beginning of the strips for row `ky` of the kernel.
    pub(super) fn origin(&self, ky: usize) -> usize {
        let stride = self.shape.stride();
        let row = ky % stride * self.phase_rows() + ky / stride;
        row * self.pitch() * self.width()
    }

    /// Lays out the strips of `x`, rounded. If `to` has two parts, the second gets the rounded errors of the
    /// first. Each has [`len`](Self::len) values.
    pub(super) fn fill(&self, isa: Isa, x: &[f32], to: [&mut [u16]; 2], line: &mut Vec<u16>) {
        let g = &self.shape;
        let (c, [above, before], [h, w]) = (self.channels.len(), g.padding(), g.map());
        // A row of the map, with zeros on both sides.
        let line_len = (w + g.kernel[1] - 1) * c;
        let parts = if to[1].is_empty() { 1 } else { 2 };
        let line = sized(line, parts * line_len);
        line.fill(0);
        let (first, second) = line.split_at_mut(line_len);
        let inner = before * c..(before + w) * c;
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
                let Some(y) = y.checked_sub(above).filter(|&y| y < h) else {
                    to[row.clone()].fill(0);
                    if parts == 2 {
                        to_rest[row].fill(0);
                    }
                    continue;
                };
                let x = &x[k * g.input_len()..][..g.input_len()];
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

    /// Copies the strips of one row of one image, from `line`, the row with its margins.
    fn cut(&self, isa: Isa, line: &[u16], to: &mut [u16]) {
        let g = &self.shape;
        let (step, len) = (g.stride() * self.channels.len(), g.kernel[1] * self.channels.len());
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

/// Returns the number of values of a strip of `channels` channels, rounded up to a multiple of [`DEPTH`].
pub(super) fn strip_width(shape: &ConvShape, channels: usize) -> usize {
    (shape.kernel[1] * channels).next_multiple_of(DEPTH)
}

/// Rounds row `y` of the map over which the kernel moves. Writes the errors to `rest`, unless it is empty.
fn round_row(
    isa: Isa,
    g: &ConvShape,
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
    // Each pixel is doubled: the row is rounded to the beginning of the memory, then spread, beginning with
    // the last pixel.
    let (w, c) = (g.w, channels.len());
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

simd_fn! {
    fn interleave<S>(even: &[u16], odd: &[u16], to: &mut [u16]) {
        for ((to, &even), &odd) in to.chunks_exact_mut(2).zip(even).zip(odd) {
            (to[0], to[1]) = (even, odd);
        }
    }
}
