//! Vectors: linear layers with their activations, the sinusoids of timesteps, and tables of vectors.

mod layers;
mod source;

use candle_core::{Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::kernel;
use super::launch::each;
use super::memory::Memory;
pub(crate) use layers::{InputGradient, LinearLayer, WeightGradient, weight_gradients};
use source::MODULE;

kernel! { MODULE, "sinusoids", Sinusoids {
    t: Pointer, y: Pointer, half: u32, decay: f64, scale: f64, between: i32, flip: i32, count: u32,
} }
kernel! { MODULE, "add_class", AddClass {
    x: Pointer, table: Pointer, index: Pointer, y: Pointer, rows: u32, columns: u32, count: u32,
} }
kernel! { MODULE, "sums_by_class", SumsByClass {
    x: Pointer, index: Pointer, sums: Pointer, batch: u32, columns: u32, count: u32,
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
