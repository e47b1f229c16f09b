use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, DeviceLocation, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::{Ema, GradScaler};
#[cfg(feature = "cuda")]
use crate::kernels::cuda;
use crate::kernels::{
    AdamStep, Isa, on_cpu_in_f32, same_storage, sum_of_squares, with_values, with_values_mut,
};
use crate::{Error, Result};

/// Settings of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamConfig {
    /// Learning rate after the warm-up; positive.
    pub learning_rate: f64,
    /// Decay of the mean of gradients; at least 0 and less than 1.
    pub beta1: f64,
    /// Decay of the mean of squared gradients; at least 0 and less than 1.
    pub beta2: f64,
    /// Number added to the root of the mean of squares; positive, also when rounded to f32.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: WeightDecay,
}

/// The kind of weight decay of [`AdamW`]. The number is 0 or positive.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightDecay {
    /// No weight decay.
    None,
    /// The weight times this is added to the gradient, as in PyTorch's `Adam`.
    L2(f64),
    /// Each update subtracts the weight times the learning rate times this, independently of the gradient, as in
    /// PyTorch's `AdamW`. Loshchilov and Hutter 2019.
    Decoupled(f64),
}

impl AdamConfig {
    /// Adam (Kingma and Ba 2015) with betas 0.9 and 0.999, eps 1e-8 and no weight decay.
    pub const fn adam(learning_rate: f64) -> Self {
        let weight_decay = WeightDecay::None;
        Self { learning_rate, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay }
    }

    /// The same as [`adam`](Self::adam), with decoupled weight decay.
    pub const fn adamw(learning_rate: f64, weight_decay: f64) -> Self {
        let weight_decay = WeightDecay::Decoupled(weight_decay);
        Self { weight_decay, ..Self::adam(learning_rate) }
    }

    pub(super) fn validate(&self) -> Result<()> {
        // Updates are computed in f32.
        let finite = |x: f64| (x as f32).is_finite();
        if !(self.learning_rate > 0.0 && finite(self.learning_rate)) {
            let expected = "positive and finite in f32";
            return Err(Error::config("learning_rate", self.learning_rate, expected));
        }
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::config(field, beta, "at least 0 and less than 1"));
            }
        }
        // The update of a weight whose gradient is 0 would be 0 / 0.
        if !(self.eps as f32 > 0.0 && finite(self.eps)) {
            return Err(Error::config("eps", self.eps, "positive and finite in f32"));
        }
        match self.weight_decay {
            WeightDecay::L2(decay) | WeightDecay::Decoupled(decay)
                if !(decay >= 0.0 && finite(decay)) =>
            {
                Err(Error::config("weight_decay", decay, "at least 0 and finite in f32"))
            }
            _ => Ok(()),
        }
    }
}

/// The optimiser: Adam, with either kind of weight decay or none, and a state that can be saved.
///
/// The update is that of PyTorch's `Adam` and `AdamW`, with bias correction. Kingma and Ba 2015, algorithm 1;
/// Loshchilov and Hutter 2019, algorithm 2.
#[derive(Debug)]
pub struct AdamW {
    config: AdamConfig,
    step: u64,
    slots: BTreeMap<String, Slot>,
    /// What updates count on a CUDA device, and what was known of it here after the last one.
    #[cfg(feature = "cuda")]
    updater: Option<(cuda::Updater, cuda::Counts)>,
}

#[derive(Debug)]
struct Slot {
    var: Var,
    /// Mean of gradients, and of their squares.
    mean: Tensor,
    square: Tensor,
}

/// PyTorch's names for the two, which begin the names in a checkpoint's file.
const MEAN: &str = "exp_avg";
const SQUARE: &str = "exp_avg_sq";

impl AdamW {
    /// Creates an optimiser of these weights.
    ///
    /// # Errors
    /// Returns an error if a setting is out of range, or if a weight is not of a floating-point dtype.
    pub fn new(config: AdamConfig, vars: &BTreeMap<String, Var>) -> Result<Self> {
        config.validate()?;
        let mut slots = BTreeMap::new();
        for (name, var) in vars {
            check_floating("weight", name, var)?;
            let (mean, square) = (var.as_tensor().zeros_like()?, var.as_tensor().zeros_like()?);
            let slot = Slot { var: var.clone(), mean, square };
            slots.insert(name.clone(), slot);
        }
        Ok(Self {
            config,
            step: 0,
            slots,
            #[cfg(feature = "cuda")]
            updater: None,
        })
    }

