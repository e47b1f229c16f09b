//! Passes of networks without conditions, on plain tensors.
#![allow(dead_code)]

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use ddpm::Result;
use ddpm::nn::Dropout;
use ddpm::nn::{Condition, Output, Trainable};

/// Computes the prediction of a training pass.
pub fn train(
    network: &impl Trainable,
    x_t: &Tensor,
    t: &Tensor,
    dropout: &Dropout,
) -> Result<Tensor> {
    Ok(network.denoise_train(x_t, t, &Condition::None, dropout)?.prediction)
}

/// Computes the gradients of all weights.
pub fn gradients(
    network: &impl Trainable,
    x_t: &Tensor,
    t: &Tensor,
    dropout: &Dropout,
    d_output: &mut (dyn FnMut(&Tensor) -> Result<Tensor> + Send),
) -> Result<GradStore> {
    let mut d_output = |output: &Output| d_output(&output.prediction).map(Output::new);
    network.gradients(x_t, t, &Condition::None, dropout, &mut d_output)
}
