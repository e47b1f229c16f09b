//! Checkpoints: training runs on disk. [`format`](self::format) defines the files, [`store`] writes them, and
//! [`open`] reads them.

pub(super) mod claim;
mod files;
pub(super) mod format;
mod found;
mod lock;
pub(super) mod open;
mod paths;
pub(super) mod store;
