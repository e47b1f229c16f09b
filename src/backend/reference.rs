//! The specification: each formula once, composed of candle operations.

use candle_core::{DType, Device, Tensor, Var};

use super::ops::{Backend, Rates};
use super::update::{Factors, MuonRule, UpdateRule, Updater, WeightState};
use crate::error::{Error, Result};
use crate::kernels::op::counters::Counters;
use crate::kernels::op::loss::Loss;
use crate::kernels::op::muon::{COEFFICIENTS, ITERATIONS, LEAST_NORM, scale};

/// Candle's operations, for every device and floating-point dtype. They support gradients.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reference;

impl Backend for Reference {
    fn mix(&self, x: &Tensor, y: &Tensor, t: &Tensor, rates: Rates<'_>) -> Result<Tensor> {
        let mut shape = vec![1; x.rank()];
        shape[0] = t.dim(0)?;
        // candle treats the largest number of the index dtype as padding, and returns zeros for it. In i64 no u8 or u32
        // is that number.
        let t = t.to_dtype(DType::I64)?;
        let table = rates.table();
        let factor = |which: usize| -> Result<Tensor> {
            let column: Vec<f64> = table.iter().map(|factors| factors[which]).collect();
            let column = Tensor::from_vec(column, table.len(), &Device::Cpu)?
                .to_dtype(x.dtype())?
                .to_device(x.device())?;
            Ok(column.index_select(&t, 0)?.reshape(shape.as_slice())?)
        };
        Ok((x.broadcast_mul(&factor(0)?)? + y.broadcast_mul(&factor(1)?)?)?)
    }

    fn combine(&self, x: &Tensor, a: f64, y: &Tensor, b: f64) -> Result<Tensor> {
        Ok((x.affine(a, 0.0)? + y.affine(b, 0.0)?)?)
    }

    fn clamp(&self, x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
        Ok(x.clamp(low, high)?)
    }

    fn squared_error(
        &self,
        output: &Tensor,
        target: &Tensor,
        scale: f64,
        gradient_scale: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let error = (output - target)?;
        let factor = 2.0 * scale * value_of(gradient_scale)?;
        Ok(((error.sqr()?.sum_all()? * scale)?, (error * factor)?))
    }

    fn loss(
        &self,
        loss: Loss,
        [error, weights]: [&Tensor; 2],
        scale: f64,
        gradient_scale: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let (value, slope) = match loss {
            Loss::Mse => (error.sqr()?, (error * 2.0)?),
            Loss::L1 => (error.abs()?, error.sign()?),
            Loss::Huber { delta } => {
                let near = error.clamp(-delta, delta)?;
                ((&near * (error - (&near * 0.5)?)?)?, near)
            }
        };
        let mut shape = vec![1; error.rank()];
        shape[0] = weights.elem_count();
        let weights = weights.reshape(shape)?;
        let sum = value.broadcast_mul(&weights)?.sum_all()?;
        let factor = scale * value_of(gradient_scale)?;
        Ok(((sum * scale)?, (slope.broadcast_mul(&weights)? * factor)?))
    }

    fn add_to(&self, sum: &mut Tensor, more: &Tensor) -> Result<()> {
        *sum = (&*sum + more)?;
        Ok(())
    }

    /// The update of PyTorch's `Adam` and `AdamW`. Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019,
    /// algorithm 2.
    fn adam(&self, weights: Vec<WeightState<'_>>, factors: &Factors) -> Result<()> {
        let Factors { beta1, beta2, eps, step_size, root_scale, .. } = *factors;
        for own in weights {
            if let (Some(gradient), None) = (&own.gradient, &own.square) {
                muon(own.weight, own.mean, gradient, factors)?;
            } else if let (Some(gradient), Some(own_square)) = (own.gradient, own.square) {
                let mut weight = own.weight.as_detached_tensor();
                let mut gradient = gradient.clone();
                if factors.gradient_scale != 1.0 {
                    gradient = gradient.affine(factors.gradient_scale, 0.0)?;
                }
                if factors.l2 != 0.0 {
                    gradient = (gradient + weight.affine(factors.l2, 0.0)?)?;
                }
                if factors.keep != 1.0 {
                    weight = weight.affine(factors.keep, 0.0)?;
                }
                let mean = self.combine(own.mean, beta1, &gradient, 1.0 - beta1)?;
                let square = self.combine(own_square, beta2, &gradient.sqr()?, 1.0 - beta2)?;
                (*own.mean, *own_square) = (mean.detach(), square.detach());
                let root = own_square.sqrt()?.affine(root_scale, eps)?;
                let update = own.mean.affine(step_size, 0.0)?.div(&root)?;
                own.weight.set(&(weight - update)?)?;
            }
            if let Some(average) = own.average {
                let (decay, weight) = (factors.average, own.weight.as_detached_tensor());
                *average = self.combine(average, decay, &weight, 1.0 - decay)?;
            }
        }
        Ok(())
    }

