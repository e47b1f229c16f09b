//! Linear layers, forward and backward.

use std::rc::Rc;

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{Result, Tensor};

use super::super::device::Gpu;
use super::super::element::{Element, Pointer};
use super::super::kernel::{Argument, argument, holds, kernel};
use super::super::launch::{THREADS, each};
use super::super::memory::Memory;
use super::source::MODULE;

kernel! { MODULE, "linear", Forward {
    x: Pointer, weight: Pointer, bias: Pointer, y: Pointer, f: i32, narrow: i32, batch: u32,
    input: u32, output: u32,
} }
kernel! { MODULE, "linear_input_gradient", OfInput {
    terms: Terms, x: Pointer, dx: Pointer, parts: Pointer, f: i32, batch: u32, input: u32,
} }
kernel! { MODULE, "sum_parts", SumParts {
    parts: Pointer, x: Pointer, dx: Pointer, f: i32, layers: u32, count: u32,
} }
kernel! { MODULE, "linear_weight_gradients", OfWeights {
    layers: Layers, batch: u32, count: u32,
} }

argument! { MODULE, struct Term { dy: u64, weight: u64, output: u32, unused: u32 } }
argument! { MODULE, struct Layer {
    x: u64, dy: u64, weight: u64, bias: u64, input: u32, output: u32, first: u32, f: i32,
} }

/// The number of layers that one launch handles.
const LAYERS: usize = 64;

/// Rows and columns of the tile of the output that a block computes, and of the tile for a few vectors.
const FORWARD: [usize; 2] = [16, 16];
const NARROW: [usize; 2] = [16, 4];

/// Rows and columns of the tile of a gradient.
const BACKWARD: [usize; 2] = [32, 32];

/// The number of blocks that is enough for a layer. With fewer, most multiprocessors of a GPU would be idle.
const ENOUGH: usize = 64;

#[derive(Clone, Copy)]
#[repr(C)]
struct Terms([Term; LAYERS]);

#[derive(Clone, Copy)]
#[repr(C)]
struct Layers([Layer; LAYERS]);

const _: () = assert!(
    holds(MODULE.source, "struct Terms {\n    Term at[64];\n};")
        && holds(MODULE.source, "struct Layers {\n    Layer at[64];\n};")
        && holds(MODULE.source, "typedef Tile<4, 4> Forward;\n")
        && holds(MODULE.source, "typedef Tile<4, 1> Narrow;\n")
        && holds(MODULE.source, "typedef Tile<8, 4> Backward;\n")
);

// SAFETY: the structs consist of plain numbers, with the layout of the source.
unsafe impl DeviceRepr for Terms {}
// SAFETY: as above.
unsafe impl DeviceRepr for Layers {}

impl Argument for Terms {
    const TYPE: &'static str = "Terms";
}

impl Argument for Layers {
    const TYPE: &'static str = "Layers";
}

/// Returns the number of tiles in each direction of matrices (rows, columns).
fn tiles([rows, columns]: [usize; 2], tile: [usize; 2]) -> [usize; 2] {
    [rows.div_ceil(tile[0]).max(1), columns.div_ceil(tile[1]).max(1)]
}

/// Launches a block for each of these tiles, in as many layers.
fn blocks([rows, columns]: [usize; 2], layers: usize) -> LaunchConfig {
    let (grid_dim, block_dim) = ((columns as u32, rows as u32, layers as u32), (THREADS, 1, 1));
    LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }
}

/// A linear layer, applied to activated vectors (batch, in).
pub(crate) struct LinearLayer<'a> {
    pub element: Element,
    pub batch: usize,
    /// (out, in)
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    /// The activation of the input vectors: 0 for none, 1 for SiLU, 2 for GELU.
    pub activation: i32,
}

impl LinearLayer<'_> {
    pub fn forward(&self, gpu: &Gpu, x: &Memory) -> Result<Memory> {
        let (output, input) = self.weight.dims2()?;
        let y = gpu.take_for(self.batch * output, self.element)?;
        let dims = [self.batch, output];
        let narrow = tiles(dims, FORWARD).iter().product::<usize>() < ENOUGH;
        let tiles = tiles(dims, if narrow { NARROW } else { FORWARD });
        let forward = Forward {
            x: x.pointer,
            weight: gpu.pointer(self.weight)?,
            bias: gpu.pointer(self.bias)?,
            y: y.pointer,
            f: self.activation,
            narrow: i32::from(narrow),
            batch: self.batch as u32,
            input: input as u32,
            output: output as u32,
        };
        gpu.launch(self.element, blocks(tiles, 1), forward)?;
        Ok(y)
    }
}

