//! AdamW, Muon, gradient clipping, loss scaling and the average of the weights, computed on the device.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{Device, Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, argument, holds, kernel};
use super::launch::{THREADS, blocks_of};
use super::muon::Matrices;
use super::staging::DeviceValue;
use crate::kernels::op::counters::Counters;
use crate::kernels::op::muon::scale;

const MODULE: &Module = &Module {
    name: "adam",
    source: concat!(include_str!("../common.cuh"), include_str!("adam.cu")),
};

kernel! { MODULE, "gradient_squares", GradientSquares {
    weights: Pointer, parts: Pointer, squares: Pointer,
} }
kernel! { MODULE, "begin_update", BeginUpdate {
    squares: Pointer, count: u32, s: UpdateSettings, learning_rate: Pointer, control: Pointer,
    scale: Pointer, norm: Pointer,
} }
kernel! { MODULE, "update_weights", UpdateWeights {
    weights: Pointer, parts: Pointer, control: Pointer,
} }
kernel! { MODULE, "begin_matrices", BeginMatrices {
    weights: Pointer, parts: Pointer, control: Pointer, squares: Pointer,
} }
kernel! { MODULE, "update_matrices", UpdateMatrices {
    weights: Pointer, parts: Pointer, control: Pointer, directions: Pointer, orthogonal: Pointer,
} }

/// Number of values that a block updates.
const CHUNK: usize = 4096;

const _: () = assert!(holds(MODULE.source, "#define CHUNK 4096\n"));

argument! { MODULE,
/// The settings of updates, as the device reads them.
#[derive(PartialEq, Default)]
pub(crate) struct UpdateSettings {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// L2 decay, which is added to the gradient, and decoupled decay.
    pub l2: f64,
    pub decoupled: f64,
    /// Maximum norm of the gradient; infinite for no clipping.
    pub max_norm: f64,
    pub ema_decay: f64,
    /// Nonzero if the average has a warm-up.
    pub ema_warmup: f64,
    /// Nonzero if gradients are scaled. The fields after this one are the scaler's settings.
    pub scaled: f64,
    pub growth_factor: f64,
    pub growth_interval: f64,
    pub backoff_factor: f64,
    pub min_scale: f64,
    /// Muon's momentum, a nonzero value for Nesterov momentum, and the decoupled weight decay of matrices.
    pub momentum: f64,
    pub nesterov: f64,
    pub muon_decoupled: f64,
} }

/// The size of `Control` in `adam.cu`: five counts in f64, then 18 f32.
const CONTROL_COUNTS: usize = 5;
const CONTROL_BYTES: usize = (CONTROL_COUNTS + 9) * 8;

/// A weight with the tensors of its update. All are f32, contiguous and on one device.
pub(crate) struct WeightUpdate<'a> {
    pub weight: &'a Tensor,
    pub mean: &'a Tensor,
    /// `None` for a matrix (output, ...) that Muon updates.
    pub square: Option<&'a Tensor>,
    pub gradient: Option<&'a Tensor>,
    pub average: Option<&'a Tensor>,
}

impl WeightUpdate<'_> {
    /// The rows and columns of a matrix that Muon updates.
    fn matrix(&self) -> Option<(usize, usize)> {
        let rows = self.weight.dims().first().copied().filter(|_| self.square.is_none())?;
        Some((rows, self.weight.elem_count() / rows.max(1)))
    }

    /// The number of blocks that update the weight.
    fn parts(&self) -> usize {
        self.weight.elem_count().div_ceil(CHUNK)
    }
}

/// The size of `Part` in `adam.cu` in bytes.
const PART: usize = size_of::<[u32; 2]>();

/// The size of `Weight` in `adam.cu`, in numbers of 8 bytes.
const WEIGHT_WORDS: usize = 8;

/// The optimiser's state on a device.
pub(crate) struct Updater {
    device: Device,
    control: CudaSlice<u8>,
    /// The factor of the gradients, a scalar.
    scale: Tensor,
    learning_rate: DeviceValue<f64>,
    /// The addresses in the tables on the device. The tables follow.
    addresses: Vec<u64>,
    weights: CudaSlice<u64>,
    parts: CudaSlice<u32>,
    squares: CudaSlice<f64>,
    /// The matrices that Muon orthogonalises.
    directions: CudaSlice<f32>,
}

