//! The gradient norm of each layer.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::trainer::Trainer;
use crate::backend;
use crate::data::loader::Batch;
use crate::error::Result;
use crate::model::Architecture;

impl<N: Architecture> Trainer<N> {
    /// Computes the gradient norm (L2) of each layer, without changing the run.
    ///
    /// The gradient is that of the next [`step`](Self::step) with this batch, before clipping. Timesteps, noise and
    /// dropout are the same. A layer consists of the weights whose names differ only after the last dot. The root of
    /// the sum of the squares of all norms equals [`Update::grad_norm`](crate::train::Update::grad_norm) of that update
    /// up to rounding.
    /// With [`Precision::F16`](crate::Precision::F16), norms are not finite after an overflow.
    ///
    /// The computation takes as long as an update. It reads each norm, so it waits for the device. On a CUDA device, the
    /// next updates are not launched as a CUDA graph until one is captured again.
    ///
    /// # Errors
    /// Returns the errors of [`step`](Self::step).
    pub fn gradient_norms(&mut self, batch: impl Into<Batch>) -> Result<BTreeMap<String, f64>> {
        let batch = batch.into();
        self.check_batch(&batch)?;
        let (executor, mut context) = self.context();
        let (gradients, scale) = executor.gradients(&mut context, &batch)?;
        let scale = scale.map_or(Ok(1.0), |scale| scalar(&scale))?;
        let mut squares = BTreeMap::<String, f64>::new();
        for (name, gradient) in &gradients {
            let layer = name.rsplit_once('.').map_or(name.as_str(), |(layer, _)| layer);
            *squares.entry(layer.into()).or_default() += square(gradient)?;
        }
        context.recycle(gradients);
        Ok(squares.into_iter().map(|(layer, square)| (layer, square.sqrt() / scale)).collect())
    }
}

/// Computes the sum of squares, as the squared error of zeros. Every device has kernels for both.
fn square(gradient: &Tensor) -> Result<f64> {
    let backend = backend::of(gradient);
    let zeros = backend.combine(gradient, 0.0, gradient, 0.0)?;
    scalar(&backend.squared_error(gradient, &zeros, 1.0, None)?.0)
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_scalar()?)
}
