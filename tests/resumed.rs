//! Every optimiser and average: runs that are resumed, runs with other numbers of threads, and runs that change.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use ddpm::nn::{DownBlockType, UNet2DConfig, UpBlockType};
use ddpm::process::Prediction;
use ddpm::train::{
    AdamConfig, AverageConfig, EmaConfig, LearningRateSchedule, Length, MuonConfig,
    TimestepSampling, WeightAverage, WeightDecay,
};
use ddpm::{
    Checkpoint, Diffusion, Error, NoiseSchedule, Precision, TrainConfig, Trainer, UNetConfig,
};

mod runs;
use runs::{Waves, config, edit, names, network, new, resume, snapshot, step_and_save};

const SLOW: AverageConfig =
    AverageConfig::HalfLife { length: Length::Images(30.0), ramp_up: Some(0.5) };
const FAST: AverageConfig = AverageConfig::HalfLife { length: Length::Updates(2.0), ramp_up: None };

/// Configurations that have every optimiser, schedule and average, both precisions in f32, and timesteps by their
/// losses.
fn configs() -> Vec<TrainConfig> {
    let [narrow, wide] = AverageConfig::POST_HOC;
    let base = || TrainConfig { optimizer: AdamConfig::adam(1e-2), ..config(10) };
    let muon = || Some(MuonConfig::default());
    let l2 = AdamConfig { weight_decay: WeightDecay::L2(0.1), ..AdamConfig::adam(1e-2) };
    vec![
        base(),
        TrainConfig {
            optimizer: l2,
            clip_norm: Some(0.1),
            averages: vec![SLOW],
            precision: Precision::High,
            ..base()
        },
        TrainConfig {
            optimizer: AdamConfig::adamw(1e-2, 0.1),
            schedule: LearningRateSchedule::Cosine { end: 0.1 },
            warmup_steps: 3,
            ema: None,
            averages: vec![narrow, FAST, wide],
            ..base()
        },
        TrainConfig {
            muon: muon(),
            schedule: LearningRateSchedule::Linear { end: 0.0 },
            clip_norm: Some(0.1),
            accumulation: 2,
            ..base()
        },
        TrainConfig {
            muon: Some(MuonConfig { nesterov: false, weight_decay: 0.2, ..MuonConfig::default() }),
            schedule: LearningRateSchedule::InverseSqrt { reference_steps: 3 },
            cooldown: 0.2,
            ema: Some(EmaConfig { decay: 0.9, warmup: false }),
            averages: vec![FAST, narrow],
            ..base()
        },
        TrainConfig { timesteps: TimestepSampling::Importance, accumulation: 2, ..base() },
    ]
}

#[test]
fn a_resumed_run_is_the_unbroken_one_at_every_step() {
    for (case, config) in configs().into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let (unbroken, broken) = (dir.path().join("unbroken"), dir.path().join("broken"));
        // With two timesteps, each has its ten losses before the last step.
        let by_losses = config.timesteps == TimestepSampling::Importance;
        let diffusion = match by_losses {
            true => Diffusion::new(NoiseSchedule::cosine(2).unwrap(), Prediction::Velocity),
            false => Diffusion::ddpm(),
        };
        let builder =
            || Trainer::builder(network()).config(config.clone()).diffusion(diffusion.clone());
        let mut whole = builder().build().unwrap();
        let mut part = builder().build().unwrap();
        for step in 1..=10 {
            step_and_save(&mut whole, &unbroken);
            step_and_save(&mut part, &broken);
            // Weights, moments, momentum, averages and counts: every byte of the checkpoints.
            let files = |dir: &Path| -> BTreeMap<String, Vec<u8>> {
                names(dir)
                    .into_iter()
                    .map(|f| (f.clone(), fs::read(dir.join(f)).unwrap()))
                    .collect()
            };
            assert_eq!(files(&unbroken), files(&broken), "case {case}, step {step}");
            assert_eq!(part.steps(), step);
            part = builder().resume(&broken).unwrap();
        }
        let expected = 3 + usize::from(config.ema.is_some()) + usize::from(config.muon.is_some());
        let expected = expected + config.averages.len() + usize::from(by_losses);
        let found = names(&broken);
        assert_eq!(found.len(), expected, "{found:?}");
        if by_losses {
            let file = broken.join("timesteps.safetensors");
            let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
            assert_eq!(tensors["counts"].to_vec1::<f32>().unwrap(), [10.0, 10.0]);
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for config in configs() {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("run");
            pool.install(|| {
                let mut trainer = new(config.clone());
                (0..3).for_each(|_| drop(step_and_save(&mut trainer, &path)));
            });
            names(&path).into_iter().map(|f| fs::read(path.join(f)).unwrap()).collect::<Vec<_>>()
        };
        let one = run(1);
        assert!([2, 5].into_iter().all(|threads| run(threads) == one), "{config:?}");
    }
}

