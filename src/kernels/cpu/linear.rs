//! Linear layers.

use super::gemm::gemm;
use super::gemm::pack::Mat;
use super::isa::Isa;
use super::math::dot;
use super::simd::simd_fn;

simd_fn! {
    /// Writes `y = x W^T + b`. The weights are not packed: the batch of time embeddings is too small for
    /// that to pay.
    pub(crate) fn linear_forward<S>(x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32]) {
        let output = bias.len();
        let input = weight.len() / output;
        for (y, x) in y.chunks_exact_mut(output).zip(x.chunks_exact(input)) {
            for ((y, weight), bias) in y.iter_mut().zip(weight.chunks_exact(input)).zip(bias) {
                *y = dot::<S>(x, weight) + bias;
            }
        }
    }
}

/// Writes the gradient of `x` from `dy` (batch, `output`).
pub(crate) fn linear_input_gradient(
    isa: Isa,
    weight: &[f32],
    output: usize,
    dy: &[f32],
    dx: &mut [f32],
) {
    let (batch, input) = (dy.len() / output, weight.len() / output);
    let weight = Mat::new(weight, output, input);
    gemm(isa, (dx, input), Mat::new(dy, batch, output), weight, false);
}

/// Writes the gradient of the weight from `dy` (batch, `output`).
pub(crate) fn linear_weight_gradient(
    isa: Isa,
    x: &[f32],
    output: usize,
    dy: &[f32],
    dweight: &mut [f32],
) {
    let (batch, input) = (dy.len() / output, dweight.len() / output);
    let turned = Mat::new(dy, batch, output).transposed();
    gemm(isa, (dweight, input), turned, Mat::new(x, batch, input), false);
}
