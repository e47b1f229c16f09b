//! The state of a run, which checkpoints hold.

use std::collections::BTreeMap;

use candle_core::Var;

use super::history::Change;
use super::importance::{LossHistory, TIMESTEPS};
use super::optim::adam::AdamW;
use super::optim::average::{Followed, WeightAverage};
use super::optim::ema::Ema;
use super::optim::muon::Muon;
use super::optim::optimizer::Optimizer;
use super::optim::scaler::{GradScaler, ScalerState};
use super::stateful::{Fields, Kind, Stateful, Tensors, within};
use crate::backend::Counters;
use crate::data::loader::Position;
use crate::error::{Error, Result};
use crate::sample::SamplerConfig;

/// The largest step of a run, limited by the addresses of random numbers.
pub(in crate::train) const MAX_STEP: u64 = (1 << 40) - 1;

/// The kinds of parts that checkpoints hold.
pub(super) const KINDS: &[&Kind] =
    &[&PROGRESS, &MODEL, &EMA, &OPTIMIZER, &MUON, &AVERAGE, &GRAD_SCALER, &TIMESTEPS];

/// The state of a run.
#[derive(Debug)]
pub(super) struct TrainState {
    pub progress: Progress,
    pub weights: Weights,
    pub optimizer: Optimizer,
    /// The losses of each timestep, with importance sampling.
    pub losses: Option<LossHistory>,
}

impl TrainState {
    /// Returns all parts, which together are the content of a checkpoint.
    pub fn parts(&self) -> Vec<&dyn Stateful> {
        let Optimizer { adam, muon, ema, averages, scaler, .. } = &self.optimizer;
        let mut parts: Vec<&dyn Stateful> = vec![&self.progress, &self.weights, ema, adam];
        parts.extend(muon.as_ref().map(|muon| muon as &dyn Stateful));
        parts.extend(averages.iter().map(|average| average as &dyn Stateful));
        parts.extend(scaler.as_ref().map(|scaler| scaler as &dyn Stateful));
        parts.extend(self.losses.as_ref().map(|losses| losses as &dyn Stateful));
        parts
    }

