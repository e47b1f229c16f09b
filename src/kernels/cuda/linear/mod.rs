//! Vectors: linear layers with their activations, the sinusoids of timesteps, and tables of vectors.

use candle_core::{Result, Tensor};

use super::blas::{As, How, Matrix};
use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, kernel};
use super::launch::each;
use super::maps::{Added, sums_by_image};
use super::memory::Memory;
use crate::precision::Precision;

const MODULE: &Module = &Module {
    name: "linear",
    source: concat!(
        include_str!("../common.cuh"),
        include_str!("../activation.cuh"),
        include_str!("linear.cu"),
    ),
};

kernel! { MODULE, "cast", Cast { x: Pointer, y: Pointer, count: u32 } }
kernel! { MODULE, "sinusoids", Sinusoids {
    t: Pointer, y: Pointer, half: u32, decay: f64, scale: f64, between: i32, flip: i32, count: u32,
} }
kernel! { MODULE, "add_class", AddClass {
    x: Pointer, table: Pointer, index: Pointer, y: Pointer, rows: u32, columns: u32, count: u32,
} }
kernel! { MODULE, "sums_by_class", SumsByClass {
    x: Pointer, index: Pointer, sums: Pointer, batch: u32, columns: u32, count: u32,
} }
kernel! { MODULE, "activate", Activate { x: Pointer, y: Pointer, f: i32, count: u32 } }
kernel! { MODULE, "activate_backward", ActivateBackward {
    x: Pointer, d: Pointer, f: i32, count: u32,
} }

/// Computes the sines and cosines of timesteps (batch) in u32, or of times between them in f32: (batch, 2 half). The
/// k-th frequency is `scale * exp(-decay * k)`. The cosines come first if `cosines_first` is true.
pub(crate) fn sinusoids(
    gpu: &Gpu,
    t: &Tensor,
    half: usize,
    [decay, scale]: [f64; 2],
    cosines_first: bool,
    element: Element,
) -> Result<Memory> {
    let count = t.elem_count() * 2 * half;
    let between = i32::from(!t.dtype().is_int());
    let (t, y) = (gpu.pointer(t)?, gpu.take_for(count, element)?);
    let (half, flip, count_of) = (half as u32, i32::from(cosines_first), count as u32);
    let own = Sinusoids { t, y: y.pointer, half, decay, scale, between, flip, count: count_of };
    gpu.launch(element, each(count)?, own)?;
    Ok(y)
}

/// Adds to each vector of `x` (batch, columns) a row of `table` (rows, columns), whose number is in `index` (batch), in
/// u32. A row that the table does not have gives NaN.
pub(crate) fn add_class(
    gpu: &Gpu,
    table: &Tensor,
    index: &Tensor,
    x: &Memory,
    element: Element,
) -> Result<Memory> {
    let (rows, columns) = table.dims2()?;
    let count = index.elem_count() * columns;
    let y = gpu.take_for(count, element)?;
    let own = AddClass {
        x: x.pointer,
        table: gpu.pointer(table)?,
        index: gpu.pointer(index)?,
        y: y.pointer,
        rows: rows as u32,
        columns: columns as u32,
        count: count as u32,
    };
    gpu.launch(element, each(count)?, own)?;
    Ok(y)
}

/// Writes to each row of `sums` (rows, columns), in f32, the sum of the vectors of `x` whose number in `index` is that
/// of the row.
pub(crate) fn sums_by_class(
    gpu: &Gpu,
    index: &Tensor,
    x: &Memory,
    sums: &Tensor,
    element: Element,
) -> Result<()> {
    let (count, columns) = (sums.elem_count(), sums.dim(1)?);
    let own = SumsByClass {
        x: x.pointer,
        index: gpu.pointer(index)?,
        sums: gpu.pointer(sums)?,
        batch: index.elem_count() as u32,
        columns: columns as u32,
        count: count as u32,
    };
    gpu.launch(element, each(count)?, own)
}

