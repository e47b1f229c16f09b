use candle_core::Result;

use super::super::blas::{As, How, Matrix};
use super::super::device::Gpu;
use super::super::element::{Element, Pointer};
use super::super::kernel::kernel;
use super::super::launch::each_of;
use super::super::memory::Memory;
use super::source::MODULE;
use super::{Convolution, Sizes};

kernel! { MODULE, "gather_patches", GatherPatches {
    x: Pointer, patches: Pointer, s: Sizes, width: u32, count: u32,
} }
kernel! { MODULE, "scatter_patches", ScatterPatches {
    patches: Pointer, dx: Pointer, s: Sizes, accumulate: i32, width: u32, count: u32,
} }

/// Maximum bytes of patches that are laid out at a time. The patches of one image may exceed it.
const PATCHES: usize = if cfg!(test) { 4 << 10 } else { 256 << 20 };

/// Convolutions as products of patches. A patch is a row of (kernel, kernel, in) values for an output
/// pixel.
impl Convolution {
    /// The number of images whose patches are laid out at a time.
    fn images_at_a_time(&self) -> usize {
        let image = self.pixels() * self.shape.patch() * self.element.bytes();
        (PATCHES / image.max(1)).clamp(1, self.shape.batch)
    }

    /// Takes memory for the patches of `images` images.
    fn take_patches(&self, gpu: &Gpu, images: usize) -> Result<Memory> {
        gpu.take_for(images * self.pixels() * self.shape.patch(), self.element)
    }

    fn packed(&self, packed: Pointer) -> Matrix {
        Matrix::new(packed, self.shape.c_out, self.shape.patch(), self.element)
    }

    /// Returns the address of image `first` in a map of the input's dimensions.
    fn images_from(&self, map: &Memory, first: usize) -> Pointer {
        map.pointer.offset(first * self.shape.input_len() * self.element.bytes())
    }

    /// Returns the output rows of the patches of images from `first` on.
    fn rows_of(&self, y: &Memory, first: usize, patches: &Matrix) -> Matrix {
        let offset = first * self.pixels() * self.shape.c_out * self.element.bytes();
        Matrix::new(y.pointer.offset(offset), patches.rows, self.shape.c_out, self.element)
    }

    /// Calls `f` for successive groups of images of `x`, with their patches and the number of the first
    /// image.
    fn for_patches(
        &self,
        gpu: &Gpu,
        x: &Memory,
        mut f: impl FnMut(Matrix, usize) -> Result<()>,
    ) -> Result<()> {
        let rows = self.shape.batch * self.pixels();
        if self.shape.is_pointwise() {
            return f(Matrix::new(x.pointer, rows, self.shape.patch(), self.element), 0);
        }
        let images = self.images_at_a_time();
        let memory = self.take_patches(gpu, images)?;
        for first in (0..self.shape.batch).step_by(images) {
            let rows = images.min(self.shape.batch - first) * self.pixels();
            let count = rows * self.shape.patch();
            let (x, patches) = (self.images_from(x, first), memory.pointer);
            let width = self.element.width(&[self.shape.c_in], &[x, patches]);
            let gather = GatherPatches { x, patches, s: self.sizes(), width, count: count as u32 };
            gpu.launch(self.element, each_of(count, width)?, gather)?;
            f(Matrix::new(patches, rows, self.shape.patch(), self.element), first)?;
        }
        Ok(())
    }

    /// Writes the output to `y`.
    pub(super) fn forward_by_patches(
        &self,
        gpu: &Gpu,
        x: &Memory,
        packed: Pointer,
        y: &Memory,
    ) -> Result<()> {
        let weights = (self.packed(packed), As::Transposed);
        self.for_patches(gpu, x, |patches, first| {
            let rows = self.rows_of(y, first, &patches);
            let patches = (patches, As::Stored);
            gpu.blas.multiply(self.precision, patches, weights, rows, How::PLAIN)
        })
    }

    /// Writes the gradient of the weights (out, k, k, in) in f32.
    pub(in super::super) fn weight_gradient_by_patches(
        &self,
        gpu: &Gpu,
        x: &Memory,
        dy: &Memory,
        to: Pointer,
    ) -> Result<()> {
        let sum = Matrix::new(to, self.shape.c_out, self.shape.patch(), Element::F32);
        self.for_patches(gpu, x, |patches, first| {
            let dy = (self.rows_of(dy, first, &patches), As::Transposed);
            let (patches, how) = ((patches, As::Stored), How::accumulating(first > 0));
            gpu.blas.multiply(self.precision, dy, patches, sum, how)
        })
    }

    /// Writes the gradient of the input to `dx`, or adds it to the values of `dx`.
    pub(super) fn input_gradient_by_patches(
        &self,
        gpu: &Gpu,
        dy: &Memory,
        packed: Pointer,
        dx: &Memory,
        accumulate: bool,
    ) -> Result<()> {
        let weights = (self.packed(packed), As::Stored);
        if self.shape.is_pointwise() {
            let rows = self.shape.batch * self.pixels();
            let dx = Matrix::new(dx.pointer, rows, self.shape.patch(), self.element);
            let (dy, how) = ((self.rows_of(dy, 0, &dx), As::Stored), How::accumulating(accumulate));
            return gpu.blas.multiply(self.precision, dy, weights, dx, how);
        }
        let images = self.images_at_a_time();
        let memory = self.take_patches(gpu, images)?;
        for first in (0..self.shape.batch).step_by(images) {
            let images = images.min(self.shape.batch - first);
            let rows = images * self.pixels();
            let d = Matrix::new(memory.pointer, rows, self.shape.patch(), self.element);
            let dy = (self.rows_of(dy, first, &d), As::Stored);
            gpu.blas.multiply(self.precision, dy, weights, d, How::PLAIN)?;
            let count = images * self.shape.input_len();
            let (patches, dx) = (memory.pointer, self.images_from(dx, first));
            let width = self.element.width(&[self.shape.c_in], &[patches, dx]);
            let accumulate = i32::from(accumulate);
            let scatter = ScatterPatches {
                patches,
                dx,
                s: self.sizes(),
                accumulate,
                width,
                count: count as u32,
            };
            gpu.launch(self.element, each_of(count, width)?, scatter)?;
        }
        Ok(())
    }
}
