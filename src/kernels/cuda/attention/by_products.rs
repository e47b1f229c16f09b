//! Attention by matrix products of cuBLASLt and the softmax between them.

use std::ops::Range;

use candle_core::Result;

use super::super::blas::{As, How, Matrix};
use super::super::device::Gpu;
use super::super::element::{Element, Pointer};
use super::super::kernel::{Launch, Module, kernel};
use super::super::launch::{THREADS, blocks_of};
use super::super::memory::Memory;
use crate::kernels::op::attention::AttentionShape;
use crate::precision::Precision;

const MODULE: &Module = &Module {
    name: "softmax",
    source: concat!(include_str!("../common.cuh"), include_str!("softmax.cu")),
};

kernel! { MODULE, "softmax", Softmax { x: Pointer, columns: u32 } }
kernel! { MODULE, "softmax_backward", SoftmaxBackward { y: Pointer, d: Pointer, columns: u32 } }

/// Maximum number of bytes of scores. 128 images of 16x16 positions have this many in f32.
pub(super) const MOST: usize = 32 << 20;

/// Attention by matrix products, for all precisions and sizes of heads. The heads are computed one after another, each
/// for several images at once, or for a part of the queries of one image. The same memory holds the scores of all.
pub(crate) struct ByProducts {
    pub precision: Precision,
    pub batch: usize,
    pub shape: AttentionShape,
    /// Maximum number of bytes for scores. The scores of a single query may need more.
    pub most: usize,
}

/// A head of some images, and some of the queries of each.
#[derive(Clone)]
struct Part {
    head: usize,
    images: Range<usize>,
    queries: Range<usize>,
}

impl ByProducts {
    fn element(&self) -> Element {
        Element::of(self.precision)
    }

    /// Returns the numbers of images and of queries that are computed at once.
    fn sizes(&self) -> (usize, usize) {
        let positions = self.shape.positions.max(1);
        let of_query = positions * self.element().bytes();
        let queries = (self.most / of_query).clamp(1, positions);
        let images = (self.most / (of_query * positions)).clamp(1, self.batch.max(1));
        (images, queries)
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        let (images, queries) = self.sizes();
        let AttentionShape { positions, heads, .. } = self.shape;
        let batch = self.batch;
        let cut = |all: usize, part: usize| {
            (0..all).step_by(part).map(move |first| first..all.min(first + part))
        };
        (0..heads).flat_map(move |head| {
            cut(batch, images).flat_map(move |images| {
                cut(positions, queries).map(move |queries| {
                    let images = images.clone();
                    Part { head, images, queries }
                })
            })
        })
    }

    /// Some rows of each image of a part, in memory with `stride` values per position. A row has the channels of a
    /// head, which begin with channel `first`.
    fn rows(
        &self,
        memory: &Memory,
        part: &Part,
        rows: &Range<usize>,
        first: usize,
        stride: usize,
    ) -> Matrix {
        let AttentionShape { positions, .. } = self.shape;
        let begin = (part.images.start * positions + rows.start) * stride + first;
        let pointer = memory.pointer.offset(begin * self.element().bytes());
        Matrix::new(pointer, rows.len(), self.shape.head(), self.element())
            .batched(stride, positions * stride)
    }

    /// Returns the rows of q, k or v (0, 1 or 2) as a part of the memory that holds all three.
    fn factors(&self, qkv: &Memory, part: &Part) -> [Matrix; 3] {
        let AttentionShape { positions, channels, .. } = self.shape;
        [0, 1, 2].map(|i| {
            let all = 0..positions;
            let rows = if i == 0 { &part.queries } else { &all };
            let first = i * channels + part.head * self.shape.head();
            self.rows(qkv, part, rows, first, 3 * channels)
        })
    }

    fn output(&self, y: &Memory, part: &Part) -> Matrix {
        let first = part.head * self.shape.head();
        self.rows(y, part, &part.queries, first, self.shape.channels)
    }

