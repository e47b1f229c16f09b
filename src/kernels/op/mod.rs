//! The definitions of the operations for every device: sizes, settings, addends of the output, and the counts of
//! updates.
//!
//! The definitions do not depend on how an operation is computed.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod conv;
pub(crate) mod counters;
pub(crate) mod depthwise;
pub(crate) mod loss;
pub(crate) mod muon;
pub(crate) mod norm;
pub(crate) mod place;
pub(crate) mod pool;
