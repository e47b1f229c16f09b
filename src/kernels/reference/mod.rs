//! The operations composed of candle's own, differentiable on every device and in every type: the oracle of
//! the kernels' tests, and the computation where there is no kernel.

pub(crate) mod attention;
pub(crate) mod conv;
pub(crate) mod layout;
pub(crate) mod linear;
pub(crate) mod norm;
