//! The crate compared with PyTorch: outputs, gradients, a training run and a sampling run.
//!
//! Runs over every `*.safetensors` in `tests/data/pytorch/`, or in the folder that the environment
//! variable `DDPM_FIXTURES` names. `tests/data/README.md` describes the content of these files and how
//! to create them. The test does not depend on a configuration or a size. `DDPM_DEVICE=cuda` selects a
//! GPU.
//!
//! Also compares `UNet2D` with diffusers, over every folder in `tests/data/diffusers/`, and in the folder that the
//! environment variable `DDPM_DIFFUSERS` names, and with the network of improved-diffusion and guided-diffusion.
//!
//! Also compares `LucidrainsUNet` with denoising-diffusion-pytorch, over `tests/data/lucidrains/`, and the folder that
//! the environment variable `DDPM_LUCIDRAINS` names.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor, Var};
use ddpm::nn::{
    AttentionHeads, Condition, Dropout, ImageSize, LucidrainsConfig, LucidrainsFile,
    LucidrainsUNet, Model, OpenAi, Output, Parameters, Trainable, UNet2D, UNet2DConfig,
};
use ddpm::process::Prediction;
use ddpm::sample::Spacing;
use ddpm::train::{AdamConfig, EmaConfig, WeightDecay};
use ddpm::{Denoiser, Diffusion, NoiseSchedule, Sampler, Solver, TrainConfig, Trainer, UNetConfig};
use serde::Deserialize;

mod passes;

/// The allowed difference from PyTorch.
const OUT: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;
const WEIGHT: f64 = 5e-6;
const LOSS: f64 = 1e-5;
const SAMPLE: f64 = 1e-4;

/// Root mean square below which a gradient is an exact zero with rounding errors. Other gradients are a
/// hundred times larger than this limit, and these a hundred times smaller.
const NO_GRADIENT: f64 = 1e-6;

#[test]
fn every_fixture_agrees() {
    // Cargo runs tests in the directory of the manifest. Run them in the same place without Cargo.
    let dir = std::env::var_os("DDPM_FIXTURES").unwrap_or("tests/data/pytorch".into());
    let dir = PathBuf::from(dir);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} holds no *.safetensors", dir.display());
    for path in paths {
        let fixture = Fixture::read(&path);
        println!("{}: {:?}", path.display(), fixture.config);
        output_and_gradients(&fixture);
        training(&fixture);
        sampling(&fixture);
    }
}

fn output_and_gradients(fixture: &Fixture) {
    let trainer = fixture.trainer();
    let [x, t, eps] = ["x", "t", "eps"].map(|name| fixture.get(name).clone());

    let mut out = None;
    let gradients = if device().is_cpu() {
        let output = trainer.model().forward(&x, &t).unwrap();
        out = Some(output.detach());
        (output - &eps).unwrap().sqr().unwrap().mean_all().unwrap().backward().unwrap()
    } else {
        let dropout = Dropout::new(0, 0);
        let mut gradient = |output: &Tensor| {
            let own = here(output);
            let scale = 2.0 / own.elem_count() as f64;
            let gradient = ((&own - &eps).unwrap() * scale).unwrap();
            out = Some(own);
            Ok(there(&gradient))
        };
        passes::gradients(trainer.model(), &there(&x), &there(&t), &dropout, &mut gradient).unwrap()
    };
    let out = out.expect("an output");
    close("out", max_abs(&out, fixture.get("out_f64")), OUT);

    let loss = (out - eps).unwrap().sqr().unwrap().mean_all().unwrap();
    close("loss", max_abs(&loss, fixture.get("loss")), LOSS);

    let expected = fixture.group("grad.");
    assert_eq!(expected.len(), trainer.vars().len(), "weights with a gradient");
    let mut worst = (0.0, String::new());
    for (name, expected) in expected {
        let var = &trainer.vars()[&name];
        let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
        let (gradient, expected) =
            (without_key(&name, &here(gradient)), without_key(&name, &expected));
        if fixture.has_no_gradient(&name) {
            assert!(rms(&gradient) < NO_GRADIENT, "{name} should have no gradient");
            continue;
        }
        let difference = norm(&(&gradient - &expected).unwrap()) / norm(&expected);
        if difference > worst.0 || difference.is_nan() {
            worst = (difference, name);
        }
    }
    close(&format!("gradient of {}", worst.1), worst.0, GRADIENT);
}