    /// Makes one update with these gradients, by the names of the weights. The learning rate replaces that of the
    /// configuration, and may be 0. A weight without a gradient does not change.
    ///
    /// # Errors
    /// Returns an error if the learning rate is negative, infinite or NaN, or if the shape, dtype or device of a
    /// gradient differs from that of its weight. Nothing is changed in these cases.
    pub fn step(&mut self, gradients: &BTreeMap<String, Tensor>, learning_rate: f64) -> Result<()> {
        if !(learning_rate >= 0.0 && (learning_rate as f32).is_finite()) {
            let expected = "at least 0 and finite in f32";
            return Err(Error::config("learning_rate", learning_rate, expected));
        }
        self.check(gradients)?;
        if self.has_kernel(gradients) {
            return self.step_by_kernel(gradients, learning_rate, 1.0, None);
        }
        self.step += 1;
        let AdamConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let (bias1, bias2) = self.biases();
        for (name, slot) in &mut self.slots {
            let Some(gradient) = gradients.get(name) else { continue };
            let mut weight = slot.var.as_detached_tensor();
            let mut gradient = gradient.clone();
            match weight_decay {
                WeightDecay::None => {}
                WeightDecay::L2(decay) => gradient = (gradient + weight.affine(decay, 0.0)?)?,
                WeightDecay::Decoupled(decay) => {
                    weight = weight.affine(1.0 - learning_rate * decay, 0.0)?;
                }
            }
            slot.mean =
                (slot.mean.affine(beta1, 0.0)? + gradient.affine(1.0 - beta1, 0.0)?)?.detach();
            slot.square = (slot.square.affine(beta2, 0.0)?
                + gradient.sqr()?.affine(1.0 - beta2, 0.0)?)?
            .detach();
            let root = slot.square.sqrt()?.affine(1.0 / bias2.sqrt(), eps)?;
            let update = slot.mean.affine(learning_rate / bias1, 0.0)?.div(&root)?;
            slot.var.set(&(weight - update)?)?;
        }
        Ok(())
    }

