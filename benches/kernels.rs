//! Times each kernel at the shapes of the two networks, and compares them with the machine's limits.
//!
//! ```text cargo bench --bench kernels -- [--filter TEXT] [--threads N] [--isa avx512|avx2|baseline]
//! [--device cpu|cuda] [--precision highest|high|bf16|f16] [--seconds S] [--json]
//! ```
//!
//! With `--device cuda`, the kernels are those for CUDA devices; see `kernels/cuda.rs`. On the CPU:
//!
//! Each rate is compared with a ceiling that is measured first, with the same threads and instruction
//! set. Compute-bound kernels are compared with arithmetic in registers. Memory-bound kernels are
//! compared with the fastest of three bandwidth tests on arrays larger than the caches. Operations
//! are those of the textbook algorithm. A 3x3 convolution at stride 1 needs fewer, so its GFLOP/s are
//! "effective" and may exceed the ceiling. The bytes of each operand are counted once, and packed
//! weights count like the weights. Small operands stay in caches, which are faster than memory.

use std::cell::Cell;
use std::hint::black_box;
use std::num::NonZero;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::builder::RangedU64ValueParser;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use rayon::prelude::*;

// The kernels are compiled into the benchmark, together with the modules that their tests need, so
// that nothing has to become public.
#[cfg(feature = "cuda")]
#[path = "kernels/cuda.rs"]
mod cuda;
#[allow(dead_code, unused_imports)]
#[path = "../src/error.rs"]
mod error;
#[allow(dead_code, unused_imports)]
#[path = "../src/kernels/mod.rs"]
mod kernels;
#[allow(dead_code, unused_imports)]
#[path = "../src/memory.rs"]
mod memory;
#[allow(dead_code, unused_imports)]
#[path = "../src/precision.rs"]
mod precision;
#[allow(dead_code, unused_imports)]
#[path = "../src/random.rs"]
mod random;
#[cfg(test)]
#[path = "../src/random_inputs.rs"]
mod random_inputs;

use error::Result;
use kernels::cpu::attention::Attention;
use kernels::cpu::conv::algorithm::{Math, Workspace};
use kernels::cpu::conv::epilogue::Epilogue;
use kernels::cpu::conv::plan::Plan;
use kernels::cpu::linear::{linear_forward, linear_input_gradient, linear_weight_gradient};
use kernels::cpu::maps::{concatenate, scale_maps, split};
use kernels::cpu::norm::Normalization;
use kernels::cpu::reduce::sums_by_image;
use kernels::op::activation::Activation;
use kernels::op::attention::AttentionShape;
use kernels::op::conv::{ConvShape, Scale};
use kernels::op::norm::NormConfig;
use kernels::{
    AdamStep, Isa, MuonStep, add_values, clamp_values, squared_errors, sum_of_squares, weighted_sum,
};
use precision::Precision;
use random::{Noise, Purpose};

