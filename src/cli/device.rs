//! The device of the tensors.

use candle_core::Device;

use super::print::err;
use super::result::Result;
use crate::backend::accelerator;
use crate::error::Error;
use crate::precision::Precision;

/// Selects the first device of the kind for which this was built, or the CPU if it is requested.
///
/// # Errors
/// Returns an error if there is no such device.
pub fn pick(cpu: bool) -> Result<Device> {
    if cpu {
        return Ok(Device::Cpu);
    }
    let Some((kind, device)) = accelerator::first() else { return Ok(Device::Cpu) };
    device
        .map_err(|e| format!("no {kind} device: {}; --cpu runs without one", Error::from(e)).into())
}

/// Describes a device for the user.
pub fn describe(device: &Device) -> String {
    match device {
        Device::Cpu => {
            // The threads of the library, which may be fewer than those of the machine.
            let threads = rayon::current_num_threads();
            format!("CPU, {threads} {}", if threads == 1 { "thread" } else { "threads" })
        }
        Device::Cuda(_) => "CUDA device 0".into(),
        Device::Metal(_) => "Metal device 0".into(),
    }
}

/// Prints a warning if a precision is not faster than `highest` on a device.
pub fn check_speed(precision: Precision, device: &Device) {
    if let Some(warning) = precision.speed_warning(device) {
        err(format_args!("warning: --precision {precision}: {warning}"));
    }
}
