use std::rc::Rc;

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{Result, Tensor};

use super::gemm::{As, How, Matrix};
use super::{Argument, Element, Gpu, Memory, each, each_of};
use crate::Precision;
use crate::kernels::op::conv::Scale;

/// Bytes of patches that are laid out at a time, at most, unless those of one image are more.
const PATCHES: usize = if cfg!(test) { 4 << 10 } else { 256 << 20 };

/// `Sizes` in `patches.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Sizes {
    h: i32,
    w: i32,
    channels: i32,
    h_out: i32,
    w_out: i32,
    kernel: i32,
    stride: i32,
    upsample: i32,
}

// SAFETY: plain integers, laid out as in the source.
unsafe impl DeviceRepr for Sizes {}

impl Argument for Sizes {
    const TYPE: &'static str = "Sizes";
}

/// A convolution of maps, padded, by matrix products of patches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Convolution {
    precision: Precision,
    element: Element,
    sizes: Sizes,
    batch: usize,
    c_out: usize,
}

/// What is added to a convolution's output.
pub(crate) struct Added<'a> {
    pub bias: &'a Tensor,
    pub per_image: Option<&'a Memory>,
    pub residual: Option<&'a Memory>,
}

impl Convolution {
    /// Of `x` (batch, height, width, in) with `weight` (out, in, k, k).
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn new(precision: Precision, x: [usize; 4], weight: &Tensor, scale: Scale) -> Result<Self> {
        let [batch, h, w, channels] = x;
        let (c_out, c_in, kernel, kernel_w) = weight.dims4()?;
        if c_in != channels || kernel != kernel_w || kernel.is_multiple_of(2) {
            candle_core::bail!("convolution of {x:?} (channels last) with {:?}", weight.shape())
        }
        let (stride, upsample) = match scale {
            Scale::Stride(stride) => (stride, 0),
            Scale::Upsample => (1, 1),
        };
        let out = |size: usize| (size << upsample).div_ceil(stride) as i32;
        let sizes = Sizes {
            h: h as i32,
            w: w as i32,
            channels: channels as i32,
            h_out: out(h),
            w_out: out(w),
            kernel: kernel as i32,
            stride: stride as i32,
            upsample,
        };
        Ok(Self { precision, element: Element::of(precision), sizes, batch, c_out })
    }

    /// (batch, height, width, out)
    pub fn output(&self) -> [usize; 4] {
        [self.batch, self.sizes.h_out as usize, self.sizes.w_out as usize, self.c_out]
    }

    fn taps(&self) -> usize {
        (self.sizes.kernel * self.sizes.kernel) as usize
    }

    fn channels(&self) -> usize {
        self.sizes.channels as usize
    }

    /// Values in a patch.
    fn patch(&self) -> usize {
        self.taps() * self.channels()
    }

    /// Output pixels of an image.
    fn pixels(&self) -> usize {
        (self.sizes.h_out * self.sizes.w_out) as usize
    }

    /// Whether patches are the map's pixels as they are.
    fn is_pointwise(&self) -> bool {
        self.sizes.kernel == 1 && self.sizes.stride == 1 && self.sizes.upsample == 0
    }

    /// Images whose patches are laid out at a time.
    fn images_at_a_time(&self) -> usize {
        let image = self.pixels() * self.patch() * self.element.bytes();
        (PATCHES / image.max(1)).clamp(1, self.batch)
    }

    /// The weights as patches are multiplied with them.
    pub fn pack(&self, gpu: &Rc<Gpu>, weight: &Tensor) -> Result<Memory> {
        let count = weight.elem_count();
        let packed = gpu.take(count * self.element.bytes())?;
        let (channels, taps) = (self.channels() as u32, self.taps() as u32);
        gpu.launch(
            self.element,
            "images_to_map",
            each(count)?,
            (gpu.pointer(weight)?, packed.pointer, channels, taps, count as u32),
        )?;
        Ok(packed)
    }

    fn packed(&self, packed: &Memory) -> Matrix {
        Matrix::new(packed.pointer, self.c_out, self.patch(), self.element)
    }

    /// Calls `f` with the patches of some images of `x` after the other: of the first image, of how
    /// many, and whether they are the first ones.
    fn for_patches(
        &self,
        gpu: &Rc<Gpu>,
        x: &Memory,
        mut f: impl FnMut(Matrix, usize, bool) -> Result<()>,
    ) -> Result<()> {
        let bytes = self.element.bytes();
        let rows = self.batch * self.pixels();
        if self.is_pointwise() {
            return f(Matrix::new(x.pointer, rows, self.patch(), self.element), 0, true);
        }
        let images = self.images_at_a_time();
        let patches = gpu.take(images * self.pixels() * self.patch() * bytes)?;
        let image = (self.sizes.h * self.sizes.w) as usize * self.channels() * bytes;
        for first in (0..self.batch).step_by(images) {
            let rows = images.min(self.batch - first) * self.pixels();
            let count = rows * self.patch();
            let x = x.pointer.offset(first * image);
            let width = self.element.width(&[self.channels()], &[x, patches.pointer]);
            gpu.launch(
                self.element,
                "gather_patches",
                each_of(count, width)?,
                (x, patches.pointer, self.sizes, width, count as u32),
            )?;
            let patches = Matrix::new(patches.pointer, rows, self.patch(), self.element);
            f(patches, first, first == 0)?;
        }
        Ok(())
    }

