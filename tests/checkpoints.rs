//! Checkpoints: they resume exactly, are complete at any moment, and errors state the problem.

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use ddpm::data::Dataset;
use ddpm::data::ImageShape;
use ddpm::nn::{Architecture, Model};
use ddpm::process::Prediction;
use ddpm::sample::SamplerConfig;
use ddpm::train::{AdamConfig, Saved};
use ddpm::{
    Checkpoint, Denoiser, Diffusion, Error, NoiseSchedule, Result, Sampler, Solver, TrainConfig,
    Trainer, UNet, UNetConfig,
};
use tempfile::TempDir;

const FILES: [&str; 3] = ["model.safetensors", "ema.safetensors", "optimizer.safetensors"];

fn network() -> UNetConfig {
    UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![16, 24],
        time_dim: 16,
        dropout: 0.1,
        ..UNetConfig::mnist()
    }
}

fn config(steps: u64) -> TrainConfig {
    TrainConfig { steps, batch_size: 4, horizontal_flip: true, ..TrainConfig::mnist() }
}

struct Waves(usize);

impl Dataset for Waves {
    fn len(&self) -> usize {
        self.0
    }

    fn shape(&self) -> ImageShape {
        (1, 8, 8).into()
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        let wave = |i: usize| ((index + 1) as f32 * i as f32 * 0.37).sin();
        pixels
            .iter_mut()
            .enumerate()
            .for_each(|(i, pixel)| *pixel = (wave(i) * 127.5 + 127.5) as u8);
        Ok(None)
    }
}

fn new(config: TrainConfig) -> Trainer<UNetConfig> {
    Trainer::new(network(), config, Diffusion::ddpm(), &Device::Cpu).unwrap()
}

fn resume(dir: &Path, config: TrainConfig) -> Result<Trainer<UNetConfig>> {
    Trainer::resume(dir, network(), config, Diffusion::ddpm(), &Device::Cpu)
}

/// Creates a directory with a checkpoint after two steps.
fn saved() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("checkpoint");
    let mut trainer = new(config(2));
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&checkpoint).unwrap();
    (dir, checkpoint)
}

fn names(dir: &Path) -> Vec<String> {
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

#[test]
fn a_resumed_run_equals_the_unbroken_one() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, broken] = ["whole", "broken"].map(|name| dir.path().join(name));
    let mut trainer = new(config(7));
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&whole).unwrap();

    // 11 images in batches of 4: both stops are in the middle of an epoch.
    let mut trainer = new(config(2));
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&broken).unwrap();
    for steps in [5, 7] {
        let mut trainer = resume(&broken, config(steps)).unwrap();
        trainer.fit(&Waves(11), &mut ()).unwrap();
        trainer.save(&broken).unwrap();
    }
    for file in FILES {
        assert_eq!(
            fs::read(whole.join(file)).unwrap(),
            fs::read(broken.join(file)).unwrap(),
            "{file}"
        );
    }
    assert_eq!(Checkpoint::open(&broken).unwrap().step(), 7);
}

/// Returns the trainer's network without gradients, so that it is computed like a loaded one.
fn frozen(trainer: &Trainer<UNetConfig>) -> Model<UNet> {
    let weights = trainer.vars().iter().map(|(k, v)| (k.clone(), v.as_detached_tensor())).collect();
    let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    trainer.architecture().build(vb).unwrap()
}

#[test]
fn sampling_needs_the_directory_alone() {
    let (_dir, path) = saved();
    let trainer = resume(&path, config(2)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.architecture::<UNetConfig>().unwrap(), network());
    assert_eq!(checkpoint.train_config(), &config(2));
    let sampler = Sampler::new(checkpoint.diffusion(), Solver::ddim(), 3).unwrap();
    let sample = |model: &dyn Denoiser| {
        // `sample` would clamp: after so few steps of training, nearly all values are out of range.
        let steps = sampler.steps(&model, (2, 1, 8, 8), 5, &Device::Cpu).unwrap();
        let images = steps.map(|step| step.unwrap().x).last().unwrap();
        images.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let ema = sample(&checkpoint.ema::<UNetConfig>(&Device::Cpu).unwrap());
    assert_eq!(ema, sample(&trainer.ema_model().unwrap()));
    let model = sample(&checkpoint.model::<UNetConfig>(&Device::Cpu).unwrap());
    assert_eq!(model, sample(&frozen(&trainer)));
    assert_ne!(ema, model);
}

#[test]
fn without_an_average_the_weights_stand_in() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { ema: None, ..config(1) };
    let mut trainer = new(config.clone());
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(dir.path().join("run")).unwrap();
    let checkpoint = Checkpoint::open(dir.path().join("run")).unwrap();
    assert_eq!(
        names(checkpoint.dir()),
        ["checkpoint.json", "model.safetensors", "optimizer.safetensors"]
    );
    let x = Tensor::ones((1, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let t = Tensor::new(&[3u32], &Device::Cpu).unwrap();
    let run = |model: &Model<UNet>| {
        model.forward(&x, &t).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let expected = run(&frozen(&trainer));
    assert_eq!(run(&checkpoint.ema::<UNetConfig>(&Device::Cpu).unwrap()), expected);
    assert_eq!(run(&trainer.ema_model().unwrap()), expected);
    resume(&dir.path().join("run"), config).unwrap();
}

#[test]
fn the_last_k_are_kept_and_nothing_else_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    for other in ["checkpoint-000000007", "checkpoint-notes", "checkpoint-12"] {
        fs::create_dir(dir.path().join(other)).unwrap(); // of somebody else: no checkpoint in it
    }
    let mut trainer = new(TrainConfig { keep_checkpoints: 3, ..config(100) });
    for _ in 0..6 {
        let batch = trainer.next_batch(&Waves(11)).unwrap();
        trainer.step(&batch).unwrap();
        trainer.save(&path).unwrap();
    }
    trainer.save(&path).unwrap(); // the same step again
    let expected = [
        "checkpoint",
        "checkpoint-000000005",
        "checkpoint-000000006",
        "checkpoint-000000007",
        "checkpoint-12",
        "checkpoint-notes",
    ];
    assert_eq!(names(dir.path()), expected);
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 6);
    let batch = trainer.next_batch(&Waves(11)).unwrap();
    trainer.step(&batch).unwrap();
    trainer.save(&path).unwrap();
    // Step 7 would now be moved to a path where a foreign directory is.
    let error = trainer.save(&path).unwrap_err();
    let expected = dir.path().join("checkpoint-000000007");
    assert!(matches!(&error, Error::Occupied { path, .. } if *path == expected), "{error}");
    assert!(error.to_string().contains("it holds no checkpoint, and one of that step"), "{error}");
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 7);
    let older = dir.path().join("checkpoint-000000005");
    assert_eq!(Checkpoint::open(older).unwrap().step(), 5);
}

