use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// A change of a run: a change of its configuration by
/// [`TrainerBuilder::resume_with_changes`](crate::train::TrainerBuilder::resume_with_changes), a change of its number
/// of steps, or a change that [`Trainer::record_change`](crate::Trainer::record_change) added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Change {
    /// The number of updates before the change.
    pub step: u64,
    /// The path of the field, such as `train.batch_size`, or `dataset_len` for the number of images.
    pub field: String,
    /// The value before; `null` for the default of an absent field.
    pub from: Value,
    /// The value after.
    pub to: Value,
}

impl Change {
    /// The field of the number of updates. Each trainer has its own number, so [`apply`](Self::apply) does not set it.
    pub(super) const STEPS: &str = "train.steps";

    /// The largest number of changes of a run.
    const MAX: usize = 1000;

    /// Adds changes to the history of a run.
    ///
    /// # Errors
    /// Returns an error if there would be too many.
    pub(super) fn record(history: &mut Vec<Self>, changes: Vec<Self>) -> Result<()> {
        let count = history.len() + changes.len();
        if count > Self::MAX {
            let expected = format!(
                "at most {}; continue the run with the configuration and the images of its checkpoint, or begin a new \
                 run",
                Self::MAX
            );
            return Err(Error::config("number of changes of the run", count, expected));
        }
        history.extend(changes);
        Ok(())
    }

    /// Makes the change in a configuration, which is at the path `root`.
    pub(super) fn apply(&self, root: &str, config: &mut Value) {
        if self.field == Self::STEPS {
            return;
        }
        let Some(path) = self.field.strip_prefix(root).and_then(|f| f.strip_prefix('.')) else {
            return;
        };
        let (parents, name) = path.rsplit_once('.').unwrap_or(("", path));
        let mut place = config;
        for parent in parents.split('.').filter(|parent| !parent.is_empty()) {
            let Some(inner) = place.get_mut(parent) else { return };
            place = inner;
        }
        if let Value::Object(fields) = place {
            match &self.to {
                Value::Null => drop(fields.remove(name)),
                to => drop(fields.insert(name.into(), to.clone())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_at_most_a_thousand_changes() {
        let change = Change { step: 1, field: "f".into(), from: Value::Null, to: Value::Null };
        let mut history = vec![change.clone(); Change::MAX - 1];
        Change::record(&mut history, vec![change.clone()]).unwrap();
        let error = Change::record(&mut history, vec![change]).unwrap_err().to_string();
        let expected = "number of changes of the run is 1001; it must be at most 1000; continue the run with the \
                        configuration and the images of its checkpoint, or begin a new run";
        assert_eq!(error, expected);
        assert_eq!(history.len(), Change::MAX);
    }
}
