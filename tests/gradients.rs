//! Every weight learns: gradients exist and agree with finite differences. The gradients of the CPU kernels
//! agree with candle's.

use std::collections::{BTreeMap, HashMap};
use std::process::Command;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use ddpm::nn::{
    Architecture, Condition, DownBlockType, Dropout, Graph, Model, Output, Parameters, Resampling,
    TimeConditioning, Trainable, UNet2D, UNet2DConfig, UpBlockType,
};
use ddpm::{Denoiser, Result, Sampler, UNet, UNetConfig};
use proptest::prelude::*;

#[path = "../src/random_inputs.rs"]
mod random_inputs;
use random_inputs::inputs;

/// Half of the distance from 1 to the next number of f32.
const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;

/// A network's sums of products round each of their terms more than once. The longest sums have 720 terms,
/// and the roundings of a term are random in sign.
const SUMS: f64 = 32.0;

/// The configuration of a network that these tests check.
trait Network: Architecture<Model = Model<Self::Graph>> {
    type Graph: Graph;

    /// (channels, height, width)
    fn shape(&self) -> (usize, usize, usize);

    /// The number of classes.
    fn class_count(&self) -> Option<usize>;
}

impl Network for UNetConfig {
    type Graph = UNet;

    fn shape(&self) -> (usize, usize, usize) {
        self.image_shape()
    }

    fn class_count(&self) -> Option<usize> {
        self.classes
    }
}

impl Network for UNet2DConfig {
    type Graph = UNet2D;

    fn shape(&self) -> (usize, usize, usize) {
        self.image_shape()
    }

    fn class_count(&self) -> Option<usize> {
        // The last vector is that of a class or of no class.
        self.num_class_embeds.map(|vectors| vectors - 1)
    }
}

/// A network, and the training loss of a batch, including dropout.
struct Problem<G> {
    parameters: Parameters,
    unet: Model<G>,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    eps: Tensor,
}

impl<G: Graph> Problem<G> {
    fn new<C: Network<Graph = G>>(config: &C, batch: usize, dtype: DType) -> Result<Self> {
        let device = Device::Cpu;
        let parameters = Parameters::new(3, dtype, &device);
        let unet = parameters.build(config)?;
        let (channels, height, width) = config.shape();
        let shape = (batch, channels, height, width);
        let wave = |frequency: f64| -> Result<Tensor> {
            let count = shape.0 * shape.1 * shape.2 * shape.3;
            let values: Vec<f64> = (0..count).map(|i| (i as f64 * frequency).sin() * 1.4).collect();
            Ok(Tensor::from_vec(values, shape, &device)?.to_dtype(dtype)?)
        };
        let t: Vec<u32> = (0..batch as u32).map(|k| (k * 601 + 150) % 1000).collect();
        let t = Tensor::new(t, &device)?;
        let condition = match config.class_count() {
            None => Condition::None,
            // Some images have the same class, and some none.
            Some(classes) => {
                let classes =
                    (0..batch).map(|k| (k * k % (classes + 1)) as u32).collect::<Vec<_>>();
                Condition::Classes(Tensor::new(classes, &device)?)
            }
        };
        Ok(Self { parameters, unet, x_t: wave(1.7)?, t, condition, eps: wave(2.3)? })
    }

    fn forward(&self, x_t: &Tensor) -> Result<Tensor> {
        Ok(self.unet.denoise(x_t, &self.t, &self.condition)?.prediction)
    }

    fn loss(&self) -> Result<Tensor> {
        self.loss_of(&self.x_t)
    }

    fn loss_of(&self, x_t: &Tensor) -> Result<Tensor> {
        let (t, condition, dropout) = (&self.t, &self.condition, Dropout::new(9, 0));
        let output = self.unet.denoise_train(x_t, t, condition, &dropout)?.prediction;
        Ok((output - &self.eps)?.sqr()?.mean_all()?)
    }

