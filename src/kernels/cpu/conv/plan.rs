//! The plan of a convolution: its shape and its algorithm. The algorithm is selected only here.

use std::sync::OnceLock;

use super::algorithm::{Algorithm, Input, Math, Packed, Workspace};
use super::bf16::Bf16;
use super::epilogue::Epilogue;
use super::im2col::Im2col;
use super::winograd::{Size, Winograd};
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

/// The algorithms, the fastest first. [`Im2col`] handles all other cases. The choice does not depend on the batch, but
/// the size of Winograd's tiles depends on the size of the map: see [`Packing`].
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
    pub(crate) fn winograd(&self) -> Option<[usize; 2]> {
        let Way::Winograd(winograd) = &self.way else { return None };
        Some(winograd.size().output())
    }

    /// The packing of the weights.
    pub(crate) fn packing(&self) -> Packing {
        match (&self.way, self.math) {
            (Way::Bf16(_), Math::Bf16x3) => Packing::Bf16x3,
            (Way::Bf16(_), _) => Packing::Bf16,
            (Way::Winograd(winograd), _) => match winograd.size() {
                Size::Small(_) => Packing::F32,
                Size::Wide => Packing::F32Wide,
                Size::Large => Packing::F32Large,
            },
            (Way::Im2col(_), _) => Packing::F32,
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

/// A layout of packed weights. Plans of the same packing, kernel and scale share packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// For products of patches, or of small tiles.
    F32,
    F32Wide,
    F32Large,
    Bf16x3,
    Bf16,
}

impl Packing {
    const COUNT: usize = Self::Bf16 as usize + 1;
}

/// The packed weights of a layer whose weights do not change. They are packed at the first use of each
/// packing.
#[derive(Debug, Default)]
pub(crate) struct PackedOnce([OnceLock<Packed>; Packing::COUNT]);

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