fn training(fixture: &Fixture) {
    let mut trainer = fixture.trainer();
    let [x0, t, eps] = ["train.x0", "train.t", "train.eps"].map(|name| fixture.get(name));
    let losses: Vec<Tensor> = (0..x0.dim(0).unwrap())
        .map(|i| {
            let [x0, t, eps] = [x0, t, eps].map(|all| all.get(i).unwrap());
            here(&trainer.step_with(there(&x0), &there(&t), &there(&eps)).unwrap().loss)
        })
        .collect();
    let losses = Tensor::stack(&losses, 0).unwrap();
    close("train.loss", max_abs(&losses, fixture.get("train.loss")), LOSS);

    let own = |(name, values): (&String, &Tensor)| (name.clone(), here(values));
    let trained: BTreeMap<_, _> = trainer.vars().iter().map(|(k, v)| own((k, v))).collect();
    let averages = trainer.ema().unwrap().averages().iter().map(own).collect();
    for (prefix, ours) in [("trained.", &trained), ("ema.", &averages)] {
        let expected = fixture.group(prefix);
        assert_eq!(expected.len(), ours.len());
        let mut worst = (0.0, String::new());
        for (name, expected) in expected {
            let (ours, expected) =
                (without_key(&name, &ours[&name]), without_key(&name, &expected));
            let difference = rms(&(&ours - &expected).unwrap());
            if !fixture.has_no_gradient(&name) && (difference > worst.0 || difference.is_nan()) {
                worst = (difference, name);
            }
        }
        close(&format!("{prefix}{}", worst.1), worst.0, WEIGHT);
    }
}

fn sampling(fixture: &Fixture) {
    assert_eq!((fixture.sample.variance.as_str(), fixture.sample.clip), ("beta", false));
    let diffusion = fixture.diffusion();
    let steps = diffusion.schedule().steps();
    let trainer = fixture.trainer();
    let sampler = Sampler::new(&diffusion, Solver::ddpm(), steps).unwrap();
    // There have been no updates, so the average has the weights of the fixture.
    let model = trainer.ema_model().unwrap();
    let z = fixture.get("sample.z");
    let x_0 = sampler
        .steps_from(&model, there(fixture.get("sample.x_T")), |t| Ok(there(&z.get(t as usize)?)))
        .unwrap()
        .map(|step| step.unwrap().x)
        .last()
        .unwrap();
    close("sample.x_0", max_abs(&here(&x_0), fixture.get("sample.x_0")), SAMPLE);
}

struct Fixture {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
    config: UNetConfig,
    train: Train,
    sample: Sample,
}

#[derive(Deserialize)]
struct Train {
    lr: f64,
    weight_decay: f64,
    betas: [f64; 2],
    eps: f64,
    clip_norm: f64,
    ema_decay: f64,
}

#[derive(Deserialize)]
struct Sample {
    steps: usize,
    beta_start: f64,
    beta_end: f64,
    variance: String,
    clip: bool,
}

impl Fixture {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().as_ref().expect("metadata");
        Self {
            path: path.to_owned(),
            tensors: candle_core::safetensors::load(path, &Device::Cpu).unwrap(),
            config: serde_json::from_str(&metadata["config"]).unwrap(),
            train: serde_json::from_str(&metadata["train"]).unwrap(),
            sample: serde_json::from_str(&metadata["sample"]).unwrap(),
        }
    }

    fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no {name}", self.path.display()))
    }

    fn group(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        self.tensors
            .iter()
            .filter_map(|(k, v)| Some((k.strip_prefix(prefix)?.to_string(), v.clone())))
            .collect()
    }

    /// Returns whether a weight has no gradient in exact arithmetic, according to PyTorch's figures. A
    /// norm whose groups are single channels removes any constant that is added to a feature map. Adam
    /// turns the remaining rounding errors into steps of full length.
    fn has_no_gradient(&self, name: &str) -> bool {
        rms(&without_key(name, self.get(&format!("grad.{name}")))) < NO_GRADIENT
    }

    fn diffusion(&self) -> Diffusion {
        let Sample { steps, beta_start, beta_end, .. } = self.sample;
        let schedule = NoiseSchedule::linear(steps, beta_start, beta_end).unwrap();
        let betas = self.get("sample.betas").to_vec1::<f64>().unwrap();
        let off = |(ours, theirs): (&f64, &f64)| (ours - theirs).abs();
        let worst = schedule.betas().iter().zip(&betas).map(off).fold(0.0, f64::max);
        assert!(worst <= 1e-15, "betas differ by {worst:e}");
        Diffusion::new(schedule, Prediction::Epsilon)
    }

    /// Creates a trainer with the recipe and weights of the fixture.
    fn trainer(&self) -> Trainer<UNetConfig> {
        let Train { lr, weight_decay, betas: [beta1, beta2], eps, clip_norm, ema_decay } =
            self.train;
        let weight_decay = WeightDecay::Decoupled(weight_decay);
        let config = TrainConfig {
            optimizer: AdamConfig { learning_rate: lr, beta1, beta2, eps, weight_decay },
            clip_norm: Some(clip_norm),
            ema: Some(EmaConfig { decay: ema_decay, warmup: false }),
            ..TrainConfig::mnist()
        };
        let mut trainer =
            Trainer::new(self.config.clone(), config, self.diffusion(), &device()).unwrap();
        // Through a file, like a user's weights from PyTorch.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.safetensors");
        let weights: HashMap<String, Tensor> = self.group("weights.").into_iter().collect();
        candle_core::safetensors::save(&weights, &path).unwrap();
        trainer.set_weights(&path).unwrap();
        trainer
    }
}

