//! Where the tensors live.

use candle_core::Device;
use ddpm::Precision;

use super::cli::Result;
use super::tell::err;

/// The first device of the kind that this was built for, or the CPU where that is asked for.
pub fn pick(cpu: bool) -> Result<Device> {
    let (kind, device) = if cpu {
        return Ok(Device::Cpu);
    } else if cfg!(feature = "cuda") {
        ("CUDA", Device::new_cuda(0))
    } else if cfg!(feature = "metal") {
        ("Metal", Device::new_metal(0))
    } else {
        return Ok(Device::Cpu);
    };
    device.map_err(|e| {
        format!("no {kind} device: {}; --cpu does without one", ddpm::Error::from(e)).into()
    })
}

pub fn describe(device: &Device) -> String {
    match device {
        Device::Cpu => {
            // The library's, which need not be as many as the machine has.
            let threads = rayon::current_num_threads();
            format!("CPU, {threads} {}", if threads == 1 { "thread" } else { "threads" })
        }
        Device::Cuda(_) => "CUDA device 0".into(),
        Device::Metal(_) => "Metal device 0".into(),
    }
}

/// Says so where a precision that is meant to be faster is slower than the exact one.
pub fn check_speed(precision: Precision, device: &Device) {
    if !precision.is_accelerated(device) {
        err!(
            "warning: this CPU has no instructions for {precision} products and computes them several \
             times more slowly than with --precision highest"
        );
    }
}