#[test]
fn a_new_run_beside_an_old_one_keeps_both() {
    let (dir, path) = saved();
    let mut trainer = new(TrainConfig { seed: 1, ..config(100) });
    // The checkpoint of the old run that was moved aside, and a copy by a user, whose name has another step.
    let old = dir.path().join("checkpoint-000000002");
    fs::rename(&path, &old).unwrap();
    let copy = dir.path().join("checkpoint-20251123153000");
    fs::create_dir(&copy).unwrap();
    for file in FILES {
        fs::copy(old.join(file), copy.join(file)).unwrap();
    }
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(20));
        let batch = trainer.next_batch(&Waves(11)).unwrap();
        trainer.step(&batch).unwrap();
        trainer.save(&path).unwrap();
    }
    let kept =
        ["checkpoint", "checkpoint-000000001", "checkpoint-000000002", "checkpoint-20251123153000"];
    assert_eq!(names(dir.path()), kept);

    // The new run cannot move its own step 2 to this path: the save fails, and nothing is lost.
    let batch = trainer.next_batch(&Waves(11)).unwrap();
    trainer.step(&batch).unwrap();
    let before = snapshot(dir.path());
    let error = trainer.save(&path).unwrap_err();
    assert!(matches!(&error, Error::Occupied { path, .. } if *path == old), "{error}");
    assert!(error.to_string().contains("another run: train.seed is 0"), "{error}");
    assert_eq!(snapshot(dir.path()), before);

    fs::remove_dir_all(&old).unwrap();
    trainer.save(&path).unwrap();
    assert_eq!(Checkpoint::open(&old).unwrap().train_config().seed, 1);
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().train_config().seed, 1);
}

#[test]
fn between_the_two_renames_the_older_one_is_found() {
    let (dir, path) = saved();
    fs::rename(&path, dir.path().join("checkpoint-000000002")).unwrap();
    fs::create_dir(dir.path().join("checkpoint.saving")).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 2);
    let trainer = resume(&path, config(3)).unwrap();
    trainer.save(&path).unwrap();
    assert!(!names(dir.path()).contains(&"checkpoint.saving".to_string()));
}

#[test]
fn between_the_two_renames_the_new_one_is_found_and_not_lost() {
    let (dir, path) = saved();
    resume(&path, config(3)).unwrap().save(dir.path().join("other")).unwrap();
    let mut trainer = resume(&path, config(3)).unwrap();
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&path).unwrap();
    let saving = dir.path().join("checkpoint.saving");
    fs::rename(&path, &saving).unwrap();
    assert_eq!(names(dir.path()), ["checkpoint-000000002", "checkpoint.saving", "other"]);
    let found = Checkpoint::open(&path).unwrap();
    assert_eq!((found.step(), found.dir()), (3, &*saving));

    // A run that may not replace the checkpoint leaves it unchanged.
    let before = snapshot(dir.path());
    new(TrainConfig { seed: 1, ..config(1) }).save(&path).unwrap_err();
    assert_eq!(snapshot(dir.path()), before);

    // The next save first moves it to its place, and then aside.
    let mut trainer = resume(&path, config(4)).unwrap();
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&path).unwrap();
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint-000000003", "other"]);
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 4);

    // An incomplete new checkpoint is ignored.
    fs::rename(&path, &saving).unwrap();
    truncate(&saving.join("checkpoint.json"), |n| n - 1);
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 3);
    fs::remove_file(saving.join("checkpoint.json")).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 3);
    fs::remove_dir_all(dir.path().join("checkpoint-000000003")).unwrap();
    let error = Checkpoint::open(&path).map(drop).unwrap_err();
    assert!(matches!(error, Error::NoCheckpoint { path: at, .. } if at == path));
}

