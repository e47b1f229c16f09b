//! Checkpoints that are opened: what they are read for, and errors that state what is wrong with their files.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use ddpm::nn::{Architecture, Model};
use ddpm::process::Prediction;
use ddpm::sample::SamplerConfig;
use ddpm::train::{AdamConfig, AverageConfig, WeightsFile};
use ddpm::{
    Checkpoint, Denoiser, Diffusion, Error, NoiseSchedule, Sampler, Solver, TrainConfig, Trainer,
    UNet, UNetConfig,
};

mod runs;
use runs::{
    FILES, Waves, config, edit, names, network, new, resume, saved, snapshot, step_and_save,
    truncate,
};

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

/// The metadata of a safetensors file.
fn metadata(file: &Path) -> HashMap<String, String> {
    let bytes = fs::read(file).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    header.metadata().clone().unwrap_or_default()
}

#[test]
fn sampling_needs_one_file_of_weights_alone() {
    let dir = tempfile::tempdir().unwrap();
    let averages = vec![AverageConfig::Power { sigma_rel: 0.1 }];
    let mut trainer = new(TrainConfig { averages, ..config(2) });
    let sampling = SamplerConfig::new(Solver::Ddim { eta: 0.5 }, 4).clip_denoised(true);
    trainer.set_sampling(sampling).unwrap();
    trainer.fit(&Waves(11), &mut ()).unwrap();
    let path = dir.path().join("run");
    trainer.save(&path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let sample = |model: &dyn Denoiser, sampler: &Sampler| {
        let steps = sampler.steps(&model, (2, 1, 8, 8), 5, &Device::Cpu).unwrap();
        let images = steps.map(|step| step.unwrap().x).last().unwrap();
        images.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let device = &Device::Cpu;
    for (file, model) in [
        ("model", checkpoint.model::<UNetConfig>(device).unwrap()),
        ("ema", checkpoint.ema::<UNetConfig>(device).unwrap()),
        ("average", checkpoint.average::<UNetConfig>(0, device).unwrap()),
    ] {
        let alone = dir.path().join("alone.safetensors");
        fs::copy(path.join(format!("{file}.safetensors")), &alone).unwrap();
        let weights = WeightsFile::open(&alone).unwrap();
        fs::remove_file(&alone).unwrap();
        assert_eq!(weights.architecture::<UNetConfig>().unwrap(), network());
        assert_eq!((weights.path(), weights.step()), (&*alone, 2));
        assert_eq!(weights.diffusion(), checkpoint.diffusion());
        assert_eq!(weights.sampling(), Some(&sampling));
        let loaded = weights.model::<UNetConfig>(device).unwrap();
        let expected = sample(&model, &checkpoint.sampler().unwrap());
        assert_eq!(sample(&loaded, &weights.sampler().unwrap()), expected, "{file}");
    }
    assert_eq!(metadata(&path.join("optimizer.safetensors")), HashMap::new());
    let metadata = metadata(&path.join("ema.safetensors"));
    assert_eq!(metadata.keys().collect::<Vec<_>>(), ["ddpm"]);
    let json: serde_json::Value = serde_json::from_str(&metadata["ddpm"]).unwrap();
    assert_eq!(json["network"]["config"]["image_size"], 8);
    assert_eq!(json["pixel_range"], serde_json::json!([-1.0, 1.0]));
    assert_eq!(json["diffusion"]["prediction"], "epsilon");
    // Nothing but the metadata was added to the files of earlier versions.
    let tensors = candle_core::safetensors::load(path.join("model.safetensors"), device).unwrap();
    let plain = dir.path().join("plain.safetensors");
    candle_core::safetensors::save(&tensors, &plain).unwrap();
    let data = |file: &Path| {
        let bytes = fs::read(file).unwrap();
        let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        bytes[8 + header..].to_vec()
    };
    assert_eq!(data(&path.join("model.safetensors")), data(&plain));

    let error = WeightsFile::open(&plain).unwrap_err().to_string();
    let advice = "open the directory of the checkpoint instead, or load the weights with";
    assert!(error.contains("plain.safetensors: the metadata has no key `ddpm`"), "{error}");
    assert!(error.contains(advice), "{error}");
    let error = WeightsFile::open(path.join("optimizer.safetensors")).unwrap_err().to_string();
    assert!(error.contains("no key `ddpm`"), "{error}");
}

#[test]
fn every_wrong_description_of_weights_is_an_error_that_names_the_file_and_the_field() {
    let (dir, path) = saved();
    let good = path.join("model.safetensors");
    let tensors = candle_core::safetensors::load(&good, &Device::Cpu).unwrap();
    let json: serde_json::Value = serde_json::from_str(&metadata(&good)["ddpm"]).unwrap();
    let file = dir.path().join("edited.safetensors");
    let open = |text: String| {
        let metadata = HashMap::from([("ddpm".to_string(), text)]);
        safetensors::serialize_to_file(&tensors, Some(metadata), &file).unwrap();
        let opened = WeightsFile::open(&file);
        opened.and_then(|weights| weights.model::<UNetConfig>(&Device::Cpu).map(drop))
    };
    open(json.to_string()).unwrap();
    type Edit = fn(&mut serde_json::Value);
    let cases: &[(Edit, &str)] = &[
        (|j| j["format_version"] = 0.into(), "format_version is 0; it must be from 1 to 1"),
        (|j| j["format_version"] = 2.into(), "format 2 is newer than 1"),
        (
            |j| drop(j.as_object_mut().unwrap().remove("format_version")),
            "format_version is missing",
        ),
        (|j| drop(j.as_object_mut().unwrap().remove("diffusion")), "missing field `diffusion`"),
        (|j| drop(j.as_object_mut().unwrap().remove("pixel_range")), "missing field `pixel_range`"),
        (|j| j["schedule"] = 1.into(), "unknown field `schedule`"),
        (|j| j["step"] = (-1).into(), "step: invalid value"),
        (|j| j["step"] = u64::MAX.into(), "step is 18446744073709551615; it must be at most"),
        (
            |j| j["pixel_range"] = vec![0, 1].into(),
            "pixel_range is [0.0, 1.0]; it must be [-1.0, 1.0]",
        ),
        (|j| j["pixel_range"] = "wide".into(), "pixel_range: invalid type"),
        (|j| j["diffusion"]["prediction"] = "cat".into(), "diffusion: unknown variant `cat`"),
        (
            |j| j["diffusion"]["schedule"]["linear"]["steps"] = 0.into(),
            "diffusion: schedule steps is 0",
        ),
        (
            |j| j["diffusion"]["schedule"] = serde_json::json!({"custom": {"betas": [2.0]}}),
            "diffusion: betas is 2 at t = 0",
        ),
        (|j| j["network"]["depth"] = 3.into(), "network: unknown field `depth`"),
        (
            |j| j["network"]["config"]["hidden_dims"] = vec![16; 1 << 20].into(),
            "length of network.config is 3145",
        ),
        (|j| j["network"]["config"]["channels"] = 0.into(), "network.config: channels is 0"),
        (|j| j["network"]["config"]["channels"] = "x".into(), "network.config: invalid type"),
        (
            |j| j["network"]["config"]["hidden_dims"] = vec![16, 16].into(),
            "weight down_blocks.0.res1.block1.2.weight has shape",
        ),
        (
            |j| {
                j["sampling"] =
                    serde_json::json!({"solver": "heun", "steps": 0, "clip_denoised": true})
            },
            "sampling: sampling steps is 0",
        ),
        (|j| j["sampling"] = 3.into(), "sampling: invalid type"),
    ];
    for (edit, expected) in cases {
        let mut edited = json.clone();
        edit(&mut edited);
        let error = open(edited.to_string()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}; expected {expected}");
        assert!(error.contains("edited.safetensors: "), "{error}");
        assert!(error.len() < 500, "{error}");
    }
    for (text, expected) in [
        (String::new(), "EOF"),
        ("[1]".into(), "invalid type"),
        ("{".repeat(1 << 20), "edited.safetensors: damaged file"),
        (json.to_string().replacen('{', r#"{"step": 1, "#, 1), "duplicate field `step`"),
        (json.to_string() + "}", "trailing characters"),
    ] {
        let error = open(text).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("edited.safetensors: "), "{error}");
    }
    // Another kind of network is a wrong request, as with a checkpoint.
    let other = json.to_string().replace(r#""unet""#, r#""transformer""#);
    let error = open(other).unwrap_err().to_string();
    assert!(error.contains("network.kind is transformer"), "{error}");
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

/// Converts a checkpoint to the format of 0.1.0, which had no checksums.
fn as_format_1(path: &Path) {
    edit(path, |json| {
        json["format_version"] = 1.into();
        json.as_object_mut().unwrap().remove("files");
    });
}

/// Rewrites a file of tensors of a checkpoint, and removes the checksums.
fn edit_tensors(file: &Path, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, file).unwrap();
    as_format_1(file.parent().unwrap());
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
            "model.safetensors: damaged file: 300547 bytes long; 300548 were written",
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

/// Weights files may have another precision, because they may come from elsewhere.
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
fn long_lists_are_shortened_in_messages() {
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
            let ending = format!("; {} is whole", older.display());
            assert!(error.to_string().ends_with(&ending), "{error}");
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
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(printed.contains("refused: ") && printed.contains(expected), "{what}: {output:?}");
    }
}

#[test]
fn a_checkpoint_of_no_name_is_refused_by_name() {
    let message = Checkpoint::open("").map(drop).unwrap_err().to_string();
    assert_eq!(message, r#"checkpoint directory is ""; it must be a path"#);
}
