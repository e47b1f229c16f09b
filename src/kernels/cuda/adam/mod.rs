//! AdamW, clipping, scaled gradients and averages of weights, decided on the device.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{Device, Result, Tensor};

use super::device::Gpu;
use super::element::{Element, Pointer};
use super::kernel::{Module, argument, holds, kernel};
use super::launch::{THREADS, blocks_of};
use super::staging::DeviceValue;

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

/// The number of values that a block works on.
const CHUNK: usize = 4096;

const _: () = assert!(holds(MODULE.source, "#define CHUNK 4096\n"));

argument! { MODULE,
/// What the device is to know of an update.
#[derive(PartialEq, Default)]
pub(crate) struct UpdateSettings {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Decay in the gradient, and apart from it.
    pub l2: f64,
    pub decoupled: f64,
    /// Infinite not to clip.
    pub max_norm: f64,
    pub ema_decay: f64,
    /// Not 0 for the warm-up of the average.
    pub ema_warmup: f64,
    /// Not 0 where gradients are scaled; the others are the scaler's settings.
    pub scaled: f64,
    pub growth_factor: f64,
    pub growth_interval: f64,
    pub backoff_factor: f64,
    pub min_scale: f64,
} }

/// What updates count: on the device, since there it is decided which ones are skipped.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Counts {
    pub steps: u64,
    pub ema_updates: u64,
    pub scale: f64,
    pub good_updates: u64,
    pub skipped: u64,
    pub exhausted: bool,
}

/// `Control` in `adam.cu`: five counts in f64, then 13 f32 and what fills them up.
const CONTROL_COUNTS: usize = 5;
const CONTROL_BYTES: usize = (CONTROL_COUNTS + 7) * 8;

/// A weight, and what follows it; all of f32, contiguous, on one device.
pub(crate) struct WeightUpdate<'a> {
    pub weight: &'a Tensor,
    pub mean: &'a Tensor,
    pub square: &'a Tensor,
    pub gradient: Option<&'a Tensor>,
    pub average: Option<&'a Tensor>,
}

/// The optimiser's part on a device.
pub(crate) struct Updater {
    device: Device,
    control: CudaSlice<u8>,
    /// What gradients are multiplied by, a scalar.
    scale: Tensor,
    learning_rate: DeviceValue<f64>,
    /// The addresses that the tables on the device hold, and the tables.
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
    pub fn new(device: &Device, counts: Counts) -> Result<Self> {
        let (cuda, scale) = (Gpu::of(device)?.device.clone(), counts.scale as f32);
        let Counts { steps, ema_updates, good_updates, skipped, exhausted, .. } = counts;
        let mut control = Vec::with_capacity(CONTROL_BYTES);
        for count in [steps, ema_updates, good_updates, skipped, u64::from(exhausted)] {
            control.extend((count as f64).to_ne_bytes());
        }
        control.resize(CONTROL_BYTES, 0);
        Ok(Self {
            device: device.clone(),
            control: cuda.clone_htod(&control)?,
            scale: Tensor::from_vec(vec![scale], (), device)?,
            learning_rate: DeviceValue::new(cuda.alloc_zeros(1)?),
            addresses: Vec::new(),
            weights: cuda.alloc_zeros(1)?,
            parts: cuda.alloc_zeros(1)?,
            squares: cuda.alloc_zeros(1)?,
        })
    }

    /// What the gradients of the next update are multiplied by, a scalar that updates change.
    pub fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// Waits for the device.
    pub fn counts(&self) -> Result<Counts> {
        let bytes = Gpu::of(&self.device)?.device.clone_dtoh(&self.control)?;
        let mut counts = [0f64; CONTROL_COUNTS];
        for (count, bytes) in counts.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut own = [0; 8];
            own.copy_from_slice(bytes);
            *count = f64::from_ne_bytes(own);
        }
        let [steps, ema_updates, good_updates, skipped, exhausted] = counts.map(|n| n as u64);
        let scale = f64::from(self.scale.to_scalar::<f32>()?);
        let exhausted = exhausted != 0;
        Ok(Counts { steps, ema_updates, scale, good_updates, skipped, exhausted })
    }

    /// Writes the learning rate of the next update to the device, unless it is known there.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        let gpu = Gpu::of(&self.device)?;
        self.learning_rate.set(&gpu.stream, learning_rate, |rate, to| gpu.send(rate, to))
    }

    /// One update; gives the gradient's norm, a scalar.
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

    /// Writes where the weights are to the device, unless it is known there. They are the same ones each
    /// time, but gradients may lie elsewhere.
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