/// The gradient of vectors (batch, in) that linear layers read after the same activation, before it is computed.
#[derive(Clone)]
pub(crate) struct InputGradient {
    pub x: Rc<Memory>,
    pub batch: usize,
    pub input: usize,
    pub activation: i32,
    /// The gradient of each layer's output, and the layer's weight (out, in).
    pub layers: Vec<(Rc<Memory>, Tensor)>,
}

impl InputGradient {
    /// Adds the layers of another gradient. Returns false, and changes
    /// nothing, if they are gradients of other vectors, or if one launch cannot hold all layers.
    pub fn join(&mut self, other: &Self) -> bool {
        let same = Rc::ptr_eq(&self.x, &other.x) && self.activation == other.activation;
        let fits = same && self.layers.len() + other.layers.len() <= LAYERS;
        if fits {
            self.layers.extend(other.layers.iter().cloned());
        }
        fits
    }

    /// Computes the sum over the layers.
    pub fn compute(&self, gpu: &Gpu, element: Element) -> Result<Memory> {
        let &Self { batch, input, activation: f, .. } = self;
        let (count, layers) = (batch * input, self.layers.len());
        let dx = gpu.take_for(count, element)?;
        let own = (layers > 1).then(|| gpu.take_for(layers * count, Element::F32)).transpose()?;
        let mut terms = Terms([Term { dy: 0, weight: 0, output: 0, unused: 0 }; LAYERS]);
        for (term, (dy, weight)) in terms.0.iter_mut().zip(&self.layers) {
            let (at, output) = (gpu.pointer(weight)?.0, weight.dim(0)? as u32);
            *term = Term { dy: dy.pointer.0, weight: at, output, unused: 0 };
        }
        let (x, to, parts) = (self.x.pointer, dx.pointer, Memory::pointer_or_none(own.as_ref()));
        let (rows, columns) = (batch as u32, input as u32);
        let of_input = OfInput { terms, x, dx: to, parts, f, batch: rows, input: columns };
        gpu.launch(element, blocks(tiles([batch, input], BACKWARD), layers), of_input)?;
        if layers > 1 {
            let (layers, values) = (layers as u32, count as u32);
            let sum = SumParts { parts, x, dx: to, f, layers, count: values };
            gpu.launch(element, each(count)?, sum)?;
        }
        Ok(dx)
    }
}

/// The gradients of a layer's weight (out, in) and bias, before they are computed.
pub(crate) struct WeightGradient {
    pub x: Rc<Memory>,
    pub dy: Rc<Memory>,
    pub activation: i32,
    pub weight: Tensor,
    pub bias: Tensor,
}

/// Computes gradients of weights and biases for vectors of the same batch.
pub(crate) fn weight_gradients(
    gpu: &Gpu,
    batch: usize,
    gradients: &[WeightGradient],
    element: Element,
) -> Result<()> {
    let none = Layer { x: 0, dy: 0, weight: 0, bias: 0, input: 0, output: 0, first: 0, f: 0 };
    for gradients in gradients.chunks(LAYERS) {
        let (mut layers, mut count) = (Layers([none; LAYERS]), 0);
        for (layer, own) in layers.0.iter_mut().zip(gradients) {
            let (output, input) = own.weight.dims2()?;
            *layer = Layer {
                x: own.x.pointer.0,
                dy: own.dy.pointer.0,
                weight: gpu.pointer(&own.weight)?.0,
                bias: gpu.pointer(&own.bias)?.0,
                input: input as u32,
                output: output as u32,
                first: count as u32,
                f: own.activation,
            };
            count += tiles([output, input], BACKWARD).iter().product::<usize>();
        }
        let grid = blocks([1, count.max(1)], 1);
        let (batch, count) = (batch as u32, gradients.len() as u32);
        gpu.launch(element, grid, OfWeights { layers, batch, count })?;
    }
    Ok(())
}
