use candle_core::{DType, Device};

use super::dispatch::has_kernels;
use crate::error::{Error, Result};
use crate::kernels::cpu::bf16::unit::Unit;
use crate::kernels::cpu::isa::Isa;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::Gpu;
use crate::precision::Precision;

impl Precision {
    /// Returns a warning for the user if [`BF16`](Self::BF16) is not faster than [`Highest`](Self::Highest) on a device,
    /// and otherwise `None`. A CPU without AMX gives a warning. Products of bf16 pairs by AVX-512 take about as long as
    /// f32 products. Emulated products take several times as long. [`F16`](Self::F16) is refused on CPUs elsewhere, and
    /// has the same warning.
    ///
    /// The environment variable `DDPM_MAX_CPU_ISA` limits which instructions are used.
    pub fn speed_warning(self, device: &Device) -> Option<&'static str> {
        if !self.is_half() || !device.is_cpu() {
            return None;
        }
        let unit = Unit::detect(Isa::detect());
        if unit.has_tiles() {
            None
        } else if unit.is_native() {
            Some(
                "this CPU has no AMX tiles: bf16 products take about as long as those of highest, and are less \
                 accurate",
            )
        } else {
            Some(
                "this CPU has no bf16 instructions: bf16 products take several times as long as those of highest",
            )
        }
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
    fn bf16_has_no_warning_only_where_the_cpu_lists_tiles() {
        let cpu = Device::Cpu;
        assert!(Precision::Highest.speed_warning(&cpu).is_none());
        assert!(Precision::High.speed_warning(&cpu).is_none());
        let listed = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let has = |flag: &str| listed.split_whitespace().any(|word| word == flag);
        let limit = std::env::var("DDPM_MAX_CPU_ISA").unwrap_or_default().to_lowercase();
        let pairs = has("avx512_bf16") && has("avx512bw") && has("avx512vl") && has("fma");
        let expected = match limit.as_str() {
            "avx2" | "baseline" => Some("no bf16 instructions"),
            "" | "amx" if pairs && has("amx_bf16") => None,
            _ if pairs => Some("no AMX tiles"),
            _ => Some("no bf16 instructions"),
        };
        let found = Precision::BF16.speed_warning(&cpu);
        assert_eq!(found.is_some(), expected.is_some());
        assert!(found.zip(expected).is_none_or(|(found, part)| found.contains(part)), "{found:?}");
    }
}