    /// Clips the gradients to the global norm `max_norm`, updates the weights, and then their average. Returns the
    /// norm before clipping. The result is that of [`clip_grad_norm`], [`step`](Self::step) and [`Ema::update`]. On
    /// the CPU it is computed in one pass over each weight.
    ///
    /// With a scaler, divides the gradients by its scale first. If the norm is not finite, changes only the scale.
    pub(super) fn update(
        &mut self,
        gradients: &mut BTreeMap<String, Tensor>,
        max_norm: f64,
        learning_rate: f64,
        ema: Option<&mut Ema>,
        mut scaler: Option<&mut GradScaler>,
    ) -> Result<Tensor> {
        self.check(gradients)?;
        #[cfg(feature = "cuda")]
        if self.on_cuda() && !gradients.is_empty() {
            // One way for all updates: what is skipped is counted there.
            for gradient in gradients.values_mut().filter(|d| !cuda::are_plain(&[d])) {
                *gradient = gradient.detach().contiguous()?;
            }
            return self.update_on_cuda(gradients, max_norm, learning_rate, ema, scaler);
        }
        let unscale = scaler.as_ref().map_or(1.0, |scaler| 1.0 / scaler.scale());
        if gradients.is_empty() || !self.has_kernel(gradients) {
            if scaler.is_some() {
                for gradient in gradients.values_mut() {
                    *gradient = gradient.affine(unscale, 0.0)?;
                }
            }
            let norm = clip_grad_norm(gradients, max_norm)?;
            if let Some(scaler) = &mut scaler {
                let finite = norm.to_dtype(DType::F64)?.to_scalar::<f64>()?.is_finite();
                scaler.update(finite);
                if !finite {
                    return Ok(norm);
                }
            }
            self.step(gradients, learning_rate)?;
            let vars = self.slots.iter().map(|(name, slot)| (name, &slot.var));
            ema.map_or(Ok(()), |ema| ema.update_from(vars))?;
            return Ok(norm);
        }
        let isa = Isa::detect();
        let mut squares = 0.0;
        for gradient in gradients.values() {
            squares += with_values([gradient], |[values]| Ok(sum_of_squares(isa, values)))?;
        }
        let norm = squares.sqrt() * unscale;
        // Above, a gradient's square may be beyond f32, and Adam's mean of it infinite for ever.
        let norm = if norm < 1e18 { norm } else { norm * f64::INFINITY };
        if let Some(scaler) = scaler {
            scaler.update(norm.is_finite());
            if !norm.is_finite() {
                return Ok(Tensor::new(norm as f32, &Device::Cpu)?);
            }
        }
        let clip = if max_norm.is_finite() { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.step_by_kernel(gradients, learning_rate, unscale * clip, ema)?;
        Ok(Tensor::new(norm as f32, &Device::Cpu)?)
    }

    /// A scalar that the loss's gradient is to be multiplied by, where there is a scaler.
    pub(super) fn loss_scale(
        &mut self,
        ema: Option<&Ema>,
        scaler: Option<&GradScaler>,
    ) -> Result<Option<Tensor>> {
        let Some(scaler) = scaler else { return Ok(None) };
        #[cfg(feature = "cuda")]
        if self.on_cuda() {
            return Ok(Some(self.updater(ema, Some(scaler))?.scale().clone()));
        }
        let _ = ema;
        Ok(Some(Tensor::new(scaler.scale() as f32, &Device::Cpu)?))
    }

    /// The scaler as it is on the device, if that is where updates are skipped; else as it is here.
    pub(super) fn settled(&self, scaler: &GradScaler) -> Result<GradScaler> {
        #[cfg(feature = "cuda")]
        if let Some((updater, _)) = &self.updater {
            return Ok(scaler.with_counts(updater.counts()?));
        }
        Ok(scaler.clone())
    }

    /// Makes the counts here those of the device, which skips updates without a word.
    pub(super) fn settle(&mut self, ema: Option<&mut Ema>, scaler: &mut GradScaler) -> Result<()> {
        let settled = self.settled(scaler)?;
        let skipped = settled.skipped() - scaler.skipped();
        *scaler = settled;
        #[cfg(feature = "cuda")]
        if let Some((_, known)) = &mut self.updater {
            self.step -= skipped;
            let updates = ema.map_or(0, |ema| {
                ema.forget_updates(skipped);
                ema.updates()
            });
            *known = scaler.counts(self.step, updates);
            return Ok(());
        }
        let _ = (ema, skipped);
        Ok(())
    }

    fn check(&self, gradients: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, slot) in &self.slots {
            let Some(gradient) = gradients.get(name) else { continue };
            let (found, expected) = (kind(gradient), kind(&slot.var));
            if found != expected {
                let (found, expected) = (format!("{found:?} for {name}"), format!("{expected:?}"));
                return Err(Error::config("gradient", found, expected + ", as the weight"));
            }
        }
        Ok(())
    }

