//! The division of a bf16 convolution into chunks that fit in a cache.

use std::cell::RefCell;
use std::ops::Range;

use super::rounding::Terms;
use super::strips::Chunk;
use crate::kernels::cpu::bf16::unit::Unit;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::op::conv::ConvShape;

/// Bytes of the operands and sums of a chunk, approximately: they fit in a usual second-level cache. In
/// tests it is small, so that small maps are divided, too.
const CHUNK_BYTES: usize = if cfg!(test) { 12 << 10 } else { 640 << 10 };

/// Steps of a product of tiles at a time. The part of a panel that they read stays in a first-level cache
/// for all rows. A multiple of the products of [`Terms`].
const RUN: usize = 12;

/// Convolutions by products of bf16 operands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16 {
    pub(super) isa: Isa,
    pub(super) unit: Unit,
    pub(super) terms: Terms,
    pub(super) shape: ConvShape,
}

thread_local! {
    /// Layouts and products, reused from call to call. Nothing may wait for other threads while it is
    /// borrowed: this thread could be given work that borrows it again.
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
pub(super) struct Scratch {
    pub strips: Vec<u16>,
    pub line: Vec<u16>,
    pub left: Vec<u16>,
    pub rounded: Vec<u16>,
    pub sums: Vec<f32>,
    pub shift: Vec<f32>,
}

impl Bf16 {
    /// Steps of a product at a time.
    pub(super) fn run(&self) -> usize {
        // Tiles read a panel faster than a second-level cache delivers it. Vectors do not, and loading and
        // storing their sums costs more.
        if self.unit.has_tiles() { RUN } else { usize::MAX }
    }

    /// Returns the number of images of a chunk, and of their output rows, if a pixel takes `bytes` bytes.
    pub(super) fn chunk_size(&self, bytes: usize, images: usize) -> (usize, usize) {
        let ConvShape { h_out, w_out, .. } = self.shape;
        let pixels = CHUNK_BYTES / bytes;
        let count = (pixels / (h_out * w_out)).min(images);
        if count > 0 { (count, h_out) } else { (1, (pixels / w_out).clamp(1, h_out)) }
    }

    /// Divides these images into chunks.
    pub(super) fn chunks(
        &self,
        images: Range<usize>,
        size: (usize, usize),
    ) -> impl Iterator<Item = Chunk> {
        let h_out = self.shape.h_out;
        let end = images.end;
        images.step_by(size.0).flat_map(move |first| {
            (0..h_out).step_by(size.1).map(move |row| Chunk {
                images: first..(first + size.0).min(end),
                rows: row..(row + size.1).min(h_out),
            })
        })
    }
}
