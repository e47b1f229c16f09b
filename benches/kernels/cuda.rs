//! Times the kernels for CUDA devices, at the shapes of the two networks with batch size 128.
//!
//! Between two waits for the device there are as many launches as take about 10 ms, so that the host's work is hidden.
//! A kernel that takes less time than its launch, about 5 µs, is still limited by it. Successive launches use other
//! maps, which together are larger than the device's cache.
//!
//! The ceiling of kernels bound by memory is a copy within the device's memory: bytes read and bytes written. As its
//! bytes, each map of a kernel counts once if it is read and once if it is written. Vectors, statistics and sums count
//! nothing. Kernels bound by arithmetic have no ceiling here.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::cuda_backend::WrapErr;
use candle_core::{Device, Tensor};

use super::error::{Error, Result};
use super::kernels::cuda::{
    Added, Attention, ColumnSums, Convolution, Element, Gpu, ImageSums, InputGradient, LinearLayer,
    Memory, Norm, PassWeights, UpdateSettings, Updater, WeightGradient, WeightUpdate, concatenate,
    images_to_map, normals, split, weight_gradients,
};
use super::kernels::op::activation::Activation;
use super::kernels::op::attention::AttentionShape;
use super::kernels::op::conv::{ConvShape, Scale};
use super::kernels::op::counters::Counters;
use super::kernels::op::norm::NormConfig;
use super::precision::Precision;
use super::random::{Noise, Purpose};
use super::{Args, HALF, Map, SAME, UP, Work, print};

const BATCH: usize = 128;

/// The bytes of the maps of one operand at least: more than a GPU's L2 cache holds.
const FOOTPRINT: usize = 256 << 20;

/// The bytes of the copy that is the ceiling, if an eighth of the free memory is as large.
const COPY: usize = 1 << 30;

/// The seconds of work between two waits for the device.
const BETWEEN_WAITS: f64 = 0.01;

/// Size of a square map and its channels.
const NORMS: &[(&str, usize, usize)] = &[
    ("cifar10", 32, 128),
    ("cifar10", 32, 256),
    ("cifar10", 32, 512),
    ("cifar10", 16, 256),
    ("cifar10", 16, 512),
    ("cifar10", 8, 256),
    ("cifar10", 8, 512),
    ("cifar10", 4, 256),
    ("mnist", 28, 32),
    ("mnist", 28, 64),
    ("mnist", 28, 128),
    ("mnist", 14, 128),
    ("mnist", 14, 256),
    ("mnist", 7, 128),
];

const CONVOLUTIONS: &[(&str, Map)] = &[
    ("cifar10", (32, 3, 128, [3; 2], SAME)),
    ("cifar10", (32, 128, 3, [3; 2], SAME)),
    ("cifar10", (32, 256, 256, [3; 2], SAME)),
    ("cifar10", (16, 256, 256, [3; 2], SAME)),
    ("cifar10", (8, 512, 256, [3; 2], SAME)),
    ("cifar10", (32, 256, 256, [3; 2], HALF)),
    ("cifar10", (16, 256, 256, [3; 2], UP)),
    ("mnist", (28, 1, 32, [3; 2], SAME)),
    ("mnist", (28, 32, 1, [3; 2], SAME)),
    ("mnist", (28, 64, 64, [3; 2], SAME)),
    ("mnist", (14, 128, 128, [3; 2], SAME)),
];

struct Bench<'a> {
    device: Device,
    gpu: Rc<Gpu>,
    precision: Precision,
    element: Element,
    /// The bytes per second of the copy.
    bytes: f64,
    /// True if any kernel was measured.
    measured: Cell<bool>,
    args: &'a Args,
}