    /// Computes the output, and the gradients of the loss by name, with each weight and pixel moved by about
    /// one rounding of f32. The change shows the effect of rounding on this problem.
    fn moved(&self) -> Result<(Tensor, BTreeMap<String, Tensor>)> {
        let move_by = |t: &Tensor, seed: u64| -> Result<Tensor> {
            let noise = Sampler::prior(t.dims(), seed, &Device::Cpu)?.to_dtype(DType::F64)?;
            Ok((t * ((noise * ROUNDING)? + 1.0)?)?)
        };
        let vars = self.parameters.vars();
        let before: Vec<Tensor> =
            vars.values().map(|var| Ok(var.as_detached_tensor().copy()?)).collect::<Result<_>>()?;
        for (k, (var, before)) in (1..).zip(vars.values().zip(&before)) {
            var.set(&move_by(before, k)?)?;
        }
        let x_t = move_by(&self.x_t, 0)?;
        let y = self.forward(&x_t)?.detach();
        let gradients = self.loss_of(&x_t)?.backward()?;
        for (var, before) in vars.values().zip(&before) {
            var.set(before)?;
        }
        let of = |var: &Var| gradients.get(var).expect("a gradient").clone();
        Ok((y, vars.iter().map(|(name, var)| (name.clone(), of(var))).collect()))
    }

    /// Asserts that the gradients of `every`-th weights agree with the change of the loss along a
    /// random direction.
    fn finite_differences_agree(&self, every: usize) -> Result<()> {
        let gradients = self.loss()?.backward()?;
        for (i, (name, var)) in self.parameters.vars().iter().enumerate() {
            if i % every != 0 {
                continue;
            }
            let gradient = gradients.get(var).expect("a gradient");
            let weight = var.as_detached_tensor().copy()?;
            let count = weight.elem_count();
            let direction: Vec<f64> = (0..count)
                .map(|j| ((i + j * 7) as f64 * 0.9).cos() / (count as f64).sqrt())
                .collect();
            let direction = Tensor::from_vec(direction, weight.shape(), &Device::Cpu)?;
            let expected = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;

            let h = 1e-4;
            let mut moved = [0.0; 2];
            for (moved, h) in moved.iter_mut().zip([h, -h]) {
                var.set(&(&weight + (&direction * h)?)?)?;
                *moved = self.loss()?.to_scalar::<f64>()?;
            }
            var.set(&weight)?;
            let found = (moved[0] - moved[1]) / (2.0 * h);
            // The rounding of the loss divided by 2 h, and the term of the third derivative.
            let limit = 1e-9 + 1e-5 * expected.abs();
            assert!(
                (found - expected).abs() < limit,
                "{name}: {expected} by backward, {found} by differences"
            );
        }
        Ok(())
    }

    fn every_weight_has_a_gradient(&self, weights: usize) -> Result<()> {
        let gradients = self.loss()?.backward()?;
        let vars = self.parameters.vars();
        for (name, var) in &vars {
            let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let norm =
                gradient.sqr()?.sum_all()?.sqrt()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            assert!(norm > 1e-8 && norm.is_finite(), "{name}: gradient of norm {norm}");
        }
        let count: usize = vars.values().map(|var| var.elem_count()).sum();
        assert_eq!(count, weights);
        Ok(())
    }
}

#[test]
fn every_weight_of_mnist_learns() -> Result<()> {
    // The number of weights of the reference implementation.
    Problem::new(&UNetConfig::mnist(), 2, DType::F32)?.every_weight_has_a_gradient(2_268_929)
}

#[test]
fn every_weight_of_cifar10_learns() -> Result<()> {
    Problem::new(&UNetConfig::cifar10(), 2, DType::F32)?.every_weight_has_a_gradient(21_355_395)
}

#[test]
fn gradients_of_mnist_agree_with_finite_differences() -> Result<()> {
    Problem::new(&UNetConfig::mnist(), 1, DType::F64)?.finite_differences_agree(6)
}

#[test]
fn gradients_of_cifar10_agree_with_finite_differences() -> Result<()> {
    // The same kinds of layers with fewer channels: the full network takes minutes in f64.
    let config = UNetConfig {
        hidden_dims: vec![16, 24, 32],
        image_size: 8.into(),
        time_dim: 16,
        dropout: 0.3,
        classes: Some(3),
        ..UNetConfig::cifar10()
    };
    Problem::new(&config, 2, DType::F64)?.finite_differences_agree(1)
}

/// A small network, and a batch for it.
fn small() -> impl Strategy<Value = (UNetConfig, usize)> {
    // If all maps have 8 channels, the output of a network does not depend on the timestep, which is an
    // error.
    let dims = prop::collection::vec(1usize..6, 2..=4)
        .prop_filter("all of 8 channels", |dims| dims.iter().any(|&d| d > 1));
    let rest = (3usize..6, 1usize..4, prop::bits::u8::masked(7), 1usize..4, 0f64..0.6);
    let conditions = (2usize..8, prop::option::of(1usize..4));
    (dims, rest, conditions).prop_map(|(dims, rest, (time, classes))| {
        let (pixels, channels, attend, batch, dropout) = rest;
        let levels = dims.len() - 1;
        let config = UNetConfig {
            // A few values in a group may vary so little that the normalisation magnifies all rounding
            // errors.
            image_size: (pixels << levels).into(),
            channels,
            hidden_dims: dims.iter().map(|d| 8 * d).collect(),
            time_dim: 2 * time,
            attention_levels: (0..levels).filter(|level| attend >> level & 1 == 1).collect(),
            dropout,
            classes,
            learned_variance: false,
        };
        (config, batch)
    })
}

