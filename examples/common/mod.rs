//! What the examples share: arguments, progress, pictures, files. The algorithms are the library's.
#![allow(dead_code, reason = "each example uses a part of it")]

pub mod cli;
pub mod curve;
pub mod datasets;
pub mod device;
pub mod draw;
pub mod files;
pub mod identity;
pub mod interrupt;
pub mod metrics;
pub mod pictures;
pub mod progress;
pub mod random;
pub mod sampling;
pub mod tell;
pub mod train;
mod watch;