    fn scores(&self, memory: &Memory, part: &Part) -> Matrix {
        let (rows, columns) = (part.queries.len(), self.shape.positions);
        Matrix::new(memory.pointer, rows, columns, self.element()).batched(columns, rows * columns)
    }

    /// Takes memory for the scores of a part.
    fn take_scores(&self, gpu: &Gpu) -> Result<Memory> {
        let (images, queries) = self.sizes();
        gpu.take_for(images * queries * self.shape.positions, self.element())
    }

    fn launch<L: Launch>(&self, gpu: &Gpu, part: &Part, kernel: L) -> Result<()> {
        let rows = (part.images.len() * part.queries.len()) as u32;
        gpu.launch(self.element(), blocks_of((rows, 1), (THREADS, 1)), kernel)
    }

    /// Writes the softmax of a part's scores: the weight of each position in the output of each query.
    fn probabilities(&self, gpu: &Gpu, qkv: &Memory, part: &Part, scores: &Memory) -> Result<()> {
        let [q, k, _] = self.factors(qkv, part);
        let how = self.how(part, self.shape.scale());
        let (q, k) = ((q, As::Stored), (k, As::Transposed));
        gpu.blas.multiply(self.precision, q, k, self.scores(scores, part), how)?;
        let softmax = Softmax { x: scores.pointer, columns: self.shape.positions as u32 };
        self.launch(gpu, part, softmax)
    }

    fn how(&self, part: &Part, alpha: f32) -> How {
        How { batch: part.images.len(), alpha, accumulate: false }
    }

    pub fn forward(&self, gpu: &Gpu, qkv: &Memory) -> Result<Memory> {
        let scores = self.take_scores(gpu)?;
        let AttentionShape { positions, channels, .. } = self.shape;
        let y = gpu.take_for(self.batch * positions * channels, self.element())?;
        for part in self.parts() {
            self.probabilities(gpu, qkv, &part, &scores)?;
            let [_, _, v] = self.factors(qkv, &part);
            let (p, v) = ((self.scores(&scores, &part), As::Stored), (v, As::Stored));
            let how = self.how(&part, 1.0);
            gpu.blas.multiply(self.precision, p, v, self.output(&y, &part), how)?;
        }
        Ok(y)
    }

    pub fn backward(&self, gpu: &Gpu, qkv: &Memory, dy: &Memory) -> Result<Memory> {
        let (p, d) = (self.take_scores(gpu)?, self.take_scores(gpu)?);
        let AttentionShape { positions, channels, .. } = self.shape;
        let dqkv = gpu.take_for(self.batch * positions * 3 * channels, self.element())?;
        for part in self.parts() {
            self.probabilities(gpu, qkv, &part, &p)?;
            let (scores, ds) = (self.scores(&p, &part), self.scores(&d, &part));
            let [q, k, v] = self.factors(qkv, &part);
            let [dq, dk, dv] = self.factors(&dqkv, &part);
            let dy = self.output(dy, &part);
            let (plain, scaled) = (self.how(&part, 1.0), self.how(&part, self.shape.scale()));
            // The gradients of keys and values are sums over all queries.
            let accumulate = part.queries.start > 0;
            let product = |a, b, d, how| gpu.blas.multiply(self.precision, a, b, d, how);

            let (a, b) = ((scores, As::Transposed), (dy, As::Stored));
            product(a, b, dv, How { accumulate, ..plain })?;
            product((dy, As::Stored), (v, As::Transposed), ds, plain)?;
            let (y, d, columns) = (p.pointer, d.pointer, positions as u32);
            self.launch(gpu, &part, SoftmaxBackward { y, d, columns })?;
            product((ds, As::Stored), (k, As::Stored), dq, scaled)?;
            let (a, b) = ((ds, As::Transposed), (q, As::Stored));
            product(a, b, dk, How { accumulate, ..scaled })?;
        }
        Ok(dqkv)
    }
}
