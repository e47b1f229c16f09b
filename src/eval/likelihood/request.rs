//! The images of an evaluation, their random numbers, and its progress.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};

use crate::data::Batch;
use crate::denoiser::{Condition, Denoiser};
use crate::error::{Error, Result, check_dims, check_float};
use crate::memory::zeros;
use crate::random::{Noise, Purpose, Stream};

/// The progress of an evaluation after one of its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Evaluated {
    /// The number of steps so far.
    pub done: usize,
    /// The number of all steps of the batch.
    pub total: usize,
}

/// The use of random numbers. It is the index of their address.
#[derive(Debug, Clone, Copy)]
pub(super) enum Use {
    /// The noise of `x_t`; the step of the address is `t`.
    Noise = 0,
    /// The choice of the terms of the bound.
    Terms = 1,
    /// The noise that makes pixels continuous.
    Dequantisation = 2,
    /// Probes of the trace; the step of the address is the number of the probe.
    Probe = 3,
}

/// The images of an evaluation, in their dtype.
pub(super) struct Request {
    /// (batch, ...)
    pub images: Tensor,
    pub condition: Condition,
    /// The number of images.
    pub count: usize,
    /// The number of values of an image.
    pub values: usize,
    first: u32,
    seed: u64,
}

impl Request {
    /// # Errors
    /// Returns an error if the batch is not one of floating-point images, or if its classes or positions do not fit.
    pub fn new(denoiser: &(impl Denoiser + ?Sized), batch: Batch, seed: u64) -> Result<Self> {
        batch.check()?;
        let images = batch.images.detach();
        let count = images.dims().first().copied().unwrap_or(0);
        if images.elem_count() == 0 || count == 0 {
            let expected = "(batch, ...), at least one image of at least one value";
            return Err(Error::shape("images", images.dims(), expected));
        }
        check_float("dtype of the images", images.dtype())?;
        // A network without classes does not receive the classes of the images, as in training.
        let classes = batch.classes.filter(|_| denoiser.classes().is_some());
        let values = images.elem_count() / count;
        let (condition, first) = (Condition::from(classes), batch.first as u32);
        Ok(Self { images, condition, count, values, first, seed })
    }

    /// Returns the random numbers of image `k` of the batch.
    pub fn stream(&self, of: Use, step: u64, k: usize) -> Stream {
        let noise = Noise::new(self.seed);
        noise.indexed(Purpose::Likelihood, of as u16, step, self.first.wrapping_add(k as u32))
    }

    /// Returns a tensor like the images, whose values `fill` writes for each image `k`.
    pub fn filled(&self, mut fill: impl FnMut(usize, &mut [f32])) -> Result<Tensor> {
        let mut numbers = zeros("random numbers", self.images.dims())?;
        for (k, numbers) in numbers.chunks_mut(self.values).enumerate() {
            fill(k, numbers);
        }
        let numbers = Tensor::from_vec(numbers, self.images.shape(), &Device::Cpu)?;
        Ok(numbers.to_dtype(self.images.dtype())?.to_device(self.images.device())?)
    }

    /// Checks an output of the denoiser, and converts it to the dtype of the images.
    ///
    /// # Errors
    /// Returns an error if its shape is not that of the images, or if it is not of a floating-point dtype.
    pub fn checked(&self, output: &Tensor) -> Result<Tensor> {
        check_dims("the denoiser's output", output.dims(), self.images.dims(), "that of images")?;
        check_float("dtype of the denoiser's output", output.dtype())?;
        Ok(output.to_dtype(self.images.dtype())?)
    }
}

/// Returns the values of a tensor in f64. All sums of an evaluation are computed in f64.
pub(super) fn host(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Reports a step. Returns whether the evaluation continues.
pub(super) fn report(
    seen: &mut impl FnMut(Evaluated) -> Result<ControlFlow<()>>,
    done: usize,
    total: usize,
) -> Result<bool> {
    Ok(seen(Evaluated { done, total })?.is_continue())
}
