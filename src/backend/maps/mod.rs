//! The operations of networks on feature maps, computed by the kernels of a device.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod dispatch;
mod ops;
mod place;
mod pool;
mod precision;

pub(crate) use dispatch::{Pass, can_capture, dispatch, has_kernels, repeated};
pub(crate) use ops::{ConvGradients, Maps, Norm};
pub(crate) use place::Place;
pub(crate) use pool::{Buffer, Pool};
pub(crate) use precision::check_precision;
