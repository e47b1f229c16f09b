use std::fmt;
use std::str::FromStr;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::kernels::has_bf16_products;
use crate::{Error, Result};

/// How exactly products are computed, and on CUDA devices how feature maps are kept. Weights, their
/// averages and the optimiser's state, statistics of normalisations, softmax, loss and sampler are f32 with
/// each; `Highest` and `High` are the words of
/// PyTorch and JAX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Precision {
    /// f32 throughout.
    #[default]
    Highest,
    /// f32 in memory, with cheaper products in convolutions where the machine has some that are good to
    /// about 16 bits: three products of bf16 parts on a CPU with AMX, which is not yet measured.
    /// On a CUDA device of compute capability 8.0 or later all products are TF32. Elsewhere as [`Highest`](Self::Highest).
    High,
    /// Convolutions' products of operands rounded to bf16 (8 bits), summed in f32; attention and linear
    /// layers multiply in f32, and maps stay f32 in memory. Meant for a CPU with AMX, which is not yet
    /// measured; by AVX-512 BF16 a training step takes about as long as in
    /// [`Highest`](Self::Highest), and any other CPU computes the same more slowly. Needs the
    /// feature `f16`. On a CUDA device all products take bf16, and maps are bf16 in memory.
    BF16,
    /// As [`BF16`](Self::BF16) with f16 in its place (11 bits, but none beyond 65504): on CUDA devices
    /// alone. Training scales its gradients by a [`GradScaler`](crate::GradScaler). Needs the feature
    /// `f16`.
    F16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Highest => "highest",
            Self::High => "high",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl FromStr for Precision {
    type Err = Error;

    /// # Errors
    /// Unless it is one of the names, and this build has the precision.
    fn from_str(name: &str) -> Result<Self> {
        let all = [Self::Highest, Self::High, Self::BF16, Self::F16];
        let Some(precision) = all.into_iter().find(|precision| precision.to_string() == name)
        else {
            return Err(Error::config("precision", name, "highest, high, bf16 or f16"));
        };
        precision.validate()?;
        Ok(precision)
    }
}

impl Precision {
    /// Whether a device computes in this precision by instructions that are made for it, or is as fast
    /// without: [`BF16`](Self::BF16) on a CPU that has none is emulated, several times slower than
    /// [`Highest`](Self::Highest).
    ///
    /// The environment variable `DDPM_MAX_CPU_ISA` limits which instructions are used.
    pub fn is_accelerated(self, device: &Device) -> bool {
        !self.is_half() || !device.is_cpu() || has_bf16_products()
    }

    /// How many there are.
    pub(crate) const COUNT: usize = Self::F16 as usize + 1;

    /// Whether it takes the feature `f16`.
    pub(crate) fn is_half(self) -> bool {
        matches!(self, Self::BF16 | Self::F16)
    }

    /// # Errors
    /// If this build lacks what it takes.
    pub(crate) fn validate(self) -> Result<()> {
        if self.is_half() && !cfg!(feature = "f16") {
            let expected =
                format!("highest or high: {self} needs the feature `f16`, which this build lacks");
            return Err(Error::config("precision", self, expected));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The instructions are detected here by another way than the kernels': the system's list.
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

    #[test]
    fn names_go_both_ways() {
        for precision in [Precision::Highest, Precision::High, Precision::BF16, Precision::F16] {
            assert_eq!(serde_json::to_value(precision).unwrap(), precision.to_string());
            if !precision.is_half() || cfg!(feature = "f16") {
                assert_eq!(precision.to_string().parse::<Precision>().unwrap(), precision);
            }
        }
        let message = "half".parse::<Precision>().unwrap_err().to_string();
        assert_eq!(message, "precision is half; it must be highest, high, bf16 or f16");
        if !cfg!(feature = "f16") {
            let message = "bf16".parse::<Precision>().unwrap_err().to_string();
            assert!(message.contains("needs the feature `f16`"), "{message}");
        }
    }
}
