//! Attention by kernels that keep no matrix of scores in memory.

use std::rc::Rc;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;

use super::super::device::Gpu;
use super::super::element::{Element, Pointer};
use super::super::kernel::{Launch, Module, holds, kernel};
use super::super::memory::Memory;
use crate::kernels::op::attention::AttentionShape;
use crate::precision::Precision;

const SOURCE: &str = include_str!("fused.cu");

/// The kernels for heads of at most this many channels.
macro_rules! width {
    ($channels:literal) => {
        (
            $channels,
            &Module {
                name: concat!("attention of ", $channels, " channels"),
                source: concat!(
                    "#define HEAD ",
                    $channels,
                    "\n",
                    include_str!("../common.cuh"),
                    include_str!("fused.cu")
                ),
            },
        )
    };
}

const WIDTHS: [(usize, &Module); 4] = [width!(32), width!(64), width!(128), width!(256)];

// The declarations are the same for all widths.
const MODULE: &Module = WIDTHS[0].1;

kernel! {
    MODULE, "attend",
    Attend {
        qkv: Pointer, y: Pointer, queries: Pointer, positions: u32, channels: u32, head: u32, scale: f32,
    }
}
kernel! {
    MODULE, "gradient_of_queries",
    GradientOfQueries {
        qkv: Pointer, y: Pointer, dy: Pointer, queries: Pointer, dqkv: Pointer, positions: u32,
        channels: u32, head: u32, scale: f32,
    }
}
kernel! {
    MODULE, "gradient_of_keys",
    GradientOfKeys {
        qkv: Pointer, dy: Pointer, queries: Pointer, dqkv: Pointer, positions: u32, channels: u32,
        head: u32, scale: f32,
    }
}

/// Number of rows of the result that a block computes, and number of its threads.
const ROWS: usize = 64;
const BLOCK: u32 = 128;

const _: () = assert!(holds(SOURCE, "#define ROWS 64\n") && holds(SOURCE, "#define BLOCK 128\n"));
const _: () = assert!(holds(SOURCE, "#define STRIDE (HEAD + 8)\n"));
const _: () = assert!(holds(SOURCE, "if (HEAD <= 128) gradients<true, true, true>"));

/// Number of rows in shared memory: 64 queries, 64 keys and 64 values, or two tiles of 64 of a block's own rows, and
/// two of 32 other rows each.
const ROWS_OF_TILES: usize = 192;

/// Attention of heads whose channels are a multiple of 8, in f16 or bf16.
pub(super) struct Fused {
    element: Element,
    batch: usize,
    shape: AttentionShape,
    /// Channels of a head in shared memory and registers.
    width: usize,
    module: &'static Module,
    /// Number of blocks.
    blocks: u32,
}

/// Results of the forward pass.
pub(super) struct Results {
    pub y: Rc<Memory>,
    /// The values of each image, head and query: `Query` in the source.
    queries: Memory,
}

/// The number of values of a query. The last one is unused.
const NUMBERS: usize = 4;

const _: () = assert!(holds(SOURCE, "    float most, log, sum, unused;\n"));

impl Fused {
    /// Returns the kernels for these sizes, if there are any.
    pub fn of(
        gpu: &Gpu,
        precision: Precision,
        batch: usize,
        shape: AttentionShape,
    ) -> Option<Self> {
        let element = Element::of(precision);
        let AttentionShape { positions, channels, heads } = shape;
        let head = shape.head();
        if element == Element::F32 || head == 0 || !head.is_multiple_of(8) || !gpu.compiles_for(80)
        {
            return None;
        }
        let &(width, module) = WIDTHS.iter().find(|(width, _)| head <= *width)?;
        let blocks = batch.checked_mul(heads)?.checked_mul(positions.div_ceil(ROWS))?;
        // The largest grid.
        let blocks = i32::try_from(blocks).ok()?.cast_unsigned();
        let fits = |n: usize| i32::try_from(n).is_ok();
        (blocks > 0 && fits(3 * channels) && fits(positions)).then_some(Self {
            element,
            batch,
            shape,
            width,
            module,
            blocks,
        })
    }

    /// Launches a kernel, with `times` as many blocks as there are parts of rows.
    fn launch<L: Launch>(&self, gpu: &Gpu, times: u32, kernel: L) -> Result<()> {
        let shared = ROWS_OF_TILES * (self.width + 8) * self.element.bytes();
        let config = LaunchConfig {
            grid_dim: (self.blocks, times, 1),
            block_dim: (BLOCK, 1, 1),
            shared_mem_bytes: shared as u32,
        };
        gpu.launch_of(self.module, self.element, config, kernel)
    }

    pub fn forward(&self, gpu: &Gpu, qkv: &Memory) -> Result<Results> {
        let AttentionShape { positions, channels, heads } = self.shape;
        let y = Rc::new(gpu.take_for(self.batch * positions * channels, self.element)?);
        let queries = gpu.take_for(self.batch * heads * positions * NUMBERS, Element::F32)?;
        let attend = Attend {
            qkv: qkv.pointer,
            y: y.pointer,
            queries: queries.pointer,
            positions: positions as u32,
            channels: channels as u32,
            head: self.shape.head() as u32,
            scale: self.shape.scale(),
        };
        self.launch(gpu, 1, attend)?;
        Ok(Results { y, queries })
    }

    pub fn backward(
        &self,
        gpu: &Gpu,
        qkv: &Memory,
        results: &Results,
        dy: &Memory,
    ) -> Result<Memory> {
        let AttentionShape { positions, channels, .. } = self.shape;
        let dqkv = gpu.take_for(self.batch * positions * 3 * channels, self.element)?;
        let (head, scale) = (self.shape.head() as u32, self.shape.scale());
        let (positions, channels) = (positions as u32, channels as u32);
        let (y, queries) = (results.y.pointer, results.queries.pointer);
        let (qkv, dy, there) = (qkv.pointer, dy.pointer, dqkv.pointer);
        let of_queries = GradientOfQueries {
            qkv,
            y,
            dy,
            queries,
            dqkv: there,
            positions,
            channels,
            head,
            scale,
        };
        self.launch(gpu, 1, of_queries)?;
        let of_keys =
            GradientOfKeys { qkv, dy, queries, dqkv: there, positions, channels, head, scale };
        // A block keeps the gradients of both keys and values in registers if they have at most 128 channels.
        self.launch(gpu, if self.width <= 128 { 1 } else { 2 }, of_keys)?;
        Ok(dqkv)
    }
}