#[test]
fn every_optimiser_learns() {
    for config in configs() {
        let mut trainer = new(TrainConfig { steps: 60, ..config });
        let batch = trainer.next_batch(&Waves(4)).unwrap();
        let t = Tensor::new(&[300u32, 500, 700, 900], &Device::Cpu).unwrap();
        let eps = batch.images.ones_like().unwrap();
        let mut losses = Vec::new();
        for _ in 0..12 {
            let update = trainer.step_with(batch.clone(), &t, &eps).unwrap();
            losses.push(update.loss.to_scalar::<f32>().unwrap());
        }
        assert!(losses[11] < 0.9 * losses[0], "{losses:?}");
    }
}

/// The layers of the network of Ho et al. have other names than those of the default list.
#[test]
fn adam_has_the_outer_layers_of_the_network_of_a_new_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let network = || UNet2DConfig {
        sample_size: 4.into(),
        down_block_types: vec![DownBlockType::Plain],
        up_block_types: vec![UpBlockType::Plain],
        block_out_channels: vec![8],
        layers_per_block: 1,
        norm_num_groups: 2,
        add_attention: false,
        num_class_embeds: Some(2),
        ..UNet2DConfig::cifar10()
    };
    let train = || TrainConfig { muon: Some(MuonConfig::default()), ..config(1) };
    let trainer = Trainer::builder(network()).config(train()).build().unwrap();
    trainer.save(&path).unwrap();
    let muon = || candle_core::safetensors::load(path.join("muon.safetensors"), &Device::Cpu);
    let muon = muon().unwrap();
    for (name, var) in trainer.vars() {
        let outer = ["conv_in.", "conv_out.", "class_embedding."];
        let outer = outer.iter().any(|layer| name.starts_with(layer));
        let by_muon = var.rank() >= 2 && !outer;
        assert_eq!(muon.contains_key(&format!("momentum_buffer.{name}")), by_muon, "{name}");
    }
    let resume = |train, path: &Path| Trainer::builder(network()).config(train).resume(path);
    resume(train(), &path).unwrap();

    // A run that began with the default list of another network continues with it.
    let old = dir.path().join("old");
    let adam = ["out_conv.", "init_conv.", "class_embedding."].map(String::from).to_vec();
    let other = TrainConfig { muon: Some(MuonConfig { adam, ..MuonConfig::default() }), ..train() };
    Trainer::builder(network()).config(other).build().unwrap().save(&old).unwrap();
    edit(&old, |json| json["train"]["muon"]["adam"].as_array_mut().unwrap().swap(0, 1));
    let resumed = resume(train(), &old).unwrap();
    assert_eq!(resumed.config().muon, Some(MuonConfig::default()));
}

#[test]
fn the_configured_matrices_belong_to_muon() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let trainer = new(TrainConfig { muon: Some(MuonConfig::default()), ..config(1) });
    trainer.save(&path).unwrap();
    let load = |file: &str| candle_core::safetensors::load(path.join(file), &Device::Cpu).unwrap();
    let (muon, adam) = (load("muon.safetensors"), load("optimizer.safetensors"));
    for (name, var) in trainer.vars() {
        let ends = name.starts_with("init_conv") || name.starts_with("out_conv");
        let by_muon = var.rank() >= 2 && !ends;
        assert_eq!(muon.contains_key(&format!("momentum_buffer.{name}")), by_muon, "{name}");
        assert_eq!(adam.contains_key(&format!("exp_avg_sq.{name}")), !by_muon, "{name}");
    }
}

