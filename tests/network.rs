//! The parts of the network: shapes, names of weights, and errors.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use ddpm::nn::{
    Architecture, Condition, Dropout, Model, Parameters, Resampling, TimeConditioning, UNet2D,
    UNet2DConfig, UpBlockType,
};
use ddpm::process::Prediction;
use ddpm::sample::{DiffusersFolder, DynamicThreshold, Guidance, SamplerConfig, Spacing, Variance};
use ddpm::train::{WeightsFile, gradients};
use ddpm::{
    Denoiser, Diffusion, NoiseSchedule, ResBlock, Result, Sampler, Solver, TimeEmbedding,
    TrainConfig, Trainer, UNet, UNetConfig,
};

mod passes;
use passes::{gradients as by_tape, train};

fn parameters() -> Parameters {
    Parameters::new(0, DType::F32, &Device::Cpu)
}

fn ones(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
}

/// Names and shapes must stay compatible with every weights file. These lists are PyTorch's.
#[test]
fn weights_are_named_and_shaped_as_in_pytorch() {
    fn check(config: &impl Architecture, expected: &str) -> usize {
        let parameters = parameters();
        let _ = parameters.build(config).unwrap();
        let vars = parameters.vars();
        let ours: Vec<String> =
            vars.iter().map(|(name, var)| format!("{name} {:?}", var.dims())).collect();
        assert_eq!(ours, expected.lines().collect::<Vec<_>>());
        vars.values().map(|var| var.elem_count()).sum()
    }
    check(&UNetConfig::mnist(), include_str!("data/weights-mnist.txt"));
    check(&UNetConfig::cifar10(), include_str!("data/weights-cifar10.txt"));
    let list = include_str!("data/weights-unet2d-cifar10.txt");
    // The number of weights of google/ddpm-cifar10-32.
    assert_eq!(check(&UNet2DConfig::cifar10(), list), 35_746_307);
}

/// A small network of Ho et al.'s kind, with dropout of values.
fn small_2d(dropout: f64) -> UNet2DConfig {
    UNet2DConfig {
        sample_size: 8.into(),
        block_out_channels: vec![8, 16, 16, 16],
        norm_num_groups: 4,
        dropout,
        ..UNet2DConfig::cifar10()
    }
}

#[test]
fn dropout_of_values_is_that_of_an_image_and_of_training() -> Result<()> {
    let device = Device::Cpu;
    let x = Sampler::prior((3, 3, 8, 8), 5, &device)?;
    let t = Tensor::new(&[4u32, 300, 900], &device)?;
    let values = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let build = |dropout| parameters().build(&small_2d(dropout));
    let (without, with) = (build(0.0)?, build(0.5)?);
    assert_eq!(values(without.forward(&x, &t)?), values(with.forward(&x, &t)?));

    let [step, other] = [Dropout::new(1, 0), Dropout::new(1, 1)];
    let all = train(&with, &x, &t, &step)?;
    assert_ne!(values(all.clone()), values(without.forward(&x, &t)?));
    assert_ne!(values(all.clone()), values(train(&with, &x, &t, &other)?));
    for batch in [1, 2] {
        let (x, t) = (x.narrow(0, 0, batch)?, t.narrow(0, 0, batch)?);
        let part = train(&with, &x, &t, &step)?;
        assert_eq!(values(part), values(all.narrow(0, 0, batch)?), "a batch of {batch}");
    }
    Ok(())
}

#[test]
fn impossible_networks_of_ho_et_als_kind_are_refused() {
    type Change = fn(&mut UNet2DConfig);
    let cases: [(Change, &str); 17] = [
        (
            |c| c.sample_size = 12.into(),
            "sample_size is 12; it must be a multiple of 8, because the levels halve it 3 times, at most 65536",
        ),
        (
            |c| c.out_channels = 4,
            "out_channels is 4; it must be in_channels, which is 3, or twice as many for a learned variance",
        ),
        (
            |c| c.block_out_channels[1] = 10,
            "block_out_channels is [8, 10, 16, 16]; it must be multiples of norm_num_groups, 4, up to 65536",
        ),
        (|c| c.block_out_channels = vec![], "block_out_channels is []; it must be 1 to 16 numbers"),
        (
            |c| c.block_out_channels = vec![4; 4],
            "block_out_channels is [4, 4, 4, 4]; it must be more than 4 in at least one entry: \
             with 4 channels a normalisation has one channel per group, and subtracts the time embedding",
        ),
        (
            |c| c.up_block_types = vec![UpBlockType::Plain; 3],
            "number of up_block_types is 3; it must be 4, that of block_out_channels",
        ),
        (
            |c| c.attention_head_dim = Some(3),
            "attention_head_dim is 3; it must be a divisor of the 16 channels of a level with attention",
        ),
        (
            |c| c.num_attention_heads = Some(3),
            "num_attention_heads is 3; it must be a divisor of the 16 channels of a level with attention",
        ),
        (
            |c| c.num_attention_heads = Some(0),
            "num_attention_heads is 0; it must be a divisor of the 16 channels of a level with attention",
        ),
        (
            |c| (c.num_attention_heads, c.attention_head_dim) = (Some(4), Some(8)),
            "num_attention_heads is 4; it must be none, because attention_head_dim is 8 (8 by default); one of the two must be none",
        ),
        (
            |c| c.attn_norm_num_groups = Some(3),
            "attn_norm_num_groups is 3; it must be a divisor of the 16 channels of the last level",
        ),
        (|c| c.norm_eps = 0.0, "norm_eps is 0; it must be positive and finite in f32"),
        (|c| c.downsample_padding = 2, "downsample_padding is 2; it must be from 0 to 1"),
        (|c| c.num_class_embeds = Some(0), "num_class_embeds is 0; it must be from 1 to 65536"),
        (
            |c| (c.num_class_embeds, c.null_class) = (Some(1), true),
            "num_class_embeds is 1; it must be from 2 to 65537",
        ),
        (
            |c| c.null_class = true,
            "null_class is true; it must be false, because num_class_embeds is none",
        ),
        (|c| c.dropout = 1.0, "dropout is 1; it must be at least 0 and less than 1"),
    ];
    for (change, expected) in cases {
        let mut config = small_2d(0.0);
        change(&mut config);
        assert_eq!(parameters().build(&config).map(drop).unwrap_err().to_string(), expected);
    }
}

/// The folder of a network that diffusers saved.
const FOLDER: &str = "tests/data/diffusers/scale_shift";