    /// The output rows that belong to the patches of images from `first` on.
    fn rows_of(&self, y: &Memory, first: usize, patches: &Matrix) -> Matrix {
        let offset = first * self.pixels() * self.c_out * self.element.bytes();
        Matrix::new(y.pointer.offset(offset), patches.rows, self.c_out, self.element)
    }

    pub fn forward(
        &self,
        gpu: &Rc<Gpu>,
        x: &Memory,
        packed: &Memory,
        added: &Added<'_>,
    ) -> Result<Memory> {
        let count = self.output().iter().product::<usize>();
        let y = gpu.take(count * self.element.bytes())?;
        #[cfg(feature = "cudnn")]
        let done = self.forward_by_cudnn(gpu, x, packed, &y)?;
        #[cfg(not(feature = "cudnn"))]
        let done = false;
        if !done {
            let weights = (self.packed(packed), As::Transposed);
            self.for_patches(gpu, x, |patches, first, _| {
                let rows = self.rows_of(&y, first, &patches);
                let patches = (patches, As::Stored);
                gpu.multiply(self.precision, patches, weights, rows, How::PLAIN)
            })?;
        }
        gpu.add_to_map(&y, [self.batch, self.pixels(), self.c_out], added, self.element)?;
        Ok(y)
    }

    /// Writes the gradient of the weights (out, in, k, k).
    pub fn weight_gradient(
        &self,
        gpu: &Rc<Gpu>,
        x: &Memory,
        dy: &Memory,
        gradient: &Tensor,
    ) -> Result<()> {
        #[cfg(feature = "cudnn")]
        if self.weight_gradient_by_cudnn(gpu, x, dy, gradient)? {
            return Ok(());
        }
        let count = gradient.elem_count();
        let packed = gpu.take(count * Element::F32.bytes())?;
        let sum = Matrix::new(packed.pointer, self.c_out, self.patch(), Element::F32);
        self.for_patches(gpu, x, |patches, first, begins| {
            let dy = (self.rows_of(dy, first, &patches), As::Transposed);
            gpu.multiply(self.precision, dy, (patches, As::Stored), sum, How::accumulating(!begins))
        })?;
        let (channels, taps) = (self.channels() as u32, self.taps() as u32);
        gpu.launch(
            Element::F32,
            "map_to_images",
            each(count)?,
            (packed.pointer, gpu.pointer(gradient)?, channels, taps, count as u32),
        )
    }

    /// Writes the gradient of the bias, and gives that of what was added to each image where it is
    /// asked for.
    pub fn bias_gradient(
        &self,
        gpu: &Rc<Gpu>,
        dy: &Memory,
        gradient: &Tensor,
        per_image: bool,
    ) -> Result<Option<Memory>> {
        let count = self.batch * self.c_out;
        let sums = gpu.take(count * Element::F32.bytes())?;
        let of_images = per_image.then(|| gpu.take(count * self.element.bytes())).transpose()?;
        let sizes = [self.batch, self.pixels(), self.c_out];
        gpu.sums_by_image(dy, sizes, sums.pointer, of_images.as_ref(), self.element)?;
        gpu.sum_columns(&sums, gradient, self.batch)?;
        Ok(of_images)
    }

    /// Writes the gradient of the input to `dx`, or adds it to what is there.
    pub fn input_gradient(
        &self,
        gpu: &Rc<Gpu>,
        dy: &Memory,
        packed: &Memory,
        dx: &Memory,
        accumulate: bool,
    ) -> Result<()> {
        #[cfg(feature = "cudnn")]
        if self.input_gradient_by_cudnn(gpu, dy, packed, dx, accumulate)? {
            return Ok(());
        }
        let weights = (self.packed(packed), As::Stored);
        let bytes = self.element.bytes();
        if self.is_pointwise() {
            let rows = self.batch * self.pixels();
            let dx = Matrix::new(dx.pointer, rows, self.patch(), self.element);
            let dy = (self.rows_of(dy, 0, &dx), As::Stored);
            return gpu.multiply(self.precision, dy, weights, dx, How::accumulating(accumulate));
        }
        let images = self.images_at_a_time();
        let patches = gpu.take(images * self.pixels() * self.patch() * bytes)?;
        let image = (self.sizes.h * self.sizes.w) as usize * self.channels();
        for first in (0..self.batch).step_by(images) {
            let images = images.min(self.batch - first);
            let rows = images * self.pixels();
            let d = Matrix::new(patches.pointer, rows, self.patch(), self.element);
            let dy = (self.rows_of(dy, first, &d), As::Stored);
            gpu.multiply(self.precision, dy, weights, d, How::PLAIN)?;
            let count = images * image;
            let dx = dx.pointer.offset(first * image * bytes);
            let width = self.element.width(&[self.channels()], &[patches.pointer, dx]);
            gpu.launch(
                self.element,
                "scatter_patches",
                each_of(count, width)?,
                (patches.pointer, dx, self.sizes, i32::from(accumulate), width, count as u32),
            )?;
        }
        Ok(())
    }
}