#[test]
fn another_runs_checkpoint_is_not_replaced() {
    let (dir, path) = saved();
    let before = snapshot(dir.path());
    let refused = |network, config, diffusion| {
        let trainer = Trainer::new(network, config, diffusion, &Device::Cpu).unwrap();
        let error = trainer.save(&path).unwrap_err();
        assert!(matches!(error, Error::ConfigMismatch { .. }), "{error}");
        assert_eq!(snapshot(dir.path()), before, "{error}");
        error.to_string()
    };
    let seeded = refused(network(), TrainConfig { seed: 1, ..config(2) }, Diffusion::ddpm());
    let expected =
        "train.seed is 0 in the checkpoint, but 1 was requested; save another run elsewhere";
    assert_eq!(seeded, expected);
    refused(UNetConfig { time_dim: 32, ..network() }, config(2), Diffusion::ddpm());
    let cosine = Diffusion::new(NoiseSchedule::cosine(1000).unwrap(), Prediction::Epsilon);
    refused(network(), config(2), cosine);

    // A second run with the same configuration would remove the old one after a few saves.
    let error = new(TrainConfig { log_every: 5, ..config(9) }).save(&path).unwrap_err();
    assert!(error.to_string().contains("step is 0; it must be at least 2"), "{error}");
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn what_a_killed_save_left_is_removed_by_the_next() {
    let (dir, path) = saved();
    let trainer = resume(&path, config(3)).unwrap();
    for left in ["checkpoint.saving", "checkpoint.removing"] {
        fs::create_dir(dir.path().join(left)).unwrap();
        fs::write(dir.path().join(left).join(FILES[0]), "the half of it").unwrap();
    }
    trainer.save(&path).unwrap();
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint-000000002"]);
}

#[test]
fn a_failed_save_leaves_the_last_checkpoint_and_no_rubbish() {
    let (dir, path) = saved();
    let before = fs::read(path.join(FILES[0])).unwrap();
    let trainer = resume(&path, config(3)).unwrap();
    // A file at the path of the directory for new files belongs to the user.
    fs::write(dir.path().join("checkpoint.saving"), "in the way").unwrap();
    let error = trainer.save(&path).unwrap_err();
    assert!(matches!(error, Error::Occupied { .. }), "{error}");
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint.saving"]);
    assert_eq!(fs::read(path.join(FILES[0])).unwrap(), before);
    let error = trainer.save("/dev/null/checkpoint").unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn weights_of_a_file_can_be_trained_in_another_way() {
    let (_dir, path) = saved();
    let other = TrainConfig { seed: 9, optimizer: AdamConfig::adamw(1e-3, 0.1), ..config(1) };
    let mut trainer = new(other);
    trainer.set_weights(path.join(FILES[0])).unwrap();
    let saved = resume(&path, config(2)).unwrap();
    for (name, var) in saved.vars() {
        let [ours, theirs] = [&trainer.vars()[name], var].map(|v| v.flatten_all().unwrap());
        assert_eq!(ours.to_vec1::<f32>().unwrap(), theirs.to_vec1::<f32>().unwrap(), "{name}");
    }
    trainer.fit(&Waves(11), &mut ()).unwrap();
    let message = trainer.set_weights(path.join(FILES[0])).unwrap_err().to_string();
    assert_eq!(message, "step is 1; it must be 0 when weights are set");
}

/// Rewrites `checkpoint.json`.
fn edit(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let file = path.join("checkpoint.json");
    let mut json = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    edit(&mut json);
    fs::write(file, serde_json::to_vec(&json).unwrap()).unwrap();
}

/// Converts a checkpoint to the format of 0.1.0, which had no checksums.
fn as_format_1(path: &Path) {
    edit(path, |json| {
        json["format_version"] = 1.into();
        json.as_object_mut().unwrap().remove("files");
    });
}

/// Rewrites a file of tensors of a checkpoint, and removes the checksums.
fn edit_tensors(file: &Path, edit: impl FnOnce(&mut std::collections::HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, file).unwrap();
    as_format_1(file.parent().unwrap());
}

fn truncate(file: &Path, keep: impl FnOnce(usize) -> usize) {
    let bytes = fs::read(file).unwrap();
    fs::write(file, &bytes[..keep(bytes.len())]).unwrap();
}

#[test]
fn every_damage_has_its_own_error_and_nothing_is_overwritten() {
    type Damage = fn(&Path);
    let cases: &[(&str, Damage, &str)] = &[
        (
            "no directory",
            |p| fs::remove_dir_all(p).unwrap(),
            "no checkpoint here: there is no checkpoint.json",
        ),
        (
            "an empty directory",
            |p| {
                fs::remove_dir_all(p).unwrap();
                fs::create_dir(p).unwrap();
            },
            "no checkpoint here",
        ),
        (
            "a file in its place",
            |p| {
                fs::remove_dir_all(p).unwrap();
                fs::write(p, "").unwrap();
            },
            "no checkpoint here",
        ),
        (
            "a directory as state",
            |p| {
                fs::remove_file(p.join("checkpoint.json")).unwrap();
                fs::create_dir(p.join("checkpoint.json")).unwrap();
            },
            "checkpoint.json is not a file",
        ),
        ("empty state", |p| truncate(&p.join("checkpoint.json"), |_| 0), "damaged file: EOF"),
        (
            "truncated state",
            |p| truncate(&p.join("checkpoint.json"), |n| n / 2),
            "damaged file: EOF",
        ),
        (
            "state that is not JSON",
            |p| fs::write(p.join("checkpoint.json"), "{]").unwrap(),
            "damaged file: key must be",
        ),
        (
            "no version",
            |p| {
                edit(p, |j| {
                    j.as_object_mut().unwrap().remove("format_version");
                })
            },
            "format_version is missing",
        ),
        (
            "a newer version",
            |p| {
                edit(p, |j| {
                    j["format_version"] = 3.into();
                    j["news"] = 1.into();
                })
            },
            "checkpoint format 3 is newer than 2",
        ),
        (
            "a version below any",
            |p| edit(p, |j| j["format_version"] = (-1).into()),
            "checkpoint.json: damaged file: format_version is -1; it must be from 1 to 2",
        ),
        (
            "a broken version",
            |p| edit(p, |j| j["format_version"] = 1.5.into()),
            "format_version is 1.5; it must be from 1 to 2",
        ),
        (
            "a version as text",
            |p| edit(p, |j| j["format_version"] = "2".into()),
            r#"format_version is "2"; it must be from 1 to 2"#,
        ),
        ("an unknown field", |p| edit(p, |j| j["surprise"] = 1.into()), "unknown field `surprise`"),
        (
            "a missing field",
            |p| {
                edit(p, |j| {
                    j.as_object_mut().unwrap().remove("step");
                })
            },
            "missing field `step`",
        ),
        (
            "a negative step",
            |p| edit(p, |j| j["step"] = (-1).into()),
            "invalid value: integer `-1`",
        ),
        (
            "a step without random numbers",
            |p| edit(p, |j| j["step"] = (1u64 << 40).into()),
            "checkpoint.json: damaged file: step is 1099511627776; it must be at most 1099511627775",
        ),
        (
            "more images than can be counted",
            |p| edit(p, |j| j["images_seen"] = u64::MAX.into()),
            "checkpoint.json: damaged file: images_seen is 18446744073709551615; it must be at most",
        ),
        (
            "more averages than updates",
            |p| edit(p, |j| j["ema_updates"] = 3.into()),
            "checkpoint.json: damaged file: ema_updates is 3; it must be at most 2",
        ),
        (
            "a wrong schedule",
            |p| edit(p, |j| j["diffusion"]["schedule"]["linear"]["beta_end"] = 7.into()),
            "checkpoint.json: damaged file: beta_end is 7; it must be",
        ),
        (
            "a huge schedule",
            |p| edit(p, |j| j["diffusion"]["schedule"]["linear"]["steps"] = u64::MAX.into()),
            "schedule steps is 18446744073709551615",
        ),
        (
            "a wrong recipe",
            |p| edit(p, |j| j["train"]["batch_size"] = 0.into()),
            "train.batch_size is 0 in the checkpoint, but 4 was requested; resume the run with the config",
        ),
        (
            "a huge network",
            |p| edit(p, |j| j["network"]["config"]["hidden_dims"] = vec![65536; 16].into()),
            "network.hidden_dims is a list of 16 in the checkpoint, but [16,24] was requested",
        ),
        (
            "truncated weights of format 1",
            |p| {
                as_format_1(p);
                truncate(&p.join("model.safetensors"), |n| n - 1)
            },
            "damaged file: incomplete metadata, file not fully covered",
        ),
        (
            "truncated weights",
            |p| truncate(&p.join("model.safetensors"), |n| n - 1),
            "model.safetensors: damaged file: 300171 bytes long; 300172 were written",
        ),
        (
            "no checksums",
            |p| {
                edit(p, |j| {
                    j.as_object_mut().unwrap().remove("files");
                })
            },
            "checkpoint.json: damaged file: files is missing; it must be present since format 2",
        ),
        (
            "averages that the recipe does not have",
            |p| edit(p, |j| j["train"]["ema"] = serde_json::Value::Null),
            "files.ema.safetensors is present; it must be absent, as train.ema is",
        ),
        (
            "a network's configuration of a megabyte",
            |p| edit(p, |j| j["network"]["config"]["hidden_dims"] = vec![16; 1 << 20].into()),
            "length of network.config is 3145",
        ),
        (
            "a kind of a megabyte",
            |p| edit(p, |j| j["network"]["kind"] = "x".repeat(1 << 20).into()),
            "xxx... (1048576 bytes) in the checkpoint, but unet was requested",
        ),
        (
            "an unknown field of a megabyte, in lines",
            |p| edit(p, |j| j["x\n".repeat(1 << 19)] = 1.into()),
            "unknown field `x x x",
        ),
        (
            "a header that lies about its length",
            |p| {
                as_format_1(p);
                let file = p.join("model.safetensors");
                let mut bytes = fs::read(&file).unwrap();
                bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
                fs::write(file, bytes).unwrap();
            },
            "damaged file",
        ),
        (
            "no weights",
            |p| fs::remove_file(p.join("model.safetensors")).unwrap(),
            "model.safetensors: No such file",
        ),
        (
            "a directory as weights",
            |p| {
                fs::remove_file(p.join("model.safetensors")).unwrap();
                fs::create_dir(p.join("model.safetensors")).unwrap();
            },
            "model.safetensors: not a regular file",
        ),
        #[cfg(unix)]
        (
            "a device as averages",
            |p| {
                fs::remove_file(p.join("ema.safetensors")).unwrap();
                std::os::unix::fs::symlink("/dev/null", p.join("ema.safetensors")).unwrap();
            },
            "ema.safetensors: not a regular file",
        ),
        (
            "whole numbers as weights",
            |p| {
                edit_tensors(&p.join("model.safetensors"), |t| {
                    t.insert("out_conv.bias".into(), Tensor::new(&[1u8], &Device::Cpu).unwrap());
                })
            },
            "model.safetensors: damaged file: out_conv.bias is of dtype U8; it must be F16, BF16, F32",
        ),
        (
            "a missing weight",
            |p| {
                edit_tensors(&p.join("model.safetensors"), |t| {
                    t.remove("out_conv.bias");
                })
            },
            "weight out_conv.bias is missing",
        ),
        (
            "a weight of another shape",
            |p| {
                edit_tensors(&p.join("model.safetensors"), |t| {
                    t.insert(
                        "out_conv.bias".into(),
                        Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap(),
                    );
                })
            },
            "weight out_conv.bias has shape [2]; the network's has [1]",
        ),
        (
            "an unknown weight",
            |p| {
                edit_tensors(&p.join("ema.safetensors"), |t| {
                    t.insert("other".into(), Tensor::new(&[1f32], &Device::Cpu).unwrap());
                })
            },
            "weight other is not one of the network's",
        ),
    ];
    for &(what, damage, expected) in cases {
        let (dir, path) = saved();
        damage(&path);
        let before = snapshot(dir.path());
        let message = match resume(&path, config(3)) {
            Ok(_) => panic!("{what}: resumed"),
            Err(error) => error.to_string(),
        };
        assert!(message.contains(expected), "{what}: {message}");
        assert!(!message.contains('\n') && message.len() < 500, "{what}: {message}");
        assert_eq!(snapshot(dir.path()), before, "{what}");
    }
}

#[test]
fn a_network_that_cannot_be_built_names_the_file() {
    let (_dir, path) = saved();
    edit(&path, |json| json["network"]["config"]["time_dim"] = 7.into());
    let checkpoint = Checkpoint::open(&path).unwrap();
    let message = checkpoint.ema::<UNetConfig>(&Device::Cpu).map(drop).unwrap_err().to_string();
    let expected = "checkpoint.json: damaged file: network.config: time_dim is 7; it must be even";
    assert!(message.contains(expected), "{message}");
}

/// Files of weights may have another precision, because they may come from elsewhere.
#[test]
fn averages_of_another_precision_go_on_in_the_weights() {
    let (_dir, path) = saved();
    let averages = || {
        let mut trainer = resume(&path, config(4)).unwrap();
        trainer.fit(&Waves(11), &mut ()).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        trainer.ema().unwrap().averages().values().flat_map(values).collect::<Vec<_>>()
    };
    let expected = averages();
    edit_tensors(&path.join("ema.safetensors"), |tensors| {
        let double = |t: &Tensor| t.to_dtype(candle_core::DType::F64).unwrap();
        tensors.values_mut().for_each(|tensor| *tensor = double(tensor));
    });
    assert_eq!(averages(), expected);
}

#[test]
fn long_lists_are_not_told_in_full() {
    let (_dir, path) = saved();
    edit(&path, |json| {
        json["diffusion"]["schedule"] =
            serde_json::json!({ "custom": { "betas": vec![0.01; 1000] } });
    });
    let custom = |betas| {
        let schedule = NoiseSchedule::from_betas(betas).unwrap();
        let diffusion = Diffusion::new(schedule, Prediction::Epsilon);
        Trainer::resume(&path, network(), config(3), diffusion, &Device::Cpu).map(drop)
    };
    custom(vec![0.01; 1000]).unwrap();
    let mut other = vec![0.01; 1000];
    other[998] = 0.02;
    for (betas, expected) in [
        (
            other,
            "diffusion.schedule.custom.betas[998] is 0.01 in the checkpoint, but 0.02 was requested; ",
        ),
        (
            vec![0.01; 999],
            "diffusion.schedule.custom.betas is a list of 1000 in the checkpoint, \
             but a list of 999 was requested; ",
        ),
    ] {
        let message = custom(betas).unwrap_err().to_string();
        assert!(message.starts_with(expected) && message.contains("set_weights"), "{message}");
    }
    let message = resume(&path, config(3)).map(drop).unwrap_err().to_string();
    assert!(message.len() < 400, "{message}");
}

#[test]
fn damaged_optimiser_states_are_refused() {
    let name = "exp_avg.out_conv.bias";
    for (expected, damage) in [
        ("weight exp_avg.out_conv.bias is missing", None),
        (
            "weight exp_avg.out_conv.bias has shape [3]",
            Some(Tensor::new(&[0f32; 3], &Device::Cpu).unwrap()),
        ),
    ] {
        let (_dir, path) = saved();
        edit_tensors(&path.join("optimizer.safetensors"), |tensors| {
            tensors.remove(name);
            tensors.extend(damage.map(|tensor| (name.to_string(), tensor)));
        });
        let message = resume(&path, config(3)).map(drop).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

/// Every file below a directory, with its content.
fn snapshot(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            // A link may be dangling.
            files.push((path.clone(), fs::read(path).unwrap_or_default()));
        }
    }
    files.sort();
    files
}

#[test]
fn another_run_cannot_go_on_from_a_checkpoint() {
    let (_dir, path) = saved();
    let mismatch = |network, config, diffusion| {
        let result = Trainer::resume(&path, network, config, diffusion, &Device::Cpu);
        match result.map(drop).unwrap_err() {
            Error::ConfigMismatch { field, found, expected, .. } => {
                format!("{field} {found} {expected}")
            }
            other => panic!("{other}"),
        }
    };
    let wide = UNetConfig { hidden_dims: vec![16, 32], ..network() };
    assert_eq!(mismatch(wide, config(3), Diffusion::ddpm()), "network.hidden_dims[1] 24 32");
    let large = TrainConfig { batch_size: 8, ..config(3) };
    assert_eq!(mismatch(network(), large, Diffusion::ddpm()), "train.batch_size 4 8");
    let seeded = TrainConfig { seed: 1, ..config(3) };
    assert_eq!(mismatch(network(), seeded, Diffusion::ddpm()), "train.seed 0 1");
    let fast = TrainConfig { optimizer: AdamConfig::adam(1e-3), ..config(3) };
    let found = mismatch(network(), fast, Diffusion::ddpm());
    assert_eq!(found, "train.optimizer.learning_rate 0.0001 0.001");
    let schedule = NoiseSchedule::cosine(1000).unwrap();
    let found = mismatch(network(), config(3), Diffusion::new(schedule, Prediction::Epsilon));
    assert!(found.starts_with("diffusion.schedule"), "{found}");
    let velocity = Diffusion::new(Diffusion::ddpm().schedule().clone(), Prediction::Velocity);
    let found = mismatch(network(), config(3), velocity);
    assert_eq!(found, r#"diffusion.prediction "epsilon" "velocity""#);

    edit(&path, |json| json["network"]["kind"] = "transformer".into());
    assert_eq!(mismatch(network(), config(3), Diffusion::ddpm()), "network.kind transformer unet");
    let error = Checkpoint::open(&path).unwrap().ema::<UNetConfig>(&Device::Cpu).unwrap_err();
    assert!(matches!(error, Error::ConfigMismatch { .. }), "{error}");
}

#[test]
fn another_data_set_is_noticed() {
    let (_dir, path) = saved();
    let mut trainer = resume(&path, config(3)).unwrap();
    let message = trainer.fit(&Waves(12), &mut ()).unwrap_err().to_string();
    assert!(
        message.starts_with("number of images is 12; it must be 11, as earlier in"),
        "{message}"
    );
}

fn step_and_save(trainer: &mut Trainer<UNetConfig>, path: &Path) -> Saved {
    let batch = trainer.next_batch(&Waves(11)).unwrap();
    trainer.step(&batch).unwrap();
    trainer.save(path).unwrap()
}

#[test]
fn a_checkpoint_of_format_1_is_read_and_goes_on() {
    // The content of a checkpoint in the format of 0.1.0, as the example `mnist` wrote it.
    let json = include_str!("data/checkpoint-format-1.json");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let old: serde_json::Value = serde_json::from_str(json).unwrap();
    let config: TrainConfig = serde_json::from_value(old["train"].clone()).unwrap();
    let schedule = NoiseSchedule::cosine(1000).unwrap();
    let diffusion = Diffusion::new(schedule, Prediction::Velocity);
    let new = Trainer::new(UNetConfig::mnist(), config.clone(), diffusion.clone(), &Device::Cpu);
    new.unwrap().save(&path).unwrap();
    fs::write(path.join("checkpoint.json"), json).unwrap();

    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!((checkpoint.step(), checkpoint.sampling()), (20, None));
    checkpoint.ema::<UNetConfig>(&Device::Cpu).unwrap();
    let resume = || {
        Trainer::resume(&path, UNetConfig::mnist(), config.clone(), diffusion.clone(), &Device::Cpu)
    };
    resume().unwrap().save(&path).unwrap();
    let written: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join("checkpoint.json")).unwrap()).unwrap();
    assert_eq!(written["format_version"], 2);
    assert_eq!(resume().unwrap().steps(), 20);
}

#[test]
fn what_trained_in_half_precision_is_read_by_every_build() {
    for precision in ["bf16", "f16"] {
        let (_dir, path) = saved();
        edit(&path, |json| {
            json["train"]["precision"] = precision.into();
            // A run in f16 has a scaler. Its settings may be ones that a later version rejects.
            json["train"]["grad_scaler"]["growth_factor"] = 0.5.into();
        });
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.ema::<UNetConfig>(&Device::Cpu).unwrap();
        checkpoint.model::<UNetConfig>(&Device::Cpu).unwrap();
        checkpoint.sampler().unwrap();
        if !cfg!(feature = "f16") {
            let error = resume(&path, checkpoint.train_config().clone()).map(drop).unwrap_err();
            assert!(matches!(error, Error::Config { field: "precision", .. }), "{error}");
            assert!(error.to_string().contains("needs the feature `f16`"), "{error}");
        }
    }
}

#[test]
fn every_flipped_bit_is_seen_and_the_file_named() {
    let (dir, path) = saved();
    let mut trainer = resume(&path, config(9)).unwrap();
    step_and_save(&mut trainer, &path);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for file in FILES {
        let file = path.join(file);
        let whole = fs::read(&file).unwrap();
        for _ in 0..40 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let bit = random as usize % (8 * whole.len());
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&file, bytes).unwrap();
            let error = Checkpoint::open(&path).map(drop).unwrap_err();
            assert!(
                matches!(&error, Error::Damaged { path, .. } if *path == file),
                "{bit}: {error}"
            );
            let older = dir.path().join("checkpoint-000000002");
            let told = format!("; {} is whole", older.display());
            assert!(error.to_string().ends_with(&told), "{error}");
            assert!(resume(&path, config(9)).is_err());
        }
        fs::write(&file, whole).unwrap();
        Checkpoint::open(&path).unwrap();
    }
    // The weights of another step, under the name of this one.
    fs::copy(dir.path().join("checkpoint-000000002").join(FILES[0]), path.join(FILES[0])).unwrap();
    let message = Checkpoint::open(&path).map(drop).unwrap_err().to_string();
    assert!(message.contains("its CRC-32 is "), "{message}");
}

