//! The heavy operations, behind one seam: networks call these functions and know nothing of how
//! they are computed.
//!
//! Feature maps are channels-last in here, contiguous (batch, height, width, channels): a
//! convolution is then a matrix product over pixels, and a normalisation reads memory in order.
//! Weights keep PyTorch's layouts, which are those of the files.
//!
//! Each operation has a reference composition of plain candle operations, which runs wherever
//! there is no kernel for it and is the oracle for the kernels' values and gradients.

mod adam;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod bf16;
mod conv;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod elementwise;
mod gemm;
mod group_norm;
mod half_conv;
mod linear;
mod maps;
mod patches;
mod process;
mod product;
mod simd;
mod strips;
mod values;
mod winograd;

use candle_core::{Result, Tensor};

pub(crate) use adam::{AdamStep, sum_of_squares};
pub(crate) use attention::{AttentionSizes, attention};
pub(crate) use conv::{Convolution, Weights, Workspace, conv2d, sum_over_batch, sums_by_image};
pub(crate) use group_norm::{Activation, Normalization, Stats, group_norm};
pub(crate) use linear::{linear, linear_forward, linear_input_gradient, linear_weight_gradient};
pub(crate) use maps::{concatenate, scale_maps, split};
pub(crate) use patches::Scale;
#[cfg(feature = "cuda")]
pub(crate) use process::mix;
pub(crate) use process::{
    add_to, add_values, are_plain, clamp, combine, squared_error, weighted_sum,
};
pub(crate) use simd::{Isa, check_limit};
pub(crate) use values::{on_cpu_in_f32, same_storage, with_values, with_values_mut};
pub(crate) use winograd::Epilogue;

/// (batch, channels, height, width) to (batch, height, width, channels).
pub(crate) fn to_channels_last(images: &Tensor) -> Result<Tensor> {
    images.permute((0, 2, 3, 1))?.contiguous()
}

/// (batch, height, width, channels) to (batch, channels, height, width).
pub(crate) fn to_channels_first(maps: &Tensor) -> Result<Tensor> {
    maps.permute((0, 3, 1, 2))?.contiguous()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor, Var};

    use crate::noise::{Noise, Purpose};

    /// Asserts that a kernel in f32 and its composition in f64 give the same values and gradients,
    /// on normal inputs of these shapes.
    pub(super) fn agrees(
        shapes: &[Vec<usize>],
        kernel: impl Fn(&[Tensor]) -> Result<Tensor>,
        composed: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) {
        agrees_within(2e-6, shapes, kernel, composed);
    }

    /// As [`agrees`], with this relative error.
    pub(super) fn agrees_within(
        tolerance: f64,
        shapes: &[Vec<usize>],
        kernel: impl Fn(&[Tensor]) -> Result<Tensor>,
        composed: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) {
        let normal = |i: usize, shape: &[usize]| {
            let values = Noise::new(5).normal(Purpose::Prior, i as u64, shape, &Device::Cpu);
            values.unwrap()
        };
        // The loss weighs every output differently, so that none can stand in for another.
        let run = |dtype: DType, f: &dyn Fn(&[Tensor]) -> Result<Tensor>| -> Result<Vec<Tensor>> {
            let vars: Vec<Var> = shapes
                .iter()
                .enumerate()
                .map(|(i, shape)| Var::from_tensor(&normal(i, shape).to_dtype(dtype)?))
                .collect::<Result<_>>()?;
            let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let y = f(&inputs)?;
            let weights = normal(99, y.dims()).to_dtype(dtype)?;
            let gradients = (&y * weights)?.sum_all()?.backward()?;
            let mut results = vec![y];
            for var in &vars {
                results.push(gradients.get(var).expect("a gradient").clone());
            }
            Ok(results)
        };
        let ours = run(DType::F32, &kernel).unwrap();
        let theirs = run(DType::F64, &composed).unwrap();
        for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert_eq!(ours.dims(), theirs.dims());
            let ours = ours.to_dtype(DType::F64).unwrap();
            let norm =
                |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
            let error = norm(&(ours - theirs).unwrap());
            let limit = tolerance * (1.0 + norm(theirs));
            assert!(
                error <= limit,
                "{}: off by {error:e}, more than {limit:e}",
                ["value", "gradient of x", "gradient of weight", "gradient of bias"][i]
            );
        }
    }
}
