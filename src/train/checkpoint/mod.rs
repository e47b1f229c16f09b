//! Checkpoints, the form of a training run on disk: [`format`](self::format) defines it, [`store`] writes it, and
//! [`open`] reads it.

pub(super) mod claim;
mod files;
pub(super) mod format;
mod found;
mod lock;
pub(super) mod open;
mod paths;
pub(super) mod store;