#[test]
fn averages_can_be_shared_without_the_other_files() {
    let (_dir, path) = saved();
    fs::remove_file(path.join("model.safetensors")).unwrap();
    fs::remove_file(path.join("optimizer.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.ema::<UNetConfig>(&Device::Cpu).unwrap();
    let error = checkpoint.model::<UNetConfig>(&Device::Cpu).map(drop).unwrap_err();
    assert!(error.to_string().contains("model.safetensors: No such file"), "{error}");
}

#[test]
fn a_checkpoint_that_was_replaced_while_open_says_so() {
    let (_dir, path) = saved();
    let checkpoint = Checkpoint::open(&path).unwrap();
    step_and_save(&mut resume(&path, config(9)).unwrap(), &path);
    let message = checkpoint.ema::<UNetConfig>(&Device::Cpu).map(drop).unwrap_err().to_string();
    assert!(
        message.ends_with("replaced since the checkpoint was opened; open it again"),
        "{message}"
    );
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 3);
}

/// Runs only as a child process, started by the test below.
#[cfg(target_os = "linux")]
#[test]
fn opens_a_huge_state() {
    let Some(path) = std::env::var_os(HUGE).map(PathBuf::from) else { return };
    let network =
        Checkpoint::open(&path).and_then(|checkpoint| checkpoint.architecture::<UNetConfig>());
    let message = network.map(drop).unwrap_err().to_string();
    assert!(message.len() < 500, "{} bytes of message", message.len());
    println!("refused: {message}");
}

#[cfg(target_os = "linux")]
const HUGE: &str = "DDPM_TEST_OPENS_A_HUGE_STATE";

#[cfg(target_os = "linux")]
#[test]
fn a_state_takes_little_more_memory_than_its_file() {
    let (_dir, path) = saved();
    let json = fs::read_to_string(path.join("checkpoint.json")).unwrap();
    let program = std::env::current_exe().unwrap();
    let numbers = |count: usize| "1,".repeat(count) + "1";
    for (what, from, to, expected) in [
        (
            "a network",
            "\"hidden_dims\": [",
            format!("\"hidden_dims\": [{},", numbers(31 << 20)),
            "network.config",
        ),
        (
            "a kind",
            "\"kind\": \"",
            format!("\"kind\": \"{}", "k".repeat(60 << 20)),
            "in the checkpoint",
        ),
        (
            "a version",
            "\"format_version\": ",
            format!("\"format_version\": [{}],\"x\":", numbers(31 << 20)),
            "format_version is [1,1,",
        ),
        (
            "a field",
            "\"step\"",
            format!("\"{}\": 1, \"step\"", "f".repeat(60 << 20)),
            "unknown field",
        ),
    ] {
        let huge = json.replacen(from, &to, 1);
        assert!((58 << 20..64 << 20).contains(&huge.len()), "{what}: {}", huge.len());
        fs::write(path.join("checkpoint.json"), huge).unwrap();
        // The limit allows for the file, a copy of its largest part, and the program itself.
        let output = Command::new("sh")
            .args(["-c", "ulimit -v 400000; exec \"$0\" --exact opens_a_huge_state --nocapture"])
            .arg(&program)
            .env(HUGE, &path)
            .env("RUST_TEST_THREADS", "1")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(told.contains("refused: ") && told.contains(expected), "{what}: {output:?}");
    }
}

#[test]
fn within_a_run_the_step_is_the_age_whatever_the_times_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let config = TrainConfig { keep_checkpoints: 3, ..config(100) };
    let mut trainer = new(config.clone());
    for _ in 0..3 {
        step_and_save(&mut trainer, &path);
    }
    // File times as a copy may set them: later steps have older files.
    let now = std::time::SystemTime::now();
    for (hours, name) in
        ["checkpoint-000000001", "checkpoint-000000002", "checkpoint"].iter().enumerate()
    {
        let file =
            fs::File::options().append(true).open(dir.path().join(name).join("checkpoint.json"));
        file.unwrap().set_modified(now - Duration::from_secs(3600 * (hours as u64 + 1))).unwrap();
    }
    step_and_save(&mut resume(&path, config).unwrap(), &path);
    let expected = ["checkpoint", "checkpoint-000000002", "checkpoint-000000003"];
    assert_eq!(names(dir.path()), expected);
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 3);
}