#[derive(Parser)]
struct Args {
    /// Runs only the measures whose name and shape contain this text.
    #[arg(long, default_value = "")]
    filter: String,
    /// The device.
    #[arg(long, value_enum, default_value = "cpu")]
    device: Where,
    /// The number of threads; by default that of all cores. Only on the CPU.
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    threads: Option<usize>,
    /// The instruction set; by default the fastest of this machine. Only on the CPU.
    #[arg(long, value_enum)]
    isa: Option<Set>,
    /// On the CPU, the precision of convolutions: highest (default), high or bf16. On CUDA devices, that of all
    /// kernels: also f16 (default, if the build has it). The last two are of the feature f16.
    #[arg(long)]
    precision: Option<Precision>,
    /// The approximate seconds per measure, from 0 to 3600.
    #[arg(long, default_value = "0.5", value_parser = seconds, allow_negative_numbers = true)]
    seconds: Duration,
    /// Prints JSON lines.
    #[arg(long)]
    json: bool,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("it must be a number from 0 to 3600".into()),
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Where {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Set {
    Avx512,
    Avx2,
    Baseline,
}

impl Set {
    fn of(isa: Isa) -> Self {
        match isa.name() {
            "avx512" => Self::Avx512,
            "avx2" => Self::Avx2,
            _ => Self::Baseline,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let measured = match args.device {
        Where::Cpu => Ok(on_cpu(&args)),
        Where::Cuda => on_cuda(&args),
    };
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => refuse("--filter", &args.filter, "no measure's name and shape hold it".into()),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(_: &Args) -> Result<bool> {
    refuse("--device", "cuda", "this build lacks the feature `cuda`".into())
}

#[cfg(feature = "cuda")]
fn on_cuda(args: &Args) -> Result<bool> {
    if let Some(set) = args.isa {
        let asked = set.to_possible_value().expect("none is skipped");
        refuse("--isa", asked.get_name(), "it is for `--device cpu`".into());
    }
    if let Some(threads) = args.threads {
        refuse("--threads", &threads.to_string(), "it is for `--device cpu`".into());
    }
    cuda::run(args)
}

/// Runs the measures on the CPU. Returns whether any was.
fn on_cpu(args: &Args) -> bool {
    let precision = args.precision.unwrap_or_default();
    if precision == Precision::F16 {
        // The CPU kernels would compute it as bf16.
        refuse("--precision", "f16", "on the CPU it must be highest, high or bf16".into());
    }
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("first use");
    }
    let available = Isa::available();
    let isa = match args.isa {
        None => available[0],
        Some(set) => match available.iter().find(|&&isa| Set::of(isa) == set) {
            Some(&isa) => isa,
            None => {
                let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
                let asked = set.to_possible_value().expect("none is skipped");
                refuse(
                    "--isa",
                    asked.get_name(),
                    format!("this machine has {}", names.join(" and ")),
                )
            }
        },
    };
    let bench = Bench {
        isa,
        flops: ceiling::flops(isa),
        bytes: ceiling::bytes(),
        precision,
        measured: Cell::new(false),
        args,
    };
    bench.ceilings();
    for (model, batch, maps) in [("mnist", 32, MNIST), ("cifar10", 8, CIFAR10)] {
        for &map in maps {
            bench.convolution(model, batch, map, true);
        }
    }
    for &map in INCEPTION {
        bench.convolution("inception", 16, map, false);
    }
    for (model, batch, size, channels) in [
        ("mnist", 32, 28, 64),
        ("mnist", 32, 14, 128),
        ("mnist", 32, 7, 128),
        ("cifar10", 8, 32, 256),
        ("cifar10", 8, 16, 256),
        ("cifar10", 8, 8, 512),
        ("cifar10", 8, 4, 256),
    ] {
        bench.group_norm(model, batch, size, channels);
    }
    for (model, batch, size, channels) in
        [("mnist", 32, 28, [64, 64]), ("mnist", 32, 7, [128, 128]), ("cifar10", 8, 32, [256, 256])]
    {
        bench.maps(model, batch, size, channels);
    }
    for (model, batch, size, channels) in
        [("mnist", 32, 7, 128), ("cifar10", 8, 16, 256), ("cifar10", 8, 4, 256)]
    {
        bench.attention(model, batch, size, channels);
    }
    for (model, batch, output) in [("mnist", 32, 128), ("cifar10", 8, 256)] {
        bench.linear(model, batch, 128, output);
    }
    for (model, weights) in [("mnist", 2_268_929), ("cifar10", 21_355_395)] {
        bench.adam(model, weights);
    }
    for (model, count, rows) in [("mnist", 8, 128), ("cifar10", 16, 256)] {
        bench.muon(model, count, rows);
    }
    for (model, dims) in [("mnist", [32, 1, 28, 28]), ("cifar10", [8, 3, 32, 32])] {
        bench.process(model, dims);
    }
    bench.measured.get()
}

fn refuse(option: &str, value: &str, why: String) -> ! {
    let message = format!("invalid value '{value}' for '{option}': {why}");
    Args::command().error(ErrorKind::InvalidValue, message).exit()
}

/// Size of a square map, input and output channels, height and width of the kernel, scale.
type Map = (usize, usize, usize, [usize; 2], Scale);

const SAME: Scale = Scale::Stride(1);
const HALF: Scale = Scale::Stride(2);
const UP: Scale = Scale::Upsample;
const WITHIN: Scale = Scale::StrideWithin(1);
const HALVED: Scale = Scale::StrideWithin(2);

const MNIST: &[Map] = &[
    (28, 32, 32, [3; 2], SAME),
    (28, 32, 64, [3; 2], SAME),
    (28, 64, 64, [3; 2], SAME),
    (28, 128, 32, [3; 2], SAME),
    (14, 64, 128, [3; 2], SAME),
    (14, 128, 128, [3; 2], SAME),
    (14, 256, 64, [3; 2], SAME),
    (7, 128, 128, [3; 2], SAME),
    (28, 1, 32, [3; 2], SAME),
    (28, 32, 1, [3; 2], SAME),
    (28, 64, 64, [3; 2], HALF),
    (14, 128, 128, [3; 2], HALF),
    (7, 128, 128, [3; 2], UP),
    (14, 64, 64, [3; 2], UP),
    (28, 32, 64, [1; 2], SAME),
    (14, 256, 64, [1; 2], SAME),
    (7, 128, 384, [1; 2], SAME),
];

const CIFAR10: &[Map] = &[
    (32, 128, 128, [3; 2], SAME),
    (32, 128, 256, [3; 2], SAME),
    (32, 256, 256, [3; 2], SAME),
    (32, 512, 128, [3; 2], SAME),
    (16, 256, 256, [3; 2], SAME),
    (16, 512, 256, [3; 2], SAME),
    (8, 256, 256, [3; 2], SAME),
    (8, 512, 256, [3; 2], SAME),
    (4, 256, 256, [3; 2], SAME),
    (32, 3, 128, [3; 2], SAME),
    (32, 128, 3, [3; 2], SAME),
    (32, 256, 256, [3; 2], HALF),
    (16, 256, 256, [3; 2], HALF),
    (8, 256, 256, [3; 2], HALF),
    (8, 256, 256, [3; 2], UP),
    (16, 256, 256, [3; 2], UP),
    (32, 512, 128, [1; 2], SAME),
    (16, 256, 768, [1; 2], SAME),
];

/// Convolutions of the extractor `Inception`.
const INCEPTION: &[Map] = &[
    (299, 3, 32, [3, 3], HALVED),
    (149, 32, 32, [3, 3], WITHIN),
    (147, 32, 64, [3, 3], SAME),
    (73, 80, 192, [3, 3], WITHIN),
    (35, 288, 64, [1, 1], SAME),
    (35, 48, 64, [5, 5], SAME),
    (35, 96, 96, [3, 3], SAME),
    (35, 288, 384, [3, 3], HALVED),
    (17, 768, 192, [1, 1], SAME),
    (17, 160, 160, [1, 7], SAME),
    (17, 160, 160, [7, 1], SAME),
    (17, 192, 192, [1, 7], SAME),
    (17, 192, 192, [7, 1], SAME),
    (17, 192, 320, [3, 3], HALVED),
    (8, 2048, 320, [1, 1], SAME),
    (8, 384, 384, [1, 3], SAME),
    (8, 384, 384, [3, 1], SAME),
    (8, 448, 384, [3, 3], SAME),
];

/// The work of a measure, which selects its ceiling.
#[derive(Clone, Copy)]
enum Work {
    Flops(usize),
    Bytes(usize),
}

/// The name of a convolution's shape.
fn shape_of_map(model: &str, batch: usize, map: Map) -> String {
    let (size, c_in, c_out, [height, width], scale) = map;
    let how = match scale {
        Scale::Stride(stride) | Scale::StrideFromEdge(stride) => format!("/{stride}"),
        Scale::StrideWithin(stride) => format!("/{stride} within"),
        Scale::Upsample => " upsampled".to_string(),
    };
    format!("{model} {batch}x{size}x{size} {c_in}->{c_out} {height}x{width}{how}")
}

fn wants(args: &Args, name: &str, shape: &str) -> bool {
    format!("{name} {shape}").contains(&args.filter)
}

/// Prints a measure: its milliseconds, its rate in this unit, and its share of the ceiling.
fn print((name, shape): (&str, &str), ms: f64, (rate, unit): (f64, &str), share: Option<f64>) {
    let unit = if unit == "gbs" { "GB/s" } else { "GFLOP/s" };
    let share = share.map_or(String::new(), |share| format!("  {:4.0} %", share * 100.0));
    println!(
        "{}",
        format!("{name:24}  {shape:32}  {ms:10.4} ms  {rate:9.1} {unit:7}{share}").trim_end()
    );
}

struct Bench<'a> {
    isa: Isa,
    /// Maximum operations per second.
    flops: f64,
    bytes: f64,
    precision: Precision,
    /// True if any kernel was measured.
    measured: Cell<bool>,
    args: &'a Args,
}

impl Bench<'_> {
    /// `trained` states whether gradients are measured, too.
    fn convolution(&self, model: &str, batch: usize, map: Map, trained: bool) {
        let (size, c_in, c_out, kernel, scale) = map;
        let [height, width] = kernel;
        let shape = shape_of_map(model, batch, map);
        let names = ["conv pack", "conv forward", "conv d input", "conv d weight"];
        if !self.wants_any(&names[..if trained { 4 } else { 2 }], &shape) {
            return;
        }
        let dims = [batch, size, size, c_in];
        let weight_dims = [c_out, c_in, height, width];
        let shape_of_conv = ConvShape::new(dims, &weight_dims, scale).expect("sizes that fit");
        let conv = Plan::new(self.isa, shape_of_conv, Math::of(self.precision, self.isa));
        let (x, weight) = (normal(dims.iter().product()), normal(weight_dims.iter().product()));
        let bias = normal(c_out);
        let mut y = normal(conv.output().iter().product());
        let dy = y.clone();
        let mut dx = x.clone();
        let packed = conv.pack(&weight, &mut Workspace::default());
        let (mut dweight, mut workspace) = (weight.clone(), Workspace::default());
        let work = Work::Flops(2 * y.len() * c_in * height * width);
        let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
        // As in training, the memory is reused.
        self.measure("conv pack", &shape, Work::Bytes(8 * weight.len()), || {
            let packed = conv.pack(&weight, &mut workspace);
            workspace.unpack(black_box(packed));
        });
        self.measure("conv forward", &shape, work, || conv.forward(&x, &packed, epilogue, &mut y));
        if !trained {
            return;
        }
        self.measure("conv d input", &shape, work, || {
            conv.input_gradient(&dy, &weight, &mut dx, false, &mut workspace);
        });
        self.measure("conv d weight", &shape, work, || {
            conv.weight_gradient(&x, &dy, &mut dweight, &mut workspace);
        });
    }

    fn group_norm(&self, model: &str, batch: usize, size: usize, channels: usize) {
        let shape = format!("{model} {batch}x{size}x{size} {channels}");
        let count = batch * size * size * channels;
        // Factors of one half, so that a gradient that replaces its input neither grows nor vanishes.
        let (weight, bias) = (vec![0.5; channels], normal(channels));
        let (x, mut y, mut dy) = (normal(count), normal(count), normal(count));
        let (isa, config) = (self.isa, NormConfig::new(Activation::Silu));
        let norm = Normalization { isa, config, weight: &weight, bias: &bias };
        self.measure("norm forward", &shape, Work::Bytes(8 * count), || {
            black_box(norm.forward(batch, &x, &mut y));
        });
        let stats = norm.forward(batch, &x, &mut y);
        self.measure("norm backward", &shape, Work::Bytes(16 * count), || {
            black_box(norm.backward(&x, &stats, &mut dy, Some(&y)));
        });
    }

    fn maps(&self, model: &str, batch: usize, size: usize, channels: [usize; 2]) {
        let shape = format!("{model} {batch}x{size}x{size} {}+{}", channels[0], channels[1]);
        let pixels = batch * size * size;
        let [mut a, mut b] = channels.map(|channels| normal(pixels * channels));
        let mut y = normal(a.len() + b.len());
        self.measure("concatenation", &shape, Work::Bytes(8 * y.len()), || {
            concatenate([&a, &b], channels, &mut y);
        });
        self.measure("split", &shape, Work::Bytes(8 * y.len()), || {
            split(&y, channels, [&mut a, &mut b]);
        });
        // Ones: zeros might be faster, and larger values would grow.
        let mask = vec![1.0; batch * channels[0]];
        let mut dropped = vec![0f32; a.len()];
        self.measure("dropout", &shape, Work::Bytes(8 * a.len()), || {
            scale_maps(&a, &mask, channels[0], &mut dropped);
        });
        self.measure("sum of maps", &shape, Work::Bytes(12 * a.len()), || {
            add_values(&mut dropped, &a);
        });
        self.measure("sums by image", &shape, Work::Bytes(4 * a.len()), || {
            black_box(sums_by_image(&a, batch, channels[0]));
        });
    }

    fn attention(&self, model: &str, batch: usize, size: usize, channels: usize) {
        let shape = format!("{model} {batch}x{size}x{size} {channels}");
        let positions = size * size;
        let shape_of_maps = AttentionShape { positions, channels, heads: 1 };
        let sizes = Attention { isa: self.isa, shape: shape_of_maps };
        let count = batch * positions * channels;
        let (qkv, mut y) = (normal(3 * count), normal(count));
        let (dy, mut dqkv) = (y.clone(), qkv.clone());
        // One product of scores or of values. The backward pass computes the scores again.
        let product = 2 * count * positions;
        self.measure("attention forward", &shape, Work::Flops(2 * product), || {
            sizes.forward(&qkv, &mut y);
        });
        self.measure("attention backward", &shape, Work::Flops(5 * product), || {
            sizes.backward(&qkv, &dy, &mut dqkv);
        });
    }

    fn linear(&self, model: &str, batch: usize, input: usize, output: usize) {
        let shape = format!("{model} {batch} {input}->{output}");
        let (x, weight, bias) = (normal(batch * input), normal(input * output), normal(output));
        let mut y = normal(batch * output);
        let (dy, mut dx, mut dweight) = (y.clone(), x.clone(), weight.clone());
        let product = 2 * batch * input * output;
        self.measure("linear forward", &shape, Work::Flops(product), || {
            linear_forward(self.isa, &x, &weight, &bias, &mut y);
        });
        self.measure("linear backward", &shape, Work::Flops(2 * product), || {
            linear_input_gradient(self.isa, &weight, output, &dy, &mut dx);
            linear_weight_gradient(self.isa, &x, output, &dy, &mut dweight);
        });
    }

    fn adam(&self, model: &str, weights: usize) {
        let shape = format!("{model} {weights}");
        if !self.wants_any(&["gradient norm", "adamw, clipping, average"], &shape) {
            return;
        }
        let [mut weight, gradient, mut mean, mut average] = [(); 4].map(|()| normal(weights));
        let mut square = vec![1f32; weights];
        let step = AdamStep {
            mean: [0.9, 0.1],
            square: [0.999, 0.001],
            eps: 1e-8,
            step_size: 1e-4,
            root_scale: 1.0,
            keep: 1.0,
            l2: 0.0,
            gradient_scale: 0.5,
            average: [0.999, 0.001],
        };
        self.measure("gradient norm", &shape, Work::Bytes(4 * weights), || {
            black_box(sum_of_squares(self.isa, &gradient));
        });
        // The weight, both means and the average are read and written. The gradient is read.
        self.measure("adamw, clipping, average", &shape, Work::Bytes(36 * weights), || {
            step.apply(
                self.isa,
                &mut weight,
                &gradient,
                (&mut mean, &mut square),
                Some(&mut average),
            );
        });
    }

    /// Measures the update of the weights of 3x3 convolutions with as many inputs as outputs. Nearly all of it is the
    /// orthogonalisation.
    fn muon(&self, model: &str, count: usize, rows: usize) {
        let cols = 9 * rows;
        let shape = format!("{model} {count} of {rows}x{cols}");
        if !self.wants_any(&["muon, update"], &shape) {
            return;
        }
        let gradient = normal(rows * cols);
        let mut matrices = vec![(gradient.clone(), gradient.clone()); count];
        let step = MuonStep {
            momentum: [0.95, 0.05],
            nesterov: true,
            gradient_scale: 1.0,
            keep: 1.0,
            learning_rate: 1e-6,
        };
        // Five iterations, each with products for X X', its square, and the polynomial with X.
        let flops = 5 * count * (4 * rows * rows * cols + 2 * rows * rows * rows);
        let isa = self.isa;
        self.measure("muon, update", &shape, Work::Flops(flops), || {
            matrices.par_iter_mut().with_max_len(1).for_each(|(momentum, weight)| {
                step.update(isa, (rows, cols), &gradient, momentum, weight);
            });
        });
    }

    /// Measures the arithmetic on images in training and sampling. As there, results are written to
    /// newly allocated memory.
    fn process(&self, model: &str, dims: [usize; 4]) {
        let [batch, channels, h, w] = dims;
        let shape = format!("{model} {batch}x{h}x{w} {channels}");
        let count = dims.iter().product();
        let (x, y) = (normal(count), normal(count));
        let factors: Vec<[f64; 2]> = (0..batch).map(|k| [0.8, 0.01 * k as f64]).collect();
        let fresh = |f: &dyn Fn(&mut [f32])| {
            let mut result = vec![0f32; count];
            f(&mut result);
            black_box(result);
        };
        self.measure("noising", &shape, Work::Bytes(12 * count), || {
            fresh(&|sum| weighted_sum(&x, &y, &factors, sum));
        });
        self.measure("squared error", &shape, Work::Bytes(12 * count), || {
            fresh(&|gradient| {
                black_box(squared_errors(&x, &y, 0.5, gradient));
            });
        });
        self.measure("sampler's combination", &shape, Work::Bytes(12 * count), || {
            fresh(&|sum| weighted_sum(&x, &y, &[[0.9, 0.1]], sum));
        });
        self.measure("sampler's clipping", &shape, Work::Bytes(8 * count), || {
            fresh(&|y| clamp_values(&x, -1.0, 1.0, y));
        });
    }

    fn wants(&self, name: &str, shape: &str) -> bool {
        wants(self.args, name, shape)
    }

    fn wants_any(&self, names: &[&str], shape: &str) -> bool {
        names.iter().any(|name| self.wants(name, shape))
    }

    fn measure(&self, name: &str, shape: &str, work: Work, run: impl FnMut()) {
        if !self.wants(name, shape) {
            return;
        }
        self.measured.set(true);
        let (min, median) = time(self.args.seconds, run);
        let (rate, unit, ceiling) = match work {
            Work::Flops(flops) => (flops as f64 / median, "gflops", self.flops),
            Work::Bytes(bytes) => (bytes as f64 / median, "gbs", self.bytes),
        };
        let (rate, share) = (rate / 1e9, rate / ceiling);
        if self.args.json {
            let line = serde_json::json!({
                "name": name, "shape": shape, "isa": self.isa.name(), "precision": self.precision,
                "threads": rayon::current_num_threads(), "ms_min": min * 1e3,
                "ms_median": median * 1e3, unit: rate, "share": share,
            });
            println!("{line}");
        } else {
            print((name, shape), median * 1e3, (rate, unit), Some(share));
        }
    }

    fn ceilings(&self) {
        let (flops, bytes) = (self.flops / 1e9, self.bytes / 1e9);
        let (isa, threads) = (self.isa.name(), rayon::current_num_threads());
        if self.args.json {
            let line = serde_json::json!({
                "name": "ceilings", "isa": isa, "threads": threads, "gflops": flops, "gbs": bytes,
            });
            println!("{line}");
        } else {
            println!("{isa}, {threads} threads: at most {flops:.1} GFLOP/s, {bytes:.1} GB/s");
        }
    }
}

/// Random values: some units multiply zeros faster.
fn normal(count: usize) -> Vec<f32> {
    let mut values = vec![0f32; count];
    Noise::new(0).stream(Purpose::Prior, 0, 0).fill_normal(&mut values);
    values
}

/// Returns the least and the median of the seconds of a run. There are at least three runs, which
/// take about `limit` in total, after one that is not timed.
fn time(limit: Duration, mut run: impl FnMut()) -> (f64, f64) {
    run();
    let (begin, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < 3 || begin.elapsed() < limit {
        let start = Instant::now();
        run();
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    (seconds[0], seconds[seconds.len() / 2])
}

/// The limits of the machine, measured by loops that do nothing else.
mod ceiling {
    use super::*;

    /// Time for each test of a ceiling, even if the measures are shorter: threads need time to wake
    /// up, and clocks to rise.
    const LIMIT: Duration = Duration::from_millis(500);

    /// Number of values of an array that is larger than the caches.
    const MEMORY: usize = 64 << 20;

    /// Number of values that one thread handles at a time.
    const CHUNK: usize = 1 << 20;

    /// Iterations of the loop in registers.
    const TURNS: usize = 1 << 18;

    /// Number of independent sums. They fit in the registers of every instruction set, and suffice to
    /// keep two units with a latency of five busy.
    const SUMS: usize = 10;

    /// Returns the maximum bytes per second of memory, by the fastest of three tests. They are plain
    /// loops, because a library's copy may bypass the caches, which no kernel does.
    pub fn bytes() -> f64 {
        let (from, mut to) = (vec![1f32; MEMORY], vec![0f32; MEMORY]);
        let factor = black_box(1.5f32);
        let bytes = |count: usize, run: &mut dyn FnMut()| {
            (count * MEMORY * size_of::<f32>()) as f64 / time(LIMIT, run).0
        };
        let read = bytes(1, &mut || {
            from.par_chunks(CHUNK).for_each(|from| {
                let mut sums = [0f32; 32];
                for from in from.as_chunks::<32>().0 {
                    sums.iter_mut().zip(from).for_each(|(sum, value)| *sum += value);
                }
                black_box(sums);
            });
        });
        let update = bytes(2, &mut || {
            to.par_chunks_mut(CHUNK).for_each(|to| to.iter_mut().for_each(|to| *to += factor));
            black_box(&to);
        });
        // A write first reads its cache line, so a copy counts three times.
        let copy = bytes(3, &mut || {
            to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| {
                to.iter_mut().zip(from).for_each(|(to, x)| *to = factor * x)
            });
            black_box(&to);
        });
        read.max(update).max(copy)
    }

    /// Returns the maximum multiplications and additions per second. Each thread is timed separately,
    /// and its median counts. A common time would be that of two threads that share a core, or of one
    /// that shares it with another program. The minimum would apply only while the other thread of a
    /// core sleeps.
    pub fn flops(isa: Isa) -> f64 {
        let width = match Set::of(isa) {
            Set::Avx512 => 16,
            Set::Avx2 => 8,
            Set::Baseline => 4,
        };
        let work = (TURNS * SUMS * width * 2) as f64;
        let rates = rayon::broadcast(|_| work / time(LIMIT, || in_registers(isa)).1);
        let cores = thread::available_parallelism().map_or(rates.len(), NonZero::get);
        rates.iter().sum::<f64>() * (cores as f64 / rates.len() as f64).min(1.0)
    }

    fn in_registers(isa: Isa) {
        match Set::of(isa) {
            // SAFETY: an `Isa` of this name exists only if the machine has the instructions.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512() },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2() },
            _ => baseline(),
        }
    }

    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;
    #[cfg(target_arch = "x86_64")]
    macro_rules! in_registers {
        ($name:ident $features:literal: $splat:ident, $mul_add:ident) => {
            #[target_feature(enable = $features)]
            fn $name() {
                let factor = $splat(black_box(0.5));
                let mut sums = [$splat(black_box(1.0)); SUMS];
                for _ in 0..TURNS {
                    for sum in &mut sums {
                        *sum = $mul_add(*sum, factor, factor);
                    }
                }
                black_box(sums);
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    in_registers!(avx512 "avx512f": _mm512_set1_ps, _mm512_fmadd_ps);
    #[cfg(target_arch = "x86_64")]
    in_registers!(avx2 "avx2,fma": _mm256_set1_ps, _mm256_fmadd_ps);

    fn baseline() {
        let factor = black_box(0.5f32);
        let mut sums = [[black_box(1f32); 4]; SUMS];
        for _ in 0..TURNS {
            for value in sums.as_flattened_mut() {
                // Fused only if the machine has an instruction for it.
                *value = match cfg!(target_arch = "x86_64") {
                    true => *value * factor + factor,
                    false => value.mul_add(factor, factor),
                };
            }
        }
        black_box(sums);
    }
}
