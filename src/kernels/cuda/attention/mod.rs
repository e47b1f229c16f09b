//! Attention of all positions to all.

use candle_core::Result;

use super::blas::{As, How, Matrix};
use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, kernel};
use super::launch::{THREADS, blocks_of};
use super::memory::Memory;
use crate::precision::Precision;

const MODULE: &Module = &Module {
    name: "attention",
    source: concat!(include_str!("../common.cuh"), include_str!("attention.cu")),
};

kernel! { MODULE, "softmax", Softmax { x: Pointer, columns: u32 } }
kernel! { MODULE, "softmax_backward", SoftmaxBackward { y: Pointer, d: Pointer, columns: u32 } }

/// Attention of all positions to all, separately for each image of a batch. q, k and v lie side by
/// side.
pub(crate) struct Attention {
    pub precision: Precision,
    pub batch: usize,
    pub positions: usize,
    pub channels: usize,
}

impl Attention {
    fn element(&self) -> Element {
        Element::of(self.precision)
    }

    /// Returns q, k or v (0, 1 or 2) as a part of the memory that holds all three.
    fn part(&self, qkv: &Memory, i: usize) -> Matrix {
        let pointer = qkv.pointer.offset(i * self.channels * self.element().bytes());
        let stride = 3 * self.channels;
        Matrix::new(pointer, self.positions, self.channels, self.element())
            .batched(stride, self.positions * stride)
    }

    fn output(&self, y: &Memory) -> Matrix {
        Matrix::new(y.pointer, self.positions, self.channels, self.element())
            .batched(self.channels, self.positions * self.channels)
    }

    fn scores(&self, memory: &Memory) -> Matrix {
        Matrix::new(memory.pointer, self.positions, self.positions, self.element())
            .batched(self.positions, self.positions * self.positions)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.channels as f32).sqrt()
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

    /// Computes the softmax of the scores: the weight of each position in the output of each.
    fn probabilities(&self, gpu: &Gpu, qkv: &Memory) -> Result<Memory> {
        let rows = self.batch * self.positions;
        let scores = gpu.take_for(rows * self.positions, self.element())?;
        let (q, k) = ((self.part(qkv, 0), As::Stored), (self.part(qkv, 1), As::Transposed));
        self.product(gpu, q, k, self.scores(&scores), self.scale())?;
        let softmax = Softmax { x: scores.pointer, columns: self.positions as u32 };
        gpu.launch(self.element(), blocks_of((rows as u32, 1), (THREADS, 1)), softmax)?;
        Ok(scores)
    }

    pub fn forward(&self, gpu: &Gpu, qkv: &Memory) -> Result<Memory> {
        let p = self.probabilities(gpu, qkv)?;
        let count = self.batch * self.positions * self.channels;
        let y = gpu.take_for(count, self.element())?;
        let (p, v) = ((self.scores(&p), As::Stored), (self.part(qkv, 2), As::Stored));
        self.product(gpu, p, v, self.output(&y), 1.0)?;
        Ok(y)
    }

    pub fn backward(&self, gpu: &Gpu, qkv: &Memory, dy: &Memory) -> Result<Memory> {
        let rows = self.batch * self.positions;
        let p = self.probabilities(gpu, qkv)?;
        let d = gpu.take_for(rows * self.positions, self.element())?;
        let dqkv = gpu.take_for(rows * 3 * self.channels, self.element())?;
        let [q, k, v] = [0, 1, 2].map(|i| self.part(qkv, i));
        let [dq, dk, dv] = [0, 1, 2].map(|i| self.part(&dqkv, i));
        let (dy, scores, ds) = (self.output(dy), self.scores(&p), self.scores(&d));

        self.product(gpu, (scores, As::Transposed), (dy, As::Stored), dv, 1.0)?;
        self.product(gpu, (dy, As::Stored), (v, As::Transposed), ds, 1.0)?;
        let (y, d) = (p.pointer, d.pointer);
        let softmax = SoftmaxBackward { y, d, columns: self.positions as u32 };
        gpu.launch(self.element(), blocks_of((rows as u32, 1), (THREADS, 1)), softmax)?;
        self.product(gpu, (ds, As::Stored), (k, As::Stored), dq, self.scale())?;
        self.product(gpu, (ds, As::Transposed), (q, As::Stored), dk, self.scale())?;
        Ok(dqkv)
    }
}
