use std::rc::Rc;

use candle_core::Result;

use super::super::device::Gpu;
use super::super::dnn::{Direction, Plan, Shape};
use super::super::element::{Element, Pointer};
use super::super::maps::{repeat_pixels, sum_pixels_to};
use super::super::memory::Memory;
use super::{Convolution, Place};
use crate::kernels::op::conv::ConvShape;
use crate::precision::Precision;

/// Convolutions with cuDNN. If the convolution doubles its input, the maps are doubled in a separate kernel.
impl Convolution {
    pub(in super::super) fn shape(&self) -> Shape {
        let [h, w] = self.shape.map();
        Shape {
            element: self.element,
            tf32: self.precision == Precision::High,
            x: [self.shape.batch, h, w, self.shape.c_in],
            y: self.output(),
            kernel: self.shape.kernel[0],
            stride: self.shape.stride(),
        }
    }

    /// Returns `None` for pointwise convolutions, which cuBLASLt computes as one product, and for convolutions with
    /// zeros on two sides only, which cuDNN lacks.
    fn plan(&self, gpu: &Gpu) -> Option<Rc<Plan>> {
        let other = self.shape.is_pointwise() || self.shape.begins_at_edge();
        gpu.dnn.as_ref().filter(|_| !other)?.plan(&self.shape())
    }

    /// Computes one of input, weight and output from the others, or adds to it. Returns false if cuDNN fails.
    /// A convolution that fails once is not tried again.
    ///
    /// # Errors
    /// Returns an error if cuDNN fails within what is captured: the capture may be the reason.
    fn run(
        &self,
        gpu: &Gpu,
        plan: &Plan,
        direction: Direction,
        operands: [Pointer; 3],
        accumulate: bool,
    ) -> Result<bool> {
        let workspace = gpu.take(plan.workspace(direction))?;
        let done = plan.run(direction, operands, workspace.pointer, accumulate);
        if !done && gpu.capture.is_active() {
            candle_core::bail!("cuDNN failed within what is captured")
        }
        if let (false, Some(dnn)) = (done, &gpu.dnn) {
            dnn.forget(&self.shape());
        }
        Ok(done)
    }

    /// Takes memory for the doubled input, if the convolution doubles it.
    fn take_doubled(&self, gpu: &Gpu) -> Result<Option<Memory>> {
        let count = 4 * self.shape.batch * self.shape.input_len();
        let upsamples = self.shape.upsamples();
        upsamples.then(|| gpu.take_for(count, self.element)).transpose()
    }

    /// Computes the doubled input, if the convolution doubles it.
    fn doubled(&self, gpu: &Gpu, x: &Memory) -> Result<Option<Memory>> {
        let upsamples = self.shape.upsamples();
        let doubled = || repeat_pixels(gpu, x, self.input(), 1.0, self.element);
        upsamples.then(doubled).transpose()
    }

    /// The dimensions of the input before it is doubled.
    fn input(&self) -> [usize; 4] {
        let ConvShape { batch, h, w, c_in, .. } = self.shape;
        [batch, h, w, c_in]
    }

    /// Writes the output to `y`. Returns false if cuDNN fails.
    pub(super) fn forward_by_dnn(
        &self,
        gpu: &Gpu,
        x: &Memory,
        packed: Pointer,
        y: &Memory,
    ) -> Result<bool> {
        let Some(plan) = self.plan(gpu) else { return Ok(false) };
        let doubled = self.doubled(gpu, x)?;
        let operands = [doubled.as_ref().unwrap_or(x).pointer, packed, y.pointer];
        self.run(gpu, &plan, Direction::Forward, operands, false)
    }

    /// Computes the gradient of the weights (out, k, k, in), in the maps' type, at the place that `place` returns for
    /// this type. Returns `None` if cuDNN fails.
    pub(super) fn weight_gradient_by_dnn(
        &self,
        gpu: &Gpu,
        x: &Memory,
        dy: &Memory,
        place: impl FnOnce(Element) -> Result<Place>,
    ) -> Result<Option<Place>> {
        let Some(plan) = self.plan(gpu) else { return Ok(None) };
        let doubled = self.doubled(gpu, x)?;
        let place = place(self.element)?;
        let operands = [doubled.as_ref().unwrap_or(x).pointer, place.0, dy.pointer];
        let done = self.run(gpu, &plan, Direction::Weight, operands, false)?;
        Ok(done.then_some(place))
    }

    /// Writes the gradient of the input to `dx`, or adds it to the values of `dx`. Returns false if cuDNN
    /// fails.
    pub(super) fn input_gradient_by_dnn(
        &self,
        gpu: &Gpu,
        dy: &Memory,
        packed: Pointer,
        dx: &Memory,
        accumulate: bool,
    ) -> Result<bool> {
        let Some(plan) = self.plan(gpu) else { return Ok(false) };
        let doubled = self.take_doubled(gpu)?;
        let to = doubled.as_ref().unwrap_or(dx).pointer;
        let operands = [to, packed, dy.pointer];
        let accumulate_there = accumulate && doubled.is_none();
        if !self.run(gpu, &plan, Direction::Input, operands, accumulate_there)? {
            return Ok(false);
        }
        if doubled.is_some() {
            let maps = [to, dx.pointer];
            sum_pixels_to(gpu, maps, self.input(), (1.0, accumulate), self.element)?;
        }
        Ok(true)
    }
}
