//! The operations of networks whose weights do not change and whose gradients nobody needs, on the CPU in f32.
//!
//! Weights are packed once, each operation writes to some channels of a map, and maps take memory from a pool.

use std::sync::Arc;

use super::maps::{Buffer, Pool};
use crate::error::Result;
use crate::kernels::Isa;
use crate::kernels::cpu::conv::algorithm::{Math, Packed, Workspace};
use crate::kernels::cpu::conv::epilogue::Epilogue;
use crate::kernels::cpu::conv::plan::Plan;
use crate::kernels::cpu::pool::pool;
use crate::kernels::op::conv::{ConvShape, Scale};
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
    /// Convolutions of the same map. Their outputs are the channels of the next map, in their order.
    Convolve(Vec<Convolution>),
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

    /// Writes the output to the channels of `y` from `first` on.
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
            Self::Convolve(convolutions) => {
                for convolution in convolutions {
                    let plan = convolution.plan(x.dims)?;
                    let epilogue = Epilogue {
                        bias: Some(&convolution.bias),
                        relu: convolution.relu,
                        place: Some(place),
                        ..Epilogue::default()
                    };
                    plan.forward(&x.values, &convolution.packed, epilogue, &mut y.values);
                    place.first += plan.output()[3];
                }
            }
        }
        Ok(())
    }
}

/// A convolution with packed weights, and perhaps a ReLU.
pub(crate) struct Convolution {
    /// (out, in, height, width)
    weight: [usize; 4],
    packed: Packed,
    bias: Vec<f32>,
    scale: Scale,
    relu: bool,
}

impl Convolution {
    /// Packs the weights of a convolution, (out, in, height, width), with the dimensions `dims`.
    ///
    /// # Errors
    /// Returns an error if a convolution cannot have these dimensions.
    pub(crate) fn new(
        weight: &[f32],
        dims: [usize; 4],
        bias: Vec<f32>,
        scale: Scale,
        relu: bool,
    ) -> Result<Self> {
        let unpacked = Self { weight: dims, packed: Packed::F32(vec![]), bias, scale, relu };
        let [_, channels, height, width] = dims;
        // Packed weights do not depend on the size of the map.
        let plan = unpacked.plan([1, height, width, channels])?;
        Ok(Self { packed: plan.pack(weight, &mut Workspace::default()), ..unpacked })
    }

    fn plan(&self, x: [usize; 4]) -> Result<Plan> {
        Ok(Plan::new(Isa::detect(), ConvShape::new(x, &self.weight, self.scale)?, Math::F32))
    }
}
