//! Attention of all positions to all.

mod by_products;
mod fused;
#[cfg(test)]
mod tests;

use std::rc::Rc;

use candle_core::Result;

use super::device::Gpu;
use super::memory::Memory;
use crate::kernels::op::attention::AttentionShape;
use crate::precision::Precision;
use by_products::ByProducts;
use fused::Fused;

/// Attention of all positions to all, separately for each image of a batch and each head. q, k and v lie side by
/// side.
pub(crate) struct Attention {
    pub precision: Precision,
    pub batch: usize,
    pub shape: AttentionShape,
}

/// Results of the forward pass that the backward pass needs. Attention by matrix products has none.
pub(crate) struct AttentionResults(Option<fused::Results>);

impl Attention {
    /// The kernels for these sizes that keep no scores in memory, if there are any.
    fn fused(&self, gpu: &Gpu) -> Option<Fused> {
        Fused::of(gpu, self.precision, self.batch, self.shape)
    }

    fn by_products(&self) -> ByProducts {
        let Self { precision, batch, shape } = *self;
        ByProducts { precision, batch, shape, most: by_products::MOST }
    }

    /// Computes the output (batch, positions, channels).
    pub fn forward(&self, gpu: &Gpu, qkv: &Memory) -> Result<(Rc<Memory>, AttentionResults)> {
        if let Some(fused) = self.fused(gpu) {
            let results = fused.forward(gpu, qkv)?;
            return Ok((results.y.clone(), AttentionResults(Some(results))));
        }
        let y = self.by_products().forward(gpu, qkv)?;
        Ok((Rc::new(y), AttentionResults(None)))
    }

    /// Computes the gradient of `qkv` from that of the output.
    ///
    /// # Errors
    /// Returns an error if a launch fails.
    pub fn backward(
        &self,
        gpu: &Gpu,
        qkv: &Memory,
        results: &AttentionResults,
        dy: &Memory,
    ) -> Result<Memory> {
        match (self.fused(gpu), &results.0) {
            (Some(fused), Some(results)) => fused.backward(gpu, qkv, results, dy),
            _ => self.by_products().backward(gpu, qkv, dy),
        }
    }
}
