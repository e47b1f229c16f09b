//! The operations in f32 on the CPU, computed by kernels on slices. Candle's own operations use a second thread pool
//! for 65,536 values or more, which competes with the pool of this crate.

use std::cmp::Reverse;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::ops::{Backend, Rates};
use super::reference::{Reference, value_of};
use super::update::{Factors, UpdateRule, Updater, WeightState};
use crate::error::Result;
use crate::kernels::op::counters::Counters;
use crate::kernels::op::loss::Loss;
use crate::kernels::{
    AdamStep, Isa, MuonStep, add_values, all_finite, clamp_values, follow, losses, on_cpu_in_f32,
    same_storage, squared_errors, sum_of_squares, weighted_sum, with_values, with_values_mut,
};
use crate::memory::zeros;

/// The kernels of the CPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cpu;

/// Returns whether the kernels accept these tensors.
fn are_plain(tensors: &[&Tensor]) -> bool {
    let suits = |t: &&Tensor| on_cpu_in_f32(t) && t.is_contiguous() && !t.track_op();
    tensors.iter().all(|t| suits(t) && t.dims() == tensors[0].dims() && t.elem_count() > 0)
}

/// Creates a tensor of the shape of the first of `tensors`, with values written by `f`.
fn written<const N: usize>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N], &mut [f32]),
) -> Result<Tensor> {
    let like = tensors[0];
    let mut values = zeros("the result", like.dims())?;
    with_values(tensors, |tensors| f(tensors, &mut values))?;
    Ok(Tensor::from_vec(values, like.shape(), like.device())?)
}

impl Backend for Cpu {
    fn mix(&self, x: &Tensor, y: &Tensor, t: &Tensor, rates: Rates<'_>) -> Result<Tensor> {
        if !are_plain(&[x, y]) || !t.device().is_cpu() {
            return Reference.mix(x, y, t, rates);
        }
        let timesteps = t.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let at = |t: i64| (rates.factors)(rates.alpha_bars[t as usize]);
        let factors: Vec<[f64; 2]> = timesteps.into_iter().map(at).collect();
        written([x, y], |[x, y], sum| weighted_sum(x, y, &factors, sum))
    }

    fn combine(&self, x: &Tensor, a: f64, y: &Tensor, b: f64) -> Result<Tensor> {
        if !are_plain(&[x, y]) {
            return Reference.combine(x, a, y, b);
        }
        written([x, y], |[x, y], sum| weighted_sum(x, y, &[[a, b]], sum))
    }

    fn clamp(&self, x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
        if !are_plain(&[x]) {
            return Reference.clamp(x, low, high);
        }
        written([x], |[x], y| clamp_values(x, low, high, y))
    }

    fn squared_error(
        &self,
        output: &Tensor,
        target: &Tensor,
        scale: f64,
        gradient_scale: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        if !are_plain(&[output, target]) {
            return Reference.squared_error(output, target, scale, gradient_scale);
        }
        let factor = (2.0 * scale * value_of(gradient_scale)?) as f32;
        let mut sum = 0.0;
        let gradient = written([output, target], |[output, target], gradient| {
            sum = squared_errors(output, target, factor, gradient);
        })?;
        Ok((Tensor::new((sum * scale) as f32, output.device())?, gradient))
    }

    fn loss(
        &self,
        loss: Loss,
        [error, weights]: [&Tensor; 2],
        scale: f64,
        gradient_scale: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        if !are_plain(&[error]) {
            return Reference.loss(loss, [error, weights], scale, gradient_scale);
        }
        let weights = weights.to_vec1::<f32>()?;
        let factor = (scale * value_of(gradient_scale)?) as f32;
        let mut sum = 0.0;
        let gradient = written([error], |[error], gradient| {
            sum = losses(loss, error, &weights, factor, gradient);
        })?;
        Ok((Tensor::new((sum * scale) as f32, error.device())?, gradient))
    }

    fn finiteness(&self, x: &Tensor) -> Result<Tensor> {
        if !are_plain(&[x]) {
            return Reference.finiteness(x);
        }
        let finite = with_values([x], |[x]| all_finite(x))?;
        Ok(Tensor::new(if finite { 0f32 } else { f32::NAN }, x.device())?)
    }

    fn add_to(&self, sum: &mut Tensor, more: &Tensor) -> Result<()> {
        if !are_plain(&[sum, more]) {
            return Reference.add_to(sum, more);
        }
        let add = |sum: &mut [f32]| with_values([more], |[more]| add_values(sum, more));
        Ok(with_values_mut(sum, add)??)
    }

    fn follow(&self, average: &mut Tensor, weight: &Tensor, decay: f64) -> Result<()> {
        if !are_plain(&[average, weight]) {
            return Reference.follow(average, weight, decay);
        }
        let change = |average: &mut [f32]| {
            with_values([weight], |[weight]| follow(Isa::detect(), decay, average, weight))
        };
        Ok(with_values_mut(average, change)??)
    }

    fn adam(&self, weights: Vec<WeightState<'_>>, factors: &Factors) -> Result<()> {
        if !have_kernel(&weights) {
            return Reference.adam(weights, factors);
        }
        let (step, isa) = (AdamStep::from(factors), Isa::detect());
        let (matrices, others): (Vec<_>, Vec<_>) =
            weights.into_iter().partition(|own| own.square.is_none() && own.gradient.is_some());
        others.into_iter().try_for_each(|own| update(isa, &step, own))?;
        muon(isa, &step, matrices, factors)
    }

