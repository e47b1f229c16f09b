//! Optimisation, one concept per file: Adam, Muon, gradient clipping, the average of the weights, the gradient scaler
//! for half precision, and the learning-rate schedule.

pub(super) mod adam;
pub(super) mod average;
pub(super) mod clip;
pub(super) mod ema;
pub(super) mod muon;
pub(super) mod optimizer;
pub(super) mod post_hoc;
pub(super) mod scaler;
pub(super) mod schedule;