/// The allowed difference from diffusers, relative to the largest value or to the norm of a gradient.
const DIFFUSERS_OUT: f64 = 1e-4;
const DIFFUSERS_GRADIENT: f64 = 1e-3;

#[test]
fn every_network_of_diffusers_agrees() {
    let folders = |dir: PathBuf| {
        let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        folders.retain(|folder| folder.join("case.safetensors").exists());
        folders.sort();
        assert!(!folders.is_empty(), "{} holds no case.safetensors", dir.display());
        folders
    };
    let mut all = folders("tests/data/diffusers".into());
    all.extend(std::env::var_os("DDPM_DIFFUSERS").into_iter().flat_map(|dir| folders(dir.into())));
    for folder in all {
        let network = Diffusers::read(&folder);
        println!("{}", folder.display());
        network.output_and_gradients();
        if network.case.contains_key("train.loss") {
            network.training_step();
        }
    }
}

/// A network that diffusers saved, with its results.
struct Diffusers {
    folder: PathBuf,
    config: UNet2DConfig,
    weights: HashMap<String, Tensor>,
    case: HashMap<String, Tensor>,
}

impl Diffusers {
    fn read(folder: &Path) -> Self {
        let load = |name| candle_core::safetensors::load(folder.join(name), &Device::Cpu).unwrap();
        Self {
            folder: folder.to_owned(),
            // The case was computed without dropout.
            config: UNet2DConfig { dropout: 0.0, ..UNet2DConfig::from_diffusers(folder).unwrap() },
            weights: load("diffusion_pytorch_model.safetensors"),
            case: load("case.safetensors"),
        }
    }

    /// Builds the network with weights that take gradients.
    fn trainable(&self) -> (Parameters, Model<UNet2D>) {
        let parameters = Parameters::new(0, DType::F32, &device());
        let model = parameters.build(&self.config).unwrap();
        let vars = parameters.vars();
        assert_eq!(vars.len(), self.weights.len());
        for (name, var) in vars {
            var.set(&there(&self.weights[&name])).unwrap();
        }
        (parameters, model)
    }

    fn output_and_gradients(&self) {
        let [x, t, d_out] = ["x", "t", "d_out"].map(|name| there(&self.case[name]));
        let condition = match self.case.get("classes") {
            Some(classes) => Condition::Classes(there(classes)),
            None => Condition::None,
        };
        let whole = |y: &Output| match &y.variance {
            Some(variance) => Tensor::cat(&[&y.prediction, variance], 1).unwrap(),
            None => y.prediction.clone(),
        };
        let expected = &self.case["out"];
        let largest = max_abs(expected, &expected.zeros_like().unwrap());
        let check_output = |what: &str, y: &Output| {
            let difference = max_abs(&here(&whole(y)), expected) / largest;
            close(&format!("out, {what}"), difference, DIFFUSERS_OUT);
        };
        let frozen = Parameters::load_diffusers(&self.folder, DType::F32, &device()).unwrap();
        let frozen = frozen.build(&self.config).unwrap();
        check_output("frozen", &frozen.denoise(&x, &t, &condition).unwrap());

        let (parameters, model) = self.trainable();
        let dropout = Dropout::new(0, 0);
        let channels = self.config.in_channels;
        // On a GPU, only the crate's kernels are tested.
        let by_candle = device().is_cpu().then(|| {
            let y = model.denoise_train(&x, &t, &condition, &dropout).unwrap();
            check_output("by candle", &y);
            (whole(&y) * &d_out).unwrap().sum_all().unwrap().backward().unwrap()
        });
        let mut gradient = |y: &Output| {
            check_output("by kernels", y);
            let d = Output::new(d_out.narrow(1, 0, channels)?.contiguous()?);
            let rest = d_out.dim(1)? - channels;
            if rest == 0 {
                return Ok(d);
            }
            Ok(d.with_variance(d_out.narrow(1, channels, rest)?.contiguous()?))
        };
        let by_kernels = model.gradients(&x, &t, &condition, &dropout, &mut gradient).unwrap();

        let by_candle = by_candle.map(|gradients| ("by candle", gradients));
        for (what, gradients) in by_candle.into_iter().chain([("by kernels", by_kernels)]) {
            let vars = parameters.vars();
            let expected = |name: &str| &self.case[&format!("grad.{name}")];
            let largest = vars.keys().map(|name| norm(expected(name))).fold(0.0, f64::max);
            let mut worst = (0.0, "no weight".to_string());
            for (name, var) in &vars {
                let found = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
                let (found, expected) = (here(found), expected(name));
                // Rounding errors of other gradients reach weights with small ones. The bias of attention's keys has
                // none in exact arithmetic, as in `without_key`.
                let size = norm(expected) + 1e-3 * largest;
                let difference = norm(&(&found - expected).unwrap()) / size;
                if difference > worst.0 || difference.is_nan() {
                    worst = (difference, name.clone());
                }
            }
            close(&format!("gradient of {}, {what}", worst.1), worst.0, DIFFUSERS_GRADIENT);
        }
    }