impl std::fmt::Debug for Updater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Updater").finish_non_exhaustive()
    }
}

impl Updater {
    pub fn new(device: &Device, counters: &Counters) -> Result<Self> {
        let cuda = Gpu::of(device)?.device.clone();
        let Counters { updates, average_updates, scale, good_updates, skipped, exhausted } =
            *counters;
        let mut control = Vec::with_capacity(CONTROL_BYTES);
        for count in [updates, average_updates, good_updates, skipped, u64::from(exhausted)] {
            control.extend((count as f64).to_ne_bytes());
        }
        control.resize(CONTROL_BYTES, 0);
        Ok(Self {
            device: device.clone(),
            control: cuda.clone_htod(&control)?,
            scale: Tensor::from_vec(vec![scale as f32], (), device)?,
            learning_rate: DeviceValue::new(cuda.alloc_zeros(1)?),
            addresses: Vec::new(),
            weights: cuda.alloc_zeros(1)?,
            parts: cuda.alloc_zeros(1)?,
            squares: cuda.alloc_zeros(1)?,
            directions: cuda.alloc_zeros(1)?,
        })
    }

    /// The factor of the gradients in the next update, a scalar that updates change.
    pub fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// Reads the counters. Waits for the device.
    pub fn counters(&self) -> Result<Counters> {
        let bytes = Gpu::of(&self.device)?.device.clone_dtoh(&self.control)?;
        let mut counts = [0f64; CONTROL_COUNTS];
        for (count, bytes) in counts.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut own = [0; 8];
            own.copy_from_slice(bytes);
            *count = f64::from_ne_bytes(own);
        }
        let [updates, average_updates, good_updates, skipped, exhausted] = counts.map(|n| n as u64);
        let scale = f64::from(self.scale.to_scalar::<f32>()?);
        let exhausted = exhausted != 0;
        Ok(Counters { updates, average_updates, scale, good_updates, skipped, exhausted })
    }

    /// Uploads the learning rate of the next update if it has changed.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        let gpu = Gpu::of(&self.device)?;
        self.learning_rate.set(&gpu.stream, learning_rate, |rate, to| gpu.send(rate, to))
    }

    /// Makes one update. Returns the norm of the gradient before clipping, a scalar.
    pub fn update(
        &mut self,
        mut weights: Vec<WeightUpdate<'_>>,
        settings: UpdateSettings,
        learning_rate: f64,
    ) -> Result<Tensor> {
        let gpu = Gpu::of(&self.device)?;
        // Matrices of one shape are orthogonalised together, after all other weights.
        weights.sort_by_key(WeightUpdate::matrix);
        self.tabulate(&gpu, &weights)?;
        self.set_learning_rate(learning_rate)?;
        let (norm_tensor, norm) = gpu.tensor(&[])?;
        let count = (self.parts.len() / 2) as u32;
        let blocks = blocks_of((count, 1), (THREADS, 1));
        let table = Pointer::to(&self.weights, &gpu.stream);
        let parts = Pointer::to(&self.parts, &gpu.stream);
        let squares = Pointer::to(&self.squares, &gpu.stream);
        let control = Pointer::to(&self.control, &gpu.stream);
        gpu.launch(Element::F32, blocks, GradientSquares { weights: table, parts, squares })?;
        let begin = BeginUpdate {
            squares,
            count,
            s: settings,
            learning_rate: self.learning_rate.pointer(&gpu.stream),
            control,
            scale: gpu.pointer(&self.scale)?,
            norm,
        };
        gpu.launch(Element::F32, blocks_of((1, 1), (THREADS, 1)), begin)?;
        // Muon's matrices are the last weights.
        let adam = weights.partition_point(|own| own.matrix().is_none());
        let (adam, matrices) = weights.split_at(adam);
        let count = adam.iter().map(WeightUpdate::parts).sum();
        if count > 0 {
            let blocks = blocks_of((count as u32, 1), (THREADS, 1));
            gpu.launch(Element::F32, blocks, UpdateWeights { weights: table, parts, control })?;
        }
        if !matrices.is_empty() {
            self.update_matrices(&gpu, matrices, count)?;
        }
        Ok(norm_tensor)
    }

    /// Updates Muon's matrices, whose parts begin at index `first`.
    fn update_matrices(
        &self,
        gpu: &Gpu,
        matrices: &[WeightUpdate<'_>],
        first: usize,
    ) -> Result<()> {
        let table = Pointer::to(&self.weights, &gpu.stream);
        let control = Pointer::to(&self.control, &gpu.stream);
        let mut directions = Pointer::to(&self.directions, &gpu.stream);
        let mut parts = Pointer::to(&self.parts, &gpu.stream).offset(PART * first);
        let mut squares = Pointer::to(&self.squares, &gpu.stream);
        let all = (self.parts.len() / 2 - first) as u32;
        let begin = BeginMatrices { weights: table, parts, control, squares };
        gpu.launch(Element::F32, blocks_of((all, 1), (THREADS, 1)), begin)?;
        for group in matrices.chunk_by(|a, b| a.matrix() == b.matrix()) {
            let batch = group.len();
            let blocks = group.iter().map(WeightUpdate::parts).sum::<usize>();
            if let Some(shape) = group[0].matrix() {
                let values = directions;
                let matrices = Matrices { values, batch, shape, squares, parts: blocks / batch };
                let result = matrices.orthogonalized(gpu)?;
                let (weights, orthogonal) = (table, result.pointer);
                let update = UpdateMatrices { weights, parts, control, directions, orthogonal };
                gpu.launch(Element::F32, blocks_of((blocks as u32, 1), (THREADS, 1)), update)?;
                directions = directions.offset(size_of::<f32>() * batch * shape.0 * shape.1);
            }
            parts = parts.offset(PART * blocks);
            squares = squares.offset(size_of::<f64>() * blocks);
        }
        Ok(())
    }

    /// Uploads the addresses of the tensors if they have changed. The weights stay the same, but
    /// gradients may move.
    fn tabulate(&mut self, gpu: &Gpu, weights: &[WeightUpdate<'_>]) -> Result<()> {
        let is_new = self.addresses.len() != weights.len() * WEIGHT_WORDS;
        if is_new && !gpu.capture.is_active() {
            let of_weight = |(i, own): (usize, &WeightUpdate<'_>)| {
                (0..own.parts()).flat_map(move |chunk| [i as u32, chunk as u32])
            };
            let parts: Vec<u32> = weights.iter().enumerate().flat_map(of_weight).collect();
            let matrices = weights.iter().filter(|own| own.matrix().is_some());
            let values: usize = matrices.map(|own| own.weight.elem_count()).sum();
            self.weights = gpu.device.alloc_zeros((weights.len() * WEIGHT_WORDS).max(1))?;
            self.parts = gpu.device.clone_htod(&parts)?;
            self.squares = gpu.device.alloc_zeros((parts.len() / 2).max(1))?;
            self.directions = gpu.device.alloc_zeros(values.max(1))?;
        }
        let optional = |tensor: Option<&Tensor>| {
            tensor.map_or(Ok(Pointer::NONE), |tensor| gpu.pointer(tensor))
        };
        let mut next = Pointer::to(&self.directions, &gpu.stream);
        let mut addresses = Vec::with_capacity(weights.len() * WEIGHT_WORDS);
        for own in weights {
            let count = own.weight.elem_count();
            let (direction, size) = match own.matrix() {
                Some(shape) => (next, scale(shape)),
                None => (Pointer::NONE, 0.0),
            };
            if own.matrix().is_some() {
                next = next.offset(count * size_of::<f32>());
            }
            addresses.extend([
                gpu.pointer(own.weight)?.0,
                gpu.pointer(own.mean)?.0,
                optional(own.square)?.0,
                optional(own.average)?.0,
                optional(own.gradient)?.0,
                count as u64,
                direction.0,
                size.to_bits(),
            ]);
        }
        if addresses != self.addresses {
            if gpu.capture.is_active() {
                candle_core::bail!("weights or gradients moved within what is captured")
            }
            gpu.send(&addresses, Pointer::to(&self.weights, &gpu.stream))?;
            self.addresses = addresses;
        }
        Ok(())
    }
}
