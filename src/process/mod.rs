//! The forward and the reverse process: schedules and the formulae that relate `x_0`, `x_t` and noise.

pub(crate) mod bound;
pub(crate) mod diffusion;
pub(crate) mod learned;
pub(crate) mod schedule;
mod spec;

pub(crate) use diffusion::check_timesteps;
pub use diffusion::{Diffusion, Prediction};
pub use schedule::NoiseSchedule;