    fn training_step(&self) {
        let config = TrainConfig {
            optimizer: AdamConfig { eps: 1e-3, ..AdamConfig::adam(1e-2) },
            clip_norm: Some(1.0),
            ema: None,
            ..TrainConfig::mnist()
        };
        let (config, network) = (config, self.config.clone());
        let mut trainer = Trainer::new(network, config, Diffusion::ddpm(), &device()).unwrap();
        trainer.set_weights(self.folder.join("diffusion_pytorch_model.safetensors")).unwrap();
        let [x_0, t, eps] =
            ["train.x_0", "train.t", "train.eps"].map(|name| there(&self.case[name]));
        let update = trainer.step_with(x_0, &t, &eps).unwrap();
        close("train.loss", max_abs(&here(&update.loss), &self.case["train.loss"]), LOSS);
        let (mut worst, mut most) = ((0.0, String::new()), 0f64);
        for (name, var) in trainer.vars() {
            let expected = &self.case[&format!("trained.{name}")];
            let difference = rms(&(here(var) - expected).unwrap());
            let changed = rms(&(&self.weights[name] - expected).unwrap());
            most = most.max(changed);
            if difference > worst.0 || difference.is_nan() {
                worst = (difference, name.clone());
            }
        }
        assert!(most > 100.0 * WEIGHT, "the step changes weights by at most {most:e}");
        close(&format!("trained.{}", worst.1), worst.0, WEIGHT);
    }
}

/// A network of improved-diffusion or guided-diffusion in `tests/data/openai.safetensors`.
#[derive(Deserialize)]
struct OpenAiCase {
    image_size: usize,
    heads: usize,
    head_channels: Option<usize>,
    new_attention_order: bool,
    time_scale: f64,
    t: Vec<u32>,
    y: Option<Vec<u32>>,
    /// The shapes of the weights.
    weights: BTreeMap<String, Vec<usize>>,
}

impl OpenAiCase {
    fn settings(&self) -> OpenAi {
        let heads = match self.head_channels {
            Some(channels) => AttentionHeads::Channels(channels),
            None => AttentionHeads::Count(self.heads),
        };
        OpenAi {
            new_attention_order: self.new_attention_order,
            time_scale: self.time_scale,
            ..OpenAi::new(self.image_size, heads)
        }
    }

