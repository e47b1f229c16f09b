use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::conv::sum_over_batch;
use super::elementwise::dot;
use super::gemm::{Mat, gemm};
use super::simd::{Isa, simd_fn};
use super::values::{contiguous, on_cpu_in_f32, with_values, zeros};

/// `x W^T + b`: `x` (batch, in), `weight` (out, in), `bias` (out).
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if on_cpu_in_f32(x) {
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear(Isa::detect()))
    } else {
        composed(x, weight, bias)
    }
}

fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}

simd_fn! {
    /// `y` on the CPU. With a batch of time embeddings there is no time to lose: weights are read as they
    /// lie.
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

/// The gradient of `x` from `dy` (batch, `output`).
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

/// The gradient of the weight from `dy` (batch, `output`).
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

struct Linear(Isa);

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, input) = x_layout.shape().dims2()?;
        let (output, weight_in) = weight_layout.shape().dims2()?;
        if weight_in != input {
            candle_core::bail!(
                "linear of {batch} x {input} with a weight of {output} x {weight_in}"
            )
        }
        let mut y = zeros(batch * output)?;
        let (weight, bias) = (contiguous(weight, weight_layout)?, contiguous(bias, bias_layout)?);
        linear_forward(self.0, contiguous(x, x_layout)?, weight, bias, &mut y);
        Ok((CpuStorage::F32(y), Shape::from((batch, output))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (output, dy) = (weight.dim(0)?, dy.contiguous()?);
        let (dx, dweight, dbias) = with_values([x, weight, &dy], |[x, weight, dy]| {
            let (mut dx, mut dweight) = (zeros(x.len())?, zeros(weight.len())?);
            linear_input_gradient(self.0, weight, output, dy, &mut dx);
            linear_weight_gradient(self.0, x, output, dy, &mut dweight);
            let mut dbias = vec![0f32; output];
            sum_over_batch(dy, &mut dbias);
            Ok((dx, dweight, dbias))
        })?;
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dweight, weight.shape(), device)?),
            Some(Tensor::from_vec(dbias, output, device)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{Normals, agrees};
    use crate::random_inputs::inputs;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(inputs(64))]

        #[test]
        fn kernel_agrees_with_its_composition(
            batch in 1usize..9, input in 1usize..40, output in 1usize..40, seed: u64,
        ) {
            let composed = |v: &[Tensor]| composed(&v[0], &v[1], &v[2]);
            agrees(
                Normals(seed),
                &[vec![batch, input], vec![output, input], vec![output]],
                |isa, v| v[0].apply_op3(&v[1], &v[2], Linear(isa)),
                composed,
                composed,
                0.0,
            );
        }
    }
}
