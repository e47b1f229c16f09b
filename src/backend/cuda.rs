//! The operations in f32 on a CUDA device, computed by the crate's kernels. None of them waits for the device.
#![cfg(feature = "cuda")]

use std::fmt;

use candle_core::{Device, Tensor};

use super::ops::{Backend, Capture, Inputs, Rates, Recordable, Recorded};
use super::reference::Reference;
use super::update::{Factors, UpdateRule, Updater, WeightState};
use crate::error::Result;
use crate::kernels::cuda::{self, Gpu, StepGraph, UpdateSettings, WeightUpdate, are_plain};
use crate::kernels::op::counters::Counters;
use crate::kernels::op::loss::Loss;
use crate::random::Address;

/// The kernels of a CUDA device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cuda;

impl Backend for Cuda {
    fn upload(&self, values: Vec<f32>, dims: &[usize], device: &Device) -> Result<Tensor> {
        Ok(cuda::upload(device, &values, dims)?)
    }

    fn upload_integers(&self, values: Vec<u32>, device: &Device) -> Result<Tensor> {
        Ok(cuda::upload(device, &values, &[values.len()])?)
    }

    fn normal(&self, at: Address, first: u32, dims: &[usize], device: &Device) -> Result<Tensor> {
        Ok(cuda::normals(&*Gpu::of(device)?, at, first, dims)?)
    }

    fn mix(&self, x: &Tensor, y: &Tensor, t: &Tensor, rates: Rates<'_>) -> Result<Tensor> {
        if !are_plain(&[x, y]) || !t.device().same_device(x.device()) {
            return Reference.mix(x, y, t, rates);
        }
        Ok(cuda::mix(x, y, t, &rates.table())?)
    }

    fn combine(&self, x: &Tensor, a: f64, y: &Tensor, b: f64) -> Result<Tensor> {
        if !are_plain(&[x, y]) {
            return Reference.combine(x, a, y, b);
        }
        Ok(cuda::combine(x, a, y, b)?)
    }

    fn clamp(&self, x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
        if !are_plain(&[x]) {
            return Reference.clamp(x, low, high);
        }
        Ok(cuda::clamp(x, low, high)?)
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
        Ok(cuda::squared_error(output, target, scale, gradient_scale)?)
    }

    fn loss(
        &self,
        loss: Loss,
        [error, weights]: [&Tensor; 2],
        scale: f64,
        gradient_scale: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        Reference.loss(loss, [error, weights], scale, gradient_scale)
    }

    fn add_to(&self, sum: &mut Tensor, more: &Tensor) -> Result<()> {
        if !are_plain(&[sum, more]) {
            return Reference.add_to(sum, more);
        }
        Ok(cuda::add_to(sum, more)?)
    }

    fn adam(&self, weights: Vec<WeightState<'_>>, factors: &Factors) -> Result<()> {
        Reference.adam(weights, factors)
    }

    fn updater(&self, device: &Device) -> Box<dyn Updater> {
        Box::new(CudaUpdater { device: device.clone(), current: None })
    }

    fn capture(&self, device: &Device) -> Option<Box<dyn Capture>> {
        Some(Box::new(Graphs(device.clone())))
    }

    fn synchronize(&self, device: &Device) -> Result<()> {
        Ok(Gpu::of(device)?.wait_for_all()?)
    }
}

/// The updates of a run, counted by the device, because it decides which ones are skipped.
struct CudaUpdater {
    device: Device,
    /// The updater on the device, and the device's counters if it has not skipped an update.
    current: Option<(cuda::Updater, Counters)>,
}

impl fmt::Debug for CudaUpdater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaUpdater").field("device", &self.device).finish_non_exhaustive()
    }
}

impl CudaUpdater {
    /// Returns the updater on the device, with these counters.
    fn with(&mut self, counters: &Counters) -> Result<&mut cuda::Updater> {
        let current = match self.current.take().filter(|(_, known)| known == counters) {
            Some(current) => current,
            None => (cuda::Updater::new(&self.device, counters)?, *counters),
        };
        Ok(&mut self.current.insert(current).0)
    }
}