    /// The weights, from the formula of `generate/openai.py`.
    fn weights(&self) -> HashMap<String, Tensor> {
        let weight = |(name, shape): (&String, &Vec<usize>)| {
            let hash = |key: u64, byte: u8| (key ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            let key = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
            let scale = (12.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
            let offset = if name.ends_with(".weight") { 1.0 } else { 0.0 };
            let value = |i: u64| {
                let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(key);
                let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                let u = ((z ^ z >> 31) >> 40) as f64 / f64::from(1 << 24) - 0.5;
                (if shape.len() > 1 { u * scale } else { u * 0.5 + offset }) as f32
            };
            let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(value).collect();
            let tensor = Tensor::from_vec(values, &shape[..], &Device::Cpu).unwrap();
            (name.clone(), tensor)
        };
        self.weights.iter().map(weight).collect()
    }
}

#[test]
fn networks_of_openai_are_networks_of_the_crate() {
    let path = "tests/data/openai.safetensors";
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let (_, header) =
        safetensors::SafeTensors::read_metadata(&std::fs::read(path).unwrap()).unwrap();
    let cases: BTreeMap<String, OpenAiCase> =
        serde_json::from_str(&header.metadata().as_ref().unwrap()["cases"]).unwrap();
    assert_eq!(cases.len(), 6);
    let temp = tempfile::tempdir().unwrap();
    for (name, case) in cases {
        let (file, weights) = (temp.path().join(format!("{name}.safetensors")), case.weights());
        candle_core::safetensors::save(&weights, &file).unwrap();
        let (config, parameters) = case.settings().load(&file, DType::F32, &device()).unwrap();
        println!("{name}: {config:?}");
        let unet = parameters.build(&config).unwrap();
        let x = there(&tensors[&format!("{name}.x")]);
        let t = there(&Tensor::new(&case.t[..], &Device::Cpu).unwrap());
        let condition = match &case.y {
            Some(y) => Condition::Classes(there(&Tensor::new(&y[..], &Device::Cpu).unwrap())),
            None => Condition::None,
        };
        let Output { prediction, variance, .. } = unet.denoise(&x, &t, &condition).unwrap();
        let parts: Vec<Tensor> = [Some(prediction), variance].into_iter().flatten().collect();
        let (found, expected) = (Tensor::cat(&parts, 1).unwrap(), &tensors[&format!("{name}.out")]);
        let largest = max_abs(expected, &expected.zeros_like().unwrap());
        close(&name, max_abs(&here(&found), expected) / largest, DIFFUSERS_OUT);

        // Another reading of the same weights computes something else, or is refused.
        let other = OpenAi { new_attention_order: !case.new_attention_order, ..case.settings() };
        let (config, parameters) = other.load(&file, DType::F32, &device()).unwrap();
        let other = parameters.build(&config).unwrap().denoise(&x, &t, &condition).unwrap();
        let changed = max_abs(&here(&other.prediction), &here(&parts[0])) / largest;
        assert!(changed > 1e-2 || case.heads == 1 && case.head_channels.is_none(), "{changed}");
        let message = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
            let mut weights = weights.clone();
            change(&mut weights);
            candle_core::safetensors::save(&weights, &file).unwrap();
            let loaded = case.settings().load(&file, DType::F32, &Device::Cpu);
            let built = loaded.and_then(|(config, parameters)| parameters.build(&config));
            built.map(drop).unwrap_err().to_string()
        };
        let lost = message(&|weights| drop(weights.remove("middle_block.1.qkv.bias")));
        assert!(lost.contains("weight mid_block.attentions.0.to_q.bias is missing"), "{lost}");
        let more = message(&|weights| {
            let tensor = weights["out.0.bias"].clone();
            weights.insert("input_blocks.1.7.bias".into(), tensor);
        });
        assert!(
            more.contains("weight input_blocks.1.7.bias is not one of the network's"),
            "{more}"
        );
        let half = message(&|weights| {
            weights.retain(|name, _| !name.starts_with("output_blocks"));
        });
        assert!(half.contains("without output_blocks, this is a classifier"), "{half}");
    }
    let heads = OpenAi::new(8, AttentionHeads::Count(2));
    let file = temp.path().join("unconditional.safetensors");
    let weights = |first: &str| {
        HashMap::from([(first.to_string(), Tensor::new(&[1f32], &Device::Cpu).unwrap())])
    };
    candle_core::safetensors::save(&weights("downs.0.0.block1.proj.weight"), &file).unwrap();
    let message = heads.load(&file, DType::F32, &Device::Cpu).map(drop).unwrap_err().to_string();
    assert!(message.contains("denoising-diffusion-pytorch, which LucidrainsFile"), "{message}");
}

/// A network of denoising-diffusion-pytorch: a file as its users have it, and the results of the package.
struct LucidrainsCase {
    file: LucidrainsFile,
    config: LucidrainsConfig,
    arguments: LucidrainsArguments,
    results: HashMap<String, Tensor>,
}

/// The arguments of the package's classes that the file of the weights does not have.
#[derive(Deserialize)]
struct LucidrainsArguments {
    unet: LucidrainsUnet,
    size: [usize; 2],
    process: Option<LucidrainsProcess>,
}

#[derive(Deserialize)]
struct LucidrainsUnet {
    sinusoidal_pos_emb_theta: Option<f64>,
}

#[derive(Deserialize)]
struct LucidrainsProcess {
    objective: Option<String>,
    beta_schedule: Option<String>,
}

impl LucidrainsCase {
    fn read(path: &Path) -> Self {
        let (_, header) =
            safetensors::SafeTensors::read_metadata(&std::fs::read(path).unwrap()).unwrap();
        let arguments: LucidrainsArguments =
            serde_json::from_str(&header.metadata().as_ref().unwrap()["case"]).unwrap();
        let file = path.with_extension("pt");
        let file = LucidrainsFile::load(file, DType::F32, &device()).unwrap();
        let [height, width] = arguments.size;
        let theta = arguments.unet.sinusoidal_pos_emb_theta.unwrap_or(10_000.0);
        let config = LucidrainsConfig {
            sinusoidal_pos_emb_theta: theta,
            ..file.network(ImageSize { height, width }).unwrap()
        };
        println!("{}: {config:?}", path.display());
        let results = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        Self { file, config, arguments, results }
    }

