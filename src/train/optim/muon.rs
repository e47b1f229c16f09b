use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::adam::{AdamConfig, check_floating, check_gradient, check_learning_rate};
use crate::backend::{self, Counters, MuonRule, WeightState};
use crate::error::{Error, Result, check_fraction};
use crate::model::{Architecture, UNetConfig};

/// Settings of [`Muon`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MuonConfig {
    /// Decay of the momentum; at least 0 and less than 1.
    pub momentum: f64,
    /// Whether the momentum is Nesterov's: the present gradient is added to it once more.
    pub nesterov: bool,
    /// Decoupled weight decay: each update subtracts this number times the learning rate times the weight. It is 0 or
    /// positive.
    pub weight_decay: f64,
    /// The beginnings of the names of matrices that Adam updates instead. They are the first and the last layer, and
    /// embeddings.
    ///
    /// When a run begins, a list equal to the default, the names of [`UNet`](crate::UNet), is replaced by the
    /// [list of the network](Architecture::OUTER_LAYERS). This also holds for such a list that was set. To keep it for
    /// another network, repeat one of its names or change their order.
    pub adam: Vec<String>,
}

impl Default for MuonConfig {
    /// Nesterov's momentum of 0.95 and no weight decay. Adam updates the first and the last layer of the network and
    /// its embedding of classes.
    fn default() -> Self {
        let adam = names(UNetConfig::OUTER_LAYERS);
        Self { momentum: 0.95, nesterov: true, weight_decay: 0.0, adam }
    }
}

fn names(layers: &[&str]) -> Vec<String> {
    layers.iter().map(|&name| name.into()).collect()
}

impl MuonConfig {
    pub(in crate::train) fn validate(&self) -> Result<()> {
        check_fraction("muon.momentum", self.momentum)?;
        if !(self.weight_decay >= 0.0 && (self.weight_decay as f32).is_finite()) {
            let expected = "at least 0 and finite in f32";
            return Err(Error::config("muon.weight_decay", self.weight_decay, expected));
        }
        Ok(())
    }

    /// Replaces the default list by that of a network.
    pub(in crate::train) fn suit<N: Architecture>(&mut self) {
        if self.adam == names(UNetConfig::OUTER_LAYERS) {
            self.adam = names(N::OUTER_LAYERS);
        }
    }

    /// Divides weights into the matrices that Muon updates, and all others.
    pub(in crate::train) fn divide(
        &self,
        vars: &BTreeMap<String, Var>,
    ) -> (BTreeMap<String, Var>, BTreeMap<String, Var>) {
        let is_matrix = |(name, var): &(String, Var)| {
            var.rank() >= 2
                && var.elem_count() > 0
                && !self.adam.iter().any(|beginning| name.starts_with(&**beginning))
        };
        vars.clone().into_iter().partition(is_matrix)
    }

    pub(super) fn rule(&self) -> MuonRule {
        let Self { momentum, nesterov, weight_decay: decoupled, .. } = *self;
        MuonRule { momentum, nesterov, decoupled }
    }
}

/// The optimiser Muon for matrices: momentum whose singular values are replaced by values near 1. Its state can be
/// saved.
///
/// Jordan et al. 2024. A kernel of a convolution is a matrix (output channels, rest). Let `g` be the gradient:
///
/// ```text
/// momentum = β momentum + (1 - β) g
/// update   = β momentum + (1 - β) g    with Nesterov's momentum; otherwise the momentum
/// weight   = (1 - lr decay) weight - lr 0.2 √max(rows, columns) orthogonalised(update)
/// ```
///
/// Five Newton-Schulz iterations orthogonalise the update, with the coefficients 3.4445, -4.7750 and 2.0315. The factor
/// `0.2 √max(rows, columns)` is that of Liu et al. 2025, equation 4. An update is then about as large as an update of
/// Adam, so both use one learning rate. The update is that of PyTorch's `Muon` with `adjust_lr_fn="match_rms_adamw"`,
/// which computes the iterations in bf16. Here they are in f32.
#[derive(Debug)]
pub struct Muon {
    config: MuonConfig,
    slots: BTreeMap<String, Slot>,
}

#[derive(Debug)]
struct Slot {
    var: Var,
    momentum: Tensor,
}

/// PyTorch's name of the momentum: the prefix of the tensor names in a checkpoint.
const MOMENTUM: &str = "momentum_buffer";

impl Muon {
    /// Creates an optimiser of these weights.
    ///
    /// # Errors
    /// Returns an error if a setting is out of range, or if a weight is not a matrix or kernel of a floating-point
    /// dtype.
    pub fn new(config: MuonConfig, vars: &BTreeMap<String, Var>) -> Result<Self> {
        config.validate()?;
        let mut slots = BTreeMap::new();
        for (name, var) in vars {
            check_floating("weight", name, var)?;
            if var.rank() < 2 || var.elem_count() == 0 {
                let value = format!("{name} of shape {:?}", var.dims());
                return Err(Error::config("weight", value, "a matrix (output, ...) with Muon"));
            }
            let momentum = var.as_tensor().zeros_like()?;
            slots.insert(name.clone(), Slot { var: var.clone(), momentum });
        }
        Ok(Self { config, slots })
    }

    /// Makes one update. `gradients` are keyed by the names of the weights. A weight without a gradient does not
    /// change.
    ///
    /// # Errors
    /// Returns an error if the learning rate is negative, infinite or NaN, or if the shape, dtype or device of a
    /// gradient differs from that of its weight. Nothing is changed in these cases.
    pub fn step(&mut self, gradients: &BTreeMap<String, Tensor>, learning_rate: f64) -> Result<()> {
        check_learning_rate(learning_rate)?;
        self.check(gradients)?;
        let mut rule = AdamConfig::default().rule();
        rule.muon = Some(self.config.rule());
        let factors = rule.begin(&mut Counters::default(), learning_rate, 1.0);
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
            mean: &mut slot.momentum,
            square: None,
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

    pub(super) fn rule(&self) -> MuonRule {
        self.config.rule()
    }

    /// The present momentum (`momentum_buffer.<name>`) in the shapes of the weights. The next update changes it; use
    /// `Tensor::copy` for values that must not change.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let state =
            |(name, slot): (&String, &Slot)| (format!("{MOMENTUM}.{name}"), slot.momentum.clone());
        self.slots.iter().map(state).collect()
    }

    /// Continues from a [`state`](Self::state).
    ///
    /// # Errors
    /// Returns an error if the state of a weight is missing, or if its shape differs from that of the weight.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, slot) in &mut self.slots {
            let key = format!("{MOMENTUM}.{name}");
            let fits = |stored: &&Tensor| stored.shape() == slot.momentum.shape();
            let Some(stored) = state.get(&key).filter(fits) else {
                let expected = format!("one {key:?} of shape {:?}", slot.momentum.dims());
                let found = format!("without a fitting {key}");
                return Err(Error::config("optimizer state", found, expected));
            };
            // Copied, because updates change it in place.
            let stored = stored.to_dtype(slot.var.dtype())?.to_device(slot.var.device())?;
            slot.momentum = stored.contiguous()?.copy()?;
        }
        Ok(())
    }
}
