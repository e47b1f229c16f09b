//! The definitions of the operations for every device: sizes, settings, and addends of the output.
//!
//! The definitions do not depend on how an operation is computed.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod conv;
pub(crate) mod linear;
pub(crate) mod norm;
