//! The interface of convolution algorithms, and the memory that they use.

use std::fmt;
use std::ops::Deref;

use super::epilogue::Epilogue;
use crate::kernels::cpu::bf16::unit::Unit;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::cpu::memory::from_line;
use crate::kernels::cpu::norm::Known;
use crate::precision::Precision;

/// The arithmetic of products. Sums are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Math {
    /// Products of f32 operands.
    F32,
    /// Products of f32 operands, and for 3x3 kernels Winograd's method with larger tiles than those of
    /// [`F32`](Self::F32): fewer products, with a greater rounding error.
    F32Large,
    /// Three products of bf16 operands in place of one product, accurate to about 16 bits.
    Bf16x3,
    /// Products of operands rounded to bf16.
    Bf16,
}

impl Math {
    /// The arithmetic of a precision in this instruction set. `F16` is not for CPUs.
    pub(crate) fn of(precision: Precision, isa: Isa) -> Self {
        match precision {
            Precision::Highest => Self::F32,
            // Three products in place of one are faster than f32 only with tiles. Tests must not depend on whether the
            // machine has tiles.
            Precision::High if cfg!(test) || Unit::detect(isa).has_tiles() => Self::Bf16x3,
            Precision::High => Self::F32Large,
            Precision::BF16 | Precision::F16 => Self::Bf16,
        }
    }
}

/// The input of a convolution: a map, or the result of a normalisation of that map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a> {
    pub map: &'a [f32],
    pub norm: Option<&'a Known>,
}

impl<'a> From<&'a [f32]> for Input<'a> {
    fn from(map: &'a [f32]) -> Self {
        Self { map, norm: None }
    }
}

impl<'a, T: Deref<Target = [f32]>> From<&'a T> for Input<'a> {
    fn from(map: &'a T) -> Self {
        Self { map, norm: None }
    }
}

/// An algorithm for convolutions of one shape, in one instruction set.
pub(super) trait Algorithm {
    /// Packs the weights (out, in, height, width) for [`forward`](Self::forward), in memory of `workspace`.
    fn pack(&self, weight: &[f32], workspace: &mut Workspace) -> Packed;

    /// Returns whether the algorithm can normalise its input as it reads it.
    fn normalizes(&self) -> bool {
        false
    }

    /// Returns whether the gradient of the weights can normalise the input as it reads it.
    fn weight_gradient_normalizes(&self) -> bool {
        false
    }

    /// Writes `y` from `x`.
    fn forward(&self, x: Input<'_>, weight: &Packed, epilogue: Epilogue<'_>, y: &mut [f32]);

    /// Writes the gradient of `x` to `dx`, or adds it to the values of `dx`.
    fn input_gradient(
        &self,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        workspace: &mut Workspace,
    );

    /// Writes the gradient of the weights, (out, in, height, width).
    fn weight_gradient(
        &self,
        x: Input<'_>,
        dy: &[f32],
        dweight: &mut [f32],
        workspace: &mut Workspace,
    );
}

/// Memory that convolutions reuse from call to call.
#[derive(Default)]
pub(crate) struct Workspace {
    /// Packed weights of f32 products, or sums and other values of one call. No call needs both.
    pub(super) values: Vec<f32>,
    /// Packed weights of bf16 products.
    pub(super) packed_bf16: Vec<u16>,
}

impl Workspace {
    /// Creates a workspace with nonzero content, as if it had been used before.
    #[cfg(test)]
    pub(crate) fn dirty(len: usize) -> Self {
        Self { values: vec![f32::NAN; len], packed_bf16: vec![u16::MAX; len] }
    }

    /// Takes back the memory of packed weights.
    pub(crate) fn unpack(&mut self, weights: Packed) {
        match weights {
            Packed::F32(values) => self.values = values,
            Packed::Bf16(values) => self.packed_bf16 = values,
        }
    }
}

/// The packed weights of a convolution. Only the algorithm that packed them knows their layout.
pub(crate) enum Packed {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

impl Packed {
    /// The values, if they are f32.
    pub(super) fn f32(&self) -> &[f32] {
        if let Self::F32(values) = self { from_line(values) } else { &[] }
    }

    /// The values, if they are bf16.
    pub(super) fn bf16(&self) -> &[u16] {
        if let Self::Bf16(values) = self { from_line(values) } else { &[] }
    }
}

impl fmt::Debug for Packed {
    /// Omits the values, of which there may be millions.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packed").finish_non_exhaustive()
    }
}