/// Returns the values that an average has after each of 40 updates of one weight, with values 1, 2, … in them.
fn followed(config: AverageConfig, batch: u64) -> Vec<f64> {
    let var = Var::new(&[0f64], &Device::Cpu).unwrap();
    let vars = BTreeMap::from([("w".to_string(), var.clone())]);
    let mut average = WeightAverage::new(config, &vars).unwrap();
    let mut values = Vec::new();
    for k in 1..=40 {
        var.set(&Tensor::new(&[f64::from(k)], &Device::Cpu).unwrap()).unwrap();
        average.update(batch).unwrap();
        values.push(average.values()["w"].to_vec1::<f64>().unwrap()[0]);
    }
    values
}

#[test]
fn averages_have_the_closed_forms_of_their_weightings() {
    // After a half-life, half of the average is left: the weight of update k after n updates is proportional to
    // 2^(-(n - k) / half-life), and that of the start is 2^(-n / half-life).
    for (config, batch, half_life) in [
        (AverageConfig::HalfLife { length: Length::Updates(5.0), ramp_up: None }, 8, 5.0),
        (AverageConfig::HalfLife { length: Length::Images(40.0), ramp_up: None }, 8, 5.0),
    ] {
        for (n, found) in (1..).zip(followed(config, batch)) {
            let left = |updates: i32| 0.5f64.powf(f64::from(updates) / half_life);
            let sum = |k: i32| f64::from(k) * (left(n - k) - left(n - k + 1));
            let expected: f64 = (1..=n).map(sum).sum();
            assert!((found - expected).abs() < 1e-12, "{config:?}, {n}: {found}, not {expected}");
        }
    }
    // With a ramp-up, the first update replaces the start, and the half-life after n updates is ramp_up n.
    let ramped = AverageConfig::HalfLife { length: Length::Updates(1e9), ramp_up: Some(0.5) };
    let mut expected = 0.0;
    for (n, found) in (1..).zip(followed(ramped, 8)) {
        let left = if n == 1 { 0.0 } else { 0.25f64.powf(1.0 / f64::from(n - 1)) };
        expected = left * expected + (1.0 - left) * f64::from(n);
        assert!((found - expected).abs() < 1e-12, "{n}: {found}, not {expected}");
    }
    // The weight of update k after n updates is (k / n)^(γ + 1) - ((k - 1) / n)^(γ + 1). For a relative standard
    // deviation of 0.10, EDM2 gives γ = 6.94, and for 0.05, 16.97.
    for (sigma_rel, gamma) in [(0.1, 6.9364), (0.05, 16.9716)] {
        for (n, found) in (1..).zip(followed(AverageConfig::Power { sigma_rel }, 8)) {
            let power = |k: i32| (f64::from(k) / f64::from(n)).powf(gamma + 1.0);
            let expected: f64 = (1..=n).map(|k| f64::from(k) * (power(k) - power(k - 1))).sum();
            assert!((found - expected).abs() < 1e-3, "{n}: {found}, not {expected}");
        }
    }
}