    fn updater(&self, _: &Device) -> Box<dyn Updater> {
        Box::new(*self)
    }
}

impl Updater for Cpu {
    fn update(
        &mut self,
        weights: Vec<WeightState<'_>>,
        rule: &UpdateRule,
        learning_rate: f64,
        counters: &mut Counters,
    ) -> Result<Tensor> {
        if weights.iter().all(|own| own.gradient.is_none()) || !have_kernel(&weights) {
            return Reference.update(weights, rule, learning_rate, counters);
        }
        let isa = Isa::detect();
        let mut squares = 0.0;
        for gradient in weights.iter().filter_map(|own| own.gradient.as_deref()) {
            squares += with_values([gradient], |[values]| sum_of_squares(isa, values))?;
        }
        let unscale = rule.unscale(counters);
        let norm = squares.sqrt() * unscale;
        // For larger norms, the square of a gradient may overflow f32, and Adam's mean of squares would stay infinite.
        let norm = if norm < 1e18 { norm } else { norm * f64::INFINITY };
        let result = Tensor::new(norm as f32, &Device::Cpu)?;
        if let Some(scale) = &rule.scale {
            scale.adapt(counters, norm.is_finite());
            if !norm.is_finite() {
                return Ok(result);
            }
        }
        let max_norm = rule.max_norm;
        let clip = if max_norm.is_finite() { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let factors = rule.begin(counters, learning_rate, unscale * clip);
        self.adam(weights, &factors)?;
        Ok(result)
    }
}

fn have_kernel(weights: &[WeightState<'_>]) -> bool {
    let suits = |t: &Tensor| on_cpu_in_f32(t) && t.is_contiguous();
    weights.iter().all(|own| suits(own.weight) && own.gradient.as_deref().is_none_or(suits))
}

impl From<&Factors> for AdamStep {
    fn from(factors: &Factors) -> Self {
        let and_rest = |factor: f64| [factor as f32, (1.0 - factor) as f32];
        Self {
            mean: and_rest(factors.beta1),
            square: and_rest(factors.beta2),
            eps: factors.eps as f32,
            step_size: factors.step_size as f32,
            root_scale: factors.root_scale as f32,
            keep: factors.keep as f32,
            l2: factors.l2 as f32,
            gradient_scale: factors.gradient_scale as f32,
            average: and_rest(factors.average),
        }
    }
}

/// Updates a weight in one pass over memory.
fn update(isa: Isa, step: &AdamStep, own: WeightState<'_>) -> Result<()> {
    let WeightState { weight, mean, square, gradient, average } = own;
    // The weight is locked while it changes, with all tensors that share its memory.
    let shared = |t: &Tensor| {
        same_storage(t, weight) || average.as_deref().is_some_and(|a| same_storage(t, a))
    };
    let gradient = match gradient {
        Some(gradient) if shared(gradient) => Some(gradient.copy()?),
        gradient => gradient.map(|gradient| gradient.clone()),
    };
    let change = |weight: &mut [f32], average: Option<&mut [f32]>| {
        let Some(gradient) = &gradient else {
            if let Some(average) = average {
                step.follow(isa, average, weight);
            }
            return Ok(());
        };
        with_values([gradient], |[gradient]| {
            let Some(square) = square else { return Ok(()) };
            with_values_mut(mean, |mean| {
                with_values_mut(square, |square| {
                    step.apply(isa, weight, gradient, (mean, square), average);
                })
            })?
        })?
    };
    with_values_mut(weight, |weight| match &average {
        Some(average) => with_values_mut(average, |average| change(weight, Some(average)))?,
        None => change(weight, None),
    })??;
    Ok(())
}

/// Updates matrices by Muon. The matrices are orthogonalised together, while no weight is locked.
fn muon(
    isa: Isa,
    adam: &AdamStep,
    matrices: Vec<WeightState<'_>>,
    factors: &Factors,
) -> Result<()> {
    let Some(rule) = factors.muon else { return Ok(()) };
    let step = MuonStep {
        momentum: [rule.momentum as f32, (1.0 - rule.momentum) as f32],
        nesterov: rule.nesterov,
        gradient_scale: factors.gradient_scale as f32,
        keep: (1.0 - factors.learning_rate * rule.decoupled) as f32,
        learning_rate: factors.learning_rate,
    };
    let mut jobs = Vec::new();
    for own in matrices {
        let WeightState { weight, mean, gradient: Some(gradient), average, .. } = own else {
            continue;
        };
        let size = gradient.flatten_from(1)?.dims2()?;
        jobs.push((size, weight, mean, gradient, average));
    }
    // The largest first, one per job, so that threads end at about the same time.
    jobs.sort_by_key(|((rows, cols), ..)| Reverse(rows * cols * rows.min(cols)));
    jobs.into_par_iter().with_max_len(1).try_for_each(|(size, weight, mean, gradient, average)| {
        with_values([&*gradient], |[gradient]| {
            with_values_mut(mean, |momentum| {
                with_values_mut(weight, |weight| {
                    step.update(isa, size, gradient, momentum, weight);
                    match average {
                        Some(average) => {
                            with_values_mut(average, |average| adam.follow(isa, average, weight))
                        }
                        None => Ok(()),
                    }
                })
            })
        })????;
        Ok(())
    })
}