    fn has_kernel(&self, gradients: &BTreeMap<String, Tensor>) -> bool {
        let suits = |t: &Tensor| on_cpu_in_f32(t) && t.is_contiguous();
        self.slots.values().all(|slot| suits(&slot.var)) && gradients.values().all(suits)
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(&self) -> bool {
        !self.slots.is_empty()
            && self.slots.values().all(|Slot { var, mean, square }| {
                let var = var.as_detached_tensor();
                cuda::are_plain(&[&var, mean, square])
            })
    }

    /// The device's part, which goes on with what is known here.
    #[cfg(feature = "cuda")]
    fn updater(
        &mut self,
        ema: Option<&Ema>,
        scaler: Option<&GradScaler>,
    ) -> Result<&mut cuda::Updater> {
        let known = counts(self.step, ema, scaler);
        let device =
            self.slots.values().next().map_or(Device::Cpu, |slot| slot.var.device().clone());
        let current = self.updater.take().filter(|(_, last)| *last == known);
        let current = match current {
            Some(current) => current,
            None => (cuda::Updater::new(&device, known)?, known),
        };
        Ok(&mut self.updater.insert(current).0)
    }

    /// Before updates are captured, or launched again: what they read of this one.
    #[cfg(feature = "cuda")]
    pub(super) fn prepare(
        &mut self,
        learning_rate: f64,
        ema: Option<&Ema>,
        scaler: Option<&GradScaler>,
    ) -> Result<()> {
        Ok(self.updater(ema, scaler)?.set_learning_rate(learning_rate)?)
    }

    /// An update that a graph made, or one that was captured and not made.
    #[cfg(feature = "cuda")]
    pub(super) fn count(
        &mut self,
        made: bool,
        mut ema: Option<&mut Ema>,
        scaler: Option<&GradScaler>,
    ) {
        if made {
            self.step += 1;
            if let Some(ema) = &mut ema {
                ema.begin_update();
            }
        } else {
            self.step -= 1;
            if let Some(ema) = &mut ema {
                ema.forget_updates(1);
            }
        }
        if let Some((_, known)) = &mut self.updater {
            *known = counts(self.step, ema.as_deref(), scaler);
        }
    }

    #[cfg(feature = "cuda")]
    fn update_on_cuda(
        &mut self,
        gradients: &BTreeMap<String, Tensor>,
        max_norm: f64,
        learning_rate: f64,
        mut ema: Option<&mut Ema>,
        scaler: Option<&mut GradScaler>,
    ) -> Result<Tensor> {
        let AdamConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let (l2, decoupled) = match weight_decay {
            WeightDecay::None => (0.0, 0.0),
            WeightDecay::L2(decay) => (decay, 0.0),
            WeightDecay::Decoupled(decay) => (0.0, decay),
        };
        let mut settings = cuda::UpdateSettings {
            beta1,
            beta2,
            eps,
            l2,
            decoupled,
            max_norm,
            ..Default::default()
        };
        if let Some(ema) = &ema {
            let config = ema.config();
            settings.ema_decay = config.decay;
            settings.ema_warmup = f64::from(u8::from(config.warmup));
        }
        if let Some(scaler) = &scaler {
            scaler.put_settings(&mut settings);
        }
        self.updater(ema.as_deref(), scaler.as_deref())?;
        let vars: Vec<Tensor> =
            self.slots.values().map(|slot| slot.var.as_detached_tensor()).collect();
        let weights: Vec<_> = self
            .slots
            .iter()
            .zip(&vars)
            .map(|((name, slot), weight)| cuda::WeightUpdate {
                weight,
                mean: &slot.mean,
                square: &slot.square,
                gradient: gradients.get(name),
                average: ema.as_ref().and_then(|ema| ema.averages().get(name)),
            })
            .collect();
        let Some((updater, known)) = &mut self.updater else {
            return Err(Error::config("optimizer", "without its device's part", "one with it"));
        };
        let norm = updater.update(&weights, settings, learning_rate)?;
        self.step += 1;
        if let Some(ema) = &mut ema {
            ema.begin_update();
        }
        *known = counts(self.step, ema.as_deref(), scaler.as_deref());
        Ok(norm)
    }

    /// The factors that correct the bias of the two means, which begin at 0.
    fn biases(&self) -> (f64, f64) {
        let steps = self.step as f64;
        (1.0 - self.config.beta1.powf(steps), 1.0 - self.config.beta2.powf(steps))
    }

    fn step_by_kernel(
        &mut self,
        gradients: &BTreeMap<String, Tensor>,
        learning_rate: f64,
        gradient_scale: f64,
        mut ema: Option<&mut Ema>,
    ) -> Result<()> {
        self.step += 1;
        let AdamConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let (bias1, bias2) = self.biases();
        let (keep, l2) = match weight_decay {
            WeightDecay::None => (1.0, 0.0),
            WeightDecay::L2(decay) => (1.0, decay),
            WeightDecay::Decoupled(decay) => (1.0 - learning_rate * decay, 0.0),
        };
        let decay = ema.as_mut().map_or(0.0, |ema| ema.begin_update());
        let and_rest = |factor: f64| [factor as f32, (1.0 - factor) as f32];
        let step = AdamStep {
            mean: and_rest(beta1),
            square: and_rest(beta2),
            eps: eps as f32,
            step_size: (learning_rate / bias1) as f32,
            root_scale: (1.0 / bias2.sqrt()) as f32,
            keep: keep as f32,
            l2: l2 as f32,
            gradient_scale: gradient_scale as f32,
            average: and_rest(decay),
        };
        let isa = Isa::detect();
        for (name, Slot { var, mean, square }) in &self.slots {
            let average = ema.as_ref().and_then(|ema| ema.averages().get(name));
            // The weight is locked while it changes, with whatever shares its memory.
            let shared = |t: &Tensor| {
                same_storage(t, var) || average.is_some_and(|average| same_storage(t, average))
            };
            let gradient = match gradients.get(name) {
                Some(gradient) if shared(gradient) => Some(gradient.copy()?),
                gradient => gradient.cloned(),
            };
            let change = |weight: &mut [f32], average: Option<&mut [f32]>| {
                let Some(gradient) = &gradient else {
                    if let Some(average) = average {
                        step.follow(isa, average, weight);
                    }
                    return Ok(());
                };
                with_values([gradient], |[gradient]| {
                    with_values_mut(mean, |mean| {
                        with_values_mut(square, |square| {
                            step.apply(isa, weight, gradient, (mean, square), average);
                            Ok(())
                        })
                    })
                })
            };
            with_values_mut(var, |weight| match average {
                Some(average) => with_values_mut(average, |average| change(weight, Some(average))),
                None => change(weight, None),
            })?;
        }
        Ok(())
    }

    /// The number of updates so far.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Copies of the means of gradients (`exp_avg.<name>`) and of their squares (`exp_avg_sq.<name>`), in the shapes of
    /// the weights. [`restore`](Self::restore) also needs [`steps`](Self::steps), which they do not contain.
    ///
    /// # Errors
    /// Returns an error if the device has not enough memory for them.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.shared_state().into_iter().map(|(name, tensor)| Ok((name, tensor.copy()?))).collect()
    }