#[test]
fn an_average_of_any_width_is_found_after_training() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let config = TrainConfig {
        optimizer: AdamConfig::adam(1e-3),
        averages: AverageConfig::POST_HOC.to_vec(),
        keep_checkpoints: 100,
        ..config(64)
    };
    let mut trainer = new(config);
    // Averages that are computed during the run, of copies of its weights.
    let copies: BTreeMap<String, Var> = trainer
        .vars()
        .iter()
        .map(|(name, var)| {
            (name.clone(), Var::from_tensor(&var.as_detached_tensor().copy().unwrap()).unwrap())
        })
        .collect();
    let mut direct: Vec<WeightAverage> = [0.07, 0.15]
        .map(|sigma_rel| WeightAverage::new(AverageConfig::Power { sigma_rel }, &copies).unwrap())
        .into();
    for step in 1..=64 {
        let batch = trainer.next_batch(&Waves(11)).unwrap();
        trainer.step(&batch).unwrap();
        for (name, var) in trainer.vars() {
            copies[name].set(&var.as_detached_tensor()).unwrap();
        }
        direct.iter_mut().for_each(|average| average.update(4).unwrap());
        if step % 4 == 0 {
            trainer.save(&path).unwrap();
        }
    }
    let checkpoint = Checkpoint::open(&path).unwrap();
    let output = |model: &dyn ddpm::Denoiser| {
        let x = Tensor::ones((1, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
        let t = Tensor::new(&[300u32], &Device::Cpu).unwrap();
        let y = model.forward(&x, &t).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let off = |a: &[f32], b: &[f32]| {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    };
    let post_hoc = |sigma| output(&checkpoint.post_hoc::<UNetConfig>(sigma, &Device::Cpu).unwrap());
    let stored = |k| output(&checkpoint.average::<UNetConfig>(k, &Device::Cpu).unwrap());
    let (narrow, wide) = (stored(0), stored(1));
    let apart = off(&narrow, &wide);
    assert!(apart > 1e-3, "{apart}");
    // A stored width is the stored average.
    assert!(off(&post_hoc(0.05), &narrow) < 1e-4 * apart);
    assert!(off(&post_hoc(0.1), &wide) < 1e-4 * apart);
    for average in &direct {
        let vb = candle_nn::VarBuilder::from_tensors(
            average.values().clone().into_iter().collect(),
            DType::F32,
            &Device::Cpu,
        );
        let expected = output(&ddpm::nn::Architecture::build(&network(), vb).unwrap());
        let &AverageConfig::Power { sigma_rel } = average.config() else { panic!() };
        let found = off(&post_hoc(sigma_rel), &expected);
        assert!(
            found < 0.02 * apart,
            "{sigma_rel}: off by {found}, while the stored are {apart} apart"
        );
    }
    let message = checkpoint.post_hoc::<UNetConfig>(0.5, &Device::Cpu).map(drop).unwrap_err();
    assert!(message.to_string().contains("sigma_rel is 0.5"), "{message}");
    let message = checkpoint.average::<UNetConfig>(2, &Device::Cpu).map(drop).unwrap_err();
    assert!(message.to_string().contains("less than 2"), "{message}");
}

#[test]
fn without_ema_samples_come_from_the_first_average() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let mut trainer = new(TrainConfig { ema: None, averages: vec![FAST], ..config(3) });
    trainer.fit(&Waves(11), ()).unwrap();
    trainer.save(&path).unwrap();
    let output = |model: &dyn ddpm::Denoiser| {
        let x = Tensor::ones((1, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
        let y = model.forward(&x, &Tensor::new(&[3u32], &Device::Cpu).unwrap()).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let checkpoint = Checkpoint::open(&path).unwrap();
    let expected = output(&checkpoint.average::<UNetConfig>(0, &Device::Cpu).unwrap());
    assert_eq!(output(&checkpoint.ema::<UNetConfig>(&Device::Cpu).unwrap()), expected);
    assert_eq!(output(&trainer.ema_model().unwrap()), expected);
    assert_ne!(output(&checkpoint.model::<UNetConfig>(&Device::Cpu).unwrap()), expected);
}

fn resume_with_changes(path: &Path, config: TrainConfig) -> ddpm::Result<Trainer<UNetConfig>> {
    Trainer::builder(network())
        .config(config)
        .diffusion(Diffusion::ddpm())
        .resume_with_changes(path)
}

#[test]
fn a_run_changes_only_if_asked_and_remembers_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let before = TrainConfig { muon: Some(MuonConfig::default()), ..config(2) };
    let mut trainer = new(before.clone());
    (0..2).for_each(|_| drop(step_and_save(&mut trainer, &path)));
    let moments = fs::read(path.join("optimizer.safetensors")).unwrap();
    let momentum = fs::read(path.join("muon.safetensors")).unwrap();

    let after = TrainConfig {
        steps: 6,
        batch_size: 6,
        accumulation: 3,
        optimizer: AdamConfig::adam(3e-3),
        precision: Precision::High,
        schedule: LearningRateSchedule::Cosine { end: 0.1 },
        ..before.clone()
    };
    assert!(matches!(resume(&path, after.clone()), Err(Error::ConfigMismatch { .. })));
    let mut trainer = resume_with_changes(&path, after.clone()).unwrap();
    let found: Vec<String> = trainer
        .history()
        .iter()
        .map(|c| format!("{} {} {} {}", c.step, c.field, c.from, c.to))
        .collect();
    assert_eq!(
        found,
        [
            "2 train.accumulation 1 3",
            "2 train.batch_size 4 6",
            "2 train.optimizer.learning_rate 0.0001 0.003",
            r#"2 train.precision "highest" "high""#,
            r#"2 train.schedule null {"cosine":{"end":0.1}}"#,
            // Its end depends on the number of steps.
            "2 train.steps 2 6",
        ]
    );
    assert!(resume(&path, TrainConfig { recompute: true, ..before.clone() }).is_ok());
    // Moments and averages are kept, and the checkpoint of the same run is replaced.
    trainer.save(&path).unwrap();
    assert_eq!(fs::read(path.join("optimizer.safetensors")).unwrap(), moments);
    assert_eq!(fs::read(path.join("muon.safetensors")).unwrap(), momentum);
    trainer.claim(&path).unwrap();
    // The number of images may change with the first data set, and only then.
    let batch = trainer.next_batch(&Waves(13)).unwrap();
    assert_eq!(batch.images.dims()[0], 6);
    trainer.step(&batch).unwrap();
    trainer.save(&path).unwrap();
    assert!(trainer.next_batch(&Waves(14)).is_err());
    drop(trainer);

    let checkpoint = Checkpoint::open(&path).unwrap();
    let last = checkpoint.history().last().unwrap();
    assert_eq!((last.step, &*last.field, last.to.as_u64()), (2, "dataset_len", Some(13)));
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join("checkpoint.json")).unwrap()).unwrap();
    let first = serde_json::json!({ "step": 2, "field": "train.accumulation", "from": 1, "to": 3 });
    assert_eq!(json["history"][0], first);
    // The run goes on as usual with its new configuration, and not with the old one.
    assert!(resume(&path, before).is_err());
    let mut trainer = resume(&path, after.clone()).unwrap();
    assert_eq!((trainer.steps(), trainer.images_seen(), trainer.history().len()), (3, 14, 7));
    trainer.fit(&Waves(13), ()).unwrap();
    trainer.save(&path).unwrap();
    // Checkpoints from before and after the change are those of one run: two are kept.
    let kept = names(dir.path());
    assert_eq!(kept, ["run", "run-000000003"]);

    // A second change of the same field, back to its first value.
    drop(trainer);
    let back = TrainConfig { batch_size: 4, accumulation: 1, ..after };
    let mut trainer = resume_with_changes(&path, back).unwrap();
    assert_eq!(trainer.history().len(), 9);
    trainer.claim(&path).unwrap();
    trainer.save(&path).unwrap();
}

#[test]
fn another_number_of_steps_is_remembered_if_rates_depend_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let falling = |steps| TrainConfig { cooldown: 0.5, keep_checkpoints: 9, ..config(steps) };
    step_and_save(&mut new(falling(10)), &path);
    let history = |trainer: &Trainer<UNetConfig>| -> Vec<String> {
        let line = |c: &ddpm::train::Change| format!("{} {} {} {}", c.step, c.field, c.from, c.to);
        trainer.history().iter().map(line).collect()
    };
    let first = "1 train.steps 10 20".to_string();
    let mut trainer = resume(&path, falling(20)).unwrap();
    assert_eq!(history(&trainer), [&*first]);
    step_and_save(&mut trainer, &path);
    drop(trainer);
    let mut trainer = resume(&path, falling(20)).unwrap();
    assert_eq!(history(&trainer), [&*first]);
    step_and_save(&mut trainer, &path);
    drop(trainer);
    // Without the cool-down the number is no longer remembered, and every checkpoint is still one of the run.
    let constant = |steps| TrainConfig { cooldown: 0.0, ..falling(steps) };
    let mut trainer = resume_with_changes(&path, constant(20)).unwrap();
    step_and_save(&mut trainer, &path);
    drop(trainer);
    let mut trainer = resume(&path, constant(30)).unwrap();
    assert_eq!(history(&trainer), [&*first, "3 train.cooldown 0.5 0.0"]);
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    let one = TrainConfig { keep_checkpoints: 1, ..constant(30) };
    drop(trainer);
    step_and_save(&mut resume(&path, one).unwrap(), &path);
    assert_eq!(names(dir.path()), ["run"]);
    // Other changes are added by the program.
    let mut trainer = resume(&path, constant(30)).unwrap();
    trainer.record_change("images", "old".into(), "new".into()).unwrap();
    step_and_save(&mut trainer, &path);
    let last = Checkpoint::open(&path).unwrap().history().last().unwrap().clone();
    assert_eq!((last.step, &*last.field, &last.to), (6, "images", &"new".into()));
    for field in ["train.batch_size", "dataset_len"] {
        assert!(trainer.record_change(field, 1.into(), 2.into()).is_err(), "{field}");
    }
}

