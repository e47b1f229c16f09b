//! The tables from which a launch reads the weights that it packs or unpacks.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::super::device::Gpu;
use super::super::element::Pointer;
use super::super::kernel::{Module, holds};
use super::super::maps::Channels;
pub(super) const MODULE: &Module = &Module {
    name: "weights",
    source: concat!(include_str!("../common.cuh"), include_str!("weights.cu")),
};

/// Number of values that a block handles at most.
const PACK: usize = 2304;

const _: () = assert!(holds(MODULE.source, "#define PACK 2304\n"));

/// A weight, and its place beside the others.
pub(super) struct Own {
    /// The values in f32.
    pub values: Pointer,
    pub layout: Channels,
    /// The position of the packed values in bytes.
    pub offset: usize,
    /// True if the packed values are f32, and not of the maps' type.
    pub wide: bool,
}

/// Returns the number of channels that a block handles, or `None` if the kernel size is too large.
pub(super) fn chunk_of(layout: Channels) -> Option<usize> {
    let most = PACK / layout.pixels.max(1);
    (most > 0).then(|| most.min(layout.channels.max(1)))
}

impl Own {
    /// The weight as `Weight` in `weights.cu`.
    fn words(&self) -> [u64; 4] {
        let Channels { channels, pixels, .. } = self.layout;
        let chunk = chunk_of(self.layout).unwrap_or(1);
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        let (first, second) = (pair(channels, pixels), pair(chunk, usize::from(self.wide)));
        [self.values.0, self.offset as u64, first, second]
    }

    /// The number of blocks.
    fn parts(&self) -> usize {
        let Channels { channels, pixels, count } = self.layout;
        let chunks = channels.div_ceil(chunk_of(self.layout).unwrap_or(1));
        count / (channels * pixels).max(1) * chunks
    }
}

/// A table on the device. It never changes, so a captured launch can read it as long as it exists.
pub(super) struct Table {
    words: Vec<u64>,
    weights: CudaSlice<u64>,
    parts: Rc<Parts>,
}

/// The blocks of a launch.
struct Parts {
    values: Vec<u32>,
    there: CudaSlice<u32>,
}

impl Table {
    /// Returns the table of these weights: the last one, unless they differ from its weights.
    ///
    /// # Errors
    /// Returns an error if the table would have to be uploaded within what is captured.
    pub fn current(gpu: &Gpu, last: &RefCell<Option<Rc<Self>>>, own: &[Own]) -> Result<Rc<Self>> {
        let words: Vec<u64> = own.iter().flat_map(Own::words).collect();
        let mut last = last.borrow_mut();
        let table = match &*last {
            Some(table) if table.words == words => table.clone(),
            _ if gpu.capture.is_active() => {
                candle_core::bail!("weights or gradients moved within what is captured")
            }
            before => {
                let of_weight = |(i, own): (usize, &Own)| {
                    (0..own.parts()).flat_map(move |index| [i as u32, index as u32])
                };
                let values: Vec<u32> = own.iter().enumerate().flat_map(of_weight).collect();
                // Gradients may move from pass to pass, but the parts stay the same.
                let parts = match before {
                    Some(table) if table.parts.values == values => table.parts.clone(),
                    _ => Rc::new(Parts { there: gpu.device.clone_htod(&values)?, values }),
                };
                let weights = gpu.pool.allocate::<u64>(words.len())?;
                gpu.send(&words, Pointer::to(&weights, &gpu.stream))?;
                Rc::new(Self { words, weights, parts })
            }
        };
        gpu.capture.hold(table.clone());
        *last = Some(table.clone());
        Ok(table)
    }

    /// Returns the addresses of the weights and of the parts, and the number of blocks.
    pub fn arguments(&self, gpu: &Gpu) -> (Pointer, Pointer, u32) {
        let weights = Pointer::to(&self.weights, &gpu.stream);
        let parts = Pointer::to(&self.parts.there, &gpu.stream);
        (weights, parts, (self.parts.values.len() / 2) as u32)
    }
}
