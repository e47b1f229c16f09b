//! Passes of a network with fixed weights as CUDA graphs.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::{Rc, Weak as RcWeak};
use std::sync::{Arc, Weak};

use candle_core::cuda_backend::DeviceId;
use candle_core::{DType, Tensor};

use super::device::Gpu;
use super::memory::Release;
use super::replay::Replay;
use super::weights::{self, Network};
use crate::error::Result;
use crate::precision::Precision;

/// Number of passes of one kind before the pass is captured. These passes compile kernels, select algorithms, pack the
/// weights, and allocate the memory that the captured pass uses.
const PASSES_BEFORE: usize = 3;

/// Maximum number of failures to capture a pass of one kind.
const ATTEMPTS: usize = 2;

/// Maximum number of kinds of passes for which a thread keeps graphs. Sampling with guidance at some of the times needs
/// two of one network.
const KINDS: usize = 4;

/// The passes that one graph can compute.
#[derive(PartialEq)]
struct Kind {
    network: u64,
    device: DeviceId,
    precision: Precision,
    inputs: Vec<(DType, Vec<usize>)>,
}

/// The passes of one kind.
struct Passes {
    kind: Kind,
    network: Weak<Network>,
    count: usize,
    failures: usize,
    graph: Rc<Slot>,
}

/// A graph, which is dropped when the memory that it holds is needed.
#[derive(Default)]
struct Slot(RefCell<Option<Replay>>);

impl Release for Slot {
    fn release(&self) {
        let _graph = self.0.try_borrow_mut().map(|mut graph| graph.take());
    }
}

thread_local! {
    /// The last ones used are last.
    static PASSES: RefCell<VecDeque<Passes>> = RefCell::default();
}

impl Drop for Network {
    fn drop(&mut self) {
        // Dropped after the borrow has ended, and before the weights that they read.
        let graphs = PASSES.try_with(|all| {
            let mut all = all.try_borrow_mut().ok()?;
            let (own, others): (VecDeque<Passes>, VecDeque<Passes>) =
                all.drain(..).partition(|passes| passes.kind.network == self.id());
            *all = others;
            Some(own)
        });
        drop(graphs);
        weights::forget(self.id());
    }
}

/// Computes a pass of a network whose weights do not change: `pass(inputs)`, which is captured as a graph after some
/// passes of the same kind, and launched from then on. The graph belongs to this thread. If it cannot be captured
/// or launched, passes continue without a graph.
///
/// # Errors
/// Returns the errors of `pass`.
pub(crate) fn repeated(
    gpu: &Rc<Gpu>,
    network: &Arc<Network>,
    precision: Precision,
    inputs: &[Tensor],
    pass: &mut dyn FnMut(&[Tensor]) -> Result<Tensor>,
) -> Result<Tensor> {
    // A graph would overwrite the maps of a pass in progress.
    if gpu.in_a_pass() || gpu.capture.is_active() || !inputs.iter().all(|x| suits(gpu, x)) {
        return pass(inputs);
    }
    let kind = Kind {
        network: network.id(),
        device: gpu.device.id(),
        precision,
        inputs: inputs.iter().map(|x| (x.dtype(), x.dims().to_vec())).collect(),
    };
    // Taken out of the list, because a pass may begin others.
    let mut own = taken(kind, network);
    let result = own.compute(gpu, inputs, pass);
    put_back(own);
    result
}

fn suits(gpu: &Gpu, x: &Tensor) -> bool {
    matches!(x.dtype(), DType::F32 | DType::U32)
        && matches!(x.device(), candle_core::Device::Cuda(device) if device.id() == gpu.device.id())
        && x.is_contiguous()
        && !x.track_op()
        && x.elem_count() > 0
}

/// Takes the passes of this kind from the list, without those of networks that no longer exist.
fn taken(kind: Kind, network: &Arc<Network>) -> Passes {
    let (found, _dead) = PASSES.with_borrow_mut(|all| {
        let (alive, dead): (VecDeque<Passes>, VecDeque<Passes>) =
            all.drain(..).partition(|own| own.network.strong_count() > 0);
        *all = alive;
        let found = all.iter().position(|own| own.kind == kind);
        (found.and_then(|i| all.remove(i)), dead)
    });
    let network = Arc::downgrade(network);
    found.unwrap_or_else(|| Passes { kind, network, count: 0, failures: 0, graph: Rc::default() })
}

fn put_back(own: Passes) {
    let _oldest = PASSES.with_borrow_mut(|all| {
        all.push_back(own);
        (all.len() > KINDS).then(|| all.pop_front())
    });
}

impl Passes {
    fn compute(
        &mut self,
        gpu: &Rc<Gpu>,
        inputs: &[Tensor],
        pass: &mut dyn FnMut(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.launched(inputs) {
            Ok(Some(output)) => return Ok(output),
            Ok(None) => {}
            // For example, no memory is left for a copy of the output.
            Err(_) => {
                self.graph.release();
                self.failures += 1;
            }
        }
        self.count += 1;
        let due = self.count > PASSES_BEFORE * (1 + 10 * self.failures);
        if !due || self.failures >= ATTEMPTS {
            return pass(inputs);
        }
        let before = gpu.pool.allocated();
        let output = pass(inputs)?;
        if gpu.pool.allocated() > before {
            // The captured pass could lack memory.
            return Ok(output);
        }
        match captured(gpu, inputs, &output, pass) {
            Ok(graph) => {
                let slot: Rc<dyn Release> = self.graph.clone();
                gpu.pool.releases(Rc::downgrade(&slot) as RcWeak<dyn Release>);
                *self.graph.0.borrow_mut() = Some(graph);
            }
            Err(_) => self.failures += 1,
        }
        Ok(output)
    }

    fn launched(&self, inputs: &[Tensor]) -> candle_core::Result<Option<Tensor>> {
        let graph = self.graph.0.borrow();
        let Some(graph) = &*graph else { return Ok(None) };
        Ok(graph.launch(inputs)?.pop())
    }
}

/// Captures a pass with outputs like this one.
fn captured(
    gpu: &Rc<Gpu>,
    inputs: &[Tensor],
    output: &Tensor,
    pass: &mut dyn FnMut(&[Tensor]) -> Result<Tensor>,
) -> Result<Replay> {
    let own = inputs.iter().map(Tensor::copy).collect::<candle_core::Result<_>>()?;
    let outputs = vec![output.copy()?];
    let mut work = |inputs: &[Tensor]| Ok((vec![pass(inputs)?], Vec::new()));
    Replay::capture(gpu.clone(), own, outputs, &mut work)
}

/// Returns whether this thread has a graph of the network.
#[cfg(test)]
pub(crate) fn is_captured(network: &Network) -> bool {
    PASSES.with_borrow(|all| {
        let of_network = |own: &&Passes| own.kind.network == network.id();
        all.iter().filter(of_network).any(|own| own.graph.0.borrow().is_some())
    })
}
