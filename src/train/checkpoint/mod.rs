//! Checkpoints: training runs on disk. [`format`](self::format) defines the files, [`store`] writes them, and [`open`]
//! reads them. [`weights`] defines the description in the metadata of a weights file.

pub(super) mod claim;
mod files;
pub(super) mod format;
mod found;
mod lock;
mod network;
pub(super) mod open;
mod paths;
pub(super) mod store;
pub(super) mod weights;