    fn updater(&self, _: &Device) -> Box<dyn Updater> {
        Box::new(*self)
    }
}

impl Updater for Reference {
    fn update(
        &mut self,
        mut weights: Vec<WeightState<'_>>,
        rule: &UpdateRule,
        learning_rate: f64,
        counters: &mut Counters,
    ) -> Result<Tensor> {
        let mut gradients: Vec<&mut Tensor> =
            weights.iter_mut().filter_map(|own| own.gradient.as_deref_mut()).collect();
        if rule.scale.is_some() {
            let unscale = rule.unscale(counters);
            for gradient in &mut gradients {
                **gradient = gradient.affine(unscale, 0.0)?;
            }
        }
        let norm = clip_norm(gradients, rule.max_norm)?;
        if let Some(scale) = &rule.scale {
            let finite = norm.to_dtype(DType::F64)?.to_scalar::<f64>()?.is_finite();
            scale.adapt(counters, finite);
            if !finite {
                return Ok(norm);
            }
        }
        let factors = rule.begin(counters, learning_rate, 1.0);
        self.adam(weights, &factors)?;
        Ok(norm)
    }
}

/// The update of Muon for a matrix, or for a kernel as the matrix (output, rest). Jordan et al. 2024. As in PyTorch,
/// the momentum is a mean: its scale does not change the orthogonalised matrix.
fn muon(weight: &Var, momentum: &mut Tensor, gradient: &Tensor, factors: &Factors) -> Result<()> {
    let Some(MuonRule { momentum: decay, nesterov, decoupled }) = factors.muon else {
        return Err(Error::config(
            "muon",
            "missing",
            "present for a weight without a mean of squares",
        ));
    };
    let gradient = gradient.affine(factors.gradient_scale, 0.0)?;
    *momentum = Reference.combine(momentum, decay, &gradient, 1.0 - decay)?.detach();
    let update = match nesterov {
        true => Reference.combine(momentum, decay, &gradient, 1.0 - decay)?,
        false => momentum.clone(),
    };
    let matrix = update.flatten_from(1)?;
    let size = scale(matrix.dims2()?) * factors.learning_rate;
    let update = orthogonalized(&matrix)?.affine(size, 0.0)?.reshape(weight.shape())?;
    let keep = 1.0 - factors.learning_rate * decoupled;
    Ok(weight.set(&(weight.as_detached_tensor().affine(keep, 0.0)? - update)?)?)
}

/// Replaces the singular values of a matrix by values near 1; see [`kernels::op::muon`](crate::kernels::op::muon).
fn orthogonalized(matrix: &Tensor) -> Result<Tensor> {
    let (rows, cols) = matrix.dims2()?;
    if rows > cols {
        return Ok(orthogonalized(&matrix.t()?.contiguous()?)?.t()?.contiguous()?);
    }
    let norm = matrix.sqr()?.sum_all()?.sqrt()?.maximum(LEAST_NORM)?;
    let mut x = matrix.broadcast_div(&norm)?;
    let [a, b, c] = COEFFICIENTS;
    for _ in 0..ITERATIONS {
        let product = x.matmul(&x.t()?)?;
        let more = (product.affine(b, 0.0)? + product.matmul(&product)?.affine(c, 0.0)?)?;
        x = (x.affine(a, 0.0)? + more.matmul(&x)?)?;
    }
    Ok(x)
}

/// Scales all gradients so that their global L2 norm is at most `max_norm`. Returns the norm before clipping, which
/// stays on the device. An infinite `max_norm` does not clip. The method is that of PyTorch's `clip_grad_norm_`;
/// Pascanu et al. 2013.
///
/// # Errors
/// Returns an error if there are no gradients.
pub(crate) fn clip_norm(gradients: Vec<&mut Tensor>, max_norm: f64) -> Result<Tensor> {
    let squares: Vec<Tensor> =
        gradients.iter().map(|g| g.sqr()?.sum_all()).collect::<candle_core::Result<_>>()?;
    if squares.is_empty() {
        let expected = "one or more: does the loss depend on any weight?";
        return Err(Error::config("gradients", "empty", expected));
    }
    let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?;
    if max_norm.is_finite() {
        let scale = (norm.affine(1.0, 1e-6)?.recip()? * max_norm)?.minimum(1.0)?;
        for gradient in gradients {
            *gradient = gradient.broadcast_mul(&scale)?;
        }
    }
    Ok(norm)
}

/// Returns the value of a scalar of f32, or 1 if there is none.
pub(super) fn value_of(scale: Option<&Tensor>) -> Result<f64> {
    Ok(match scale {
        Some(scale) => f64::from(scale.to_scalar::<f32>()?),
        None => 1.0,
    })
}
