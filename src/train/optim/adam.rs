use std::collections::BTreeMap;

use candle_core::{DType, Device, DeviceLocation, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::backend::{self, Counters, UpdateRule, WeightState};
use crate::error::{Error, Result, check_fraction};

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
#[non_exhaustive]
pub enum WeightDecay {
    /// No weight decay.
    None,
    /// This number times the weight is added to the gradient, as in PyTorch's `Adam`.
    L2(f64),
    /// Each update subtracts this number times the learning rate times the weight, independently of the gradient. This
    /// is the decay of PyTorch's `AdamW`. Loshchilov and Hutter 2019.
    Decoupled(f64),
}

impl Default for AdamConfig {
    /// [`AdamConfig::adam`] with PyTorch's default learning rate, 1e-3.
    fn default() -> Self {
        Self::adam(1e-3)
    }
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

    pub(in crate::train) fn validate(&self) -> Result<()> {
        // Updates are computed in f32.
        let finite = |x: f64| (x as f32).is_finite();
        if !(self.learning_rate > 0.0 && finite(self.learning_rate)) {
            let expected = "positive and finite in f32";
            return Err(Error::config("learning_rate", self.learning_rate, expected));
        }
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            check_fraction(field, beta)?;
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

    /// The update rule without clipping, average or gradient scale.
    pub(super) fn rule(&self) -> UpdateRule {
        let Self { beta1, beta2, eps, .. } = *self;
        let (l2, decoupled) = match self.weight_decay {
            WeightDecay::None => (0.0, 0.0),
            WeightDecay::L2(decay) => (decay, 0.0),
            WeightDecay::Decoupled(decay) => (0.0, decay),
        };
        let max_norm = f64::INFINITY;
        UpdateRule {
            beta1,
            beta2,
            eps,
            l2,
            decoupled,
            max_norm,
            average: None,
            scale: None,
            muon: None,
        }
    }
}

/// The Adam optimiser, with either kind of weight decay or none. Its state can be saved.
///
/// The update is that of PyTorch's `Adam` and `AdamW`, with bias correction. Kingma and Ba 2015, algorithm 1;
/// Loshchilov and Hutter 2019, algorithm 2. Let `g` be the gradient after L2 decay, and `n` the number of updates:
///
/// ```text
/// mean   = beta1 mean + (1 - beta1) g
/// square = beta2 square + (1 - beta2) g²
/// weight = (1 - lr decay) weight - lr mean / (1 - beta1ⁿ) / (√(square / (1 - beta2ⁿ)) + eps)
/// ```
#[derive(Debug)]
pub struct AdamW {
    config: AdamConfig,
    updates: u64,
    slots: BTreeMap<String, Slot>,
}

#[derive(Debug)]
struct Slot {
    var: Var,
    /// Mean of gradients, and mean of squared gradients.
    mean: Tensor,
    square: Tensor,
}

/// PyTorch's names for both means: prefixes of the tensor names in a checkpoint.
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
        Ok(Self { config, updates: 0, slots })
    }

    /// Makes one update. `gradients` are keyed by the names of the weights. `learning_rate` replaces the configured
    /// one, and may be 0. A weight without a gradient does not change.
    ///
    /// # Errors
    /// Returns an error if the learning rate is negative, infinite or NaN, or if the shape, dtype or device of a
    /// gradient differs from that of its weight. Nothing is changed in these cases.
    pub fn step(&mut self, gradients: &BTreeMap<String, Tensor>, learning_rate: f64) -> Result<()> {
        check_learning_rate(learning_rate)?;
        self.check(gradients)?;
        let mut counters = Counters { updates: self.updates, ..Counters::default() };
        let factors = self.config.rule().begin(&mut counters, learning_rate, 1.0);
        self.updates = counters.updates;
        let Some(first) = self.slots.values().next() else { return Ok(()) };
        let backend = backend::of(&first.var);
        let mut gradients = gradients.clone();
        let mut gradients = gradients.iter_mut().collect();
        backend.adam(self.states(&mut gradients, &mut BTreeMap::new()), &factors)
    }

    /// Returns the weights, each with the state that an update of it reads or changes.
    pub(super) fn states<'a>(
        &'a mut self,
        gradients: &mut BTreeMap<&String, &'a mut Tensor>,
        averages: &mut BTreeMap<&String, &'a mut Tensor>,
    ) -> Vec<WeightState<'a>> {
        let state = |(name, slot): (&String, &'a mut Slot)| WeightState {
            weight: &slot.var,
            mean: &mut slot.mean,
            square: Some(&mut slot.square),
            gradient: gradients.remove(name),
            average: averages.remove(name),
        };
        self.slots.iter_mut().map(state).collect()
    }

    /// # Errors
    /// Returns an error if a gradient does not fit its weight.
    pub(super) fn check(&self, gradients: &BTreeMap<String, Tensor>) -> Result<()> {
        self.slots.iter().try_for_each(|(name, slot)| check_gradient(name, &slot.var, gradients))
    }

    /// The device and dtype of the weights, if there are any.
    pub(super) fn place(&self) -> Option<(Device, DType)> {
        let slot = self.slots.values().next()?;
        Some((slot.var.device().clone(), slot.var.dtype()))
    }

    pub(super) fn config(&self) -> &AdamConfig {
        &self.config
    }

    /// The number of updates so far.
    pub fn steps(&self) -> u64 {
        self.updates
    }

    pub(super) fn set_steps(&mut self, updates: u64) {
        self.updates = updates;
    }

    /// Returns copies of the means of gradients (`exp_avg.<name>`) and of their squares (`exp_avg_sq.<name>`), in the
    /// shapes of the weights. [`restore`](Self::restore) also needs [`steps`](Self::steps), which is not part of the
    /// state.
    ///
    /// # Errors
    /// Returns an error if the device has not enough memory for them.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.shared_state().into_iter().map(|(name, tensor)| Ok((name, tensor.copy()?))).collect()
    }

    /// Returns the [`state`](Self::state) without copies: the next update changes the tensors.
    pub(in crate::train) fn shared_state(&self) -> BTreeMap<String, Tensor> {
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
                    let expected = format!("one {key:?} of shape {:?}", value.dims());
                    let found = format!("without a fitting {key}");
                    return Err(Error::config("optimizer state", found, expected));
                };
                // Copied, because updates change it in place.
                let stored = stored.to_dtype(value.dtype())?.to_device(value.device())?;
                *value = stored.contiguous()?.copy()?;
            }
        }
        self.updates = steps;
        Ok(())
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

/// # Errors
/// Returns an error if an update cannot be made with this learning rate.
pub(super) fn check_learning_rate(learning_rate: f64) -> Result<()> {
    if learning_rate >= 0.0 && (learning_rate as f32).is_finite() {
        return Ok(());
    }
    Err(Error::config("learning_rate", learning_rate, "at least 0 and finite in f32"))
}

/// # Errors
/// Returns an error if the gradient of this weight does not fit it.
pub(super) fn check_gradient(
    name: &str,
    var: &Var,
    gradients: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let Some(gradient) = gradients.get(name) else { return Ok(()) };
    let (found, expected) = (kind(gradient), kind(var));
    if found == expected {
        return Ok(());
    }
    let (found, expected) = (format!("{found:?} for {name}"), format!("{expected:?}"));
    Err(Error::config("gradient", found, expected + ", as the weight"))
}

/// The properties that two tensors must share to be added element by element.
fn kind(t: &Tensor) -> (DType, &[usize], DeviceLocation) {
    (t.dtype(), t.dims(), t.device().location())
}

#[cfg(test)]
mod tests {
    use super::*;

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
