//! The operations on candle tensors, differentiable by candle. They use a kernel if there is one for the
//! device and the dtype, and the [reference](mod@super::reference) composition otherwise.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::cpu::conv::algorithm::{Math, Workspace};
use super::cpu::conv::epilogue::Epilogue;
use super::cpu::conv::plan::{PackedOnce, Plan};
use super::cpu::isa::Isa;
use super::cpu::linear::{linear_forward, linear_input_gradient, linear_weight_gradient};
use super::cpu::norm::Normalization;
use super::cpu::reduce::{sum_over_batch, sums_by_image};
use super::op::activation::Activation;
use super::op::conv::{ConvShape, Scale};
use super::op::norm::NormConfig;
use super::reference;
use super::slices::{contiguous, on_cpu_in_f32, with_values, zeros};

pub(crate) use super::reference::attention::attention;

/// Computes a convolution with zero padding of half the kernel. See [`ConvShape`] for the dimensions. `bias`
/// is (out). Weights that do not change are `packed` once.
pub(crate) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    scale: Scale,
    packed: Option<&Arc<PackedOnce>>,
) -> Result<Tensor> {
    if on_cpu_in_f32(x) {
        apply([x, weight, bias], Conv2d { isa: Isa::detect(), scale, packed: packed.cloned() })
    } else {
        reference::conv::conv2d(x, weight, bias, scale)
    }
}

/// Computes the GroupNorm of `x` (batch, height, width, channels), with `weight` and `bias` (channels).
pub(crate) fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    config: NormConfig,
) -> Result<Tensor> {
    if on_cpu_in_f32(x) {
        apply([x, weight, bias], GroupNorm { isa: Isa::detect(), config })
    } else {
        reference::norm::group_norm(x, weight, bias, config)
    }
}

/// Computes the GroupNorm of `x`, modulated by the scales and shifts `by` (batch, 1, 1, 2 channels).
pub(crate) fn modulated_group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    by: &Tensor,
    config: NormConfig,
) -> Result<Tensor> {
    let plain = NormConfig { activation: Activation::None, ..config };
    reference::norm::modulated(&group_norm(x, weight, bias, plain)?, by, config.activation)
}

/// Computes `x W^T + b`: `x` (batch, in), `weight` (out, in), `bias` (out).
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if on_cpu_in_f32(x) {
        apply([x, weight, bias], Linear { isa: Isa::detect() })
    } else {
        reference::linear::linear(x, weight, bias)
    }
}

/// The values of a tensor, and its dimensions.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    dims: &'a [usize],
    values: &'a [f32],
}

/// A kernel for CPUs with an input, a weight and a bias, and its backward pass.
pub(super) trait Kernel: Send + Sync {
    const NAME: &'static str;

    /// Returns the output and its dimensions.
    fn forward(&self, inputs: [Values<'_>; 3]) -> Result<(Vec<f32>, Vec<usize>)>;

    /// Returns the gradients of the inputs from the gradient of the output. The gradient of the first input
    /// may be absent if it is not `wanted`.
    fn backward(&self, inputs: [Values<'_>; 3], dy: &[f32], wanted: bool) -> Result<Gradients>;
}

type Gradients = (Option<Vec<f32>>, Vec<f32>, Vec<f32>);

/// Applies a kernel to f32 tensors on the CPU.
pub(super) fn apply<K: Kernel + 'static>(
    [x, weight, bias]: [&Tensor; 3],
    kernel: K,
) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Differentiable(kernel))
}

/// A kernel as an operation of candle.
struct Differentiable<K>(K);

impl<K: Kernel> CustomOp3 for Differentiable<K> {
    fn name(&self) -> &'static str {
        K::NAME
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
        let (y, dims) = self.0.forward([
            Values { dims: x_layout.dims(), values: contiguous(x, x_layout)? },
            Values { dims: weight_layout.dims(), values: contiguous(weight, weight_layout)? },
            Values { dims: bias_layout.dims(), values: contiguous(bias, bias_layout)? },
        ])?;
        Ok((CpuStorage::F32(y), Shape::from(dims)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dims, dy) = ([x, weight, bias].map(Tensor::dims), dy.contiguous()?);
        // The images at the input of a network need no gradient.
        let wanted = x.track_op();
        let values = [x, weight, bias, &dy];
        let (dx, dweight, dbias) = with_values(values, |[x, weight, bias, dy]| {
            let [x_dims, weight_dims, bias_dims] = dims;
            let x = Values { dims: x_dims, values: x };
            let weight = Values { dims: weight_dims, values: weight };
            let bias = Values { dims: bias_dims, values: bias };
            self.0.backward([x, weight, bias], dy, wanted)
        })??;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((
            dx.map(|dx| tensor(dx, x)).transpose()?,
            Some(tensor(dweight, weight)?),
            Some(tensor(dbias, bias)?),
        ))
    }
}

/// A convolution.
pub(super) struct Conv2d {
    pub isa: Isa,
    pub scale: Scale,
    /// The packed weights, if they do not change.
    pub packed: Option<Arc<PackedOnce>>,
}

impl Conv2d {
    fn plan(&self, x: Values<'_>, weight: Values<'_>) -> Result<Plan> {
        let dims = Shape::from(x.dims).dims4()?.into();
        let shape = ConvShape::new(dims, weight.dims, self.scale);
        Ok(Plan::new(self.isa, shape.map_err(candle_core::Error::wrap)?, Math::F32))
    }
}

impl Kernel for Conv2d {
    const NAME: &'static str = "conv2d";