/// A small network of Ho et al.'s kind with any of its options, and a batch for it.
fn small_2d() -> impl Strategy<Value = (UNet2DConfig, usize)> {
    use {DownBlockType as Down, UpBlockType as Up};
    let down = prop_oneof![Just(Down::Plain), Just(Down::Attention), Just(Down::Resnet)];
    let up = prop_oneof![Just(Up::Plain), Just(Up::Attention), Just(Up::Resnet)];
    let levels = prop::collection::vec((1usize..4, down, up), 1..=3);
    let sizes = (1usize..3, [2usize..5, 2usize..5], 1usize..4, 1usize..3);
    let time = (0usize..2, any::<bool>(), prop::option::of(1usize..9));
    let attention = (any::<bool>(), 0usize..5, prop::option::of(Just(2usize)));
    let rest = (any::<[bool; 4]>(), prop::option::of(2usize..4), 0f64..0.6, 1usize..4);
    (levels, sizes, time, attention, rest).prop_map(
        |(levels, (layers, pixels, channels, groups), time, attention, rest)| {
            let (scale_shift, blocks, centered, from_edge) = {
                let [a, b, c, d] = rest.0;
                (a, b, c, d)
            };
            let resampling = if blocks { Resampling::Resnet } else { Resampling::Conv };
            let halvings = levels.len() - 1;
            let config = UNet2DConfig {
                sample_size: ddpm::nn::ImageSize {
                    height: pixels[0] << halvings,
                    width: pixels[1] << halvings,
                },
                in_channels: channels,
                out_channels: channels,
                center_input_sample: centered,
                time_embedding_dim: time.2,
                freq_shift: time.0,
                flip_sin_to_cos: time.1,
                down_block_types: levels.iter().map(|level| level.1).collect(),
                up_block_types: levels.iter().map(|level| level.2).collect(),
                // At least two channels in a group, so that every block depends on the timestep.
                block_out_channels: levels.iter().map(|level| 4 * groups * level.0).collect(),
                layers_per_block: layers,
                downsample_padding: usize::from(!from_edge),
                downsample_type: resampling,
                upsample_type: resampling,
                dropout: rest.2,
                attention_head_dim: [Some(2), Some(4), None, None, None][attention.1],
                num_attention_heads: [None, None, None, Some(2), Some(4)][attention.1],
                norm_num_groups: 2 * groups,
                attn_norm_num_groups: attention.2,
                norm_eps: 1e-6,
                resnet_time_scale_shift: match scale_shift {
                    true => TimeConditioning::ScaleShift,
                    false => TimeConditioning::Default,
                },
                add_attention: attention.0,
                num_class_embeds: rest.1,
                null_class: rest.1.is_some() && layers == 1,
                time_scale: if time.1 { 0.25 } else { 1.0 },
            };
            (config, rest.3)
        },
    )
}

fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.to_dtype(DType::F64)?.sqr()?.sum_all()?.sqrt()?.to_scalar()?)
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// Computes the gradients of the loss with the network's own backward passes.
fn by_tape<G: Graph>(problem: &Problem<G>) -> Result<GradStore> {
    let Problem { unet, x_t, t, condition, eps, .. } = problem;
    let scale = 2.0 / eps.elem_count() as f64;
    let mut d_output = |y: &Output| Ok(Output::new(((&y.prediction - eps)? * scale)?));
    unet.gradients(x_t, t, condition, &Dropout::new(9, 0), &mut d_output)
}

/// Builds the network with the same weights, which take no gradients.
fn frozen<C: Network>(config: &C, vars: &BTreeMap<String, Var>) -> Result<Model<C::Graph>> {
    let weights: HashMap<String, Tensor> =
        vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    config.build(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu))
}

