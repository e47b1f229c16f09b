//! The state of a run, which checkpoints hold.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use serde_json::{Map, Value};

use super::optim::adam::AdamW;
use super::optim::ema::Ema;
use super::optim::optimizer::Optimizer;
use super::optim::scaler::{GradScaler, ScalerState};
use crate::backend::Counters;
use crate::data::loader::Position;
use crate::error::{Error, Result};
use crate::sample::SamplerConfig;

/// Tensors by name.
pub(super) type Tensors = BTreeMap<String, Tensor>;

/// Fields of a checkpoint's JSON by name.
pub(super) type Fields = Map<String, Value>;

/// A part of a run that has state. A checkpoint is a list of such parts.
pub(super) trait Stateful {
    /// The name of the file for the part's tensors, without `.safetensors`.
    fn name(&self) -> &'static str;

    /// The tensors to save, without copies. A part without tensors has no file.
    fn tensors(&self) -> Option<Tensors> {
        None
    }

    /// The fields to save. `counters` are the exact counts of the updates.
    ///
    /// # Errors
    /// Returns an error if a value cannot be written as JSON.
    fn fields(&self, counters: &Counters) -> Result<Fields> {
        let _ = counters;
        Ok(Fields::new())
    }

    /// Replaces the state by saved tensors, whose names and shapes are those of the present ones,
    /// and by the fields of all parts.
    ///
    /// # Errors
    /// Returns an error if a field is missing or not valid, or if an operation fails.
    fn restore(&mut self, tensors: Tensors, fields: &Fields) -> Result<()>;
}

/// The state of a run.
#[derive(Debug)]
pub(super) struct TrainState {
    pub progress: Progress,
    pub weights: Weights,
    pub optimizer: Optimizer,
}

impl TrainState {
    /// Returns all parts, which together are the content of a checkpoint.
    pub fn parts(&self) -> Vec<&dyn Stateful> {
        let Optimizer { adam, ema, scaler, .. } = &self.optimizer;
        let mut parts: Vec<&dyn Stateful> = vec![&self.progress, &self.weights, adam];
        parts.extend(ema.as_ref().map(|ema| ema as &dyn Stateful));
        parts.extend(scaler.as_ref().map(|scaler| scaler as &dyn Stateful));
        parts
    }

    /// Returns the parts that are restored from a checkpoint after the network was built with its
    /// weights.
    pub fn parts_beside_weights(&mut self) -> Vec<&mut dyn Stateful> {
        let Optimizer { adam, ema, scaler, .. } = &mut self.optimizer;
        let mut parts: Vec<&mut dyn Stateful> = vec![&mut self.progress, adam];
        parts.extend(ema.as_mut().map(|ema| ema as &mut dyn Stateful));
        parts.extend(scaler.as_mut().map(|scaler| scaler as &mut dyn Stateful));
        parts
    }
}

/// The progress of a run.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress {
    /// Number of updates so far.
    pub step: u64,
    pub images_seen: u64,
    /// Number of images in the data set, once one was used. The order of the images depends on it.
    pub dataset_len: Option<u64>,
    /// The sampler settings of the run, if they were set.
    pub sampling: Option<SamplerConfig>,
}

impl Progress {
    /// The position of the next update in the order of the images.
    pub fn position(&self) -> Position {
        Position { step: self.step, images_seen: self.images_seen }
    }

    /// Records the number of images, on which the order of images depends.
    ///
    /// # Errors
    /// Returns an error if earlier updates of the run used a different number.
    pub fn use_images(&mut self, len: u64) -> Result<()> {
        match self.dataset_len {
            Some(before) if before != len && self.step > 0 => {
                let expected = format!(
                    "{before}, as earlier in this run, because the order of images depends on it"
                );
                Err(Error::config("number of images", len, expected))
            }
            // No update depends on the order yet.
            _ => {
                self.dataset_len = Some(len);
                Ok(())
            }
        }
    }
}

impl Stateful for Progress {
    fn name(&self) -> &'static str {
        "progress"
    }

    fn fields(&self, _: &Counters) -> Result<Fields> {
        let mut fields = Fields::new();
        fields.insert("step".into(), self.step.into());
        fields.insert("images_seen".into(), self.images_seen.into());
        fields.insert("dataset_len".into(), self.dataset_len.into());
        if let Some(sampling) = &self.sampling {
            let sampling = serde_json::to_value(sampling).map_err(Error::external)?;
            fields.insert("sampling".into(), sampling);
        }
        Ok(fields)
    }

    fn restore(&mut self, _: Tensors, fields: &Fields) -> Result<()> {
        *self = Self {
            step: field(fields, "step")?,
            images_seen: field(fields, "images_seen")?,
            dataset_len: field(fields, "dataset_len")?,
            sampling: field(fields, "sampling")?,
        };
        Ok(())
    }
}

/// The weights of the network, by name.
#[derive(Debug)]
pub(super) struct Weights(pub BTreeMap<String, Var>);

impl Weights {
    /// The present values, without copies.
    pub fn values(&self) -> Tensors {
        self.0.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
    }
}

impl Stateful for Weights {
    fn name(&self) -> &'static str {
        "model"
    }

    fn tensors(&self) -> Option<Tensors> {
        Some(self.values())
    }

    fn restore(&mut self, tensors: Tensors, _: &Fields) -> Result<()> {
        for (name, new) in tensors {
            if let Some(var) = self.0.get(&name) {
                var.set(&new)?;
            }
        }
        Ok(())
    }
}

impl Stateful for AdamW {
    fn name(&self) -> &'static str {
        "optimizer"
    }

    fn tensors(&self) -> Option<Tensors> {
        Some(self.shared_state())
    }

    fn restore(&mut self, tensors: Tensors, fields: &Fields) -> Result<()> {
        // The optimiser made every update of the run, except those that were skipped.
        let scaler: Option<ScalerState> = field(fields, "grad_scaler")?;
        let skipped = scaler.map_or(0, |scaler| scaler.skipped);
        let step: u64 = field(fields, "step")?;
        AdamW::restore(self, step.saturating_sub(skipped), &tensors)
    }
}

impl Stateful for Ema {
    fn name(&self) -> &'static str {
        "ema"
    }

    fn tensors(&self) -> Option<Tensors> {
        Some(self.averages().clone())
    }

    fn fields(&self, counters: &Counters) -> Result<Fields> {
        Ok(Fields::from_iter([("ema_updates".into(), counters.average_updates.into())]))
    }

    fn restore(&mut self, tensors: Tensors, fields: &Fields) -> Result<()> {
        self.continue_from(field(fields, "ema_updates")?, tensors)
    }
}

impl Stateful for GradScaler {
    fn name(&self) -> &'static str {
        "grad_scaler"
    }

    fn fields(&self, counters: &Counters) -> Result<Fields> {
        let state = ScalerState::from(counters);
        let state = serde_json::to_value(state).map_err(Error::external)?;
        Ok(Fields::from_iter([("grad_scaler".into(), state)]))
    }

    fn restore(&mut self, _: Tensors, fields: &Fields) -> Result<()> {
        let Some(state) = field(fields, "grad_scaler")? else {
            return Err(Error::config("grad_scaler", "missing", "present with Precision::F16"));
        };
        self.continue_from(state)
    }
}

/// Reads the field of this name. A missing field is read as `null`.
fn field<T: serde::de::DeserializeOwned>(fields: &Fields, name: &'static str) -> Result<T> {
    let value = fields.get(name).cloned().unwrap_or(Value::Null);
    serde_json::from_value(value).map_err(|e| Error::config(name, e.to_string(), "valid"))
}