    fn unet(&self) -> LucidrainsUNet {
        self.file.weights().build(&self.config).unwrap()
    }

    /// The weights by name.
    fn weights(&self) -> BTreeMap<String, Tensor> {
        let parameters = self.file.weights();
        parameters.build(&self.config).unwrap();
        let weight = |(name, var): (String, Var)| (name, here(var.as_tensor()));
        parameters.vars().into_iter().map(weight).collect()
    }

    fn check_output(&self, what: &str, y: &Output) {
        let parts: Vec<&Tensor> =
            [Some(&y.prediction), y.variance.as_ref()].into_iter().flatten().collect();
        let (found, expected) = (Tensor::cat(&parts, 1).unwrap(), &self.results["out"]);
        let largest = max_abs(expected, &expected.zeros_like().unwrap());
        close(what, max_abs(&here(&found), expected) / largest, LUCIDRAINS_OUT);
    }

    fn output(&self) {
        let [x, t] = ["x", "t"].map(|name| there(&self.results[name]));
        let y = self.unet().denoise(&x, &t, &Condition::None).unwrap();
        self.check_output("out", &y);
        // Times between two timesteps are allowed, too.
        let between = t.to_dtype(DType::F32).unwrap();
        self.check_output(
            "out in f32",
            &self.unet().denoise(&x, &between, &Condition::None).unwrap(),
        );
    }

    /// Samples by the package's DDIM, in five steps.
    fn sample(&self) {
        let Some(process) = &self.arguments.process else {
            let error = self.file.schedule().unwrap_err().to_string();
            assert!(error.contains("it has no betas"), "{error}");
            return;
        };
        let schedule = self.file.schedule().unwrap();
        let steps = schedule.steps();
        let expected = match process.beta_schedule.as_deref() {
            None => NoiseSchedule::sigmoid(steps, -3.0, 3.0, 1.0),
            Some("cosine") => NoiseSchedule::cosine(steps),
            Some(_) => NoiseSchedule::linear_scaled(steps),
        };
        assert_eq!(schedule, expected.unwrap());
        let alpha_bars = Tensor::new(schedule.alpha_bars(), &Device::Cpu).unwrap();
        close("alpha_bars", max_abs(&alpha_bars, &self.results["alpha_bars"]), 1e-6);
        let prediction = match process.objective.as_deref() {
            None => Prediction::Velocity,
            Some("pred_noise") => Prediction::Epsilon,
            Some(_) => Prediction::Sample,
        };
        let diffusion = Diffusion::new(schedule, prediction);
        let sampler =
            Sampler::with_spacing(&diffusion, Solver::ddim(), Spacing::Trailing, 5).unwrap();
        let sampler = sampler.clip_denoised(true);
        let (unet, start) = (self.unet(), there(&self.results["start"]));
        let steps = sampler.steps_from(&unet, start, |_| unreachable!()).unwrap();
        let x_0 = steps.last().unwrap().unwrap().x;
        // The package returns pixels from 0 to 1.
        let expected = ((&self.results["sample"] * 2.0).unwrap() - 1.0).unwrap();
        close("sample", max_abs(&here(&x_0), &expected), SAMPLE);
    }

