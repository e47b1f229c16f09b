//! The only place that knows which devices there are.

pub(crate) mod maps;