/// Runs the measures. Returns whether any was.
pub fn run(args: &Args) -> Result<bool> {
    let device = Device::new_cuda(0)?;
    let gpu = Gpu::of(&device)?;
    let default = if cfg!(feature = "f16") { Precision::F16 } else { Precision::Highest };
    let precision = args.precision.unwrap_or(default);
    gpu.check(precision)?;
    let (element, measured) = (Element::of(precision), Cell::default());
    let mut bench = Bench { device, gpu, precision, element, bytes: 0.0, measured, args };
    bench.bytes = bench.copy()?;
    for &(model, size, channels) in NORMS {
        bench.norm(model, size, channels)?;
    }
    for (model, size, channels) in [
        ("cifar10", 32, [256, 256]),
        ("cifar10", 16, [256, 256]),
        ("mnist", 28, [64, 64]),
        ("mnist", 7, [128, 128]),
    ] {
        bench.maps(model, size, channels)?;
    }
    for (model, weights) in [("mnist", 2_268_929), ("cifar10", 21_355_395)] {
        bench.adam(model, weights)?;
    }
    for (model, count, channels) in [("mnist", 16, 128), ("cifar10", 32, 256)] {
        bench.packing(model, count, channels)?;
    }
    for &(model, map) in CONVOLUTIONS {
        bench.convolution(model, map)?;
    }
    for (model, size, channels) in [("mnist", 7, 128), ("cifar10", 16, 256), ("cifar10", 4, 256)] {
        bench.attention(model, size, channels)?;
    }
    for (model, input, output) in
        [("mnist", 128, 128), ("cifar10", 128, 256), ("cifar10", 512, 512)]
    {
        bench.linear(model, input, output)?;
    }
    Ok(bench.measured.get())
}