/// Compares gradients in f32 with candle's gradients of the same weights in f64.
fn the_tape_agrees<C: Network>(config: &C, batch: usize) -> Result<()> {
    let mut ours = Problem::new(config, batch, DType::F32)?;
    let exact = Problem::new(config, batch, DType::F64)?;
    let (vars, exact_vars) = (ours.parameters.vars(), exact.parameters.vars());
    for (name, var) in &vars {
        // The initial weights of norms, 1 and 0, would hide whether they are used.
        if var.rank() == 1 {
            let wave = Tensor::arange(0f32, var.elem_count() as f32, &Device::Cpu)?;
            let wave = ((wave * 1.3)?.sin()? * 0.3)?;
            var.set(&(var.as_detached_tensor() + wave)?)?;
        }
        exact_vars[name].set(&var.as_detached_tensor().to_dtype(DType::F64)?)?;
    }

    let (found, again) = (by_tape(&ours)?, by_tape(&ours)?);
    ours.unet.set_recompute(true)?;
    let recomputed = by_tape(&ours)?;
    let expected = exact.loss()?.backward()?;
    let (moved_y, moved) = exact.moved()?;
    let mut most = 0f64;
    for var in exact_vars.values() {
        most = most.max(norm(expected.get(var).expect("a gradient"))?);
    }
    for (name, var) in &vars {
        let gradient = found.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
        for other in [&again, &recomputed] {
            assert_eq!(bits(gradient)?, bits(other.get(var).expect("a gradient"))?, "{name}");
        }
        let expected = expected.get(&exact_vars[name]).expect("a gradient");
        let error = norm(&(gradient.to_dtype(DType::F64)? - expected)?)?;
        let moved = norm(&(&moved[name] - expected)?)?;
        // A bias before a normalisation of single channels has no gradient, so only rounding errors remain.
        let limit = SUMS * moved + 16.0 * ROUNDING * most;
        assert!(error <= limit, "{name}: off by {error:e}, more than {limit:e}");
    }

    let ours = Problem { unet: frozen(config, &vars)?, ..ours };
    let y = ours.forward(&ours.x_t)?;
    assert_eq!(bits(&y)?, bits(&ours.forward(&ours.x_t)?)?);
    let expected = exact.forward(&exact.x_t)?;
    let (error, size) = (norm(&(y.to_dtype(DType::F64)? - &expected)?)?, norm(&expected)?);
    let limit = SUMS * norm(&(moved_y - &expected)?)?;
    assert!(error <= limit, "the output, of norm {size}: off by {error:e}, more than {limit:e}");
    for k in 0..batch {
        let (x_t, t) = (ours.x_t.narrow(0, k, 1)?, ours.t.narrow(0, k, 1)?);
        let alone = ours.unet.denoise(&x_t, &t, &ours.condition.narrow(k, 1)?)?.prediction;
        assert_eq!(bits(&alone)?, bits(&y.narrow(0, k, 1)?)?, "image {k} of {batch}, alone");
    }
    Ok(())
}

proptest! {
    #![proptest_config(inputs(16))]

    #[test]
    fn gradients_on_the_cpu_are_those_of_candle_in_f64((config, batch) in small()) {
        the_tape_agrees(&config, batch).unwrap();
    }

    #[test]
    fn so_are_those_of_ho_et_als_network((config, batch) in small_2d()) {
        the_tape_agrees(&config, batch).unwrap();
    }
}

/// A process selects its kernels once, so each smaller instruction set is tested in a separate process.
#[test]
fn so_they_are_in_every_instruction_set() {
    for isa in ["avx2", "baseline"] {
        let tests = [
            "gradients_on_the_cpu_are_those_of_candle_in_f64",
            "so_are_those_of_ho_et_als_network",
        ];
        let output = Command::new(std::env::current_exe().unwrap())
            .args(tests)
            .arg("--exact")
            .env("DDPM_MAX_CPU_ISA", isa)
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("2 passed"), "{isa}: {stdout}");
    }
}

#[test]
fn an_unknown_instruction_set_is_refused() {
    let test = "an_unknown_instruction_set_is_refused";
    if std::env::var("DDPM_MAX_CPU_ISA").as_deref() == Ok("sse9") {
        let built = Parameters::new(0, DType::F32, &Device::Cpu).build(&UNetConfig::mnist());
        let message = built.unwrap_err().to_string();
        assert_eq!(message, "DDPM_MAX_CPU_ISA is sse9; it must be amx, avx512, avx2 or baseline");
        return;
    }
    let command = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact"])
        .env("DDPM_MAX_CPU_ISA", "sse9")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&command.stdout);
    assert!(command.status.success() && stdout.contains("1 passed"), "{stdout}");
}