/// Runs a test of this file in a separate process, without root's permissions if it has them, to test failing
/// removals.
#[cfg(unix)]
fn as_ordinary_user(test: &str, dir: &Path) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    use std::os::unix::process::CommandExt;

    const NOBODY: u32 = 65534;
    let program = dir.join("tests");
    // The program is copied to a place that the other user can read. A separate process copies it: a program
    // that another test's child still has open for writing is busy.
    let copied = Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&program).status();
    assert!(copied.unwrap().success());
    let mut command = Command::new(&program);
    command.args(["--exact", test, "--nocapture"]).env(PROTECTED, dir).current_dir("/");
    if dir.metadata().unwrap().uid() == 0 {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
        command.uid(NOBODY).gid(NOBODY);
    }
    let output = command.output().unwrap();
    let told =
        [output.stdout, output.stderr].map(|told| String::from_utf8_lossy(&told).into_owned());
    assert!(output.status.success() && told[0].contains("1 passed"), "{}{}", told[0], told[1]);
}

#[cfg(unix)]
const PROTECTED: &str = "DDPM_TEST_PROTECTS_IN";

/// Runs only as a child process, started by the test below.
#[cfg(unix)]
#[test]
fn saves_beside_protected_checkpoints() {
    use std::os::unix::fs::PermissionsExt;

    let Some(dir) = std::env::var_os(PROTECTED).map(PathBuf::from) else { return };
    let path = dir.join("checkpoint");
    let allow = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let is_not_removed = |saved: &Saved, at: &Path| {
        let [Error::NotRemoved { path, source }] = saved.warnings.as_slice() else {
            panic!("{:?}", saved.warnings)
        };
        assert_eq!((path.as_path(), source.kind()), (at, std::io::ErrorKind::PermissionDenied));
    };
    let mut trainer = new(config(100));
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    // A checkpoint that a user protects from changes.
    let kept = dir.join("checkpoint-000000001");
    allow(&kept, 0o555);
    for step in 3..6 {
        is_not_removed(&step_and_save(&mut trainer, &path), &kept);
        assert_eq!(Checkpoint::open(&path).unwrap().step(), step);
        assert_eq!(Checkpoint::open(&kept).unwrap().step(), 1);
        let last = format!("checkpoint-{:09}", step - 1);
        assert_eq!(names(&dir), ["checkpoint", "checkpoint-000000001", &last, "tests"]);
    }
    allow(&kept, 0o755);
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());

    // The remains of an interrupted removal, and of a copy at the path of a step that is saved again.
    let rest = dir.join("checkpoint.removing");
    fs::create_dir(&rest).unwrap();
    fs::write(rest.join("model.safetensors"), "half of it").unwrap();
    allow(&rest, 0o555);
    is_not_removed(&step_and_save(&mut trainer, &path), &rest);
    assert_eq!(names(&dir), ["checkpoint", "checkpoint-000000006", "checkpoint.removing", "tests"]);
    fs::rename(&path, dir.join("checkpoint-000000007")).unwrap();
    fs::create_dir(&path).unwrap();
    for file in fs::read_dir(dir.join("checkpoint-000000007")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), path.join(file.file_name())).unwrap();
    }
    allow(&dir.join("checkpoint-000000007"), 0o555);
    let warnings = step_and_save(&mut trainer, &path).warnings;
    assert!(warnings.iter().all(|w| matches!(w, Error::NotRemoved { .. })), "{warnings:?}");
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 8);
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            allow(&path, 0o755);
        }
    }
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    assert_eq!(names(&dir), ["checkpoint", "checkpoint-000000008", "tests"]);
}