    fn forward(&self, [x, weight, bias]: [Values<'_>; 3]) -> Result<(Vec<f32>, Vec<usize>)> {
        let plan = self.plan(x, weight)?;
        let mut y = zeros(plan.output().iter().product())?;
        let epilogue = Epilogue { bias: Some(bias.values), ..Epilogue::default() };
        match &self.packed {
            Some(packed) => {
                plan.forward(x.values, packed.get(&plan, weight.values), epilogue, &mut y);
            }
            None => {
                let packed = plan.pack(weight.values, &mut Workspace::default());
                plan.forward(x.values, &packed, epilogue, &mut y);
            }
        }
        Ok((y, plan.output().to_vec()))
    }

    fn backward(
        &self,
        [x, weight, bias]: [Values<'_>; 3],
        dy: &[f32],
        wanted: bool,
    ) -> Result<Gradients> {
        let plan = self.plan(x, weight)?;
        let mut workspace = Workspace::default();
        let mut dx = None;
        if wanted {
            let dx = dx.insert(zeros(x.values.len())?);
            plan.input_gradient(dy, weight.values, dx, false, &mut workspace);
        }
        let mut dweight = vec![0f32; weight.values.len()];
        plan.weight_gradient(x.values, dy, &mut dweight, &mut workspace);
        let [batch, _, _, channels] = plan.output();
        let mut dbias = vec![0f32; bias.values.len()];
        sum_over_batch(&sums_by_image(dy, batch, channels), &mut dbias);
        Ok((dx, dweight, dbias))
    }
}

/// A normalisation.
pub(super) struct GroupNorm {
    pub isa: Isa,
    pub config: NormConfig,
}

impl GroupNorm {
    fn with<'a>(&self, weight: Values<'a>, bias: Values<'a>) -> Normalization<'a> {
        let Self { isa, config } = *self;
        Normalization { isa, config, weight: weight.values, bias: bias.values }
    }
}

impl Kernel for GroupNorm {
    const NAME: &'static str = "group_norm";

    fn forward(&self, [x, weight, bias]: [Values<'_>; 3]) -> Result<(Vec<f32>, Vec<usize>)> {
        let (batch, ..) = Shape::from(x.dims).dims4()?;
        let mut y = zeros(x.values.len())?;
        self.with(weight, bias).forward(batch, x.values, &mut y);
        Ok((y, x.dims.to_vec()))
    }

    fn backward(
        &self,
        [x, weight, bias]: [Values<'_>; 3],
        dy: &[f32],
        _: bool,
    ) -> Result<Gradients> {
        let mut dx = dy.to_vec();
        let norm = self.with(weight, bias);
        let statistics = norm.stats(x.dims[0], x.values);
        let (dweight, dbias) = norm.backward(x.values, &statistics, &mut dx, None);
        Ok((Some(dx), dweight, dbias))
    }
}

/// A linear layer.
pub(super) struct Linear {
    pub isa: Isa,
}

impl Kernel for Linear {
    const NAME: &'static str = "linear";

    fn forward(&self, [x, weight, bias]: [Values<'_>; 3]) -> Result<(Vec<f32>, Vec<usize>)> {
        let (batch, input) = Shape::from(x.dims).dims2()?;
        let (output, columns) = Shape::from(weight.dims).dims2()?;
        if input != columns {
            candle_core::bail!("{input} inputs for a linear layer of {columns}")
        }
        let mut y = zeros(batch * output)?;
        linear_forward(self.isa, x.values, weight.values, bias.values, &mut y);
        Ok((y, vec![batch, output]))
    }

    fn backward(
        &self,
        [x, weight, bias]: [Values<'_>; 3],
        dy: &[f32],
        _: bool,
    ) -> Result<Gradients> {
        let output = bias.values.len();
        let (mut dx, mut dweight) = (zeros(x.values.len())?, zeros(weight.values.len())?);
        linear_input_gradient(self.isa, weight.values, output, dy, &mut dx);
        linear_weight_gradient(self.isa, x.values, output, dy, &mut dweight);
        let mut dbias = vec![0f32; output];
        sum_over_batch(dy, &mut dbias);
        Ok((Some(dx), dweight, dbias))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kernels::cpu::norm::RUN;
    use crate::kernels::suite::{ConvArithmetic, ConvCase, Found, LinearCase, NormCase, Subject};
    use crate::kernels::tests::{Products, value_and_gradients};
    use candle_core::{DType, Device};

    pub(crate) fn subjects() -> Vec<Box<dyn Subject>> {
        Isa::available()
            .into_iter()
            .map(|isa| Box::new(Autograd(isa)) as Box<dyn Subject>)
            .collect()
    }

    /// The operations on candle tensors in an instruction set, differentiated by candle.
    struct Autograd(Isa);

    /// Computes the results of an operation on an input, a weight and a bias.
    fn found(
        inputs: [&Tensor; 3],
        dy: &Tensor,
        f: impl Fn([&Tensor; 3]) -> Result<Tensor>,
    ) -> Result<Found> {
        let inputs = inputs.map(Tensor::clone);
        let f = |v: &[Tensor]| f([&v[0], &v[1], &v[2]]);
        let all = value_and_gradients(DType::F32, &inputs, |_| dy.clone(), f)?;
        Ok(["y", "dx", "dweight", "dbias"].into_iter().zip(all).collect())
    }

    impl Subject for Autograd {
        fn name(&self) -> String {
            format!("autograd in {}", self.0.name())
        }

        fn convolution_arithmetic(&self, shape: &ConvShape) -> ConvArithmetic {
            let winograd = Plan::new(self.0, *shape, Math::F32).winograd();
            ConvArithmetic { products: Products::PLAIN, operands: DType::F32, winograd }
        }

        fn norm_arithmetic(&self) -> (usize, f64) {
            (RUN, 0.0)
        }

        fn convolution(&self, case: &ConvCase) -> Result<Found> {
            let ConvCase { shape, x, weight, dy, bias, .. } = case;
            let nothing = Tensor::zeros(shape.c_out, DType::F32, &Device::Cpu)?;
            let conv = |v: [&Tensor; 3]| {
                apply(v, Conv2d { isa: self.0, scale: shape.scale, packed: None })
            };
            let mut found = found([x, weight, bias.as_ref().unwrap_or(&nothing)], dy, conv)?;
            let (y_before, dx_before) = match &case.before {
                Some([y, dx]) => (Some(y), Some(dx)),
                None => (None, None),
            };
            let added = [case.per_image.as_ref(), case.residual.as_ref(), y_before];
            for term in added.into_iter().flatten() {
                found[0].1 = found[0].1.broadcast_add(term)?;
            }
            if let Some(dx_before) = dx_before {
                found[1].1 = (&found[1].1 + dx_before)?;
            }
            Ok(found)
        }

        fn normalization(&self, case: &NormCase) -> Result<Found> {
            let NormCase { config, x, weight, bias, dy, more } = case;
            let norm = |v: [&Tensor; 3]| apply(v, GroupNorm { isa: self.0, config: *config });
            let mut found = found([x, weight, bias], dy, norm)?;
            if let Some(more) = more {
                found[1].1 = (&found[1].1 + more)?;
            }
            Ok(found)
        }

        fn linear(&self, case: &LinearCase) -> Result<Found> {
            let LinearCase { activation, x, weight, bias, dy } = case;
            found([x, weight, bias], dy, |[x, weight, bias]| {
                let x = reference::linear::activated(*activation, x)?;
                apply([&x, weight, bias], Linear { isa: self.0 })
            })
        }
    }
}
