//! Training images, and the batches that are formed from them.
//!
//! [`Images`] holds a data set in memory, with one byte per value. [`mnist`] and [`cifar10`] read the files in which
//! those data sets are distributed. For other data, implement [`Dataset`].

mod cifar;
pub(crate) mod dataset;
mod file;
#[cfg(feature = "image")]
pub mod folder;
mod idx;
pub(crate) mod images;
pub(crate) mod loader;
pub(crate) mod parallel;
pub(crate) mod prefetch;
mod split;
mod subset;

pub use cifar::cifar10;
pub use dataset::{Dataset, ImageShape, normalized};
#[cfg(feature = "image")]
pub use folder::{Folder, FolderConfig};
pub use idx::{mnist, read_idx_images, read_idx_labels};
pub use images::Images;
pub use loader::Batch;
pub use split::Split;
pub use subset::{Subset, hold_out};