#[test]
fn what_determines_the_parts_of_a_run_cannot_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    step_and_save(&mut new(config(2)), &path);
    let before = snapshot(dir.path());
    for (changed, expected) in [
        (TrainConfig { seed: 1, ..config(2) }, "train.seed is 0 in the checkpoint, but 1 was"),
        (TrainConfig { ema: None, ..config(2) }, "train.ema is {"),
        (TrainConfig { averages: vec![FAST], ..config(2) }, "train.averages is null in the"),
        (TrainConfig { muon: Some(MuonConfig::default()), ..config(2) }, "train.muon is null"),
    ] {
        for result in [resume_with_changes(&path, changed.clone()), resume(&path, changed)] {
            let message = result.map(drop).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }
    let wide = UNetConfig { hidden_dims: vec![16, 32], ..network() };
    let builder = Trainer::builder(wide).config(config(2));
    let message = builder.resume_with_changes(&path).map(drop).unwrap_err().to_string();
    assert!(message.starts_with("network.hidden_dims[1] is 24"), "{message}");
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn the_fields_of_a_plain_checkpoint_are_those_of_earlier_versions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    step_and_save(&mut new(config(2)), &path);
    let text = fs::read_to_string(path.join("checkpoint.json")).unwrap();
    let fields: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("  \"")?.split('"').next()).collect();
    assert_eq!(
        fields,
        [
            "format_version",
            "step",
            "images_seen",
            "dataset_len",
            "ema_updates",
            "network",
            "diffusion",
            "train",
            "files"
        ]
    );
    let files: Vec<&str> =
        text.lines().filter(|line| line.contains("safetensors")).map(str::trim).collect();
    let names = ["model", "ema", "optimizer"];
    assert_eq!(files, names.map(|name| format!("\"{name}.safetensors\": {{")));
    let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        text.lines().count(),
        serde_json::to_string_pretty(&parsed).unwrap().lines().count()
    );
}