/// Runs only as a child process, started by the test below.
#[cfg(unix)]
#[test]
fn claims_in_a_directory_of_others() {
    use std::os::unix::fs::PermissionsExt;

    let Some(dir) = std::env::var_os(PROTECTED).map(PathBuf::from) else { return };
    let out = dir.join("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o555)).unwrap();
    let error = new(config(9)).claim(out.join("checkpoint")).unwrap_err();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o755)).unwrap();
    let Error::Io { path, source } = &error else { panic!("{error}") };
    assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
    assert_eq!(*path, out.join("checkpoint.lock"));
}

#[cfg(unix)]
#[test]
fn a_directory_that_is_not_writable_is_an_error_of_permission() {
    let dir = tempfile::tempdir().unwrap();
    as_ordinary_user("claims_in_a_directory_of_others", dir.path());
}

#[test]
fn what_no_save_wrote_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let theirs = ["checkpoint.removing", "checkpoint.removing-2"].map(|name| dir.path().join(name));
    for theirs in &theirs {
        fs::create_dir(theirs).unwrap();
        fs::write(theirs.join("thesis.txt"), "").unwrap();
    }
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    fs::write(path.join("notes.txt"), "the good one").unwrap();
    step_and_save(&mut trainer, &path);
    let warnings = step_and_save(&mut trainer, &path).warnings;
    let noted = dir.path().join("checkpoint-000000001");
    let [Error::NotRemoved { path: told, source }] = warnings.as_slice() else {
        panic!("{warnings:?}")
    };
    assert_eq!(*told, noted);
    assert!(source.to_string().starts_with("it holds notes.txt, which is not"), "{source}");
    // Files that a system adds do not prevent a save.
    fs::remove_file(noted.join("notes.txt")).unwrap();
    fs::write(noted.join(".DS_Store"), "").unwrap();
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    assert!(!noted.exists());
    assert!(theirs.iter().all(|theirs| theirs.join("thesis.txt").is_file()));
}

