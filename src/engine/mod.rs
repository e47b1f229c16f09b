//! How a network is computed: its layers, the engines that compute them, and the memory that they use.
//!
//! Feature maps are channels-last, as [`kernels`](crate::kernels) wants them.

mod backend;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[allow(clippy::module_inception)]
mod engine;
mod layers;
mod pool;
mod tape;

pub(crate) use backend::Backend;
pub(crate) use cpu::Cpu;
#[cfg(feature = "cuda")]
pub(crate) use cuda::Cuda;
pub(crate) use engine::{Add, Autograd, Engine, Survey, VectorActivation};
pub(crate) use layers::{Conv2d, GROUPS, GroupNorm, Linear};
pub(crate) use pool::Pool;
pub(crate) use tape::{Map, Tape};
