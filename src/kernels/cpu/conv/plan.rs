//! The plan of a convolution: its shape and its algorithm. The algorithm is selected only here.

use std::sync::OnceLock;

use super::algorithm::{Algorithm, Input, Math, Packed, Workspace};
use super::bf16::Bf16;
use super::epilogue::Epilogue;
use super::im2col::Im2col;
use super::winograd::Winograd;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::op::conv::ConvShape;

/// A convolution on the CPU with its algorithm. Creating this small value costs a few comparisons.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    shape: ConvShape,
    math: Math,
    way: Way,
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Bf16(Bf16),
    Winograd(Winograd),
    Im2col(Im2col),
}

/// Returns an algorithm for the convolution, if it supports the shape and the arithmetic.
type Suits = fn(Isa, &ConvShape, Math) -> Option<Way>;

/// The algorithms, the fastest first. [`Im2col`] handles all other cases. The choice does not depend on the batch. With
/// [`Math::F32Large`], the size of tiles and the packing of weights depend on the size of the map: see [`Plan::packing`].
const WAYS: [Suits; 2] = [
    |isa, shape, math| Bf16::suits(isa, shape, math).map(Way::Bf16),
    |isa, shape, math| Winograd::suits(isa, shape, math).map(Way::Winograd),
];

impl Plan {
    /// Selects the first algorithm that supports the shape and the arithmetic.
    pub(crate) fn new(isa: Isa, shape: ConvShape, math: Math) -> Self {
        let way = WAYS.iter().find_map(|suits| suits(isa, &shape, math));
        Self { shape, math, way: way.unwrap_or(Way::Im2col(Im2col { isa, shape })) }
    }

    fn algorithm(&self) -> &dyn Algorithm {
        match &self.way {
            Way::Bf16(bf16) => bf16,
            Way::Winograd(winograd) => winograd,
            Way::Im2col(im2col) => im2col,
        }
    }

    /// Height and width of the output of Winograd's tiles, if the algorithm is Winograd's.
    #[cfg(test)]
    pub(crate) fn winograd(&self) -> Option<usize> {
        let Way::Winograd(winograd) = &self.way else { return None };
        Some(if winograd.is_large() { 4 } else { 2 })
    }

    /// The arithmetic that packs weights like this plan. Plans of the same arithmetic, kernel and scale share packed
    /// weights, except that [`Math::F32Large`] packs those of small maps like [`Math::F32`].
    pub(crate) fn packing(&self) -> Math {
        match (&self.way, self.math) {
            (Way::Winograd(winograd), Math::F32Large) if winograd.is_large() => Math::F32Large,
            (_, Math::F32Large) => Math::F32,
            (_, math) => math,
        }
    }

    /// Returns the same plan, with bf16 products on another unit.
    #[cfg(test)]
    pub(crate) fn with_unit(self, unit: crate::kernels::cpu::bf16::unit::Unit) -> Self {
        match self.way {
            Way::Bf16(bf16) => Self { way: Way::Bf16(bf16.with_unit(unit)), ..self },
            _ => self,
        }
    }

    /// The dimensions of the output.
    pub(crate) fn output(&self) -> [usize; 4] {
        self.shape.output()
    }

    /// Packs the weights (out, in, height, width) for [`forward`](Self::forward), in memory of `workspace`.
    /// [`Workspace::unpack`] takes the memory back.
    pub(crate) fn pack(&self, weight: &[f32], workspace: &mut Workspace) -> Packed {
        self.algorithm().pack(weight, workspace)
    }

    /// Returns whether the convolution can normalise its input as the input is read.
    pub(crate) fn normalizes(&self) -> bool {
        self.algorithm().normalizes()
    }

    /// Returns whether the gradient of the weights can normalise the input as the input is read.
    pub(crate) fn weight_gradient_normalizes(&self) -> bool {
        self.algorithm().weight_gradient_normalizes()
    }

    /// Writes `y` from `x`. Another plan with the same [`packing`](Self::packing) may have packed the weights.
    pub(crate) fn forward<'a>(
        &self,
        x: impl Into<Input<'a>>,
        weight: &Packed,
        epilogue: Epilogue<'_>,
        y: &mut [f32],
    ) {
        let x = x.into();
        assert!(epilogue.place.is_none() || epilogue.add.residual.is_none());
        assert!(x.norm.is_none() || self.normalizes());
        self.algorithm().forward(x, weight, epilogue, y);
    }

    /// Writes the gradient of `x` to `dx`, or adds it to the values of `dx`.
    pub(crate) fn input_gradient(
        &self,
        dy: &[f32],
        weight: &[f32],
        dx: &mut [f32],
        accumulate: bool,
        workspace: &mut Workspace,
    ) {
        self.algorithm().input_gradient(dy, weight, dx, accumulate, workspace);
    }

    /// Writes the gradient of the weights, (out, in, height, width).
    pub(crate) fn weight_gradient<'a>(
        &self,
        x: impl Into<Input<'a>>,
        dy: &[f32],
        dweight: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let x = x.into();
        assert!(x.norm.is_none() || self.weight_gradient_normalizes());
        self.algorithm().weight_gradient(x, dy, dweight, workspace);
    }
}

/// The packed weights of a layer whose weights do not change. They are packed at the first use of each
/// packing.
#[derive(Debug, Default)]
pub(crate) struct PackedOnce([OnceLock<Packed>; Math::COUNT]);

impl PackedOnce {
    /// Returns the packed weights for a plan. The first call packs them.
    pub(crate) fn get(&self, plan: &Plan, weight: &[f32]) -> &Packed {
        let packed = &self.0[plan.packing() as usize];
        // Not packed within `get_or_init`: packing uses the thread pool, and threads that wait there
        // would keep it from ending. In the worst case the weights are packed twice.
        match packed.get() {
            Some(weights) => weights,
            None => {
                let weights = plan.pack(weight, &mut Workspace::default());
                packed.get_or_init(|| weights)
            }
        }
    }

    /// Returns whether no weights are kept.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|packed| packed.get().is_none())
    }
}