impl Updater for CudaUpdater {
    fn update(
        &mut self,
        mut weights: Vec<WeightState<'_>>,
        rule: &UpdateRule,
        learning_rate: f64,
        counters: &mut Counters,
    ) -> Result<Tensor> {
        let vars: Vec<Tensor> = weights.iter().map(|own| own.weight.as_detached_tensor()).collect();
        let suit = |(own, var): (&WeightState<'_>, &Tensor)| match &own.square {
            Some(square) => are_plain(&[var, own.mean, square]),
            None => rule.muon.is_some() && are_plain(&[var, own.mean]),
        };
        let none = weights.iter().all(|own| own.gradient.is_none());
        if none || !weights.iter().zip(&vars).all(suit) {
            // The host counts this update.
            self.current = None;
            return Reference.update(weights, rule, learning_rate, counters);
        }
        for gradient in weights.iter_mut().filter_map(|own| own.gradient.as_deref_mut()) {
            if !are_plain(&[gradient]) {
                *gradient = gradient.detach().contiguous()?;
            }
        }
        let own: Vec<_> = weights
            .iter()
            .zip(&vars)
            .map(|(own, weight)| WeightUpdate {
                weight,
                mean: own.mean,
                square: own.square.as_deref(),
                gradient: own.gradient.as_deref(),
                average: own.average.as_deref(),
            })
            .collect();
        let norm = self.with(counters)?.update(own, rule.into(), learning_rate)?;
        rule.count(counters);
        self.assume(counters);
        Ok(norm)
    }

    fn loss_scale(&mut self, counters: &Counters) -> Result<Tensor> {
        Ok(self.with(counters)?.scale().clone())
    }

    fn read(&self, counters: &Counters) -> Result<Counters> {
        match &self.current {
            Some((updater, _)) => Ok(updater.counters()?),
            None => Ok(*counters),
        }
    }

    fn stage(&mut self, learning_rate: f64, counters: &Counters) -> Result<()> {
        Ok(self.with(counters)?.set_learning_rate(learning_rate)?)
    }

    fn assume(&mut self, counters: &Counters) {
        if let Some((_, known)) = &mut self.current {
            *known = *counters;
        }
    }
}

impl From<&UpdateRule> for UpdateSettings {
    fn from(rule: &UpdateRule) -> Self {
        let UpdateRule { beta1, beta2, eps, l2, decoupled, max_norm, average, scale, .. } = *rule;
        let mut settings = Self { beta1, beta2, eps, l2, decoupled, max_norm, ..Self::default() };
        // Without an average the device counts no updates of one.
        settings.ema_decay = -1.0;
        if let Some(average) = average {
            settings.ema_decay = average.decay;
            settings.ema_warmup = f64::from(u8::from(average.warmup));
        }
        if let Some(muon) = rule.muon {
            settings.momentum = muon.momentum;
            settings.nesterov = f64::from(u8::from(muon.nesterov));
            settings.muon_decoupled = muon.decoupled;
        }
        if let Some(scale) = scale {
            settings.scaled = 1.0;
            settings.growth_factor = scale.growth_factor;
            settings.growth_interval = scale.growth_interval as f64;
            settings.backoff_factor = scale.backoff_factor;
            settings.min_scale = scale.min_scale;
        }
        settings
    }
}

/// The CUDA graphs of a device.
struct Graphs(Device);

impl Capture for Graphs {
    fn is_possible(&self, x_0: &Tensor) -> Result<bool> {
        // Within a pass, for example in the function that returns its gradient, a graph could overwrite maps in use.
        Ok(are_plain(&[x_0]) && !Gpu::of(&self.0)?.in_a_pass())
    }

    fn allocated(&self) -> Result<u64> {
        Ok(Gpu::of(&self.0)?.allocated_blocks())
    }

    fn set_step(&self, step: u64) -> Result<()> {
        Gpu::of(&self.0)?.step(step)?;
        Ok(())
    }

    fn record(&self, inputs: &Inputs, update: &mut Recordable<'_>) -> Result<Box<dyn Recorded>> {
        let copy = Tensor::copy;
        let classes = inputs.classes.as_ref().map(copy).transpose()?;
        let own = Inputs { x_0: copy(&inputs.x_0)?, t: copy(&inputs.t)?, classes };
        Ok(Box::new(StepGraph::capture(own.tensors(), || update(&own))?))
    }
}

impl Recorded for StepGraph {
    fn fits(&self, inputs: &Inputs) -> bool {
        self.fits(&inputs.tensors())
    }

    fn repeat(&self, inputs: &Inputs) -> Result<(Tensor, Tensor)> {
        self.launch(&inputs.tensors())
    }
}