    fn gradients(&self) {
        let Some(d_out) = self.results.get("d_out") else { return };
        let parameters = Parameters::new(0, DType::F32, &device());
        let model = parameters.build(&self.config).unwrap();
        let weights = self.weights();
        for (name, var) in parameters.vars() {
            var.set(&there(&weights[&name])).unwrap();
        }
        let [x, t, d_out] = [&self.results["x"], &self.results["t"], d_out].map(there);
        let dropout = Dropout::new(0, 0);
        let mut gradient = |y: &Output| {
            self.check_output("out in training", y);
            let channels = self.config.channels;
            let d = Output::new(d_out.narrow(1, 0, channels)?);
            Ok(match self.config.learned_variance {
                true => d.with_variance(d_out.narrow(1, channels, channels)?),
                false => d,
            })
        };
        let found = model.gradients(&x, &t, &Condition::None, &dropout, &mut gradient).unwrap();
        let mut worst = (0.0, String::new());
        for (name, var) in parameters.vars() {
            let found = found.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let expected = &self.results[&format!("grad.{name}")];
            let difference = norm(&(here(found) - expected).unwrap()) / norm(expected);
            if difference > worst.0 || difference.is_nan() {
                worst = (difference, name);
            }
        }
        close(&format!("gradient of {}", worst.1), worst.0, LUCIDRAINS_GRADIENT);
    }
}

/// The allowed difference from denoising-diffusion-pytorch, relative to the largest value or to the norm of a gradient.
const LUCIDRAINS_OUT: f64 = 1e-5;
const LUCIDRAINS_GRADIENT: f64 = 1e-4;

#[test]
fn networks_of_denoising_diffusion_pytorch_agree() {
    let own = Path::new("tests/data/lucidrains").to_owned();
    for folder in
        [Some(own), std::env::var_os("DDPM_LUCIDRAINS").map(PathBuf::from)].into_iter().flatten()
    {
        let entries = std::fs::read_dir(&folder).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
        paths.sort();
        assert!(!paths.is_empty(), "{} holds no *.safetensors", folder.display());
        for path in paths {
            let case = LucidrainsCase::read(&path);
            case.output();
            case.sample();
            case.gradients();
        }
    }
}

#[test]
fn dropout_of_a_network_of_denoising_diffusion_pytorch_acts_only_in_training() {
    let case = LucidrainsCase::read("tests/data/lucidrains/trainer.safetensors".as_ref());
    let config = LucidrainsConfig { dropout: 0.5, ..case.config.clone() };
    let unet = case.file.weights().build(&config).unwrap();
    let [x, t] = ["x", "t"].map(|name| there(&case.results[name]));
    case.check_output("out", &unet.denoise(&x, &t, &Condition::None).unwrap());
    let train = |seed| {
        let y = unet.denoise_train(&x, &t, &Condition::None, &Dropout::new(seed, 0)).unwrap();
        here(&y.prediction)
    };
    assert_eq!(max_abs(&train(0), &train(0)), 0.0);
    for other in [train(1), case.results["out"].clone()] {
        assert!(max_abs(&train(0), &other) > 0.1);
    }
}

#[test]
fn networks_before_version_2_have_the_groups_of_their_configuration() {
    let case = LucidrainsCase::read("tests/data/lucidrains/groups.safetensors".as_ref());
    assert_eq!(case.config.resnet_block_groups, Some(8));
    let [x, t] = ["x", "t"].map(|name| there(&case.results[name]));
    let output = |groups| {
        let config = LucidrainsConfig { resnet_block_groups: Some(groups), ..case.config.clone() };
        let unet = case.file.weights().build(&config)?;
        Ok::<_, ddpm::Error>(here(&unet.denoise(&x, &t, &Condition::None)?.prediction))
    };
    assert!(max_abs(&output(2).unwrap(), &output(8).unwrap()) > 1e-3);
    for groups in [0, 3] {
        let message = output(groups).unwrap_err().to_string();
        assert!(message.contains(&format!("resnet_block_groups is {groups}; ")), "{message}");
    }
}

#[test]
fn a_file_of_denoising_diffusion_pytorch_that_the_crate_cannot_compute_is_refused_by_the_reason() {
    let case = LucidrainsCase::read("tests/data/lucidrains/state.safetensors".as_ref());
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("changed.safetensors");
    let load = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut weights = case.weights();
        change(&mut weights);
        let weights: HashMap<String, Tensor> = weights.into_iter().collect();
        candle_core::safetensors::save(&weights, &path).unwrap();
        LucidrainsFile::load(&path, DType::F32, &Device::Cpu)
    };
    let cut = |weights: &mut BTreeMap<String, Tensor>, name: &str, rows: usize| {
        let weight = weights[name].narrow(0, 0, rows).unwrap();
        weights.insert(name.into(), weight);
    };
    let size = case.config.image_size;
    let network = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        load(change).and_then(|file| file.network(size))
    };
    let config = LucidrainsConfig {
        sinusoidal_pos_emb_theta: case.config.sinusoidal_pos_emb_theta,
        ..network(&|_| {}).unwrap()
    };
    assert_eq!(config, case.config);
    type Change<'a> = &'a dyn Fn(&mut BTreeMap<String, Tensor>);
    let changes: [(Change<'_>, &str); 6] = [
        (&|weights| drop(weights.remove("init_conv.weight")), "not the weights of a Unet"),
        (&|weights| weights.retain(|name, _| !name.ends_with("mem_kv")), "before 1.9"),
        (
            &|weights| {
                let weight = &weights["init_conv.weight"];
                let twice = Tensor::cat(&[weight, weight], 1).unwrap();
                weights.insert("init_conv.weight".into(), twice);
            },
            "2 channels of the input and 1 of the output: a network with self_condition",
        ),
        (&|weights| drop(weights.remove("time_mlp.1.weight")), "time_mlp.1.weight is missing"),
        (&|weights| cut(weights, "downs.1.3.1.weight", 3), "level 1 has 3 channels, and dim is 4"),
        (
            &|weights| cut(weights, "time_mlp.1.weight", 8),
            "dim is 2; it must be even, from 4 to 16384",
        ),
    ];
    for (change, expected) in changes {
        let message = network(change).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    let message = case.file.network(6).unwrap_err().to_string();
    assert!(message.contains("image_size is 6; it must be a multiple of 4"), "{message}");

    let with_betas = |betas: &[f32]| {
        let file = load(&|weights| {
            let named = |(name, weight)| (format!("model.{name}"), weight);
            *weights = std::mem::take(weights).into_iter().map(named).collect();
            weights.insert("betas".into(), Tensor::new(betas, &Device::Cpu).unwrap());
        });
        file.unwrap().schedule()
    };
    let betas = [0.25, 0.5, 0.75];
    let schedule = with_betas(&betas.map(|beta| beta as f32)).unwrap();
    assert_eq!(schedule, NoiseSchedule::from_betas(betas.to_vec()).unwrap());
    let message = with_betas(&[0.5, 1.5]).unwrap_err().to_string();
    assert!(message.contains("betas is 1.5 at t = 1"), "{message}");

    let unet = case.unet();
    let x = Tensor::zeros((1, 1, 8, 6), DType::F32, &device()).unwrap();
    let message = unet.forward(&x, &there(&Tensor::new(&[0u32], &Device::Cpu).unwrap()));
    let message = message.unwrap_err().to_string();
    assert!(message.contains("with sizes that are multiples of 4"), "{message}");
}

/// The device of all tests. It is a single value, because candle compares devices by their handles.
fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let find = || match std::env::var("DDPM_DEVICE").as_deref() {
        Ok("cuda") => Device::new_cuda(0).unwrap(),
        _ => Device::Cpu,
    };
    DEVICE.get_or_init(find).clone()
}

