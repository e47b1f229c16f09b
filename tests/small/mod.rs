//! Two small networks: one of the crate's layers other than the U-Net, and one of a single weight.
#![allow(dead_code)]

use candle_core::Tensor;
use candle_nn::{Init, VarBuilder};
use ddpm::nn::{
    Activation, Add, Architecture, Attention, Condition, Conv2d, Engine, Graph, GroupNorm, Linear,
    Model, Output, ResBlock, Trainable, VectorActivation,
};
use ddpm::{Denoiser, Result, TimeEmbedding};
use serde::{Deserialize, Serialize};

/// A network that consists of its `run`, and has no code for its computation.
pub struct Small {
    time: TimeEmbedding,
    input: Conv2d,
    down: Conv2d,
    block: ResBlock,
    attention: Attention,
    up: Conv2d,
    gate: Linear,
    norm: GroupNorm,
    output: Conv2d,
}

impl Graph for Small {
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x_t: &E::Map) -> Result<E::Map> {
        let time = self.time.run(engine)?;
        let skip = engine.conv(&self.input, x_t)?;
        let x = engine.conv(&self.down, &skip)?;
        let x = self.block.run(engine, &x, &time)?;
        let x = self.attention.run(engine, &x)?;
        let gate = engine.linear(VectorActivation::Gelu, &self.gate, &time)?;
        let x = engine.conv_add(&self.up, &x, Add::per_image(&gate))?;
        let x = engine.concatenate(&x, &skip)?;
        let x = engine.drop_maps(&x, 7, 0.25)?;
        engine.norm_conv(&self.norm, &self.output, &x)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SmallConfig {
    pub width: usize,
}

impl Architecture for SmallConfig {
    const KIND: &'static str = "small";
    type Model = Model<Small>;

    fn build(&self, vb: VarBuilder) -> Result<Model<Small>> {
        let width = self.width;
        Model::new(Small {
            time: TimeEmbedding::new(16, vb.pp("time"))?,
            input: Conv2d::new(3, width, 5, vb.pp("input"))?,
            down: Conv2d::new(width, width, 3, vb.pp("down"))?.downsampling(),
            block: ResBlock::new(width, 2 * width, 16, vb.pp("block"))?,
            attention: Attention::new(2 * width, vb.pp("attention"))?,
            up: Conv2d::new(2 * width, width, 3, vb.pp("up"))?.upsampling(),
            gate: Linear::new(16, width, vb.pp("gate"))?,
            norm: GroupNorm::new(2 * width, Activation::Silu, vb.pp("norm"))?,
            output: Conv2d::new(2 * width, 3, 1, vb.pp("output"))?,
        })
    }
}

pub const CONFIG: SmallConfig = SmallConfig { width: 16 };

/// One weight, which scales its input: the cheapest network.
#[derive(Serialize, Deserialize)]
pub struct Scale;

pub struct Scaled(Tensor);

impl Architecture for Scale {
    const KIND: &'static str = "scale";
    type Model = Scaled;

    fn build(&self, vb: VarBuilder) -> Result<Scaled> {
        Ok(Scaled(vb.get_with_hints(1, "scale", Init::Const(0.5))?))
    }
}

impl Denoiser for Scaled {
    fn denoise(&self, x_t: &Tensor, _: &Tensor, _: &Condition) -> Result<Output> {
        Ok(Output::new(x_t.broadcast_mul(&self.0)?))
    }
}

impl Trainable for Scaled {}
