//! The interface between the parts of a run and its checkpoints.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::config::TrainConfig;
use crate::backend::Counters;
use crate::error::{Error, Result, in_short};

/// Tensors by name.
pub(super) type Tensors = BTreeMap<String, Tensor>;

/// Fields of `checkpoint.json` in their order. They are kept as text until their types are known, because parsed values
/// would take many times the memory.
#[derive(Debug, Default)]
pub(super) struct Fields(Vec<(String, Box<RawValue>)>);

impl Fields {
    /// Adds a field.
    ///
    /// # Errors
    /// Returns an error if the value cannot be written as JSON.
    pub fn insert(&mut self, name: &str, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(Error::external)?;
        // Indented as a field of an object. Strings of JSON contain no line breaks.
        let text = RawValue::from_string(text.replace('\n', "\n  ")).map_err(Error::external)?;
        self.push(name.into(), text);
        Ok(())
    }

    pub fn push(&mut self, name: String, text: Box<RawValue>) {
        self.0.push((name, text));
    }

    /// The JSON of a field.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, text)| text.get())
    }

    /// Removes a field, and returns its JSON.
    pub fn take(&mut self, name: &str) -> Option<Box<RawValue>> {
        let at = self.0.iter().position(|(found, _)| found == name)?;
        Some(self.0.remove(at).1)
    }

    /// Reads a field. A missing one is read as `null`.
    ///
    /// # Errors
    /// Returns an error that names the field if its value is not valid, or if a field without a default is missing.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        match self.text(name) {
            Some(text) => serde_json::from_str(text)
                .map_err(|e| Error::external(format!("{name}: {}", in_short(&e.to_string())))),
            None => serde_json::from_str("null")
                .map_err(|_| Error::external(format!("missing field `{name}`"))),
        }
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, text)| (name, text)))
    }
}

/// What is known of a kind of parts without their state: the files and fields that they write, and valid fields.
#[derive(Debug)]
pub(super) struct Kind {
    /// The name of the first part's file of tensors, without `.safetensors`. The names of further parts are numbered.
    pub name: &'static str,
    /// Whether the tensors are weights with which the network can be built.
    pub weights: bool,
    /// The number of parts with tensors in a run with this configuration.
    pub files: fn(&TrainConfig) -> usize,
    /// The field of the configuration that determines this number.
    pub setting: &'static str,
    /// The fields of `checkpoint.json` that such parts write.
    pub fields: &'static [&'static str],
    /// Returns an error if a field has a value that no run of this number of updates can reach.
    pub check: fn(&Fields, u64) -> Result<()>,
}

impl Kind {
    /// The name of the file of the tensors of a part of this kind; `index` counts from 0.
    pub fn file(&self, index: usize) -> String {
        match index {
            0 => format!("{}.safetensors", self.name),
            _ => format!("{}-{}.safetensors", self.name, index + 1),
        }
    }

    /// Returns whether a part of this kind can have written the file of this name.
    pub fn owns(&self, file: &str) -> bool {
        let stem = file.strip_suffix(".safetensors").and_then(|f| f.strip_prefix(self.name));
        stem.is_some_and(|rest| match rest.strip_prefix('-') {
            Some(number) => {
                number.parse::<usize>().is_ok_and(|n| n > 1 && self.file(n - 1) == file)
            }
            None => rest.is_empty(),
        })
    }
}

/// A part of a run that has state. A checkpoint is a list of such parts. To add a kind of parts, implement this trait,
/// and add the [`Kind`] to `KINDS` and the part to the lists of `TrainState`.
pub(super) trait Stateful {
    fn kind(&self) -> &'static Kind;

    /// The number of parts of the same kind before this one.
    fn index(&self) -> usize {
        0
    }

    /// The tensors to save, without copies. A part without tensors has no file.
    fn tensors(&self) -> Option<Tensors> {
        None
    }

    /// Adds the fields to save. `counters` are the exact counts of the updates.
    ///
    /// # Errors
    /// Returns an error if a value cannot be written as JSON.
    fn save(&self, fields: &mut Fields, counters: &Counters) -> Result<()> {
        let _ = (fields, counters);
        Ok(())
    }

    /// Replaces the state by saved tensors, whose names and shapes are those of the present ones,
    /// and by the fields of all parts.
    ///
    /// # Errors
    /// Returns an error if a field is missing or not valid, or if an operation fails.
    fn restore(&mut self, tensors: Tensors, fields: &Fields) -> Result<()>;
}

/// # Errors
/// Returns an error if a field of a checkpoint is larger than `most`.
pub(super) fn within(field: &'static str, value: u64, most: u64) -> Result<()> {
    if value > most {
        return Err(Error::config(field, value, format!("at most {most}")));
    }
    Ok(())
}