    /// The same as [`state`](Self::state), without copies: the next update changes the tensors.
    pub(super) fn shared_state(&self) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for (name, slot) in &self.slots {
            state.insert(format!("{MEAN}.{name}"), slot.mean.clone());
            state.insert(format!("{SQUARE}.{name}"), slot.square.clone());
        }
        state
    }

    /// Continues from a [`state`](Self::state) after `steps` updates.
    ///
    /// # Errors
    /// Returns an error if the state of a weight is missing, or if its shape differs from that of the weight.
    pub fn restore(&mut self, steps: u64, state: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, slot) in &mut self.slots {
            for (prefix, value) in [(MEAN, &mut slot.mean), (SQUARE, &mut slot.square)] {
                let key = format!("{prefix}.{name}");
                let stored = state.get(&key).filter(|stored| stored.shape() == value.shape());
                let Some(stored) = stored else {
                    return Err(Error::Config {
                        field: "optimizer state",
                        value: format!("without a fitting {key}"),
                        expected: format!("one {:?} of shape {:?}", key, value.dims()),
                    });
                };
                // A copy: updates change it in place.
                let stored = stored.to_dtype(value.dtype())?.to_device(value.device())?;
                *value = stored.contiguous()?.copy()?;
            }
        }
        self.step = steps;
        Ok(())
    }
}

#[cfg(feature = "cuda")]
fn counts(steps: u64, ema: Option<&Ema>, scaler: Option<&GradScaler>) -> cuda::Counts {
    let ema_updates = ema.map_or(0, Ema::updates);
    match scaler {
        Some(scaler) => scaler.counts(steps, ema_updates),
        None => cuda::Counts { steps, ema_updates, scale: 1.0, ..Default::default() },
    }
}

/// # Errors
/// Returns an error if the tensor of this name is not of a floating-point dtype, because some functions of candle panic
/// for other dtypes.
pub(super) fn check_floating(what: &'static str, name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.dtype().is_float() {
        return Ok(());
    }
    let value = format!("{name} of dtype {}", tensor.dtype().as_str());
    Err(Error::config(what, value, "of a floating-point dtype"))
}

/// The properties that two tensors must share to be added element by element.
fn kind(t: &Tensor) -> (DType, &[usize], DeviceLocation) {
    (t.dtype(), t.dims(), t.device().location())
}

/// Computes the gradients of `loss` (a scalar) with respect to `vars`, by the names of the weights. Weights on which the
/// loss does not depend are omitted.
///
/// # Errors
/// Returns an error if an operation between the weights and the loss has no gradient.
pub fn gradients(loss: &Tensor, vars: &BTreeMap<String, Var>) -> Result<BTreeMap<String, Tensor>> {
    Ok(by_name(loss.backward()?, vars))
}

/// The gradients of `vars`, by the weights' names; those that are not there are left out.
pub(super) fn by_name(
    mut gradients: GradStore,
    vars: &BTreeMap<String, Var>,
) -> BTreeMap<String, Tensor> {
    vars.iter().filter_map(|(name, var)| Some((name.clone(), gradients.remove(var)?))).collect()
}

