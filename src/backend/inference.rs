//! The operations of networks with fixed weights and without gradients, on the CPU in f32.
//!
//! Weights are packed at their first use, each operation writes to some channels of a map, and maps take memory from a
//! pool.

use std::sync::Arc;

use super::maps::{Buffer, Pool};
use crate::error::Result;
use crate::kernels::Isa;
use crate::kernels::cpu::conv::algorithm::Math;
use crate::kernels::cpu::conv::epilogue::Epilogue;
use crate::kernels::cpu::conv::plan::{PackedOnce, Plan};
use crate::kernels::cpu::depthwise::{self, Depthwise};
use crate::kernels::cpu::pool::pool;
use crate::kernels::op::activation::Rectifier;
use crate::kernels::op::conv::{ConvShape, Scale};
use crate::kernels::op::depthwise::DepthwiseShape;
use crate::kernels::op::place::Place;
use crate::kernels::op::pool::{PoolShape, Pooling};

/// A map (batch, height, width, channels).
pub(crate) struct Map {
    pub dims: [usize; 4],
    pub values: Buffer,
}

impl Map {
    /// Takes memory for a map, with arbitrary content.
    ///
    /// # Errors
    /// Returns an error if there is not enough memory.
    pub(crate) fn take(pool: &Arc<Pool>, dims: [usize; 4]) -> Result<Self> {
        let len = dims.iter().fold(1usize, |len, &size| len.saturating_mul(size));
        Ok(Self { dims, values: pool.take(len)? })
    }
}

/// An operation of a network.
pub(crate) enum Step {
    /// Convolutions of the same map. Their outputs are the channels of the next map, in the order of the convolutions.
    Convolve(Vec<Convolution>),
    Depthwise(DepthwiseConvolution),
    /// A pooling with a square window of this height.
    Pool(Pooling, usize, Scale),
}

impl Step {
    /// The dimensions of the output for an input of dimensions `x`.
    ///
    /// # Errors
    /// Returns an error if the operation does not fit the input.
    pub(crate) fn output(&self, x: [usize; 4]) -> Result<[usize; 4]> {
        match self {
            Self::Pool(_, window, scale) => Ok(PoolShape::new(x, *window, *scale)?.output()),
            Self::Depthwise(convolution) => Ok(convolution.shape(x)?.output()),
            Self::Convolve(convolutions) => {
                let mut dims = [x[0], 0, 0, 0];
                for convolution in convolutions {
                    let [batch, h, w, channels] = convolution.plan(x)?.output();
                    dims = [batch, h, w, dims[3] + channels];
                }
                Ok(dims)
            }
        }
    }

    /// Returns the output as a map.
    ///
    /// # Errors
    /// Returns an error if the operation does not fit the input, or if there is not enough memory.
    pub(crate) fn apply(&self, pool: &Arc<Pool>, x: &Map) -> Result<Map> {
        let mut y = Map::take(pool, self.output(x.dims)?)?;
        self.run(x, &mut y, 0)?;
        Ok(y)
    }

    /// Writes the output to the channels of `y` from `first` on, or [adds](Convolution::adding) it to them.
    ///
    /// # Errors
    /// Returns an error if the operation does not fit the input.
    pub(crate) fn run(&self, x: &Map, y: &mut Map, first: usize) -> Result<()> {
        let mut place = Place { first, of: y.dims[3] };
        match self {
            Self::Pool(pooling, window, scale) => {
                let shape = PoolShape::new(x.dims, *window, *scale)?;
                pool(Isa::detect(), *pooling, &shape, &x.values, place, &mut y.values);
            }
            Self::Depthwise(convolution) => {
                let shape = convolution.shape(x.dims)?;
                let DepthwiseConvolution { packed, bias, rectifier, .. } = convolution;
                let (isa, rectifier) = (Isa::detect(), *rectifier);
                Depthwise { isa, shape, weight: packed, bias, rectifier }.forward(
                    &x.values,
                    place,
                    &mut y.values,
                );
            }
            Self::Convolve(convolutions) => {
                for convolution in convolutions {
                    let plan = convolution.plan(x.dims)?;
                    let epilogue = Epilogue {
                        bias: Some(&convolution.bias),
                        accumulate: convolution.adds,
                        rectifier: convolution.rectifier,
                        place: Some(place),
                        ..Epilogue::default()
                    };
                    let packed = convolution.packed.get(&plan, &convolution.weight);
                    plan.forward(&x.values, packed, epilogue, &mut y.values);
                    place.first += plan.output()[3];
                }
            }
        }
        Ok(())
    }
}

/// A convolution, and the limits of its output.
pub(crate) struct Convolution {
    /// (out, in, height, width). Kept, because maps of another size may need another packing.
    weight: Vec<f32>,
    dims: [usize; 4],
    /// Packed at the first use, because the packing depends on the size of the map.
    packed: PackedOnce,
    bias: Vec<f32>,
    scale: Scale,
    rectifier: Rectifier,
    adds: bool,
}

impl Convolution {
    /// Creates a convolution with weights (out, in, height, width) of the dimensions `dims`.
    ///
    /// # Errors
    /// Returns an error if a convolution cannot have these dimensions.
    pub(crate) fn new(
        weight: Vec<f32>,
        dims: [usize; 4],
        bias: Vec<f32>,
        scale: Scale,
        rectifier: Rectifier,
    ) -> Result<Self> {
        let packed = PackedOnce::default();
        let convolution = Self { weight, dims, packed, bias, scale, rectifier, adds: false };
        let [_, channels, height, width] = dims;
        convolution.plan([1, height, width, channels])?;
        Ok(convolution)
    }

    /// Adds the output to the values of the map to which it would be written, before limits apply.
    pub(crate) fn adding(self) -> Self {
        Self { adds: true, ..self }
    }

    fn plan(&self, x: [usize; 4]) -> Result<Plan> {
        Ok(Plan::new(Isa::detect(), ConvShape::new(x, &self.dims, self.scale)?, Math::F32))
    }
}

/// A depthwise convolution with packed weights, and the limits of its output.
pub(crate) struct DepthwiseConvolution {
    /// (channels, 1, kernel, kernel)
    weight: [usize; 4],
    /// (kernel, kernel, channels)
    packed: Vec<f32>,
    bias: Vec<f32>,
    stride: usize,
    rectifier: Rectifier,
}

impl DepthwiseConvolution {
    /// Packs the weights of a depthwise convolution, (channels, 1, kernel, kernel), with the dimensions `dims`.
    pub(crate) fn new(
        weight: &[f32],
        dims: [usize; 4],
        bias: Vec<f32>,
        stride: usize,
        rectifier: Rectifier,
    ) -> Self {
        Self { weight: dims, packed: depthwise::pack(weight, dims[0]), bias, stride, rectifier }
    }

    fn shape(&self, x: [usize; 4]) -> Result<DepthwiseShape> {
        DepthwiseShape::new(x, self.weight, self.stride)
    }
}
