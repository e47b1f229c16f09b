//! The operations of networks on feature maps, by the kernels of a device.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod dispatch;
mod ops;
mod pool;

pub(crate) use dispatch::{Pass, Place, can_capture, check_precision, dispatch, has_kernels};
pub(crate) use ops::Maps;
pub(crate) use pool::Pool;
