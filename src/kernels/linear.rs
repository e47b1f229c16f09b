use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::conv::sum_over_batch;
use super::gemm::{Mat, gemm};
use super::values::{contiguous, on_cpu_in_f32, with_values};

/// `x W^T + b`: `x` (batch, in), `weight` (out, in), `bias` (out).
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if on_cpu_in_f32(x) {
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear)
    } else {
        composed(x, weight, bias)
    }
}

fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}

/// On the CPU: a product for each row. How a product's sums are blocked depends on its shape, so one
/// product for the whole batch would make an image's result depend on the size of its batch. With a
/// batch of time embeddings there is no time to lose.
pub(crate) fn linear_forward(x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32]) {
    let output = bias.len();
    let input = weight.len() / output;
    let weight = Mat::new(weight, output, input).transposed();
    for (y, x) in y.chunks_mut(output).zip(x.chunks(input)) {
        y.copy_from_slice(bias);
        gemm(y, Mat::new(x, 1, input), weight, true);
    }
}

/// The gradient of `x` from `dy` (batch, `output`).
pub(crate) fn linear_input_gradient(weight: &[f32], output: usize, dy: &[f32], dx: &mut [f32]) {
    let (batch, input) = (dy.len() / output, weight.len() / output);
    gemm(dx, Mat::new(dy, batch, output), Mat::new(weight, output, input), false);
}

/// The gradient of the weight from `dy` (batch, `output`).
pub(crate) fn linear_weight_gradient(x: &[f32], output: usize, dy: &[f32], dweight: &mut [f32]) {
    let (batch, input) = (dy.len() / output, dweight.len() / output);
    let rows = Mat::new(dy, batch, output);
    gemm(dweight, rows.transposed(), Mat::new(x, batch, input), false);
}

struct Linear;

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
        let mut y = vec![0f32; batch * output];
        let (weight, bias) = (contiguous(weight, weight_layout)?, contiguous(bias, bias_layout)?);
        linear_forward(contiguous(x, x_layout)?, weight, bias, &mut y);
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
            let [mut dx, mut dweight] = [x, weight].map(|values| vec![0f32; values.len()]);
            linear_input_gradient(weight, output, dy, &mut dx);
            linear_weight_gradient(x, output, dy, &mut dweight);
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
    use super::super::tests::agrees;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn kernel_agrees_with_its_composition(
            batch in 1usize..9, input in 1usize..40, output in 1usize..40,
        ) {
            agrees(
                &[vec![batch, input], vec![output, input], vec![output]],
                |v| linear(&v[0], &v[1], &v[2]),
                |v| composed(&v[0], &v[1], &v[2]),
            );
        }
    }
}