/// By cuDNN, where it can; each tells whether it did.
#[cfg(feature = "cudnn")]
impl Convolution {
    /// None for products of pixels as they are, which cuBLASLt computes at once.
    fn plan(&self, gpu: &Gpu) -> Option<Rc<super::cudnn::Plan>> {
        gpu.cudnn.as_ref().filter(|_| !self.is_pointwise())?.plan(&self.shape())
    }

    /// Whether it was done. What cuDNN refuses at the last moment is not asked of it again.
    fn done(&self, gpu: &Gpu, done: Result<bool>) -> Result<bool> {
        if let (Ok(false), Some(cudnn)) = (&done, &gpu.cudnn) {
            cudnn.forget(&self.shape());
        }
        done
    }

    pub(super) fn shape(&self) -> super::cudnn::Shape {
        let Sizes { h, w, upsample, kernel, stride, .. } = self.sizes;
        let x = [self.batch, (h << upsample) as usize, (w << upsample) as usize, self.channels()];
        super::cudnn::Shape {
            element: self.element,
            tf32: self.precision == Precision::High,
            x,
            y: self.output(),
            kernel: kernel as usize,
            stride: stride as usize,
        }
    }

    /// Values of the input, before it is doubled.
    fn input_len(&self) -> usize {
        self.batch * (self.sizes.h * self.sizes.w) as usize * self.channels()
    }

    /// The doubled input, where it is to be doubled.
    fn doubled(&self, gpu: &Rc<Gpu>, x: &Memory) -> Result<Option<Memory>> {
        if self.sizes.upsample == 0 {
            return Ok(None);
        }
        let count = 4 * self.input_len();
        let doubled = gpu.take(count * self.element.bytes())?;
        let width = self.element.width(&[self.channels()], &[x.pointer, doubled.pointer]);
        gpu.launch(
            self.element,
            "upsample",
            each_of(count, width)?,
            (
                x.pointer,
                doubled.pointer,
                self.sizes.w as u32,
                self.channels() as u32,
                width,
                count as u32,
            ),
        )?;
        Ok(Some(doubled))
    }

    fn forward_by_cudnn(
        &self,
        gpu: &Rc<Gpu>,
        x: &Memory,
        packed: &Memory,
        y: &Memory,
    ) -> Result<bool> {
        let Some(plan) = self.plan(gpu) else { return Ok(false) };
        let doubled = self.doubled(gpu, x)?;
        let x = doubled.as_ref().unwrap_or(x);
        self.done(gpu, plan.forward(gpu, x.pointer, packed.pointer, y.pointer))
    }

    fn weight_gradient_by_cudnn(
        &self,
        gpu: &Rc<Gpu>,
        x: &Memory,
        dy: &Memory,
        gradient: &Tensor,
    ) -> Result<bool> {
        let Some(plan) = self.plan(gpu) else { return Ok(false) };
        let doubled = self.doubled(gpu, x)?;
        let x = doubled.as_ref().unwrap_or(x);
        let count = gradient.elem_count();
        let packed = gpu.take(count * self.element.bytes())?;
        if !self.done(gpu, plan.weight_gradient(gpu, x.pointer, dy.pointer, packed.pointer))? {
            return Ok(false);
        }
        let (channels, taps) = (self.channels() as u32, self.taps() as u32);
        gpu.launch(
            self.element,
            "map_to_images",
            each(count)?,
            (packed.pointer, gpu.pointer(gradient)?, channels, taps, count as u32),
        )?;
        Ok(true)
    }

    fn input_gradient_by_cudnn(
        &self,
        gpu: &Rc<Gpu>,
        dy: &Memory,
        packed: &Memory,
        dx: &Memory,
        accumulate: bool,
    ) -> Result<bool> {
        let Some(plan) = self.plan(gpu) else { return Ok(false) };
        if self.sizes.upsample == 0 {
            let result =
                plan.input_gradient(gpu, packed.pointer, dy.pointer, dx.pointer, accumulate);
            return self.done(gpu, result);
        }
        let count = self.input_len();
        let doubled = gpu.take(4 * count * self.element.bytes())?;
        let result = plan.input_gradient(gpu, packed.pointer, dy.pointer, doubled.pointer, false);
        if !self.done(gpu, result)? {
            return Ok(false);
        }
        let width = self.element.width(&[self.channels()], &[doubled.pointer, dx.pointer]);
        gpu.launch(
            self.element,
            "upsample_backward",
            each_of(count, width)?,
            (
                doubled.pointer,
                dx.pointer,
                self.sizes.w as u32,
                self.channels() as u32,
                i32::from(accumulate),
                width,
                count as u32,
            ),
        )?;
        Ok(true)
    }
}
