//! The operations as compositions of candle operations, differentiable on every device and in every dtype.
//! They are the oracle of the kernels' tests, and the fallback if there is no kernel.

pub(crate) mod attention;
pub(crate) mod conv;
#[cfg(test)]
pub(crate) mod depthwise;
pub(crate) mod layout;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod pixels;
#[cfg(test)]
pub(crate) mod pool;