#[test]
fn a_claim_that_fails_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let [path, other] = ["checkpoint", "other"].map(|name| dir.path().join(name));
    fs::write(&other, "").unwrap();
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    trainer.claim(&other).unwrap_err();
    fs::create_dir(dir.path().join("checkpoint-000000003")).unwrap();
    trainer.claim(&path).unwrap_err();
    assert!(matches!(new(config(9)).claim(&path), Err(Error::Locked { .. })));
}

#[cfg(unix)]
#[test]
fn an_old_checkpoint_that_cannot_be_removed_is_told_and_hinders_no_save() {
    let dir = tempfile::tempdir().unwrap();
    as_ordinary_user("saves_beside_protected_checkpoints", dir.path());
}

#[test]
fn a_claim_finds_what_is_in_the_way_before_the_first_step() {
    type Put = fn(&Path);
    let cases: &[(&str, Put, Option<&str>)] = &[
        ("nothing", |_| {}, None),
        ("an empty directory", |p| fs::create_dir(p).unwrap(), None),
        ("a file", |p| fs::write(p, "").unwrap(), Some("it is a file")),
        (
            "another's directory",
            |p| {
                fs::create_dir(p).unwrap();
                fs::write(p.join("notes.txt"), "").unwrap();
            },
            Some("it holds notes.txt, and no checkpoint.json"),
        ),
        (
            "half a copy",
            |p| {
                fs::create_dir(p).unwrap();
                FILES.iter().for_each(|file| fs::write(p.join(file), "").unwrap());
            },
            Some("it holds ema.safetensors and 2 more, and no checkpoint.json"),
        ),
        #[cfg(unix)]
        (
            "a dangling link",
            |p| std::os::unix::fs::symlink("nowhere", p).unwrap(),
            Some("it is a link to nowhere, which does not exist"),
        ),
        #[cfg(unix)]
        (
            "a link to an empty directory",
            |p| {
                fs::create_dir(p.with_file_name("large-disk")).unwrap();
                std::os::unix::fs::symlink("large-disk", p).unwrap();
            },
            Some(
                "it is a link to large-disk, which holds no checkpoint; link the directory around it",
            ),
        ),
        (
            "another's directory where new files belong",
            |p| {
                let saving = p.with_file_name("checkpoint.saving");
                fs::create_dir(&saving).unwrap();
                fs::write(saving.join("notes.txt"), "").unwrap();
            },
            Some("checkpoint.saving: no checkpoint can be saved here: it holds notes.txt, which"),
        ),
        (
            "another's directory where an old one is moved",
            |p| fs::create_dir(p.with_file_name("checkpoint-000000005")).unwrap(),
            Some("checkpoint-000000005: no checkpoint can be saved here: it holds no checkpoint"),
        ),
        (
            "another's directory that is never in the way",
            |p| fs::create_dir(p.with_file_name("checkpoint-000000010")).unwrap(),
            None,
        ),
        (
            "another run",
            |p| drop(new(TrainConfig { seed: 3, ..config(9) }).save(p).unwrap()),
            Some(
                "train.seed is 3 in the checkpoint, but 0 was requested; save another run elsewhere",
            ),
        ),
        (
            "a later step",
            |p| drop(step_and_save(&mut new(config(9)), p)),
            Some("step is 0; it must be at least 1"),
        ),
        (
            "a damaged checkpoint",
            |p| {
                new(config(9)).save(p).unwrap();
                truncate(&p.join("checkpoint.json"), |n| n / 2);
            },
            Some("checkpoint.json: damaged file"),
        ),
        ("the run itself", |p| drop(new(config(9)).save(p).unwrap()), None),
    ];
    for &(what, put, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint");
        put(&path);
        let before = snapshot(dir.path());
        let mut trainer = new(config(9));
        let claimed = trainer.claim(&path).map_err(|e| e.to_string());
        assert_eq!(
            snapshot(dir.path()).len(),
            before.len() + usize::from(claimed.is_ok()),
            "{what}"
        );
        match (claimed, expected) {
            (Ok(()), None) => drop(step_and_save(&mut trainer, &path)),
            (Err(message), Some(expected)) => {
                assert!(message.contains(expected), "{what}: {message}");
                assert_eq!(snapshot(dir.path()), before, "{what}");
                // The claim returns the error that would have ended the run.
                assert_eq!(
                    trainer.save(&path).is_err(),
                    !what.contains("old one is moved"),
                    "{what}"
                );
            }
            (claimed, _) => panic!("{what}: {claimed:?}"),
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_mount_point_is_no_place_for_checkpoints() {
    let mount = Path::new("/dev/shm");
    use std::os::unix::fs::MetadataExt;
    let device = |path: &str| fs::metadata(path).map(|m| m.dev()).ok();
    if device("/dev/shm").is_none() || device("/dev/shm") == device("/dev") {
        return; // not one here
    }
    let error = new(config(9)).claim(mount).unwrap_err();
    assert!(
        error.to_string().starts_with("/dev/shm: no checkpoint can be saved here: it is a mount")
    );
    assert!(!Path::new("/dev/shm.lock").exists());
}

#[cfg(unix)]
#[test]
fn a_link_for_the_run_whose_target_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    std::os::unix::fs::symlink("unplugged", &out).unwrap();
    let error = new(config(9)).claim(out.join("checkpoint")).unwrap_err();
    assert!(matches!(&error, Error::Occupied { path, .. } if *path == out), "{error}");
    assert!(
        error.to_string().ends_with("it is a link to unplugged, which does not exist"),
        "{error}"
    );
}

#[cfg(unix)]
#[test]
fn one_run_has_one_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    let before = snapshot(dir.path());
    let mut second = new(config(9));
    for error in [second.claim(&path).unwrap_err(), second.save(&path).map(drop).unwrap_err()] {
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        let expected = "checkpoint: this process saves here; only one run at a time may";
        assert!(error.to_string().ends_with(expected), "{error}");
        assert_eq!(snapshot(dir.path()), before);
    }
    // By another path to the same place, and again.
    step_and_save(
        &mut trainer,
        &dir.path().join("../").join(dir.path().file_name().unwrap()).join("checkpoint"),
    );
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint-000000001", "checkpoint.lock"]);
    drop(trainer);
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint-000000001"]);
    resume(&path, config(9)).unwrap().claim(&path).unwrap();
}

/// Runs only as a child process, started by the test below.
#[test]
fn claims_and_waits_to_be_killed() {
    let Some(path) = std::env::var_os(CLAIMED).map(PathBuf::from) else { return };
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    println!("claimed");
    std::thread::sleep(Duration::from_secs(60));
}

const CLAIMED: &str = "DDPM_TEST_CLAIMS";

#[cfg(unix)]
#[test]
fn a_claim_is_told_with_its_process_and_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "claims_and_waits_to_be_killed", "--nocapture"])
        .env(CLAIMED, &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("claimed")));
    let message = new(config(9)).claim(&path).unwrap_err().to_string();
    if cfg!(unix) {
        assert!(message.contains(&format!("process {} saves here", child.id())), "{message}");
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    drop(trainer);
    assert_eq!(names(dir.path()), ["checkpoint"]);
}

