//! The only place that distinguishes devices. The modules above it state what is computed.
//!
//! [`reference`] is the specification. It contains each formula of the process, the loss and the update once, composed
//! of candle operations. It runs on every device and in every floating-point dtype, and supports gradients. The other
//! backends compute the same with fewer passes over memory, for tensors that are [plain](ops::Backend). They delegate
//! all other tensors to the reference. One table of tests compares them with the reference.

#[cfg(feature = "cli")]
pub(crate) mod accelerator;
mod cpu;
mod cuda;
pub(crate) mod inference;
pub(crate) mod maps;
mod ops;
mod reference;
#[cfg(test)]
mod tests;
mod update;

use candle_core::{DType, Device, Tensor};

pub(crate) use self::ops::{Backend, Capture, Computed, Inputs, Rates, Recorded};
pub(crate) use self::reference::clip_norm;
pub(crate) use self::update::{AverageRule, MuonRule, ScaleRule, UpdateRule, Updater, WeightState};
pub(crate) use crate::kernels::op::counters::Counters;

/// Returns the backend for tensors of this dtype on this device.
pub(crate) fn on(device: &Device, dtype: DType) -> &'static dyn Backend {
    match (device, dtype) {
        (Device::Cpu, DType::F32) => &cpu::Cpu,
        #[cfg(feature = "cuda")]
        (Device::Cuda(_), DType::F32) => &cuda::Cuda,
        _ => &reference::Reference,
    }
}

/// Returns whether reading a value from the device waits for all work that was submitted before.
pub(crate) fn reading_waits(device: &Device) -> bool {
    !device.is_cpu()
}

/// Returns the backend for the dtype and the device of `x`.
pub(crate) fn of(x: &Tensor) -> &'static dyn Backend {
    on(x.device(), x.dtype())
}