    /// Returns the parts that are restored from a checkpoint after the network was built with its
    /// weights.
    pub fn parts_beside_weights(&mut self) -> Vec<&mut dyn Stateful> {
        let Optimizer { adam, muon, ema, averages, scaler, .. } = &mut self.optimizer;
        let mut parts: Vec<&mut dyn Stateful> = vec![&mut self.progress, ema, adam];
        parts.extend(muon.as_mut().map(|muon| muon as &mut dyn Stateful));
        parts.extend(averages.iter_mut().map(|average| average as &mut dyn Stateful));
        parts.extend(scaler.as_mut().map(|scaler| scaler as &mut dyn Stateful));
        parts.extend(self.losses.as_mut().map(|losses| losses as &mut dyn Stateful));
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
    /// The changes of the configuration during the run.
    pub history: Vec<Change>,
    /// Whether the number of images may change once; not saved.
    pub may_change_images: bool,
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
        let may_change = std::mem::take(&mut self.may_change_images);
        match self.dataset_len {
            Some(before) if before != len && self.step > 0 && may_change => {
                let (from, to) = (before.into(), len.into());
                let change = Change { step: self.step, field: "dataset_len".into(), from, to };
                Change::record(&mut self.history, vec![change])?;
                self.dataset_len = Some(len);
                Ok(())
            }
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

impl Progress {
    /// Reads the progress of a checkpoint.
    ///
    /// # Errors
    /// Returns an error if a field is missing or not valid.
    pub fn of(fields: &Fields) -> Result<Self> {
        // Parsed values take many times the memory of the text.
        let length = fields.text("history").map_or(0, str::len);
        within("length of history", length as u64, MAX_HISTORY_BYTES)?;
        Ok(Self {
            step: fields.get("step")?,
            images_seen: fields.get("images_seen")?,
            dataset_len: fields.get("dataset_len")?,
            sampling: fields.get("sampling")?,
            history: fields.get::<Option<_>>("history")?.unwrap_or_default(),
            may_change_images: false,
        })
    }
}

/// The longest history that is read.
const MAX_HISTORY_BYTES: u64 = 1 << 20;

const PROGRESS: Kind = Kind {
    name: "progress",
    weights: false,
    files: |_| 0,
    setting: "",
    fields: &["step", "images_seen", "dataset_len", "sampling", "history"],
    check: |fields, step| {
        within("step", step, MAX_STEP)?;
        // Leaves room to add as many images again without an overflow.
        within("images_seen", fields.get("images_seen")?, u64::MAX / 2)
    },
};

impl Stateful for Progress {
    fn kind(&self) -> &'static Kind {
        &PROGRESS
    }

    fn save(&self, fields: &mut Fields, _: &Counters) -> Result<()> {
        fields.insert("step", &self.step)?;
        fields.insert("images_seen", &self.images_seen)?;
        fields.insert("dataset_len", &self.dataset_len)?;
        if let Some(sampling) = &self.sampling {
            fields.insert("sampling", sampling)?;
        }
        match self.history.as_slice() {
            [] => Ok(()),
            history => fields.insert("history", &history),
        }
    }

    fn restore(&mut self, _: Tensors, fields: &Fields) -> Result<()> {
        *self = Self::of(fields)?;
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

/// The kind of the [`Weights`].
pub(super) const MODEL: Kind = Kind {
    name: "model",
    weights: true,
    files: |_| 1,
    setting: "",
    fields: &[],
    check: |_, _| Ok(()),
};

impl Stateful for Weights {
    fn kind(&self) -> &'static Kind {
        &MODEL
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

const OPTIMIZER: Kind = Kind {
    name: "optimizer",
    weights: false,
    files: |_| 1,
    setting: "",
    fields: &["optimizer_updates"],
    check: |fields, step| {
        let updates: Option<u64> = fields.get("optimizer_updates")?;
        within("optimizer_updates", updates.unwrap_or(0), step)
    },
};

/// The number of updates of the optimiser: every update of the run, except those that the scaler skipped.
fn updates_by_scaler(step: u64, scaler: Option<ScalerState>) -> u64 {
    step.saturating_sub(scaler.map_or(0, |scaler| scaler.skipped))
}

impl Stateful for AdamW {
    fn kind(&self) -> &'static Kind {
        &OPTIMIZER
    }

    fn tensors(&self) -> Option<Tensors> {
        Some(self.shared_state())
    }

    fn restore(&mut self, tensors: Tensors, fields: &Fields) -> Result<()> {
        let updates = match fields.get("optimizer_updates")? {
            Some(updates) => updates,
            None => updates_by_scaler(fields.get("step")?, fields.get("grad_scaler")?),
        };
        AdamW::restore(self, updates, &tensors)
    }

    fn save(&self, fields: &mut Fields, counters: &Counters) -> Result<()> {
        // The scaler of an earlier part of the run, in another precision, may have skipped updates.
        if counters.updates == updates_by_scaler(fields.get("step")?, Some(counters.into())) {
            return Ok(());
        }
        fields.insert("optimizer_updates", &counters.updates)
    }
}

/// The kind of the [`Ema`].
pub(super) const EMA: Kind = Kind {
    name: "ema",
    weights: true,
    files: |train| usize::from(train.ema.is_some()),
    setting: "train.ema",
    fields: &["ema_updates"],
    // At most one per update.
    check: |fields, step| within("ema_updates", fields.get("ema_updates")?, step),
};

impl Stateful for Option<Ema> {
    fn kind(&self) -> &'static Kind {
        &EMA
    }

    fn tensors(&self) -> Option<Tensors> {
        self.as_ref().map(|ema| ema.averages().clone())
    }

    fn save(&self, fields: &mut Fields, counters: &Counters) -> Result<()> {
        fields.insert("ema_updates", &counters.average_updates)
    }

    fn restore(&mut self, tensors: Tensors, fields: &Fields) -> Result<()> {
        let Some(ema) = self else { return Ok(()) };
        ema.continue_from(fields.get("ema_updates")?, tensors)
    }
}

const MUON: Kind = Kind {
    name: "muon",
    weights: false,
    files: |train| usize::from(train.muon.is_some()),
    setting: "train.muon",
    fields: &[],
    check: |_, _| Ok(()),
};

impl Stateful for Muon {
    fn kind(&self) -> &'static Kind {
        &MUON
    }

    fn tensors(&self) -> Option<Tensors> {
        Some(self.state())
    }

    fn restore(&mut self, tensors: Tensors, _: &Fields) -> Result<()> {
        Muon::restore(self, &tensors)
    }
}

/// The kind of each [`WeightAverage`].
pub(super) const AVERAGE: Kind = Kind {
    name: "average",
    weights: true,
    files: |train| train.averages.len(),
    setting: "train.averages",
    fields: &["averaged"],
    check: |fields, step| match fields.get::<Option<Followed>>("averaged")? {
        Some(followed) => within("averaged.updates", followed.updates, step),
        None => Ok(()),
    },
};

impl Stateful for WeightAverage {
    fn kind(&self) -> &'static Kind {
        &AVERAGE
    }

    fn index(&self) -> usize {
        WeightAverage::index(self)
    }

    fn tensors(&self) -> Option<Tensors> {
        Some(self.values().clone())
    }

    fn save(&self, fields: &mut Fields, _: &Counters) -> Result<()> {
        // All averages of a run have followed the same updates.
        if self.index() > 0 {
            return Ok(());
        }
        fields.insert("averaged", &self.followed())
    }

    fn restore(&mut self, tensors: Tensors, fields: &Fields) -> Result<()> {
        self.continue_from(fields.get("averaged")?, tensors)
    }
}

/// The kind of the [`GradScaler`].
pub(super) const GRAD_SCALER: Kind = Kind {
    name: "grad_scaler",
    weights: false,
    files: |_| 0,
    setting: "",
    fields: &["grad_scaler"],
    check: |fields, step| match fields.get::<Option<ScalerState>>("grad_scaler")? {
        Some(scaler) => within("grad_scaler.skipped", scaler.skipped, step),
        None => Ok(()),
    },
};

impl Stateful for GradScaler {
    fn kind(&self) -> &'static Kind {
        &GRAD_SCALER
    }

    fn save(&self, fields: &mut Fields, counters: &Counters) -> Result<()> {
        fields.insert("grad_scaler", &ScalerState::from(counters))
    }

    fn restore(&mut self, _: Tensors, fields: &Fields) -> Result<()> {
        let Some(state) = fields.get("grad_scaler")? else {
            return Err(Error::config("grad_scaler", "missing", "present with Precision::F16"));
        };
        self.continue_from(state)
    }
}