/// Scales all gradients so that their global L2 norm is at most `max_norm`, and returns the norm before. An infinite
/// `max_norm` does not clip. The method is that of PyTorch's `clip_grad_norm_`. Pascanu et al. 2013.
///
/// The norm stays on the device, and nothing is read back.
///
/// # Errors
/// Returns an error if there are no gradients, if one is not of a floating-point dtype, or if `max_norm` is not positive.
pub fn clip_grad_norm(gradients: &mut BTreeMap<String, Tensor>, max_norm: f64) -> Result<Tensor> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::config("max_norm", max_norm, "positive, or infinite not to clip"));
    }
    gradients.iter().try_for_each(|(name, gradient)| check_floating("gradient", name, gradient))?;
    let squares: Vec<Tensor> =
        gradients.values().map(|g| g.sqr()?.sum_all()).collect::<candle_core::Result<_>>()?;
    if squares.is_empty() {
        return Err(Error::config(
            "gradients",
            "empty",
            "one or more: does the loss depend on any weight?",
        ));
    }
    let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?;
    if max_norm.is_finite() {
        let scale = (norm.affine(1.0, 1e-6)?.recip()? * max_norm)?.minimum(1.0)?;
        for gradient in gradients.values_mut() {
            *gradient = gradient.broadcast_mul(&scale)?;
        }
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::super::EmaConfig;
    use super::*;

    #[test]
    fn one_pass_does_what_three_do() -> Result<()> {
        let weights = |dtype| -> Result<BTreeMap<String, Var>> {
            let names = ["a", "b", "idle"].into_iter().zip([3, 40_000, 5]);
            names
                .map(|(name, count)| {
                    let values =
                        (Tensor::arange(0f64, count as f64, &Device::Cpu)? * 0.37)?.sin()?;
                    Ok((name.to_string(), Var::from_tensor(&values.to_dtype(dtype)?)?))
                })
                .collect()
        };
        for decay in [WeightDecay::None, WeightDecay::L2(0.1), WeightDecay::Decoupled(0.1)] {
            let config = AdamConfig { weight_decay: decay, ..AdamConfig::adam(1e-2) };
            let ema = EmaConfig { decay: 0.9, warmup: true };
            let (fast, slow) = (weights(DType::F32)?, weights(DType::F64)?);
            let mut adams = (AdamW::new(config, &fast)?, AdamW::new(config, &slow)?);
            let mut emas = (Ema::new(ema, &fast)?, Ema::new(ema, &slow)?);
            for (step, max_norm) in [0.5, 1e9, f64::INFINITY].into_iter().enumerate() {
                let of = |vars: &BTreeMap<String, Var>| -> Result<BTreeMap<String, Tensor>> {
                    let gradient = |(name, var): (&String, &Var)| {
                        Ok((name.clone(), ((var.as_detached_tensor() * 3.0)? + step as f64)?))
                    };
                    vars.iter().filter(|(name, _)| *name != "idle").map(gradient).collect()
                };
                let norm =
                    adams.0.update(&mut of(&fast)?, max_norm, 1e-2, Some(&mut emas.0), None)?;
                let mut gradients = of(&slow)?;
                let expected = clip_grad_norm(&mut gradients, max_norm)?;
                adams.1.step(&gradients, 1e-2)?;
                emas.1.update(&slow)?;
                let (norm, expected) = (norm.to_scalar::<f32>()?, expected.to_scalar::<f64>()?);
                assert!((f64::from(norm) / expected - 1.0).abs() < 1e-6, "{norm}, {expected}");
            }
            let close = |a: &Tensor, b: &Tensor| -> Result<()> {
                let off = (a.to_dtype(DType::F64)? - b)?.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(off < 1e-6, "{decay:?}: off by {off}");
                Ok(())
            };
            for (name, var) in &fast {
                close(var, &slow[name])?;
                close(&emas.0.averages()[name], &emas.1.averages()[name])?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_that_share_the_weights_memory_are_taken() -> Result<()> {
        let var = Var::new(&[1f32, -2.0], &Device::Cpu)?;
        let vars = BTreeMap::from([("w".to_string(), var.clone())]);
        let gradients = BTreeMap::from([("w".to_string(), var.as_detached_tensor())]);
        AdamW::new(AdamConfig::adam(0.5), &vars)?.step(&gradients, 0.5)?;
        assert_eq!(var.to_vec1::<f32>()?, [0.5, -1.5]);
        Ok(())
    }
}
