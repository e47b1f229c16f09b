//! Muon's orthogonalisation of matrices, computed on the device.

use candle_core::Result;

use super::blas::{As, How, Matrix};
use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, kernel};
use super::launch::{THREADS, blocks_of, each};
use super::memory::Memory;
use crate::kernels::op::muon::{COEFFICIENTS, ITERATIONS, LEAST_NORM};
use crate::precision::Precision;

const MODULE: &Module = &Module {
    name: "muon",
    source: concat!(include_str!("../common.cuh"), include_str!("muon.cu")),
};

kernel! { MODULE, "inverse_norms", InverseNorms {
    squares: Pointer, parts: u32, least: f64, inverse: Pointer,
} }
kernel! { MODULE, "scale_matrices", ScaleMatrices {
    x: Pointer, factors: Pointer, power: i32, size: u32, count: u32,
} }
kernel! { MODULE, "polynomial", Polynomial {
    q: Pointer, x: Pointer, a: f32, b: f32, c: f32, rows: u32, count: u32,
} }

/// Matrices of one shape, contiguous in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrices {
    pub values: Pointer,
    pub batch: usize,
    /// The rows and columns of each matrix.
    pub shape: (usize, usize),
    /// The sums of squares of the parts of each matrix, in f64.
    pub squares: Pointer,
    /// The number of parts of each matrix.
    pub parts: usize,
}

impl Matrices {
    /// Computes the orthogonalised matrices.
    ///
    /// The algorithm is that of the CPU: the iterations run on the smaller of the two products of a matrix with itself.
    /// They need f32, because in TF32 the smallest eigenvalues of that product may become so negative that the
    /// iterations diverge.
    pub fn orthogonalized(&self, gpu: &Gpu) -> Result<Memory> {
        let (rows, cols) = self.shape;
        let (wide, side) = (rows <= cols, rows.min(cols));
        let inverse = gpu.take(self.batch * size_of::<f64>())?;
        let norms = InverseNorms {
            squares: self.squares,
            parts: self.parts as u32,
            least: LEAST_NORM,
            inverse: inverse.pointer,
        };
        gpu.launch(Element::F32, blocks_of((self.batch as u32, 1), (THREADS, 1)), norms)?;

        let matrix = |pointer, (rows, columns): (usize, usize)| {
            Matrix::new(pointer, rows, columns, Element::F32).batched(columns, rows * columns)
        };
        let x = matrix(self.values, self.shape);
        let multiply = |a, b, shape: (usize, usize)| -> Result<Memory> {
            let product = gpu.take_for(self.batch * shape.0 * shape.1, Element::F32)?;
            let how = How { batch: self.batch, ..How::PLAIN };
            gpu.blas.multiply(Precision::Highest, a, b, matrix(product.pointer, shape), how)?;
            Ok(product)
        };
        let stored = |memory: &Memory| (matrix(memory.pointer, (side, side)), As::Stored);
        let square = |a: &Memory, b: &Memory| multiply(stored(a), stored(b), (side, side));
        let (size, count) = (side * side, self.batch * side * side);
        let scale = |memory: &Memory, power| {
            let (x, factors) = (memory.pointer, inverse.pointer);
            let (size, all) = (size as u32, count as u32);
            let scale = ScaleMatrices { x, factors, power, size, count: all };
            gpu.launch(Element::F32, each(count)?, scale)
        };

        let mut product = match wide {
            true => multiply((x, As::Stored), (x, As::Transposed), (side, side))?,
            false => multiply((x, As::Transposed), (x, As::Stored), (side, side))?,
        };
        scale(&product, 2)?;
        let [a, b, c] = COEFFICIENTS.map(|coefficient| coefficient as f32);
        let mut factor: Option<Memory> = None;
        for iteration in 1..=ITERATIONS {
            let q = square(&product, &product)?;
            let (rows, all) = (side as u32, count as u32);
            let polynomial =
                Polynomial { q: q.pointer, x: product.pointer, a, b, c, rows, count: all };
            gpu.launch(Element::F32, each(count)?, polynomial)?;
            if iteration < ITERATIONS {
                product = square(&square(&q, &product)?, &q)?;
            }
            factor = Some(match factor {
                Some(factor) => square(&q, &factor)?,
                None => q,
            });
        }
        let Some(factor) = factor else { candle_core::bail!("no iteration of Muon") };
        scale(&factor, 1)?;
        match wide {
            true => multiply(stored(&factor), (x, As::Stored), self.shape),
            false => multiply((x, As::Stored), stored(&factor), self.shape),
        }
    }
}
