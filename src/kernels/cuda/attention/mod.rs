//! Attention of all positions to all.

use candle_core::Result;

use super::blas::{As, How, Matrix};
use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, kernel};
use super::launch::{THREADS, blocks_of};
use super::memory::Memory;
use crate::kernels::op::attention::AttentionShape;
use crate::precision::Precision;

const MODULE: &Module = &Module {
    name: "attention",
    source: concat!(include_str!("../common.cuh"), include_str!("attention.cu")),
};

kernel! { MODULE, "softmax", Softmax { x: Pointer, columns: u32 } }
kernel! { MODULE, "softmax_backward", SoftmaxBackward { y: Pointer, d: Pointer, columns: u32 } }

/// Attention of all positions to all, separately for each image of a batch and each head. q, k and v lie side by
/// side. The heads are computed one after another, with the same memory for their scores.
pub(crate) struct Attention {
    pub precision: Precision,
    pub batch: usize,
    pub shape: AttentionShape,
}

impl Attention {
    fn element(&self) -> Element {
        Element::of(self.precision)
    }

    /// The channels of a head in memory with `stride` values per position. They begin with channel `first`.
    fn head(&self, memory: &Memory, first: usize, stride: usize) -> Matrix {
        let AttentionShape { positions, .. } = self.shape;
        let pointer = memory.pointer.offset(first * self.element().bytes());
        Matrix::new(pointer, positions, self.shape.head(), self.element())
            .batched(stride, positions * stride)
    }

    /// Returns q, k or v (0, 1 or 2) of a head as a part of the memory that holds all three.
    fn part(&self, qkv: &Memory, head: usize, i: usize) -> Matrix {
        let channels = self.shape.channels;
        self.head(qkv, i * channels + head * self.shape.head(), 3 * channels)
    }

    /// The output of a head.
    fn output(&self, y: &Memory, head: usize) -> Matrix {
        self.head(y, head * self.shape.head(), self.shape.channels)
    }

    fn scores(&self, memory: &Memory) -> Matrix {
        let AttentionShape { positions, .. } = self.shape;
        Matrix::new(memory.pointer, positions, positions, self.element())
            .batched(positions, positions * positions)
    }

    /// The number of rows of the scores of a head.
    fn rows(&self) -> usize {
        self.batch * self.shape.positions
    }

    /// Takes memory for the scores of a head.
    fn take_scores(&self, gpu: &Gpu) -> Result<Memory> {
        gpu.take_for(self.rows() * self.shape.positions, self.element())
    }

    fn product(
        &self,
        gpu: &Gpu,
        a: (Matrix, As),
        b: (Matrix, As),
        d: Matrix,
        alpha: f32,
    ) -> Result<()> {
        gpu.blas.multiply(
            self.precision,
            a,
            b,
            d,
            How { batch: self.batch, alpha, accumulate: false },
        )
    }

    /// Writes the softmax of a head's scores: the weight of each position in the output of each.
    fn probabilities(&self, gpu: &Gpu, qkv: &Memory, head: usize, scores: &Memory) -> Result<()> {
        let q = (self.part(qkv, head, 0), As::Stored);
        let k = (self.part(qkv, head, 1), As::Transposed);
        self.product(gpu, q, k, self.scores(scores), self.shape.scale())?;
        let softmax = Softmax { x: scores.pointer, columns: self.shape.positions as u32 };
        gpu.launch(self.element(), blocks_of((self.rows() as u32, 1), (THREADS, 1)), softmax)
    }

    pub fn forward(&self, gpu: &Gpu, qkv: &Memory) -> Result<Memory> {
        let p = self.take_scores(gpu)?;
        let y = gpu.take_for(self.rows() * self.shape.channels, self.element())?;
        for head in 0..self.shape.heads {
            self.probabilities(gpu, qkv, head, &p)?;
            let (p, v) = ((self.scores(&p), As::Stored), (self.part(qkv, head, 2), As::Stored));
            self.product(gpu, p, v, self.output(&y, head), 1.0)?;
        }
        Ok(y)
    }

    pub fn backward(&self, gpu: &Gpu, qkv: &Memory, dy: &Memory) -> Result<Memory> {
        let (p, d) = (self.take_scores(gpu)?, self.take_scores(gpu)?);
        let dqkv = gpu.take_for(self.rows() * 3 * self.shape.channels, self.element())?;
        let (scores, ds, scale) = (self.scores(&p), self.scores(&d), self.shape.scale());
        for head in 0..self.shape.heads {
            self.probabilities(gpu, qkv, head, &p)?;
            let [q, k, v] = [0, 1, 2].map(|i| self.part(qkv, head, i));
            let [dq, dk, dv] = [0, 1, 2].map(|i| self.part(&dqkv, head, i));
            let dy = self.output(dy, head);

            self.product(gpu, (scores, As::Transposed), (dy, As::Stored), dv, 1.0)?;
            self.product(gpu, (dy, As::Stored), (v, As::Transposed), ds, 1.0)?;
            let (y, d, columns) = (p.pointer, d.pointer, self.shape.positions as u32);
            let softmax = SoftmaxBackward { y, d, columns };
            gpu.launch(self.element(), blocks_of((self.rows() as u32, 1), (THREADS, 1)), softmax)?;
            self.product(gpu, (ds, As::Stored), (k, As::Stored), dq, scale)?;
            self.product(gpu, (ds, As::Transposed), (q, As::Stored), dk, scale)?;
        }
        Ok(dqkv)
    }
}
