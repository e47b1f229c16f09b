//! AdamW, gradient clipping, loss scaling and the average of the weights, computed on the device.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{Device, Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, argument, holds, kernel};
use super::launch::{THREADS, blocks_of};
use super::staging::DeviceValue;
use crate::kernels::op::counters::Counters;

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
} }

/// The size of `Control` in `adam.cu`: five counts in f64, then 13 f32 and padding.
const CONTROL_COUNTS: usize = 5;
const CONTROL_BYTES: usize = (CONTROL_COUNTS + 7) * 8;

/// A weight with the tensors of its update. All are f32, contiguous and on one device.
pub(crate) struct WeightUpdate<'a> {
    pub weight: &'a Tensor,
    pub mean: &'a Tensor,
    pub square: &'a Tensor,
    pub gradient: Option<&'a Tensor>,
    pub average: Option<&'a Tensor>,
}

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
        weights: &[WeightUpdate<'_>],
        settings: UpdateSettings,
        learning_rate: f64,
    ) -> Result<Tensor> {
        let gpu = Gpu::of(&self.device)?;
        self.tabulate(&gpu, weights)?;
        self.set_learning_rate(learning_rate)?;
        let (norm_tensor, norm) = gpu.tensor(&[])?;
        let count = (self.parts.len() / 2) as u32;
        let blocks = blocks_of((count, 1), (THREADS, 1));
        let weights = Pointer::to(&self.weights, &gpu.stream);
        let parts = Pointer::to(&self.parts, &gpu.stream);
        let squares = Pointer::to(&self.squares, &gpu.stream);
        let control = Pointer::to(&self.control, &gpu.stream);
        gpu.launch(Element::F32, blocks, GradientSquares { weights, parts, squares })?;
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
        gpu.launch(Element::F32, blocks, UpdateWeights { weights, parts, control })?;
        Ok(norm_tensor)
    }

    /// Uploads the addresses of the tensors if they have changed. The weights stay the same, but
    /// gradients may move.
    fn tabulate(&mut self, gpu: &Gpu, weights: &[WeightUpdate<'_>]) -> Result<()> {
        let optional = |tensor: Option<&Tensor>| {
            tensor.map_or(Ok(Pointer::NONE), |tensor| gpu.pointer(tensor))
        };
        let mut addresses = Vec::new();
        for own in weights {
            addresses.extend([
                gpu.pointer(own.weight)?.0,
                gpu.pointer(own.mean)?.0,
                gpu.pointer(own.square)?.0,
                optional(own.average)?.0,
                optional(own.gradient)?.0,
                own.weight.elem_count() as u64,
            ]);
        }
        if addresses != self.addresses {
            if gpu.capture.is_active() {
                candle_core::bail!("weights or gradients moved within what is captured")
            }
            if self.addresses.len() != addresses.len() {
                let mut parts = Vec::new();
                for (i, own) in weights.iter().enumerate() {
                    for chunk in 0..own.weight.elem_count().div_ceil(CHUNK) {
                        parts.extend([i as u32, chunk as u32]);
                    }
                }
                self.weights = gpu.device.alloc_zeros(addresses.len().max(1))?;
                self.parts = gpu.device.clone_htod(&parts)?;
                self.squares = gpu.device.alloc_zeros((parts.len() / 2).max(1))?;
            }
            gpu.send(&addresses, Pointer::to(&self.weights, &gpu.stream))?;
            self.addresses = addresses;
        }
        Ok(())
    }
}