#[cfg(unix)]
#[test]
fn a_run_whose_directory_is_removed_saves_all_the_same_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let path = out.join("checkpoint");
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    fs::remove_dir_all(&out).unwrap();
    let warnings = step_and_save(&mut trainer, &path).warnings;
    let [Error::Vanished { path: told }] = warnings.as_slice() else { panic!("{warnings:?}") };
    assert_eq!(*told, out);
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 2);
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    // The claim is effective again.
    assert!(matches!(new(config(9)).claim(&path), Err(Error::Locked { .. })));
}

#[test]
fn how_samples_are_drawn_travels_with_the_run() {
    let (_dir, path) = saved();
    let usual = Checkpoint::open(&path).unwrap();
    assert_eq!((usual.sampling(), usual.sampler().unwrap().timesteps().len()), (None, 50));

    let sampling = SamplerConfig::new(Solver::Ddim { eta: 1.0 }, 7);
    let mut trainer = resume(&path, config(9)).unwrap();
    let message =
        trainer.set_sampling(SamplerConfig::new(sampling.solver, 0)).unwrap_err().to_string();
    assert!(message.starts_with("sampling steps is 0; it must be from 1 to 1000"), "{message}");
    trainer.set_sampling(sampling).unwrap();
    trainer.save(&path).unwrap();
    step_and_save(&mut resume(&path, config(9)).unwrap(), &path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.sampling(), Some(&sampling));
    let [ours, theirs] =
        [checkpoint.sampler().unwrap(), sampling.sampler(&Diffusion::ddpm()).unwrap()];
    assert_eq!(format!("{ours:?}"), format!("{theirs:?}"));
}

#[test]
fn weights_that_are_not_finite_are_not_saved() {
    let (dir, path) = saved();
    let mut trainer = resume(&path, config(9)).unwrap();
    step_and_save(&mut trainer, &path);
    let before = snapshot(dir.path());
    let bias = &trainer.vars()["out_conv.bias"];
    bias.set(&Tensor::new(&[f32::INFINITY], &Device::Cpu).unwrap()).unwrap();
    let message = trainer.save(&path).map(drop).unwrap_err().to_string();
    assert!(
        message.starts_with("weight out_conv.bias is inf at step 3; nothing was saved"),
        "{message}"
    );
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn a_run_ends_before_its_steps_have_no_more_random_numbers() {
    let (_dir, path) = saved();
    edit(&path, |json| json["step"] = ((1u64 << 40) - 1).into());
    let mut trainer = resume(&path, config(u64::MAX)).unwrap();
    let message = trainer.fit(&Waves(11), &mut ()).unwrap_err().to_string();
    assert!(message.starts_with("step is 1099511627775; it must be less than"), "{message}");
    trainer.save(&path).unwrap();
    Checkpoint::open(&path).unwrap();
}

#[test]
fn a_checkpoint_of_no_name_is_refused_by_name() {
    let message = Checkpoint::open("").map(drop).unwrap_err().to_string();
    assert_eq!(message, r#"checkpoint directory is ""; it must be a path"#);
}

/// The environment variable of the process that the test below kills.
const VICTIM: &str = "DDPM_TEST_SAVES_UNTIL_KILLED";

/// Saves as fast as possible, and prints when a save begins and what it saved. Runs only as a child process.
#[test]
fn saves_until_killed() {
    let Some(path) = std::env::var_os(VICTIM).map(PathBuf::from) else { return };
    let mut trainer = match Checkpoint::open(&path) {
        Ok(_) => resume(&path, config(u64::MAX)).unwrap(),
        Err(_) => new(config(u64::MAX)),
    };
    loop {
        let batch = trainer.next_batch(&Waves(11)).unwrap();
        trainer.step(&batch).unwrap();
        println!("saving");
        trainer.save(&path).unwrap();
        println!("saved {}", trainer.steps());
    }
}

#[test]
fn killed_at_any_moment_a_run_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let (mut last, mut within, mut between) = (0, 0, 0);
    for round in 0..50 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "saves_until_killed", "--nocapture", "--test-threads=1"])
            .env(VICTIM, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let step_of = |line: &str| line.split_once("saved ")?.1.parse::<u64>().ok();
        let begins = |lines: &mut Lines<_>| lines.any(|line| line.unwrap().ends_with("saving"));
        // The first save shows how long a save takes. Then the child is killed at a random moment, most
        // likely within a save.
        assert!(begins(&mut lines), "round {round}: a first save");
        let start = Instant::now();
        let first = lines.by_ref().find_map(|line| step_of(&line.unwrap())).expect("a first save");
        let duration = start.elapsed();
        assert!(begins(&mut lines), "round {round}: a second save");
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(duration.mul_f64((random % 1000) as f64 / 800.0));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        let told = lines.filter_map(|line| step_of(&line.ok()?)).last().unwrap_or(first);

        within += usize::from(dir.path().join("checkpoint.saving").exists());
        between += usize::from(!path.exists());
        let trainer =
            resume(&path, config(u64::MAX)).unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert!(first > last, "round {round}: {first} after {last}");
        assert!(trainer.steps() >= told, "round {round}: {} after {told}", trainer.steps());
        last = told;
        // Leftovers are removed by the next child, or by the test.
        if round % 2 == 1 {
            trainer.save(&path).unwrap();
            let aside = format!("checkpoint-{:09}", trainer.steps());
            assert_eq!(names(dir.path()), ["checkpoint", aside.as_str()], "round {round}");
        }
    }
    println!("{last} steps saved; killed {within} times in a save, {between} between its renames");
    assert!(within >= 10, "killed only {within} times in a save");
}