#[test]
fn files_and_fields_of_no_part_are_refused_by_name() {
    type Damage = fn(&mut serde_json::Value);
    let cases: [(Damage, &str); 8] = [
        (
            |j| j["files"]["other.safetensors"] = j["files"]["model.safetensors"].clone(),
            "unknown field `other.safetensors`",
        ),
        (
            |j| j["files"]["average-1.safetensors"] = j["files"]["model.safetensors"].clone(),
            "unknown field `average-1.safetensors`",
        ),
        (
            |j| j["files"]["average-2.safetensors"] = j["files"]["model.safetensors"].clone(),
            "files.average-2.safetensors is present; it must be absent, as train.averages is",
        ),
        (
            |j| drop(j["files"].as_object_mut().unwrap().remove("optimizer.safetensors")),
            "files.optimizer.safetensors is absent; it must be present",
        ),
        (
            |j| j["train"]["averages"] = serde_json::json!([{ "power": { "sigma_rel": 0.1 } }]),
            "files.average.safetensors is absent; it must be present, as train.averages is",
        ),
        (
            |j| j["averaged"] = serde_json::json!({ "updates": 3, "images": 4 }),
            "averaged.updates is 3; it must be at most 1",
        ),
        (|j| j["optimizer_updates"] = 2.into(), "optimizer_updates is 2; it must be at most 1"),
        (|j| j["history"] = "x".repeat(2 << 20).into(), "length of history is 2097154"),
    ];
    for (damage, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        step_and_save(&mut new(config(2)), &path);
        edit(&path, damage);
        let message = Checkpoint::open(&path).map(drop).unwrap_err().to_string();
        assert!(message.contains("damaged file: ") && message.contains(expected), "{message}");
    }
}