#[test]
fn options_of_diffusers_that_are_lacking_are_refused_by_name() {
    let config = UNet2DConfig::from_diffusers(FOLDER).unwrap();
    assert_eq!(config.resnet_time_scale_shift, TimeConditioning::ScaleShift);
    assert_eq!((config.upsample_type, config.norm_eps), (Resampling::Resnet, 1e-3));
    // As an architecture of a checkpoint, the configuration is the same.
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<UNet2DConfig>(&json).unwrap(), config);

    let text = std::fs::read_to_string(format!("{FOLDER}/config.json")).unwrap();
    for (option, value, expected) in [
        (
            "time_embedding_type",
            "\"fourier\"",
            "time_embedding_type is \"fourier\"; it must be \"positional\"",
        ),
        ("act_fn", "\"mish\"", "act_fn is \"mish\"; it must be \"silu\" or \"swish\""),
        ("mid_block_scale_factor", "1.4", "mid_block_scale_factor is 1.4; it must be 1 or 1.0"),
        (
            "_class_name",
            "\"UNet1DModel\"",
            "_class_name is \"UNet1DModel\"; it must be \"UNet2DModel\"",
        ),
        (
            "down_block_types",
            "[\"SkipDownBlock2D\"]",
            "down_block_types is [\"SkipDownBlock2D\"]: unknown variant",
        ),
        ("norm_num_groups", "null", "norm_num_groups is null: invalid type"),
        ("flavour", "1", "flavour is 1: unknown field"),
        ("freq_shift", "3", "freq_shift is 3; it must be from 0 to 1"),
    ] {
        let mut options: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&text).unwrap();
        options.insert(option.into(), serde_json::from_str(value).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, serde_json::to_string(&options).unwrap()).unwrap();
        let message = UNet2DConfig::from_diffusers(dir.path()).unwrap_err().to_string();
        let message = message.strip_prefix(&format!("{}: ", path.display())).unwrap();
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn schedulers_of_diffusers_are_processes_and_samplers() {
    let read = |json: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scheduler_config.json");
        std::fs::write(&path, json).unwrap();
        let prefix = format!("{}: ", path.display());
        SamplerConfig::from_diffusers(dir.path()).map_err(|e| e.to_string().replace(&prefix, ""))
    };
    // The options of google/ddpm-cifar10-32.
    let (diffusion, sampler) = read(
        r#"{"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
            "beta_start": 0.0001, "clip_sample": true, "num_train_timesteps": 1000, "trained_betas": null,
            "variance_type": "fixed_large"}"#,
    )
    .unwrap();
    assert_eq!(diffusion, Diffusion::ddpm());
    let ho = SamplerConfig::new(Solver::ddpm(), 1000).clip_denoised(true);
    assert_eq!(sampler, ho.spacing(Spacing::Leading));

    let (diffusion, sampler) = read(
        r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": false,
            "set_alpha_to_one": true, "rescale_betas_zero_snr": true}"#,
    )
    .unwrap();
    assert_eq!(diffusion.prediction(), Prediction::Velocity);
    assert_eq!((diffusion.schedule().steps(), diffusion.schedule().terminal_snr()), (20, 0.0));
    assert_eq!(sampler, SamplerConfig::new(Solver::ddim(), 20).spacing(Spacing::Trailing));

    let posterior = Solver::Ddpm { variance: Variance::Posterior };
    let implicit = read(r#"{"_class_name": "DDIMScheduler", "variance_type": "fixed_small"}"#);
    assert_eq!(implicit.unwrap().1.solver, Solver::DdimUnclippedNoise { eta: 0.0 });
    let ancestral = r#"{"_class_name": "DDPMScheduler"}"#;
    assert_eq!(read(ancestral).unwrap().1.solver, posterior);
    let absent = "_class_name is absent; it must be \"DDPMScheduler\" or \"DDIMScheduler\"";
    assert_eq!(read("{}").unwrap_err(), absent);
    let other = "_class_name is \"PNDMScheduler\"; it must be \"DDPMScheduler\" or";
    for (json, expected) in [
        (r#"{"_class_name": "PNDMScheduler"}"#, other),
        (
            r#"{"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}"#,
            "trained_betas is a list of 2; it must be 3 numbers, as num_train_timesteps",
        ),
        (
            r#"{"_class_name": "DDIMScheduler", "timestep_spacing": "linspace"}"#,
            "timestep_spacing is \"linspace\"; it must be \"leading\", or \"trailing\" with a divisor",
        ),
        (
            r#"{"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "num_train_timesteps": 999}"#,
            "timestep_spacing is \"trailing\", with 50 steps of 999 timesteps; it must be",
        ),
        (r#"{"thresholding": true}"#, "thresholding is true; it must be false"),
        (r#"{"beta_schedule": "sigmoid"}"#, "beta_schedule is \"sigmoid\": unknown variant"),
        (r#"{"steps_offset": 1}"#, "steps_offset is 1; it must be 0"),
        (r#"{"beta_end": 2}"#, "beta_end is 2; it must be"),
        (r#"{"lower_order_final": true}"#, "lower_order_final is true: unknown field"),
    ] {
        let class = r#"{"_class_name": "DDPMScheduler", "#;
        let json = if json.contains("class") { json.into() } else { json.replacen('{', class, 1) };
        let message = read(&json).unwrap_err();
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn earlier_names_and_several_files_of_diffusers_are_the_same_network() -> Result<()> {
    let device = Device::Cpu;
    let config = UNet2DConfig::from_diffusers(FOLDER)?;
    let forward = |weights: Parameters| -> Result<Vec<f32>> {
        let x = Sampler::prior((1, 3, 8, 8), 5, &device)?;
        let y = weights.build(&config)?.forward(&x, &Tensor::new(&[400u32], &device)?)?;
        Ok(y.flatten_all()?.to_vec1()?)
    };
    let expected = forward(Parameters::load_diffusers(FOLDER, DType::F32, &device)?)?;

    let name = "diffusion_pytorch_model.safetensors";
    let all = candle_core::safetensors::load(format!("{FOLDER}/{name}"), &device)?;
    let mut files: [HashMap<String, Tensor>; 2] = Default::default();
    let mut list = serde_json::Map::new();
    for (k, (name, tensor)) in all.into_iter().enumerate() {
        let earlier = name
            .replace("to_q", "query")
            .replace("to_k", "key")
            .replace("to_v", "value")
            .replace("to_out.0", "proj_attn");
        list.insert(earlier.clone(), format!("part-{}.safetensors", k % 2).into());
        files[k % 2].insert(earlier, tensor);
    }
    assert!(list.contains_key("mid_block.attentions.0.proj_attn.bias"));
    let dir = tempfile::tempdir().unwrap();
    for (k, tensors) in files.iter().enumerate() {
        let path = dir.path().join(format!("part-{k}.safetensors"));
        candle_core::safetensors::save(tensors, path)?;
    }
    let index = dir.path().join(format!("{name}.index.json"));
    let write = |list: &serde_json::Map<String, serde_json::Value>| {
        let json = serde_json::json!({ "metadata": {}, "weight_map": list });
        std::fs::write(&index, json.to_string()).unwrap();
    };
    write(&list);
    let load = || Parameters::load_diffusers(dir.path(), DType::F32, &device);
    assert_eq!(forward(load()?)?, expected);

    // Files of PyTorch have the same names with another extension.
    let pytorch = tempfile::tempdir().unwrap();
    let bin = pytorch.path().join("diffusion_pytorch_model.bin");
    std::fs::copy(format!("{PYTORCH}/state.pt"), &bin).unwrap();
    let of_bin = || {
        let weights = Parameters::load_diffusers(pytorch.path(), DType::F32, &device)?;
        Ok::<_, ddpm::Error>(
            weights.builder().get((2, 2), "parameter")?.flatten_all()?.to_vec1::<f32>()?,
        )
    };
    let values = of_bin()?;
    std::fs::rename(&bin, pytorch.path().join("part.bin")).unwrap();
    let only = r#"{"weight_map": {"parameter": "part.bin"}}"#;
    std::fs::write(bin.with_extension("bin.index.json"), only).unwrap();
    assert_eq!(of_bin()?, values);

    list.insert("conv_in.weight".into(), "../part-0.safetensors".into());
    write(&list);
    let message = load().unwrap_err().to_string();
    let expected = "lists ../part-0.safetensors; it must list the names of files in the folder";
    assert_eq!(message, format!("{}: {expected}", index.display()));
    Ok(())
}

/// The bits of what a network of diffusers computes for one image.
fn bits(unet: &Model<UNet2D>, config: &UNet2DConfig) -> Vec<u32> {
    let (channels, height, width) = config.image_shape();
    let x = Sampler::prior((1, channels, height, width), 5, &Device::Cpu).unwrap();
    let condition = match config.num_class_embeds {
        Some(_) => Condition::classes(vec![1]).unwrap(),
        None => Condition::None,
    };
    let y = unet.denoise(&x, &Tensor::new(&[400u32], &Device::Cpu).unwrap(), &condition).unwrap();
    [Some(y.prediction), y.variance]
        .into_iter()
        .flatten()
        .flat_map(|y| y.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        .map(f32::to_bits)
        .collect()
}

/// From a folder of diffusers to a weights file, and from there to a folder of a pipeline.
#[test]
fn networks_of_diffusers_are_the_same_after_two_conversions() -> Result<()> {
    let (temp, device) = (tempfile::tempdir().unwrap(), Device::Cpu);
    let linear = || NoiseSchedule::linear(1000, 1e-4, 0.02);
    let ddpm = |variance| SamplerConfig::new(Solver::Ddpm { variance }, 1000).clip_denoised(true);
    let ddim = SamplerConfig::new(Solver::ddim(), 50).spacing(Spacing::Leading);
    let unclipped_noise = Solver::DdimUnclippedNoise { eta: 0.0 };
    let unclipped_noise =
        SamplerConfig::new(unclipped_noise, 50).spacing(Spacing::Leading).clip_denoised(true);
    for (name, schedule, prediction, sampling) in [
        ("cifar10", linear()?, Prediction::Epsilon, ddpm(Variance::Beta).spacing(Spacing::Leading)),
        (
            "celebahq_church",
            NoiseSchedule::cosine(1000)?.zero_terminal_snr()?,
            Prediction::Velocity,
            ddim.spacing(Spacing::Trailing),
        ),
        (
            "heads",
            NoiseSchedule::quadratic(1000, 0.00085, 0.012)?,
            Prediction::Epsilon,
            ddpm(Variance::Learned),
        ),
        (
            "classes",
            NoiseSchedule::sigmoid(1000, -3.0, 3.0, 1.0)?,
            Prediction::Sample,
            unclipped_noise,
        ),
        (
            "scale_shift",
            NoiseSchedule::cosine(1000)?.shifted(-1.0)?,
            Prediction::Velocity,
            ddpm(Variance::Posterior),
        ),
    ] {
        let folder = format!("tests/data/diffusers/{name}");
        let config = UNet2DConfig::from_diffusers(&folder)?;
        let weights = Parameters::load_diffusers(&folder, DType::F32, &device)?;
        let expected = bits(&weights.build(&config)?, &config);
        let diffusion = Diffusion::new(schedule, prediction);
        let file = temp.path().join(format!("{name}.safetensors"));
        WeightsFile::create(&file, &config, &weights, &diffusion, Some(&sampling))?;

        let file = WeightsFile::open(&file)?;
        assert_eq!((file.step(), file.sampling()), (0, Some(&sampling)));
        assert_eq!(file.diffusion(), &diffusion);
        assert_eq!(file.architecture::<UNet2DConfig>()?, config);
        assert_eq!(bits(&file.model::<UNet2DConfig>(&device)?, &config), expected);

        let out = temp.path().join(name);
        file.export_diffusers(&out, None)?;
        let folder = DiffusersFolder::open(&out)?;
        assert_eq!(folder.network(), &config);
        assert_eq!(folder.sampling(), &sampling);
        let betas = |diffusion: &Diffusion| diffusion.schedule().betas().to_vec();
        assert_eq!(betas(folder.diffusion()), betas(&diffusion), "{name}");
        assert_eq!(folder.diffusion().prediction(), prediction);
        let read = folder.weights(DType::F32, &device)?.build(folder.network())?;
        assert_eq!(bits(&read, &config), expected);

        let again = file.export_diffusers(&out, None).unwrap_err().to_string();
        assert!(again.contains("it must be a path at which there is nothing"), "{again}");
        // Only the file and the folders remain.
        let hidden = std::fs::read_dir(temp.path()).unwrap().flatten();
        assert!(hidden.map(|e| e.file_name()).all(|name| !name.to_string_lossy().starts_with('.')));
    }
    Ok(())
}

#[test]
fn what_a_folder_of_diffusers_lacks_is_refused_by_name() -> Result<()> {
    let (temp, device) = (tempfile::tempdir().unwrap(), Device::Cpu);
    let path = temp.path().join("w.safetensors");
    let file = |network: &str| {
        let folder = format!("tests/data/diffusers/{network}");
        let weights = Parameters::load_diffusers(&folder, DType::F32, &device)?;
        let config = UNet2DConfig::from_diffusers(&folder)?;
        WeightsFile::create(&path, &config, &weights, &Diffusion::ddpm(), None)?;
        WeightsFile::open(&path)
    };
    let message = |file: &WeightsFile, sampling: SamplerConfig| {
        let out = temp.path().join("out");
        let message = file.export_diffusers(&out, Some(&sampling)).unwrap_err().to_string();
        assert!(!out.exists());
        message
    };
    let plain = file("cifar10")?;
    let even = SamplerConfig::new(Solver::ddim(), 50);
    let ddim = even.spacing(Spacing::Leading);
    let trailing = SamplerConfig::new(Solver::ddim(), 30).spacing(Spacing::Trailing);
    let usual = SamplerConfig::usual(&Diffusion::ddpm());
    for (sampling, expected) in [
        (usual, "solver is DDIM with eta 0, which clips; it must be DdimUnclippedNoise"),
        (usual.spacing(Spacing::Leading), "SamplerConfig::for_diffusers replaces it"),
        (even, "spacing is even, with 50 sampling steps of ddim; it must be leading, or trailing"),
        (trailing, "trailing with a divisor of 1000 as the number of steps"),
        (SamplerConfig::new(Solver::ddpm(), 50).spacing(Spacing::Quadratic), "leading or trailing"),
        (
            SamplerConfig::new(Solver::ddpm(), 1),
            "spacing is even; it must be even with at least 2 steps, leading or trailing, in a folder",
        ),
        (SamplerConfig::recommended(), "solver is UniPC"),
        (SamplerConfig::new(Solver::Ddim { eta: 0.5 }, 50), "solver is DDIM"),
        (ddim.spacing(Spacing::LogSnr), "spacing is"),
        (ddim.guidance(Some(Guidance::new(2.0))), "guidance is set"),
        (
            ddim.dynamic_threshold(DynamicThreshold { ratio: 0.995, max: 1.5 }),
            "dynamic_threshold is set",
        ),
        (SamplerConfig::new(Solver::ddim(), 0), "is 0; it must be"),
    ] {
        let message = message(&plain, sampling);
        assert!(message.contains(expected), "{message}, not {expected}");
    }
    // Without settings, the closest to the usual ones.
    let out = temp.path().join("usual");
    plain.export_diffusers(&out, None)?;
    let closest = *DiffusersFolder::open(&out)?.sampling();
    assert_eq!(closest, usual.for_diffusers());
    let unclipped_noise = Solver::DdimUnclippedNoise { eta: 0.0 };
    let expected = SamplerConfig::new(unclipped_noise, 50).spacing(Spacing::Leading);
    assert_eq!(closest, expected.clip_denoised(true));
    let ancestral = SamplerConfig::new(Solver::ddpm(), 50).clip_denoised(true);
    assert_eq!((ancestral.for_diffusers(), trailing.for_diffusers()), (ancestral, trailing));
    let learned = message(&file("heads")?, ddim);
    assert!(learned.contains("a network with a learned variance"), "{learned}");
    let own = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let weights = parameters();
    WeightsFile::create(&path, &own, &weights, &Diffusion::ddpm(), None)?;
    let own = message(&WeightsFile::open(&path)?, ddim);
    assert_eq!(own, "network.kind is unet; it must be unet2d, because diffusers lacks the others");
    Ok(())
}

#[test]
fn initial_weights_are_pytorchs_distribution_and_follow_from_seed_and_name() {
    let build = |seed| {
        let parameters = Parameters::new(seed, DType::F32, &Device::Cpu);
        let _ = parameters.build(&UNetConfig::mnist()).unwrap();
        parameters.vars()
    };
    let vars = build(0);
    let values = |name: &str| vars[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // Uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in): the variance is bound^2 / 3.
    for (name, fan_in) in [
        ("bottleneck.res1.block1.2.weight", 128 * 9),
        ("bottleneck.res1.block1.2.bias", 128 * 9),
        ("time_mlp.mlp.0.weight", 128),
        ("bottleneck.attn.qkv.weight", 128),
    ] {
        let (values, bound) = (values(name), 1.0 / (fan_in as f32).sqrt());
        let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!(values.iter().all(|v| v.abs() <= bound), "{name}");
        assert!((variance * 3.0 / (bound * bound) - 1.0).abs() < 0.25, "{name}: {variance}");
    }
    assert!(values("out_norm.weight").iter().all(|&v| v == 1.0));
    assert!(values("out_norm.bias").iter().all(|&v| v == 0.0));

    let other = build(1);
    let name = "init_conv.weight";
    assert_ne!(values(name), other[name].flatten_all().unwrap().to_vec1::<f32>().unwrap());
    // The same weight has the same value in another network.
    let parameters = parameters();
    let small = UNetConfig { hidden_dims: vec![32, 64], ..UNetConfig::mnist() };
    let _ = parameters.build(&small).unwrap();
    assert_eq!(
        values(name),
        parameters.vars()[name].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
}

#[test]
fn parts_keep_their_shapes() {
    let vb = parameters().builder();
    let block = ResBlock::new(8, 16, 4, vb.pp("block")).unwrap();
    let y = block.forward(&ones(&[2, 8, 5, 7]), &ones(&[2, 4]), None).unwrap();
    assert_eq!(y.dims(), [2, 16, 5, 7]);
    let embedding = TimeEmbedding::new(6, vb.pp("time")).unwrap();
    let t = Tensor::new(&[0i64, 999], &Device::Cpu).unwrap();
    assert_eq!(embedding.forward(&t).unwrap().dims(), [2, 6]);
}

/// Bit for bit: each image is computed as if it were alone.
#[test]
fn an_image_does_not_depend_on_its_batch() {
    let config = UNetConfig { attention_levels: vec![1], ..UNetConfig::mnist() };
    let unet = Parameters::new(0, DType::F32, &Device::Cpu).build(&config).unwrap();
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 2).unwrap();
    let sample = |batch: usize| {
        let steps = sampler.steps(&unet, (batch, 1, 28, 28), 4, &Device::Cpu).unwrap();
        let x = steps.map(|step| step.unwrap().x).last().unwrap();
        x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let most = sample(7);
    for batch in [1, 2, 5] {
        assert_eq!(sample(batch), most[..batch * 784], "a batch of {batch}");
    }
}

#[test]
fn dropout_drops_whole_maps_while_training_only() {
    let vb = parameters().builder();
    let block = ResBlock::new(8, 8, 4, vb).unwrap().with_dropout(0.5, 3).unwrap();
    let (x, t_emb) = (ones(&[2, 8, 4, 4]).arange_like(), ones(&[2, 4]));
    let run = |dropout: Option<&Dropout>| {
        block.forward(&x, &t_emb, dropout).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let [first, again, later] = [0, 0, 1].map(|step| run(Some(&Dropout::new(1, step))));
    assert_eq!(first, again);
    assert_ne!(first, later);
    assert_ne!(first, run(None));
}

/// The pointer forwards both inference and training calls, including dropout.
#[test]
fn boxed_and_shared_networks_are_denoisers() {
    let config = UNetConfig { hidden_dims: vec![8, 16], dropout: 0.5, ..UNetConfig::mnist() };
    let unet = parameters().build(&config).unwrap();
    let (x_t, t) =
        (ones(&[1, 1, 28, 28]).arange_like(), Tensor::new(&[5u32], &Device::Cpu).unwrap());
    fn values(y: Result<Tensor>) -> Vec<f32> {
        y.unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }
    fn run(denoiser: impl Denoiser, x_t: &Tensor, t: &Tensor) -> Vec<f32> {
        values(denoiser.forward(x_t, t))
    }
    let expected = run(unet.clone(), &x_t, &t);
    assert_ne!(expected, values(train(&unet, &x_t, &t, &Dropout::new(1, 0))));
    assert_eq!(run(Box::new(unet.clone()) as Box<dyn Denoiser>, &x_t, &t), expected);
    assert_eq!(run(Arc::new(unet) as Arc<dyn Denoiser>, &x_t, &t), expected);
}

#[test]
fn wrong_dtypes_are_refused() {
    for dtype in [DType::BF16, DType::F16, DType::U8] {
        let vb = Parameters::new(0, dtype, &Device::Cpu).builder();
        for message in [
            UNetConfig::mnist().build(vb.pp("unet")).map(drop),
            ResBlock::new(8, 8, 4, vb.pp("block")).map(drop),
            TimeEmbedding::new(4, vb.pp("time")).map(drop),
        ]
        .map(|result| result.unwrap_err().to_string())
        {
            let expected = format!("dtype is {}; it must be f32 or f64", dtype.as_str());
            assert_eq!(message, expected);
        }
    }
    let vb = parameters().builder();
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let unet = config.build(vb.pp("unet")).unwrap();
    let block = ResBlock::new(8, 8, 4, vb.pp("block")).unwrap();
    let (x, t_emb, image) = (ones(&[1, 8, 2, 2]), ones(&[1, 4]), ones(&[1, 1, 28, 28]));
    let to = |t: &Tensor, dtype| t.to_dtype(dtype).unwrap();
    let t = Tensor::new(&[5u32], &Device::Cpu).unwrap();
    for (result, expected) in [
        (
            block.forward(&to(&x, DType::U8), &t_emb, None),
            "dtype of x is u8; it must be f32, that of the weights",
        ),
        (
            block.forward(&x, &to(&t_emb, DType::U8), None),
            "dtype of t_emb is u8; it must be f32, that of the weights",
        ),
        (block.forward(&to(&x, DType::F64), &t_emb, None), "dtype of x is f64"),
        (
            unet.forward(&to(&image, DType::U8), &t),
            "dtype of x_t is u8; it must be a floating-point dtype",
        ),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    // A sampler may use another floating-point dtype. The network computes in its own.
    let y = unet.forward(&to(&image, DType::F64), &t).unwrap();
    assert_eq!(y.dtype(), DType::F64);
}

/// A sampler asks for times between two timesteps, in f32. At a timestep, every dtype gives the same bits.
#[test]
fn a_time_between_two_timesteps_has_an_embedding_between_theirs() {
    let vb = parameters().builder();
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let unet = config.build(vb.pp("unet")).unwrap();
    let embedding = TimeEmbedding::new(8, vb.pp("time")).unwrap();
    let x = ones(&[2, 1, 28, 28]);
    let at = |times: [f64; 2], dtype| {
        let t = Tensor::new(&times, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let dropout = Dropout::new(0, 0);
        let mut taped = None;
        by_tape(&unet, &x, &t, &dropout, &mut |y| {
            taped = Some(y.clone());
            Ok(y.clone())
        })
        .unwrap();
        let taped = taped.unwrap();
        let results = [embedding.forward(&t).unwrap(), unet.forward(&x, &t).unwrap(), taped];
        results.map(|y| y.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    for dtype in [DType::F32, DType::F64, DType::I64] {
        assert_eq!(at([3.0, 999.0], dtype), at([3.0, 999.0], DType::U32), "{dtype:?}");
    }
    let ends = at([3.0, 4.0], DType::U32);
    let between = at([3.25, 3.75], DType::F32);
    for ([ends, between], size) in
        ends.into_iter().zip(between).map(|(e, b)| [e, b]).zip([8, 784, 784])
    {
        let distance = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
        };
        let [near, far] = [&ends[..size], &ends[size..]].map(|end| distance(end, &between[..size]));
        assert!(0.0 < near && near < 0.5 * far, "{near} {far}");
    }
}

#[test]
fn what_is_no_timestep_is_refused() {
    let vb = parameters().builder();
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let unet = config.build(vb.pp("unet")).unwrap();
    let embedding = TimeEmbedding::new(4, vb.pp("time")).unwrap();
    let x = ones(&[2, 1, 28, 28]);
    let t = |t: &[f64], dtype| Tensor::new(t, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    for (t, expected) in [
        (t(&[0.0, 5.0], DType::F16), "dtype of t is f16; it must be an integer dtype, f32 or f64"),
        (t(&[0.0, f64::NAN], DType::F64), "t is NaN; it must be finite and at least 0"),
        (t(&[-0.5, 0.0], DType::F32), "t is -0.5; it must be finite and at least 0"),
        (t(&[0.0, -1.0], DType::I64), "t is -1; it must be at least 0, a timestep"),
        (t(&[-7.0, 3.0], DType::I32), "t is -7; it must be at least 0, a timestep"),
    ] {
        let dropout = Dropout::new(0, 0);
        for message in [
            embedding.forward(&t).map(drop),
            unet.forward(&x, &t).map(drop),
            train(&unet, &x, &t, &dropout).map(drop),
            by_tape(&unet, &x, &t, &dropout, &mut |y| Ok(y.clone())).map(drop),
        ]
        .map(|result| result.unwrap_err().to_string())
        {
            assert_eq!(message, expected);
        }
    }
}

/// Returns the largest change of a network's output between the timesteps 0 and 999.
fn hearing(network: impl Fn(u32) -> Result<Tensor>) -> f32 {
    let change = (network(0).unwrap() - network(999).unwrap()).unwrap().abs().unwrap();
    change.max_all().unwrap().to_scalar().unwrap()
}

/// GroupNorm has 8 groups. With 8 channels, each channel is normalised separately, so that an added
/// constant is removed.
#[test]
fn a_block_of_8_output_channels_ignores_the_timestep() {
    for (input, output) in [(8, 8), (16, 8), (8, 16), (16, 16)] {
        let parameters = parameters();
        let vb = parameters.builder();
        let embedding = TimeEmbedding::new(16, vb.pp("time")).unwrap();
        let block = ResBlock::new(input, output, 16, vb.pp("block")).unwrap();
        let x = ones(&[1, input, 8, 8]).arange_like();
        let change = hearing(|t| {
            let t = Tensor::new(&[t], &Device::Cpu)?;
            block.forward(&x, &embedding.forward(&t)?, None)
        });
        // The change is within the rounding of f32, or a thousand times as large.
        assert!(
            if output == 8 { change < 1e-5 } else { change > 1e-2 },
            "{input} {output}: {change}"
        );
    }
}

#[test]
fn a_network_that_ignores_the_timestep_is_refused() {
    let config = |dims: &[usize]| UNetConfig {
        image_size: 16.into(),
        hidden_dims: dims.to_vec(),
        time_dim: 32,
        ..UNetConfig::mnist()
    };
    for dims in [&[8, 8][..], &[8, 8, 8]] {
        for message in [
            config(dims).validate().unwrap_err().to_string(),
            config(dims).build(parameters().builder()).unwrap_err().to_string(),
        ] {
            let expected =
                format!("hidden_dims is {dims:?}; it must be more than 8 in at least one entry");
            assert!(message.starts_with(&expected), "{message}");
        }
    }
    for dims in [&[8, 16][..], &[16, 8], &[16, 16], &[8, 8, 16], &[8, 16, 8], &[16, 8, 8]] {
        let parameters = parameters();
        let unet = config(dims).build(parameters.builder()).unwrap();
        let x = ones(&[1, 1, 16, 16]).arange_like();
        let change = hearing(|t| unet.forward(&x, &Tensor::new(&[t], &Device::Cpu)?));
        assert!(change > 1e-3, "{dims:?}: {change}");
    }
}

/// Checks the documentation of `hidden_dims`: these blocks of a valid network do not depend on the
/// timestep.
#[test]
fn with_8_and_16_channels_the_upward_path_ignores_the_timestep() {
    let parameters = parameters();
    let config =
        UNetConfig { image_size: 16.into(), hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let unet = config.build(parameters.builder()).unwrap();
    let (x, t) =
        (ones(&[1, 1, 16, 16]).arange_like(), Tensor::new(&[500u32], &Device::Cpu).unwrap());
    let before = unet.forward(&x, &t).unwrap();
    for (name, var) in parameters.vars() {
        let Some(block) = name.strip_suffix(".time_emb.1.weight") else { continue };
        let kept = var.as_detached_tensor().copy().unwrap();
        var.set(&(&kept + kept.arange_like()).unwrap()).unwrap();
        let change = (unet.forward(&x, &t).unwrap() - &before).unwrap().abs().unwrap();
        let change = change.max_all().unwrap().to_scalar::<f32>().unwrap();
        var.set(&kept).unwrap();
        let deaf = block.starts_with("up_blocks");
        assert!(if deaf { change < 1e-5 } else { change > 1e-3 }, "{block}: {change}");
    }
}

/// Creates a file with these bytes.
fn file(bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.safetensors");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn load(path: &std::path::Path, dtype: DType) -> Result<Parameters> {
    Parameters::load(path, dtype, &Device::Cpu)
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    const NAN: f64 = f64::NAN;
    const INFINITY: f64 = f64::INFINITY;
    let fine = [0.0, -0.0, 1.0, -60000.0, 1e-8, 2.5];
    for (stored, wanted, bad, kind) in [
        (DType::F32, DType::F32, NAN, "NaN"),
        (DType::F32, DType::F32, -NAN, "NaN"),
        (DType::F32, DType::F32, INFINITY, "infinite"),
        (DType::F32, DType::F64, -INFINITY, "infinite"),
        (DType::F16, DType::F32, NAN, "NaN"),
        (DType::F16, DType::F32, -INFINITY, "infinite"),
        // A file in half precision holds infinity in place of a number that was too large.
        (DType::F16, DType::F32, 1e5, "infinite"),
        (DType::BF16, DType::F32, NAN, "NaN"),
        (DType::BF16, DType::F32, INFINITY, "infinite"),
        (DType::F64, DType::F64, NAN, "NaN"),
        (DType::F64, DType::F64, -INFINITY, "infinite"),
        // Finite in the file, but not in the dtype of the network.
        (DType::F64, DType::F32, 1e39, "too large for f32"),
        (DType::F64, DType::F32, -3.4028235677973366e38, "too large for f32"),
        (DType::F64, DType::F16, 65520.0, "too large for f16"),
        (DType::F32, DType::F16, -65520.0, "too large for f16"),
        (DType::BF16, DType::F16, 65536.0, "too large for f16"),
        (DType::F32, DType::BF16, 3.3962e38, "too large for bf16"),
        (DType::F64, DType::BF16, -3.3961776e38, "too large for bf16"),
    ] {
        let weights = |values: &[f64]| {
            let weight = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(stored).unwrap();
            let other = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
            file(&safetensors::serialize([("a.b", weight), ("b", other)], None).unwrap())
        };
        let (_dir, path) = weights(&fine);
        load(&path, wanted).unwrap();
        let mut values = fine.to_vec();
        values[4] = bad;
        values.push(bad);
        let (_dir, path) = weights(&values);
        let message = load(&path, wanted).unwrap_err().to_string();
        let expected = format!(
            "{}: damaged file: a.b is not finite: 2 of 7 values, the first at index 4, which is {kind}",
            path.display()
        );
        assert_eq!(message, expected, "{bad} of {stored:?} in {wanted:?}");
    }
}

/// The largest numbers that do not become infinite, to show that the limits above are exact.
#[test]
fn weights_that_round_to_finite_numbers_are_taken() {
    for (stored, wanted, value, as_loaded) in [
        (DType::F64, DType::F32, 3.4028235677973362e38, f64::from(f32::MAX)),
        (DType::F64, DType::F16, 65519.99, 65504.0),
        (DType::F32, DType::F16, -65519.0, -65504.0),
        (DType::F32, DType::BF16, 3.3961774e38, 3.3895313892515355e38),
        (DType::F64, DType::F64, f64::MAX, f64::MAX),
    ] {
        let weight = Tensor::new(&[value], &Device::Cpu).unwrap().to_dtype(stored).unwrap();
        let (_dir, path) = file(&safetensors::serialize([("w", weight)], None).unwrap());
        let loaded = load(&path, wanted).unwrap().builder().get(1, "w").unwrap();
        let loaded = loaded.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(loaded, [as_loaded], "{value} of {stored:?} in {wanted:?}");
    }
}

#[test]
fn a_trainer_takes_no_weights_that_are_not_finite() {
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let parameters = parameters();
    let _ = parameters.build(&config).unwrap();
    let mut weights: BTreeMap<_, _> =
        parameters.vars().into_iter().map(|(k, v)| (k, v.as_detached_tensor())).collect();
    let bias = weights.get_mut("out_conv.bias").unwrap();
    *bias = (&*bias * f64::INFINITY).unwrap();
    let (_dir, path) = file(&safetensors::serialize(&weights, None).unwrap());
    let train = TrainConfig::mnist();
    let mut trainer = Trainer::new(config, train, Diffusion::ddpm(), &Device::Cpu).unwrap();
    let message = trainer.set_weights(&path).unwrap_err().to_string();
    assert!(message.contains("out_conv.bias is not finite: 1 of 1 values"), "{message}");
}

/// Files that torch.save wrote, in both of its formats.
const PYTORCH: &str = "tests/data/pytorch_files";

/// Asserts that a file has all tensors of `expected.safetensors`, bit by bit, behind a prefix.
fn assert_has_expected(file: &str, prefix: &str) {
    let path = format!("{PYTORCH}/{file}");
    let expected =
        candle_core::safetensors::load(format!("{PYTORCH}/expected.safetensors"), &Device::Cpu);
    let weights = Parameters::load_part(&path, prefix, DType::F64, &Device::Cpu).unwrap();
    let builder = weights.builder();
    for (name, tensor) in expected.unwrap() {
        let found = builder.get(tensor.dims(), &name).unwrap_or_else(|e| panic!("{path}: {e}"));
        let values = |tensor: &Tensor| {
            let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            Ok::<_, candle_core::Error>(values.into_iter().map(f64::to_bits).collect::<Vec<_>>())
        };
        assert_eq!(values(&found).unwrap(), values(&tensor).unwrap(), "{path}: {name}");
    }
    // Tensors of other types are left out.
    for counter in ["counter", "1.num_batches_tracked"] {
        let error = builder.get((), counter).unwrap_err().to_string();
        assert!(error.contains(&format!("weight {counter} is missing")), "{error}");
    }
}

#[test]
fn tensors_in_files_of_pytorch_have_the_values_of_pytorch() {
    assert_has_expected("state.pt", "");
    assert_has_expected("state-legacy.pt", "");
    assert_has_expected("state-protocol-4.pt", "");
    assert_has_expected("trainer.pt", "ema.ema_model.model.");
    assert_has_expected("trainer.pt", "model.model.");
    // A safetensors file has parts, too. A header of 640 bytes makes its first two bytes those of a pickle.
    let header = r#"{"parameter":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let bytes = [&640u64.to_le_bytes(), format!("{header:640}").as_bytes(), &[0; 8]].concat();
    assert!(bytes.starts_with(&[0x80, 2]));
    let (_dir, path) = file(&bytes);
    let weights = Parameters::load_part(&path, "param", DType::F32, &Device::Cpu).unwrap();
    assert_eq!(weights.builder().get(2, "eter").unwrap().to_vec1::<f32>().unwrap(), [0.0; 2]);
}

#[test]
fn a_file_of_pytorch_runs_no_code() {
    for (name, path) in ["hostile.pt", "hostile-legacy.pt"].map(|n| (n, format!("{PYTORCH}/{n}"))) {
        let message = load(path.as_ref(), DType::F32).unwrap_err().to_string();
        let expected = format!("{path}: args is made by posix.system, which is not run");
        assert_eq!(message, expected, "{name}");
        // The call is not among the values that are asked for.
        let weights = Parameters::load_part(&path, "weight", DType::F32, &Device::Cpu).unwrap();
        let weight = weights.builder().get(2, "").unwrap();
        assert_eq!(weight.to_vec1::<f32>().unwrap(), [1.0, 1.0]);
    }
}

/// A file of PyTorch's earlier format with this pickle as its object.
fn legacy(object: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let system = b"\x80\x02M\xe9\x03.\x80\x02}X\x0d\0\0\0little_endian\x88s.";
    [magic, &system[..], object, b"]."].concat()
}

/// A state dict with one tensor, whose shape and strides are these parts of a pickle, and whose storage is the number
/// 1.
fn with_shape(shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let tensor = b"}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n\
                   X\x01\0\0\x000X\x03\0\0\0cpuK\x01NtQK\0";
    let mut file = legacy(&[&tensor[..], shape, strides, b"\x89NtRs."].concat());
    file.truncate(file.len() - 2);
    file.extend(b"]X\x01\0\0\x000a.\x01\0\0\0\0\0\0\0\0\0\x80\x3f");
    file
}

/// Every case would take much memory or time, or would overflow the stack, if its numbers were not checked.
#[test]
fn damaged_and_hostile_files_of_pytorch_are_errors() {
    let message = |bytes: &[u8]| {
        let (_dir, path) = file(bytes);
        load(&path, DType::F32).map(drop).unwrap_err().to_string()
    };
    let (_dir, path) = file(&with_shape(b"K\x01\x85", b"K\x01\x85"));
    let one = load(&path, DType::F32).unwrap().builder().get(1, "w").unwrap();
    assert_eq!(one.to_vec1::<f32>().unwrap(), [1.0]);

    let huge = b"\x8a\x06\0\0\0\0\0\x01"; // 2^40
    let expanded = with_shape(&[&huge[..], b"\x85"].concat(), b"K\0\x85");
    let overflowing =
        with_shape(&[huge, &huge[..], b"\x86"].concat(), &[huge, &huge[..], b"\x86"].concat());
    let doubled = (1..30u8).fold(b"}q\0".to_vec(), |mut pickle, n| {
        pickle.extend([b'}', b'q', n]);
        for key in b"abcd" {
            pickle.extend([b'X', 1, 0, 0, 0, *key, b'h', n - 1, b's']);
        }
        pickle
    });
    let mut nested = vec![b')'];
    nested.resize(1 << 21, 0x85);
    for (bytes, expected) in [
        (expanded, "w: the tensors have more than 8 times the size of the file"),
        (overflowing, "exceeds its storage of 1 values"),
        (with_shape(b"K\x02\x85", b"K\x01\x85"), "a view of shape [2] exceeds its storage"),
        (with_shape(b"K\x01\x85", b")"), "the arguments of a tensor have another form"),
        (with_shape(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "have another form"),
        (legacy(&[&doubled[..], b"."].concat()), "is too deep"),
        (legacy(b"}q\0X\x01\0\0\0ah\0s."), "is too deep"),
        (legacy(&[&nested[..], b"."].concat()), "more than 1048576 operations"),
        (legacy(b"X\xff\xff\xff\xffa."), "the pickle is incomplete"),
        (legacy(b"]."), "the file holds no dictionary of tensors"),
        (legacy(b"cos\nsystem\nX\x02\0\0\0ls\x85R."), "the file calls os.system, which is not run"),
        (legacy(b"R."), "the stack of the pickle is empty"),
        (legacy(b"I01\n."), "operation 0x49, which is not read"),
        (b"\x80\x02}.".to_vec(), "a pickle that torch.save did not write"),
        (b"PK\x03\x04\0\0\x08\x08 and the rest".to_vec(), "it has no ZIP directory"),
        (b"anything else".to_vec(), "damaged file"),
    ] {
        let message = message(&bytes);
        assert!(message.contains(expected), "{message}, not {expected}");
    }
    let overlapping = std::fs::read(format!("{PYTORCH}/overlapping.pt")).unwrap();
    assert!(message(&overlapping).contains("is missing, or has another size"));
    // Bytes of the files are changed in turn, and the files are cut.
    for name in ["state.pt", "state-legacy.pt", "trainer.pt"] {
        let whole = std::fs::read(format!("{PYTORCH}/{name}")).unwrap();
        for i in (0..whole.len()).step_by(23) {
            let (_dir, path) = file(&whole[..i]);
            assert!(load(&path, DType::F32).is_err(), "{name}: {i} bytes");
            let mut changed = whole.clone();
            changed[i] ^= if i % 2 == 0 { 0x01 } else { 0xff };
            let (_dir, path) = file(&changed);
            // A change of a name or a date is no error.
            let _ = load(&path, DType::F32);
        }
    }
}

#[test]
fn a_missing_weight_is_reported_with_the_name_in_the_file() {
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let parameters = parameters();
    let _ = parameters.build(&config).unwrap();
    let named = |prefix: &str, taken: &str| {
        let named = |(name, var): (String, Var)| {
            let name = name.strip_prefix(taken).unwrap_or(&name);
            (format!("{prefix}{name}"), var.as_detached_tensor())
        };
        let weights: BTreeMap<_, _> = parameters.vars().into_iter().map(named).collect();
        let (_dir, path) = file(&safetensors::serialize(&weights, None).unwrap());
        load(&path, DType::F32).unwrap().build(&config).map(drop).unwrap_err().to_string()
    };
    let missing = "weight down_blocks.0.res1.shortcut.weight is missing; the file has ";
    for (prefix, taken, expected) in [
        ("module.", "", "module.down_blocks.0.res1.shortcut.weight"),
        ("model.unet.", "", "model.unet.down_blocks.0.res1.shortcut.weight"),
        ("", "down_blocks.0.", "res1.shortcut.weight"),
    ] {
        let message = named(prefix, taken);
        let expected = format!("{missing}{expected}, under another prefix");
        assert!(message.ends_with(&expected), "{message}");
    }
    let message = named("module_", "");
    assert!(message.ends_with("res1.shortcut.weight is missing"), "{message}");
}

#[test]
fn weights_of_no_floating_dtype_are_refused() {
    let vb = Parameters::new(0, DType::U8, &Device::Cpu).builder();
    let message = vb.get(3, "w").unwrap_err().to_string();
    assert!(
        message.contains("dtype of the weights is u8; it must be a floating-point dtype"),
        "{message}"
    );
}

/// Names and lists from a file are shortened in messages.
#[test]
fn messages_do_not_grow_with_what_they_are_about() {
    let long = UNetConfig { hidden_dims: vec![8; 1_000_000], ..UNetConfig::mnist() };
    let message = long.validate().unwrap_err().to_string();
    assert_eq!(message, "hidden_dims is a list of 1000000; it must be 2 to 16 numbers");
    let long = UNetConfig { attention_levels: vec![0; 1_000_000], ..UNetConfig::mnist() };
    let message = long.validate().unwrap_err().to_string();
    assert!(message.starts_with("attention_levels is a list of 1000000; it must"), "{message}");

    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let parameters = parameters();
    let _ = parameters.build(&config).unwrap();
    let mut weights: BTreeMap<_, _> =
        parameters.vars().into_iter().map(|(k, v)| (k, v.as_detached_tensor())).collect();
    weights.insert("x".repeat(1 << 20), ones(&[1]));
    let built = |weights: &BTreeMap<String, Tensor>| {
        let (_dir, path) = file(&safetensors::serialize(weights, None).unwrap());
        load(&path, DType::F32).and_then(|weights| weights.build(&config)).unwrap_err().to_string()
    };
    let message = built(&weights);
    assert!(
        message.len() < 500 && message.contains("xxx... (1048576 bytes) is not one of the"),
        "{message}"
    );
    weights.insert("x".repeat(1 << 20), (ones(&[1]) * f64::NAN).unwrap());
    let message = built(&weights);
    assert!(
        message.len() < 500 && message.contains("xxx... (1048576 bytes) is not finite:"),
        "{message}"
    );
    weights.insert("init_conv.weight".into(), ones(&[1; 1000]));
    weights.retain(|name, _| name.len() < 1000);
    let message = built(&weights);
    assert!(message.len() < 500 && message.contains("has shape a list of 1000;"), "{message}");
}

#[test]
fn a_weight_without_memory_is_an_error() {
    let vb = parameters().builder();
    for shape in [(1 << 30, 1 << 20), (1 << 40, 1 << 40)] {
        let message = vb.get(shape, "w").unwrap_err().to_string();
        let expected = format!("weight is w of shape [{}, {}]; it must be small", shape.0, shape.1);
        assert!(message.contains(&expected), "{message}");
    }
}

/// Different values in the shape of another tensor.
trait ArangeLike {
    fn arange_like(&self) -> Tensor;
}

impl ArangeLike for Tensor {
    fn arange_like(&self) -> Tensor {
        let count = self.elem_count();
        Tensor::arange(0f32, count as f32, &Device::Cpu)
            .unwrap()
            .reshape(self.shape())
            .unwrap()
            .sin()
            .unwrap()
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let vb = parameters().builder();
    let unet = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() }
        .build(vb.pp("unet"))
        .unwrap();
    let block = ResBlock::new(8, 8, 4, vb.pp("block")).unwrap();
    let embedding = TimeEmbedding::new(4, vb.pp("time")).unwrap();
    let t = |n: usize| Tensor::zeros(n, DType::U32, &Device::Cpu).unwrap();
    let run = |shape: &[usize], n| unet.forward(&ones(shape), &t(n)).unwrap_err().to_string();
    for (message, expected) in [
        (run(&[1, 3, 28, 28], 1), "x_t has shape [1, 3, 28, 28]; it must be (batch, 1, 28, 28)"),
        (run(&[1, 1, 32, 32], 1), "x_t has shape [1, 1, 32, 32]; it must be (batch, 1, 28, 28)"),
        (run(&[28, 28], 28), "x_t has shape [28, 28]"),
        (run(&[0, 1, 28, 28], 0), "it must be a batch of at least one image"),
        (run(&[2, 1, 28, 28], 3), "t has shape [3]; it must be [2], one timestep for each image"),
        (
            block.forward(&ones(&[1, 4, 2, 2]), &ones(&[1, 4]), None).unwrap_err().to_string(),
            "x has shape [1, 4, 2, 2]; it must be (batch, 8, height, width)",
        ),
        (
            block.forward(&ones(&[2, 8, 2, 2]), &ones(&[1, 4]), None).unwrap_err().to_string(),
            "t_emb has shape [1, 4]; it must be [2, 4], (batch, time_dim)",
        ),
        (block.clone().with_dropout(1.5, 0).unwrap_err().to_string(), "dropout is 1.5"),
        (
            ResBlock::new(12, 8, 4, vb.pp("a")).unwrap_err().to_string(),
            "channels is 12; it must be a multiple of 8",
        ),
        (ResBlock::new(8, 0, 4, vb.pp("b")).unwrap_err().to_string(), "channels is 0"),
        (
            TimeEmbedding::new(5, vb.pp("c")).unwrap_err().to_string(),
            "time_dim is 5; it must be even",
        ),
        (TimeEmbedding::new(2, vb.pp("d")).unwrap_err().to_string(), "time_dim is 2"),
        (
            embedding.forward(&ones(&[2, 2])).unwrap_err().to_string(),
            "t has shape [2, 2]; it must be (batch)",
        ),
    ] {
        assert!(message.contains(expected), "{message}");
    }
}

/// Builds a small network in which the weights whose names begin with `trainable` are trainable.
fn partly_trainable(trainable: &str) -> Result<(Model<UNet>, BTreeMap<String, Var>)> {
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let parameters = Parameters::new(0, DType::F32, &Device::Cpu);
    parameters.build(&config)?;
    let weights = parameters.vars().into_iter().map(|(name, var)| {
        let live = name.starts_with(trainable);
        (name, if live { var.as_tensor().clone() } else { var.as_detached_tensor() })
    });
    let vb = VarBuilder::from_tensors(weights.collect(), DType::F32, &Device::Cpu);
    let mut vars = parameters.vars();
    vars.retain(|name, _| name.starts_with(trainable));
    Ok((config.build(vb)?, vars))
}

#[test]
fn a_partly_trainable_network_has_the_gradients_of_that_part() -> Result<()> {
    let (unet, vars) = partly_trainable("up_blocks")?;
    let x = Sampler::prior((2, 1, 28, 28), 0, &Device::Cpu)?;
    let t = Tensor::new(&[1u32, 900], &Device::Cpu)?;
    let loss = unet.forward(&x, &t)?.sqr()?.sum_all()?;
    let by_candle = gradients(&loss, &vars)?;
    let by_tape = by_tape(&unet, &x, &t, &Dropout::new(0, 0), &mut |y| Ok((y * 2.0)?))?;
    assert!(!vars.is_empty() && by_candle.len() == vars.len());
    let norm = |t: &Tensor| -> Result<f32> { Ok(t.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt()) };
    let norms = by_candle.values().map(norm).collect::<Result<Vec<_>>>()?;
    let largest = norms.into_iter().fold(0.0, f32::max);
    for (name, var) in &vars {
        let (a, b) = (&by_candle[name], by_tape.get(var).expect("a gradient"));
        // A bias before groups of one channel has no gradient except rounding errors.
        assert!(norm(&(a - b)?)? <= 1e-4 * norm(a)? + 1e-6 * largest, "{name}");
    }
    Ok(())
}

#[test]
fn weights_that_are_computed_pass_their_gradients_on() -> Result<()> {
    let (_, vars) = partly_trainable("")?;
    let config = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
    let weights = vars.iter().map(|(k, v)| Ok((k.clone(), (v.as_tensor() * 2.0)?)));
    let weights = weights.collect::<Result<_>>()?;
    let unet = config.build(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu))?;
    let x = Sampler::prior((1, 1, 28, 28), 0, &Device::Cpu)?;
    let t = Tensor::new(&[5u32], &Device::Cpu)?;
    let found = by_tape(&unet, &x, &t, &Dropout::new(0, 0), &mut |y| Ok(y.clone()))?;
    assert!(vars.values().all(|var| found.get(var).is_some()));
    Ok(())
}

#[test]
fn many_jobs_share_a_frozen_network() -> Result<()> {
    // Jobs of one pool: while one of them waits, its thread may start another.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for _ in 0..20 {
        let (unet, _) = partly_trainable("none")?;
        let x = Sampler::prior((2, 1, 28, 28), 0, &Device::Cpu)?;
        let t = Tensor::new(&[1u32, 900], &Device::Cpu)?;
        let results = std::sync::Mutex::new(Vec::new());
        pool.scope(|scope| {
            for _ in 0..24 {
                scope.spawn(|_| {
                    let y = unet.forward(&x, &t).unwrap().flatten_all().unwrap();
                    results.lock().unwrap().push(y.to_vec1::<f32>().unwrap());
                });
            }
        });
        let results = results.into_inner().unwrap();
        assert!(results.len() == 24 && results.windows(2).all(|pair| pair[0] == pair[1]));
    }
    Ok(())
}

#[test]
fn debug_shows_the_shape_and_not_the_values() -> Result<()> {
    let (unet, _) = partly_trainable("none")?;
    let x = Sampler::prior((2, 1, 28, 28), 0, &Device::Cpu)?;
    unet.forward(&x, &Tensor::new(&[1u32, 900], &Device::Cpu)?)?;
    let text = format!("{unet:?}");
    assert!(text.contains("hidden_dims: [8, 16]") && text.len() < 1000, "{text}");
    Ok(())
}
