//! The plan of a convolution: its shape, and the way to compute it, which is selected here alone.

use std::sync::OnceLock;

use super::algorithm::{Algorithm, Math, Packed, Workspace};
use super::bf16::Bf16;
use super::epilogue::Epilogue;
use super::im2col::Im2col;
use super::winograd::Winograd;
use crate::kernels::cpu::isa::Isa;
use crate::kernels::op::conv::ConvShape;

/// A convolution on the CPU, ready to be computed. A small value: making one costs a few comparisons.
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

/// Returns a way to compute the convolution, if it suits the shape and the arithmetic.
type Suits = fn(Isa, &ConvShape, Math) -> Option<Way>;

/// The ways to compute a convolution, the fastest first. [`Im2col`] suits everything else. Whether a way
/// suits does not depend on the batch or the size of the map, so packed weights serve all of them.
const WAYS: [Suits; 2] = [
    |isa, shape, math| Bf16::suits(isa, shape, math).map(Way::Bf16),
    |isa, shape, math| Winograd::suits(isa, shape, math).map(Way::Winograd),
];

impl Plan {
    /// The first way that suits.
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

    /// Returns whether the products are those of Winograd's method.
    #[cfg(test)]
    pub(crate) fn is_winograd(&self) -> bool {
        matches!(self.way, Way::Winograd(_))
    }

    /// The same, with bf16 products by another unit.
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

    /// The weights (out, in, k, k), as [`forward`](Self::forward) reads them, in memory of `workspace`:
    /// [`Workspace::unpack`] takes it back.
    pub(crate) fn pack(&self, weight: &[f32], workspace: &mut Workspace) -> Packed {
        self.algorithm().pack(weight, workspace)
    }

    /// Writes `y` from `x`. The weights may be those that a plan of another batch or size of map packed.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        weight: &Packed,
        epilogue: Epilogue<'_>,
        y: &mut [f32],
    ) {
        self.algorithm().forward(x, weight, epilogue, y);
    }

    /// Writes the gradient of `x` to `dx`, or adds it to the values that are there.
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

    /// Writes the gradient of the weights, (out, in, k, k).
    pub(crate) fn weight_gradient(
        &self,
        x: &[f32],
        dy: &[f32],
        dweight: &mut [f32],
        workspace: &mut Workspace,
    ) {
        self.algorithm().weight_gradient(x, dy, dweight, workspace);
    }
}

/// The packed weights of a layer whose weights do not change, for each kind of arithmetic, once used.
#[derive(Debug, Default)]
pub(crate) struct PackedOnce([OnceLock<Packed>; Math::COUNT]);

impl PackedOnce {
    /// The packed weights for a plan, which are packed in the first call.
    pub(crate) fn get(&self, plan: &Plan, weight: &[f32]) -> &Packed {
        let packed = &self.0[plan.math as usize];
        // Not packed within `get_or_init`: threads of the pool that wait there for the first one would
        // keep it from ending. At worst the weights are packed twice.
        match packed.get() {
            Some(weights) => weights,
            None => {
                let weights = plan.pack(weight, &mut Workspace::default());
                packed.get_or_init(|| weights)
            }
        }
    }
}