/// A linear layer, applied to activated vectors (batch, in).
pub(crate) struct LinearLayer<'a> {
    pub precision: Precision,
    pub batch: usize,
    /// (out, in)
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    /// The activation of the input vectors: 0 for none, 1 for SiLU, 2 for GELU.
    pub activation: i32,
}

impl LinearLayer<'_> {
    fn element(&self) -> Element {
        Element::of(self.precision)
    }

    fn sizes(&self) -> Result<(usize, usize)> {
        self.weight.dims2()
    }

    /// Converts the weights to the maps' type.
    fn weights(&self, gpu: &Gpu) -> Result<(Memory, Matrix)> {
        let (element, (output, input)) = (self.element(), self.sizes()?);
        let count = output * input;
        let weights = gpu.take_for(count, element)?;
        let (x, y) = (gpu.pointer(self.weight)?, weights.pointer);
        gpu.launch(element, each(count)?, Cast { x, y, count: count as u32 })?;
        let matrix = Matrix::new(weights.pointer, output, input, element);
        Ok((weights, matrix))
    }

    fn activated(&self, gpu: &Gpu, x: &Memory) -> Result<(Memory, Matrix)> {
        let (element, (_, input)) = (self.element(), self.sizes()?);
        let count = self.batch * input;
        let y = gpu.take_for(count, element)?;
        let (x, f) = (x.pointer, self.activation);
        let activate = Activate { x, y: y.pointer, f, count: count as u32 };
        gpu.launch(element, each(count)?, activate)?;
        let matrix = Matrix::new(y.pointer, self.batch, input, element);
        Ok((y, matrix))
    }

    pub fn forward(&self, gpu: &Gpu, x: &Memory) -> Result<Memory> {
        let (element, (output, _)) = (self.element(), self.sizes()?);
        let count = self.batch * output;
        let y = gpu.take_for(count, element)?;
        let (_x, x) = self.activated(gpu, x)?;
        let (_weights, weights) = self.weights(gpu)?;
        let d = Matrix::new(y.pointer, self.batch, output, element);
        let (x, weights) = ((x, As::Stored), (weights, As::Transposed));
        gpu.blas.multiply(self.precision, x, weights, d, How::PLAIN)?;
        let bias = Added { bias: self.bias, per_image: None, residual: None };
        bias.add_to(gpu, &y, [1, self.batch, output], element)?;
        Ok(y)
    }

    /// Returns the gradient of the input, and writes those of weight and bias.
    pub fn backward(
        &self,
        gpu: &Gpu,
        x: &Memory,
        dy: &Memory,
        [d_weight, d_bias]: [&Tensor; 2],
    ) -> Result<Memory> {
        let (element, (output, input)) = (self.element(), self.sizes()?);
        let d = Matrix::new(dy.pointer, self.batch, output, element);
        let (_activated, activated) = self.activated(gpu, x)?;
        let gradient = Matrix::new(gpu.pointer(d_weight)?, output, input, Element::F32);
        let (transposed, activated) = ((d, As::Transposed), (activated, As::Stored));
        gpu.blas.multiply(self.precision, transposed, activated, gradient, How::PLAIN)?;

        // The batch is summed like the pixels of one image.
        let sums = (gpu.pointer(d_bias)?, None);
        sums_by_image(gpu, dy, [1, self.batch, output], sums, element)?;

        let count = self.batch * input;
        let dx = gpu.take_for(count, element)?;
        let (_weights, weights) = self.weights(gpu)?;
        let to = Matrix::new(dx.pointer, self.batch, input, element);
        gpu.blas.multiply(
            self.precision,
            (d, As::Stored),
            (weights, As::Stored),
            to,
            How::PLAIN,
        )?;
        let (x, d, f) = (x.pointer, dx.pointer, self.activation);
        gpu.launch(element, each(count)?, ActivateBackward { x, d, f, count: count as u32 })?;
        Ok(dx)
    }
}
