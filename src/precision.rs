use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The precision of products, and on CUDA devices of feature maps.
///
/// Weights, their averages, the state of the optimiser, statistics of normalisations, softmax, loss and sampler are
/// always f32. The names `Highest` and `High` follow PyTorch and JAX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Precision {
    /// f32 throughout.
    ///
    /// On a CPU, 3x3 convolutions at stride 1 are computed by Winograd's method. The error of a network is that of f32 in
    /// PyTorch with channels last, and about twice that of PyTorch with contiguous maps.
    #[default]
    Highest,
    /// f32 in memory, with cheaper products.
    ///
    /// On a CUDA device of compute capability 8.0 or later, all products are TF32 (11 bits). On a CPU with AMX,
    /// convolutions are three products of bf16 parts, accurate to about 16 bits, whose speed is not yet measured. On any
    /// other CPU, 3x3 convolutions of at least 8 channels, at stride 1 and without upsampling, of maps of at least 7x7
    /// pixels, use Winograd's F(4x4, 3x3) in f32: 0.75 times as many products as the F(2x4, 3x3) of
    /// [`Highest`](Self::Highest) at maps of 14x14 pixels and more, and 0.56 times as many as its F(2x2, 3x3) at smaller
    /// ones. The relative error of such a convolution is about 1e-6. The error of a network is about 1.5 times that of
    /// `Highest`. All other operations, and other devices, are those of `Highest`.
    High,
    /// Products of operands rounded to bf16 (8 bits), summed in f32. Requires the feature `f16`.
    ///
    /// On a CPU this applies to convolutions. Attention and linear layers multiply in f32, and feature maps are f32 in
    /// memory. This precision is meant for CPUs with AMX, on which it is not yet measured. With AVX-512 BF16 a training
    /// step takes about as long as with [`Highest`](Self::Highest). Any other CPU emulates it more slowly. On a CUDA
    /// device this applies to all products, and feature maps are bf16 in memory.
    BF16,
    /// The same as [`BF16`](Self::BF16) with f16 (11 bits, numbers up to 65504), on CUDA devices only. Training scales
    /// its gradients by a [`GradScaler`](crate::train::GradScaler). Requires the feature `f16`.
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
    /// Returns an error if this is not one of the names, or if this build lacks the precision.
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
    /// Returns whether the precision requires the feature `f16`.
    pub(crate) fn is_half(self) -> bool {
        matches!(self, Self::BF16 | Self::F16)
    }

    /// # Errors
    /// Returns an error if this build lacks a feature that the precision requires.
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
