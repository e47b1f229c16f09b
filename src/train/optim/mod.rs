//! The optimiser and what belongs to it, each in a file: Adam, clipping, the average of the weights, the scale of
//! gradients in half precision, and the learning rate.

pub(super) mod adam;
pub(super) mod clip;
pub(super) mod ema;
pub(super) mod optimizer;
pub(super) mod scaler;
pub(super) mod schedule;