fn there(tensor: &Tensor) -> Tensor {
    // The kernels take timesteps in u32.
    let dtype = if tensor.dtype() == DType::I64 { DType::U32 } else { tensor.dtype() };
    tensor.to_dtype(dtype).unwrap().to_device(&device()).unwrap()
}

fn here(tensor: &Tensor) -> Tensor {
    tensor.to_device(&Device::Cpu).unwrap()
}

/// Removes the bias of attention's keys, which has no gradient in exact arithmetic: softmax ignores a
/// constant that is added to all scores of a row. Only rounding errors change this bias.
fn without_key(name: &str, tensor: &Tensor) -> Tensor {
    if !name.ends_with("qkv.bias") {
        return tensor.clone();
    }
    let third = tensor.dim(0).unwrap() / 3;
    let [q, v] = [0, 2 * third].map(|start| tensor.narrow(0, start, third).unwrap());
    Tensor::cat(&[q, v], 0).unwrap()
}

fn rms(a: &Tensor) -> f64 {
    norm(a) / (a.elem_count() as f64).sqrt()
}

fn max_abs(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let [a, b] = [a, b].map(|t| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap());
    let difference = (a - b).unwrap().abs().unwrap().to_vec1::<f64>().unwrap();
    // `max` would lose a NaN.
    difference.into_iter().fold(0.0, |most, d| if d > most || d.is_nan() { d } else { most })
}

fn norm(a: &Tensor) -> f64 {
    let a = a.to_dtype(DType::F64).unwrap();
    a.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f64>().unwrap()
}

fn close(what: &str, difference: f64, limit: f64) {
    println!("  {what}: {difference:.1e} (at most {limit:.0e})");
    assert!(difference <= limit, "{what} differs by {difference:e}; at most {limit:e} is allowed");
}
