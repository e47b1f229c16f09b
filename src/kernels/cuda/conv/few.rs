use std::rc::Rc;

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{Result, Tensor};

use super::super::device::Gpu;
use super::super::element::{Element, Pointer};
use super::super::kernel::{holds, kernel};
use super::super::launch::{THREADS, blocks_of};
use super::super::maps::ColumnSums;
use super::super::memory::Memory;
use super::source::MODULE;
use super::{Convolution, Sizes};

kernel! { MODULE, "weight_gradient_of_few", OfWeight {
    x: Pointer, dy: Pointer, parts: Pointer, s: Sizes, output: u32, part: u32, pixels: u32,
} }
kernel! { MODULE, "input_gradient_of_few", OfInput {
    dy: Pointer, weights: Pointer, dx: Pointer, s: Sizes, output: u32, accumulate: i32, pixels: u32,
} }

/// Height and width of the tile of a product that a block computes.
const TILE: usize = 32;

const _: () = assert!(holds(MODULE.source, "typedef Tile<8, 4> Few;\n"));

/// Maximum number of channels for which these kernels are used. With 8, tensor cores read whole groups of values.
const FEW: usize = 7;

/// Minimum number of output pixels from which a block computes its part of a gradient, and maximum number of parts.
const PART: usize = if cfg!(test) { 40 } else { 512 };
const PARTS: usize = if cfg!(test) { 6 } else { 256 };

/// Gradients of convolutions with few channels, which are usually those of images.
impl Convolution {
    /// Computes the gradient of the weights (out, in, k, k), if the input has few channels; otherwise returns false.
    /// `sums` completes it.
    pub fn weight_gradient_of_few(
        &self,
        gpu: &Gpu,
        [x, dy]: [&Memory; 2],
        sums: &ColumnSums,
        gradient: &Tensor,
    ) -> Result<bool> {
        let (inputs, output) = (self.shape.c_in, self.shape.c_out);
        if inputs > FEW || self.is_pointwise() {
            return Ok(false);
        }
        let (pixels, patch) = (self.shape.batch * self.pixels(), self.shape.patch());
        let part = pixels.div_ceil(PARTS).max(PART);
        let count = pixels.div_ceil(part).max(1);
        let parts = gpu.take_for(count * output * patch, Element::F32)?;
        let of_weight = OfWeight {
            x: x.pointer,
            dy: dy.pointer,
            parts: parts.pointer,
            s: self.sizes(),
            output: output as u32,
            part: part as u32,
            pixels: pixels as u32,
        };
        let grid_dim = (count as u32, output.div_ceil(TILE) as u32, patch.div_ceil(TILE) as u32);
        let blocks = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        gpu.launch(self.element, blocks, of_weight)?;
        sums.add(gpu, Rc::new(parts), count, gradient)?;
        Ok(true)
    }

    /// Writes the gradient of the input to `dx`, or adds it to the values of `dx`, if the output has few channels;
    /// otherwise returns false.
    pub(super) fn input_gradient_of_few(
        &self,
        gpu: &Gpu,
        dy: &Memory,
        packed: Pointer,
        dx: &Memory,
        accumulate: bool,
    ) -> Result<bool> {
        let (inputs, output) = (self.shape.c_in, self.shape.c_out);
        if output > FEW || self.is_pointwise() || self.shape.upsamples() {
            return Ok(false);
        }
        let pixels = self.shape.batch * self.shape.h * self.shape.w;
        let of_input = OfInput {
            dy: dy.pointer,
            weights: packed,
            dx: dx.pointer,
            s: self.sizes(),
            output: output as u32,
            accumulate: i32::from(accumulate),
            pixels: pixels as u32,
        };
        let tiles = (pixels.div_ceil(TILE) as u32, inputs.div_ceil(TILE) as u32);
        gpu.launch(self.element, blocks_of(tiles, (THREADS, 1)), of_input)?;
        Ok(true)
    }
}
