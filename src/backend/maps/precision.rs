use candle_core::{DType, Device};

use super::dispatch::has_kernels;
use crate::error::{Error, Result};
use crate::kernels::cpu::bf16::unit::has_bf16_products;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::Gpu;
use crate::precision::Precision;

impl Precision {
    /// Returns whether a device has instructions for this precision, or needs none to be fast. On a CPU without such
    /// instructions [`BF16`](Self::BF16) is emulated, which is several times slower than [`Highest`](Self::Highest).
    ///
    /// The environment variable `DDPM_MAX_CPU_ISA` limits which instructions are used.
    pub fn is_accelerated(self, device: &Device) -> bool {
        !self.is_half() || !device.is_cpu() || has_bf16_products()
    }
}

/// Checks whether a network of weights of this dtype on this device can compute with a precision.
///
/// # Errors
/// Returns an error that states the supported precisions.
pub(crate) fn check_precision(precision: Precision, dtype: DType, device: &Device) -> Result<()> {
    precision.validate()?;
    if precision.is_half() && !has_kernels(dtype, device) {
        let expected = format!(
            "highest or high: {precision} is for networks of f32 weights on the CPU or a CUDA device"
        );
        return Err(Error::config("precision", precision, expected));
    }
    if precision == Precision::F16 && !device.is_cuda() {
        let expected = "highest, high or bf16 on the CPU: f16 is for CUDA devices (feature `cuda`)";
        return Err(Error::config("precision", precision, expected));
    }
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        Gpu::of(device)?.check(precision)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unlike the kernels, this test finds the instructions in the list of the operating system.
    #[cfg(target_os = "linux")]
    #[test]
    fn bf16_is_accelerated_where_the_cpu_lists_its_instructions() {
        let cpu = Device::Cpu;
        assert!(Precision::Highest.is_accelerated(&cpu) && Precision::High.is_accelerated(&cpu));
        let listed = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let has = |flag: &str| listed.split_whitespace().any(|word| word == flag);
        let limit = std::env::var("DDPM_MAX_CPU_ISA").unwrap_or_default().to_lowercase();
        let expected = match limit.as_str() {
            "avx2" | "baseline" => false,
            _ => has("avx512_bf16") && has("avx512bw") && has("avx512vl") && has("fma"),
        };
        assert_eq!(Precision::BF16.is_accelerated(&cpu), expected);
    }
}
