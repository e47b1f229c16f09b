//! Launches that were captured as a CUDA graph, with the memory that they use.

use std::any::Any;
use std::rc::Rc;

use candle_core::Tensor;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaGraph;

use super::device::Gpu;
use super::memory::Held;
use crate::error::Result;

/// Captured launches, and the memory that they own.
pub(super) struct Replay {
    graph: CudaGraph,
    gpu: Rc<Gpu>,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    _kept: Vec<Tensor>,
    _read: Vec<Rc<dyn Any>>,
    _memory: Held,
}

/// The work that is captured. It returns the results, which are copied to the outputs, and tensors that the graph
/// keeps.
pub(super) type Work<'a> = &'a mut dyn FnMut(&[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)>;

impl Replay {
    /// Captures the launches of `work` without running them. `work` reads `inputs`, whose values each launch replaces.
    ///
    /// # Errors
    /// Returns the error of `work`. Returns an error if `work` waits or uploads, or if it uses memory or a kernel
    /// that is not yet available.
    pub fn capture(
        gpu: Rc<Gpu>,
        inputs: Vec<Tensor>,
        outputs: Vec<Tensor>,
        work: Work<'_>,
    ) -> Result<Self> {
        let copied = || -> Result<Vec<Tensor>> {
            let (results, kept) = work(&inputs)?;
            for (result, output) in results.iter().zip(&outputs) {
                gpu.copy(result, output)?;
            }
            Ok(kept)
        };
        let _memory = gpu.pool.hold();
        let (graph, _kept) = gpu.capture.of(&gpu.device, copied)?;
        let _read = gpu.capture.held();
        Ok(Self { graph, gpu, inputs, outputs, _kept, _read, _memory })
    }

    /// Launches the work for these inputs, which have the shapes of the captured ones. Returns copies of the outputs.
    ///
    /// # Errors
    /// Returns an error if an input has another shape, or if a [pass](Gpu::in_a_pass) is in progress.
    pub fn launch(&self, inputs: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        // The memory of a pass may be that of the captured launches.
        if self.gpu.in_a_pass() {
            candle_core::bail!("captured work was launched within another pass")
        }
        for (input, own) in inputs.iter().zip(&self.inputs) {
            self.gpu.copy(input, own)?;
        }
        self.graph.launch().w()?;
        // Copied, because the next launch overwrites them.
        self.outputs.iter().map(Tensor::copy).collect()
    }
}