impl Bench<'_> {
    /// Measures the copy. Returns its bytes per second.
    fn copy(&self) -> Result<f64> {
        let Device::Cuda(cuda) = &self.device else { unreachable!("a CUDA device") };
        let context = cuda.cuda_stream().context().clone();
        let count = COPY.min(context.mem_get_info().w()?.0 / 8);
        let (from, mut to) = (cuda.alloc_zeros::<u8>(count)?, cuda.alloc_zeros::<u8>(count)?);
        let limit = Duration::from_millis(500);
        let (min, median) = self.time(limit, 1, || cuda.memcpy_dtod(&from, &mut to))?;
        let (name, rate) = (context.name().w()?, 2.0 * count as f64 / min);
        let shape = format!("{} MB", count / 1_000_000);
        if self.args.json {
            let line = serde_json::json!({
                "name": "copy", "shape": shape, "device": name, "precision": self.precision,
                "ms_min": min * 1e3, "ms_median": median * 1e3, "gbs": rate / 1e9,
            });
            println!("{line}");
        } else {
            println!("{name}, {}: a copy of {shape} at {:.1} GB/s", self.precision, rate / 1e9);
        }
        Ok(rate)
    }

    fn norm(&self, model: &str, size: usize, channels: usize) -> Result<()> {
        let shape = format!("{model} {BATCH}x{size}x{size} {channels}");
        let names = [
            "norm forward",
            "norm forward, additions",
            "norm again",
            "norm backward",
            "norm backward, addition",
        ];
        if !self.wants_any(&names, &shape) {
            return Ok(());
        }
        let (gpu, dims) = (&*self.gpu, [BATCH, size, size, channels]);
        let (bytes, sets) = self.sizes(dims);
        let [x, d, more] =
            [self.maps_of(dims, sets)?, self.maps_of(dims, sets)?, self.maps_of(dims, sets)?];
        // Factors of one half, so that a gradient that replaces its input does not grow.
        let weight = Tensor::from_vec(vec![0.5f32; channels], channels, &self.device)?;
        let (bias, config) = (self.normal(&[channels])?, NormConfig::new(Activation::Silu));
        let norm =
            Norm { element: self.element, dims, config, weight: &weight, bias: &bias, by: None };
        self.measure(names[0], &shape, Work::Bytes(2 * bytes), sets, |k| {
            norm.forward(gpu, &x[k], None)
        })?;
        // A residual block keeps the sum for the backward pass.
        self.measure(names[1], &shape, Work::Bytes(4 * bytes), sets, |k| {
            let added = Added { bias: Some(&bias), residual: Some(&more[k]), ..Added::default() };
            norm.forward(gpu, &x[k], Some((&added, &d[k])))
        })?;
        let (_, statistics) = norm.forward(gpu, &x[0], None)?;
        self.measure(names[2], &shape, Work::Bytes(2 * bytes), sets, |k| {
            norm.again(gpu, &x[k], &statistics)
        })?;
        self.measure(names[3], &shape, Work::Bytes(3 * bytes), sets, |k| {
            norm.backward(gpu, (&x[k], &statistics), &d[k], None)
        })?;
        self.measure(names[4], &shape, Work::Bytes(4 * bytes), sets, |k| {
            norm.backward(gpu, (&x[k], &statistics), &d[k], Some(&more[k]))
        })
    }

    fn maps(&self, model: &str, size: usize, channels: [usize; 2]) -> Result<()> {
        let shape = format!("{model} {BATCH}x{size}x{size} {}+{}", channels[0], channels[1]);
        let names = ["concatenation", "split", "bias, residual", "sums by image"];
        if !self.wants_any(&names, &shape) {
            return Ok(());
        }
        let (gpu, element, pixels) = (&*self.gpu, self.element, BATCH * size * size);
        let [of_a, of_b, of_both] = [channels[0], channels[1], channels[0] + channels[1]]
            .map(|channels| [BATCH, size, size, channels]);
        let (bytes, sets) = self.sizes(of_a);
        let both = self.sizes(of_both).0;
        let [a, b, y] =
            [self.maps_of(of_a, sets)?, self.maps_of(of_b, sets)?, self.maps_of(of_both, sets)?];
        self.measure(names[0], &shape, Work::Bytes(2 * both), sets, |k| {
            concatenate(gpu, [&a[k], &b[k]], channels, pixels, element)
        })?;
        self.measure(names[1], &shape, Work::Bytes(2 * both), sets, |k| {
            split(gpu, &y[k], channels, pixels, element)
        })?;
        let (bias, sizes) = (self.normal(&channels[..1])?, [BATCH, size * size, channels[0]]);
        // The memory of the concatenation is large enough for the sum.
        self.measure(names[2], &shape, Work::Bytes(3 * bytes), sets, |k| {
            let added = Added { bias: Some(&bias), residual: Some(&a[k]), ..Added::default() };
            added.add_to(gpu, [&a[(k + 1) % sets], &y[k]], sizes, element)
        })?;
        self.measure(names[3], &shape, Work::Bytes(bytes), sets, |k| {
            ImageSums::of(gpu, &a[k], None, sizes, element)
        })
    }

    fn adam(&self, model: &str, weights: usize) -> Result<()> {
        let (name, shape) = ("adamw, clipping, average", format!("{model} {weights}"));
        if !self.wants(name, &shape) {
            return Ok(());
        }
        let normal = || self.normal(&[1, weights]);
        let [weight, gradient, mean, average] = [normal()?, normal()?, normal()?, normal()?];
        let square = Tensor::from_vec(vec![1f32; weights], &[1, weights], &self.device)?;
        let settings = UpdateSettings {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_norm: 1.0,
            ema_decay: 0.999,
            ..UpdateSettings::default()
        };
        let mut updater = Updater::new(&self.device, &Counters::default())?;
        // The weight, both means and the average are read and written. The gradient is read twice, and counts once.
        self.measure(name, &shape, Work::Bytes(36 * weights), 1, |_| {
            let own = WeightUpdate {
                weight: &weight,
                mean: &mean,
                square: Some(&square),
                gradient: Some(&gradient),
                average: Some(&average),
            };
            updater.update(vec![own], settings, 1e-6)
        })
    }

    /// Measures the packing of the weights of 3x3 convolutions with as many inputs as outputs, by one launch.
    fn packing(&self, model: &str, count: usize, channels: usize) -> Result<()> {
        let (name, shape) = ("conv pack", format!("{model} {count} of {channels}x{channels}x3x3"));
        if !self.wants(name, &shape) {
            return Ok(());
        }
        let (network, dims) = (Arc::default(), [channels, channels, 3, 3]);
        let of_conv = ConvShape::new([BATCH, 8, 8, channels], &dims, Scale::Stride(1))?;
        let convolution = Convolution::new(self.precision, of_conv);
        let pass = || PassWeights::begin(self.gpu.clone(), &network, self.element, false);
        let weights = (0..count).map(|_| self.normal(&dims)).collect::<Result<Vec<_>>>()?;
        // The first pass finds which weights there are.
        let first = pass()?;
        for weight in &weights {
            first.of_convolution(&convolution, weight)?;
        }
        drop(first);
        let values = count * dims.iter().product::<usize>();
        self.measure(name, &shape, Work::Bytes((4 + self.width()) * values), 2, |_| pass())
    }

    fn convolution(&self, model: &str, map: Map) -> Result<()> {
        let (size, c_in, c_out, kernel, scale) = map;
        let shape = super::shape_of_map(model, BATCH, map);
        let names = ["conv forward", "conv d input", "conv d weight"];
        if !self.wants_any(&names, &shape) {
            return Ok(());
        }
        let (gpu, dims) = (&*self.gpu, [BATCH, size, size, c_in]);
        let of_conv = ConvShape::new(dims, &[c_out, c_in, kernel[0], kernel[1]], scale)?;
        let convolution = Convolution::new(self.precision, of_conv);
        let weight = self.normal(&[c_out, c_in, kernel[0], kernel[1]])?;
        let sets = self.sizes(dims).1.min(self.sizes(convolution.output()).1);
        let (x, dy) = (self.maps_of(dims, sets)?, self.maps_of(convolution.output(), sets)?);
        let pass = PassWeights::begin(self.gpu.clone(), &Arc::default(), self.element, false)?;
        let packed = pass.of_convolution(&convolution, &weight)?;
        let outputs = convolution.output().iter().product::<usize>();
        let work = Work::Flops(2 * outputs * c_in * kernel[0] * kernel[1]);
        self.measure(names[0], &shape, work, sets, |k| convolution.forward(gpu, &x[k], packed))?;
        // The first convolution of a network has no such gradient.
        if c_in > 3 {
            let dx = self.maps_of(dims, sets)?;
            self.measure(names[1], &shape, work, sets, |k| {
                convolution.input_gradient(gpu, &dy[k], packed, &dx[k], false)
            })?;
        }
        // Not a weight of the pass: its gradient is unpacked at once.
        let (gradient, sums) = (self.normal(weight.dims())?, ColumnSums::default());
        self.measure(names[2], &shape, work, sets, |k| {
            if !convolution.weight_gradient_of_few(gpu, [&x[k], &dy[k]], &sums, &gradient)? {
                pass.gradient(&convolution, [&x[k], &dy[k]], (&gradient, &gradient))?;
            }
            sums.compute(gpu)
        })
    }

    fn attention(&self, model: &str, size: usize, channels: usize) -> Result<()> {
        let shape = format!("{model} {BATCH}x{size}x{size} {channels}");
        let names = ["attention forward", "attention backward"];
        if !self.wants_any(&names, &shape) {
            return Ok(());
        }
        let (gpu, precision, positions) = (&*self.gpu, self.precision, size * size);
        let of_maps = AttentionShape { positions, channels, heads: 1 };
        let attention = Attention { precision, batch: BATCH, shape: of_maps };
        let (dims, wide) = ([BATCH, size, size, channels], [BATCH, size, size, 3 * channels]);
        let sets = self.sizes(dims).1;
        let (qkv, dy) = (self.maps_of(wide, sets)?, self.maps_of(dims, sets)?);
        // One product of scores or of values. The backward pass computes the scores again.
        let product = 2 * BATCH * positions * positions * channels;
        self.measure(names[0], &shape, Work::Flops(2 * product), sets, |k| {
            attention.forward(gpu, &qkv[k])
        })?;
        // The maps of all sets have the same values.
        let (_, results) = attention.forward(gpu, &qkv[0])?;
        self.measure(names[1], &shape, Work::Flops(5 * product), sets, |k| {
            attention.backward(gpu, &qkv[k], &results, &dy[k])
        })
    }

    fn linear(&self, model: &str, input: usize, output: usize) -> Result<()> {
        let shape = format!("{model} {BATCH} {input}->{output}");
        let names = ["linear forward", "linear backward"];
        if !self.wants_any(&names, &shape) {
            return Ok(());
        }
        let (gpu, element, batch, activation) = (&*self.gpu, self.element, BATCH, 1);
        let (weight, bias) = (self.normal(&[output, input])?, self.normal(&[output])?);
        let vectors = |count: usize| {
            Ok::<_, Error>(Rc::new(self.maps_of([BATCH, 1, 1, count], 1)?.remove(0)))
        };
        let (x, dy) = (vectors(input)?, vectors(output)?);
        let product = 2 * BATCH * input * output;
        let layer = LinearLayer { element, batch, weight: &weight, bias: &bias, activation };
        self.measure(names[0], &shape, Work::Flops(product), 1, |_| layer.forward(gpu, &x))?;
        let of_weights = WeightGradient {
            x: x.clone(),
            dy: dy.clone(),
            activation,
            weight: self.normal(&[output, input])?,
            bias: self.normal(&[output])?,
        };
        let of_input =
            InputGradient { x, batch, input, activation, layers: vec![(dy, weight.clone())] };
        self.measure(names[1], &shape, Work::Flops(2 * product), 1, |_| {
            weight_gradients(gpu, batch, std::slice::from_ref(&of_weights), element)?;
            of_input.compute(gpu, element)
        })
    }

    /// The bytes of a value of a map.
    fn width(&self) -> usize {
        if self.element == Element::F32 { 4 } else { 2 }
    }

    /// Returns the bytes of a map, and the number of maps that fill the footprint.
    fn sizes(&self, dims: [usize; 4]) -> (usize, usize) {
        let bytes = self.width() * dims.iter().product::<usize>();
        (bytes, FOOTPRINT.div_ceil(bytes).clamp(2, 64))
    }

    /// Returns normals in f32.
    fn normal(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(normals(&self.gpu, Noise::new(0).address(Purpose::Prior, 0, 0), 0, shape)?)
    }

    /// Returns maps of normals, all with the same values.
    fn maps_of(&self, [batch, h, w, channels]: [usize; 4], count: usize) -> Result<Vec<Memory>> {
        let images = self.normal(&[batch, channels, h, w])?;
        let map = |_| images_to_map(&self.gpu, &images, self.element);
        Ok((0..count).map(map).collect::<candle_core::Result<_>>()?)
    }

    fn wants(&self, name: &str, shape: &str) -> bool {
        super::wants(self.args, name, shape)
    }

    fn wants_any(&self, names: &[&str], shape: &str) -> bool {
        names.iter().any(|name| self.wants(name, shape))
    }

    /// Measures a kernel. `run` launches it for the operands of this index, below `sets`.
    fn measure<T>(
        &self,
        name: &str,
        shape: &str,
        work: Work,
        sets: usize,
        mut run: impl FnMut(usize) -> candle_core::Result<T>,
    ) -> Result<()> {
        if !self.wants(name, shape) {
            return Ok(());
        }
        self.measured.set(true);
        // The last results are kept, so that the next ones are written to other memory.
        let (mut results, mut k) = (VecDeque::new(), 0);
        let (min, median) = self.time(self.args.seconds, sets + 1, || {
            results.push_back(run(k)?);
            if results.len() > sets {
                results.pop_front();
            }
            k = (k + 1) % sets;
            Ok(())
        })?;
        let (rate, unit, share) = match work {
            Work::Flops(flops) => (flops as f64 / median, "gflops", None),
            Work::Bytes(bytes) => {
                (bytes as f64 / median, "gbs", Some(bytes as f64 / median / self.bytes))
            }
        };
        if self.args.json {
            let mut line = serde_json::json!({
                "name": name, "shape": shape, "precision": self.precision, "ms_min": min * 1e3,
                "ms_median": median * 1e3, unit: rate / 1e9,
            });
            if let Some(share) = share {
                line["share"] = share.into();
            }
            println!("{line}");
        } else {
            print((name, shape), median * 1e3, (rate / 1e9, unit), share);
        }
        Ok(())
    }

    /// Returns the least and the median of the seconds of a launch, after two rounds of `warm_up` launches: the first
    /// compiles the kernel and allocates memory.
    fn time(
        &self,
        limit: Duration,
        warm_up: usize,
        mut launch: impl FnMut() -> candle_core::Result<()>,
    ) -> Result<(f64, f64)> {
        let mut launches = |count: usize| {
            for _ in 0..count {
                launch()?;
            }
            self.gpu.wait_for_all()
        };
        launches(warm_up)?;
        let start = Instant::now();
        launches(warm_up)?;
        let one = start.elapsed().as_secs_f64() / warm_up as f64;
        let count = ((BETWEEN_WAITS / one) as usize).clamp(1, 1000);
        let mut result = Ok(());
        let (min, median) = super::time(limit, || {
            if result.is_ok() {
                result = launches(count);
            }
        });
        result?;
        Ok((min / count as f64, median / count as f64))
    }
}
