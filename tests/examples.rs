//! The examples as programs: the files they write, how they resume, and their messages for wrong
//! arguments.
//!
//! `cargo test` builds them before these tests run. With `cargo test --test examples` alone they may be
//! missing or outdated: run `cargo build --examples` first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use ddpm::cli::{FolderArgs, RunDir, TrainArgs};
use ddpm::data::folder::Folder;
use ddpm::data::{self as sets, Batch, Dataset, Subset};
use ddpm::eval::{ProbabilityFlow, VariationalBound};
use ddpm::nn::UNet2DConfig;
use ddpm::sample::{SamplerConfig, Spacing, Variance};
use ddpm::train::WeightsFile;
use ddpm::{Checkpoint, Diffusion, Solver, TrainConfig, UNetConfig};
use image::AnimationDecoder;
use image::codecs::gif::GifDecoder;
use serde_json::{Value, json};
use tempfile::TempDir;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Options small enough for a test. The network has its full size.
const SMALL: [&str; 6] = ["--batch-size", "2", "--sample-count", "3", "--sampling-steps", "2"];

fn example(name: &str) -> Command {
    // .../release/deps/examples-0123456789abcdef
    let test = std::env::current_exe().expect("this test has a path");
    let path = test
        .ancestors()
        .skip(1)
        .take(3)
        .map(|dir| dir.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX)))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is not built: cargo build --examples"));
    let mut command = Command::new(path);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("CARGO").stdin(Stdio::null());
    command
}

/// Trains on MNIST, and asserts success.
fn mnist(out: &Path, args: &[&str]) -> Result<String> {
    succeed(example("mnist").args(args).arg("--out").arg(out))
}

fn succeed(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {text}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Returns the `--help` of an example as one line, independently of its wrapping.
fn help(name: &str) -> Result<String> {
    let help = succeed(example(name).arg("--help"))?;
    Ok(help.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Asserts that a command fails with one line on standard error that contains all of `expected`.
fn assert_fails(command: &mut Command, expected: &[&str]) -> Result<()> {
    let Output { status, stderr, .. } = command.output()?;
    let text = String::from_utf8(stderr)?;
    assert!(!status.success(), "{command:?} succeeded");
    assert!(status.code().is_some_and(|c| c == 1 || c == 2), "{command:?}: {status}, {text}");
    assert!(text.starts_with("error: ") && text.ends_with('\n'), "{command:?}: {text:?}");
    assert_eq!(text.lines().count(), 1, "{command:?}: {text:?}");
    for part in expected {
        assert!(text.contains(part), "{command:?}: {text:?} does not say {part:?}");
    }
    Ok(())
}

/// The message if a folder does not contain MNIST's images.
const IMAGES: &str = "neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz is here";

/// Writes a small set in MNIST's format: `count` images of 28 x 28 with a bright field in each.
fn write_idx(dir: &Path, count: u8) -> Result<()> {
    fs::create_dir_all(dir)?;
    let mut images = [[0, 0, 8, 3], [0, 0, 0, count], [0, 0, 0, 28], [0, 0, 0, 28]].concat();
    images.extend((0..u32::from(count) * 784).map(|i| {
        let (image, y, x) = (i / 784, i / 28 % 28, i % 28);
        if (y + 2 * image) % 28 < 12 && (x + 3 * image) % 28 < 8 { 255 } else { 0 }
    }));
    let mut labels = [[0, 0, 8, 1], [0, 0, 0, count]].concat();
    labels.extend(0..count);
    for part in ["train", "t10k"] {
        fs::write(dir.join(format!("{part}-images-idx3-ubyte")), &images)?;
        fs::write(dir.join(format!("{part}-labels-idx1-ubyte")), &labels)?;
    }
    Ok(())
}

fn metrics(out: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(out.join("metrics.jsonl"))?;
    Ok(text.lines().map(serde_json::from_str).collect::<std::result::Result<_, _>>()?)
}

fn steps(out: &Path) -> Result<Vec<u64>> {
    Ok(metrics(out)?.iter().filter_map(|line| line["step"].as_u64()).collect())
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one() -> Result<()> {
    let temp = TempDir::new()?;
    let (whole, halves) = (temp.path().join("whole"), temp.path().join("halves"));
    // Batches of 2 from 5 images: the third spans two epochs, and step 3 ends within the second.
    write_idx(&temp.path().join("mnist"), 5)?;
    let data = temp.path().to_str().ok_or("a path in UTF-8")?;
    let args = [&SMALL[..], &["--data", data, "--save-every", "2", "--seed", "7"]].concat();
    mnist(&whole, &[&args[..], &["--steps", "6"]].concat())?;
    mnist(&halves, &[&args[..], &["--steps", "3"]].concat())?;

    // The log of a run that continued without saving, and was killed while it wrote a line.
    let log = halves.join("metrics.jsonl");
    let mut lines = fs::read_to_string(&log)?;
    lines += "{\"step\":4,\"loss\":9.0,\"lr\":0.1,\"grad_norm\":1.0,\"images_per_second\":1.0}\n";
    lines += "{\"step\":5,\"loss\"";
    fs::write(&log, lines)?;
    let said =
        mnist(&halves, &["--data", data, "--steps", "6", "--sample-count", "3", "--resume"])?;
    assert!(said.contains("steps    4 to 6, batches of 2, seed 7"), "{said}");
    // The grids use the same sampler settings as before.
    let sampling = Checkpoint::open(halves.join("checkpoint"))?.sampling().copied();
    assert_eq!(sampling.map(|sampling| sampling.steps), Some(2));

    for file in ["model.safetensors", "ema.safetensors", "optimizer.safetensors"] {
        let read = |out: &Path| fs::read(out.join("checkpoint").join(file));
        assert!(read(&whole)? == read(&halves)?, "{file} differs");
    }
    assert_eq!(steps(&halves)?, [1, 2, 3, 4, 5, 6]);
    for (a, b) in metrics(&whole)?.iter().zip(metrics(&halves)?) {
        assert_eq!((&a["loss"], &a["grad_norm"]), (&b["loss"], &b["grad_norm"]));
    }

    let said = mnist(&halves, &["--data", data, "--resume"])?;
    assert!(said.contains("the run is at step 6 of 6"), "{said}");
    Ok(())
}

/// A resumed run equals one without an interruption, including its division of the images and its best checkpoint.
#[test]
fn a_run_holds_out_the_same_images_after_a_resume_and_keeps_its_best_checkpoint() -> Result<()> {
    let temp = TempDir::new()?;
    let (whole, halves) = (temp.path().join("whole"), temp.path().join("halves"));
    write_idx(&temp.path().join("mnist"), 5)?;
    let data = temp.path().to_str().ok_or("a path in UTF-8")?;
    let watch = ["--held-out-every", "2", "--gradient-norms", "4", "--tensorboard"];
    let args = [&SMALL[..], &["--data", data, "--held-out", "2"], &watch].concat();
    let said = mnist(&whole, &[&args[..], &["--steps", "4"]].concat())?;
    assert!(said.contains("5 images, 2 held out"), "{said}");
    assert!(said.contains("best     held-out loss "), "{said}");
    mnist(&halves, &[&args[..], &["--steps", "2"]].concat())?;
    // The other options are in config.json.
    let resume = ["--data", data, "--steps", "4", "--resume"];
    let mut other = example("mnist");
    other.args(resume).args(["--held-out", "1"]).arg("--out").arg(&halves);
    let advice = "omit --held-out, or add --change";
    assert_fails(&mut other, &["data.json: the run holds out 2 images, not 1", advice])?;
    mnist(&halves, &resume)?;

    for file in ["checkpoint/model.safetensors", "checkpoint/ema.safetensors", "best/best.json"] {
        assert!(fs::read(whole.join(file))? == fs::read(halves.join(file))?, "{file} differs");
    }
    let published = |out: &Path| -> Result<Vec<Value>> {
        Ok(metrics(out)?.into_iter().filter(|line| line.get("loss").is_none()).collect())
    };
    let lines = published(&whole)?;
    assert_eq!(lines, published(&halves)?);
    assert_eq!(lines.iter().map(|line| &line["step"]).collect::<Vec<_>>(), [2, 4]);
    let least = lines.iter().filter_map(|line| line["held_out/loss"].as_f64()).reduce(f64::min);
    let norms =
        |line: &Value| line.as_object().map(|l| l.keys().filter(|k| k.starts_with("grad")).count());
    assert!(norms(&lines[0]) == Some(0) && norms(&lines[1]) > Some(20), "{lines:?}");
    let best: Value = serde_json::from_slice(&fs::read(whole.join("best/best.json"))?)?;
    assert_eq!(best["value"].as_f64(), least);
    let checkpoint = Checkpoint::open(whole.join("best/checkpoint"))?;
    assert_eq!(best["step"].as_u64(), Some(checkpoint.step()));
    assert_eq!(fs::read_dir(whole.join("tensorboard"))?.count(), 1);
    assert_eq!(fs::read_dir(halves.join("tensorboard"))?.count(), 2);

    // The loss of other images is not compared with the best one.
    let change = ["--data", data, "--resume", "--change", "--held-out", "1"];
    let said = mnist(&halves, &change)?;
    assert!(said.contains("best-old, the best before the change"), "{said}");
    let of_others: Value = serde_json::from_slice(&fs::read(halves.join("best/best.json"))?)?;
    assert_eq!(of_others["step"].as_u64(), Some(4));
    assert_ne!(of_others["value"], best["value"]);

    let all = ["--data", data, "--held-out", "5"];
    let out = temp.path().join("none");
    assert_fails(
        example("mnist").args(all).arg("--out").arg(&out),
        &["--held-out: held-out images is 5; it must be at least 1, and less than 5"],
    )?;
    assert!(!out.exists());
    Ok(())
}

#[test]
fn a_run_on_the_embedded_digits_writes_all_its_files() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("run");
    let said = mnist(&out, &[&SMALL[..], &["--steps", "3", "--sample-every", "2"]].concat())?;
    assert!(said.contains("digits embedded") && said.contains("10,000 images"), "{said}");

    let checkpoint = out.join("checkpoint");
    for file in ["checkpoint.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"]
    {
        assert!(checkpoint.join(file).is_file(), "{file}");
    }
    let (grid, curve) = (image::open(out.join("samples/step-000003.png"))?, out.join("loss.png"));
    // Two columns of 28 pixels, twice their size, and gaps of 2.
    assert_eq!((grid.width(), grid.height(), grid.color()), (118, 118, image::ColorType::L8));
    assert!(out.join("samples/step-000002.png").is_file());
    assert!(image::open(curve)?.width() > 500);
    for line in metrics(&out)? {
        let keys: Vec<&String> = line.as_object().ok_or("an object")?.keys().collect();
        assert_eq!(keys, ["grad_norm", "images_per_second", "loss", "lr", "step", "waiting"]);
        assert!(line.as_object().is_some_and(|l| l.values().all(Value::is_number)), "{line}");
    }
    assert_eq!(steps(&out)?, [1, 2, 3]);
    let end: Vec<&str> = said.lines().rev().take(4).collect();
    let [done, grid, time, loss] = end[..] else { panic!("{said}") };
    assert_eq!(done, format!("done: {}", out.display()));
    assert_eq!(grid, format!("grid     {}", out.join("samples/step-000003.png").display()));
    assert!(time.starts_with("time     00:0"), "{said}");
    let losses: Vec<f64> = metrics(&out)?.iter().filter_map(|m| m["loss"].as_f64()).collect();
    let (low, high) = (losses.iter().fold(f64::MAX, |a, &b| a.min(b)), losses[0].max(losses[1]));
    let loss = loss.strip_prefix("loss     ").and_then(|l| l.strip_suffix(", smoothed, at step 3"));
    let loss: f64 = loss.ok_or("a loss")?.parse()?;
    assert!((low - 1e-4..=high.max(losses[2]) + 1e-4).contains(&loss), "{losses:?}: {loss}");

    samples(&checkpoint, temp.path())?;
    a_number(&checkpoint, temp.path())?;
    figures(&checkpoint, temp.path())?;
    errors_about_a_run(&out, temp.path())
}

#[test]
fn the_discs_are_trained_on_and_continued_without_arguments() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("out/discs");
    for (number, lines) in [("2", [1, 2].as_slice()), ("3", &[1, 2, 3])] {
        let said = succeed(example("discs").arg(number).current_dir(&temp))?;
        assert_eq!(said, format!("step {number} of {number}: see out/discs\n"));
        assert_eq!(steps(&out)?, lines);
        assert!(out.join(format!("samples/step-00000{number}.png")).is_file());
    }
    assert!(out.join("loss.png").is_file());
    Ok(())
}

#[test]
fn a_conditional_run_draws_the_class_that_is_asked_for() -> Result<()> {
    let temp = TempDir::new()?;
    let (run, plain) = (temp.path().join("run"), temp.path().join("plain"));
    mnist(&run, &[&SMALL[..], &["--conditional", "--steps", "2"]].concat())?;
    mnist(&run, &["--steps", "3", "--resume"])?;
    let checkpoint = run.join("checkpoint");
    let opened = Checkpoint::open(&checkpoint)?;
    assert_eq!(opened.architecture::<UNetConfig>()?.classes, Some(10));
    let guidance = opened.sampling().and_then(|sampling| sampling.guidance);
    assert_eq!(guidance.map(|guidance| guidance.scale), Some(2.0));

    let sample = |checkpoint: &Path, name: &str, args: &[&str]| {
        let mut command = example("sample");
        command.args(["--sampling-steps", "2"]).args(args);
        if !args.contains(&"--from") {
            command.args(["--count", "3"]);
        }
        command.arg("--checkpoint").arg(checkpoint).arg("--out").arg(temp.path().join(name));
        command
    };
    // Without --class, the first three images are of the classes 0, 1 and 2, as in the run's grid.
    let cases: [(&str, &[&str]); 5] = [
        ("all.png", &[]),
        ("listed.png", &["--class", "0,1,2", "--guidance", "2"]),
        ("one.png", &["--class", "2"]),
        ("weak.png", &["--guidance", "1"]),
        ("guided.png", &["--guidance", "5"]),
    ];
    let mut pictures = Vec::new();
    for (name, args) in cases {
        let said = succeed(&mut sample(&checkpoint, name, args))?;
        assert_eq!(said.contains("guidance    5"), name == "guided.png", "{said}");
        pictures.push(fs::read(temp.path().join(name))?);
    }
    assert!(pictures[0] == pictures[1]);
    let differ = pictures[1..].iter().map(|picture| picture.as_slice()).collect::<BTreeSet<_>>();
    assert_eq!(differ.len(), 4);

    // Images 1 and 2 alone are those of the three.
    let dirs = [temp.path().join("three"), temp.path().join("two")];
    for (dir, from, count) in [(&dirs[0], "0", "3"), (&dirs[1], "1", "2")] {
        let mut command = sample(&checkpoint, "grid.png", &["--from", from]);
        succeed(command.arg("--images").arg(dir).args(["--count", count]))?;
    }
    assert!(dirs[0].join("000000.png").is_file() && !dirs[1].join("000000.png").exists());
    for file in ["000001.png", "000002.png"] {
        assert!(fs::read(dirs[0].join(file))? == fs::read(dirs[1].join(file))?, "{file}");
        assert_eq!(image::open(dirs[0].join(file))?.to_luma8().dimensions(), (28, 28));
    }

    conditional_edits(&checkpoint, temp.path())?;

    mnist(&plain, &[&SMALL[..], &["--steps", "1"]].concat())?;
    let no_classes = |option| format!("{option} needs a network with classes; this one has none");
    for (checkpoint, args, expected) in [
        (&checkpoint, ["--class", "10"], "--class is 10; the network's are 0 to 9".to_string()),
        (&plain.join("checkpoint"), ["--class", "1"], no_classes("--class")),
        (&plain.join("checkpoint"), ["--guidance", "2"], no_classes("--guidance")),
    ] {
        assert_fails(&mut sample(checkpoint, "none.png", &args), &[&expected])?;
    }
    let args = ["--steps", "2", "--resume", "--conditional", "--out"];
    let expected = "the run in --out is not conditional; omit --conditional to continue it";
    assert_fails(example("mnist").args(args).arg(&plain), &[expected])
}

/// All images of an interpolation have one class, and its ends are the images of the seeds in this class.
fn conditional_edits(checkpoint: &Path, temp: &Path) -> Result<()> {
    let dir = |name: &str| temp.join("conditional").join(name);
    let sample = |name: &str, args: &[&str]| {
        let mut command = example("sample");
        command.args(["--cpu", "--sampling-steps", "2"]).args(args).arg("--checkpoint");
        command.arg(checkpoint).arg("--images").arg(dir(name));
        command
    };
    let draw = |name: &str, args: &[&str]| succeed(&mut sample(name, args)).map(drop);
    let read = |name: &str, k: usize| fs::read(dir(name).join(format!("{k:06}.png")));

    let between = ["--interpolate", "3", "7", "--count", "4"];
    draw("path", &[&between[..], &["--class", "2"]].concat())?;
    for (name, seed, k) in [("first", "3", 0), ("last", "7", 3)] {
        draw(name, &["--seed", seed, "--class", "2", "--count", "1"])?;
        assert!(read("path", k)? == read(name, 0)?, "seed {seed}");
    }

    // Each picture is inverted with this class, whichever is the first.
    let pictures = [temp.join("falling.png"), temp.join("rising.png")];
    image::GrayImage::from_fn(28, 28, |x, _| image::Luma([250 - x as u8 * 9]))
        .save(&pictures[0])?;
    image::GrayImage::from_fn(28, 28, |x, y| image::Luma([(x * 5 + y * 4) as u8]))
        .save(&pictures[1])?;
    let [a, b] = pictures.each_ref().map(|path| path.display().to_string());
    let pictures = ["--solver", "ddim", "--eta", "0", "--count", "3"];
    let forth = [&["--interpolate-pictures", &a, &b], &pictures[..]].concat();
    let back = [&["--interpolate-pictures", &b, &a], &pictures[..]].concat();
    draw("forth", &[&forth[..], &["--class", "2"]].concat())?;
    draw("back", &[&back[..], &["--class", "2"]].concat())?;
    draw("other", &[&forth[..], &["--class", "5"]].concat())?;
    assert!(read("forth", 0)? == read("back", 2)? && read("forth", 2)? == read("back", 0)?);
    assert!(read("forth", 0)? != read("forth", 2)? && read("forth", 0)? != read("other", 0)?);

    let vary = ["--vary", &a, "--strength", "1", "--count", "2"];
    draw("listed", &[&vary[..], &["--class", "5,2"]].concat())?;
    draw("twos", &[&vary[..], &["--class", "2"]].concat())?;
    assert!(read("listed", 1)? == read("twos", 1)? && read("listed", 0)? != read("twos", 0)?);

    let fill = ["--inpaint", &a, "--mask", &a, "--solver", "ddpm"];
    for (args, option, needs) in [
        (&between[..], "--interpolate", " with one class, such as --class 3: "),
        (&[&between[..], &["--class", "3,7"]].concat(), "--interpolate", " with one class, "),
        (&forth, "--interpolate-pictures", " with one class, "),
        (&vary, "--vary", ", such as --class 3: "),
        (&fill, "--inpaint", ", such as --class 3: "),
    ] {
        assert_fails(&mut sample("none", args), &[&format!("{option} needs --class{needs}")])?;
    }
    assert!(!dir("none").exists());
    Ok(())
}

/// From a run with the network of Ho et al. to a folder of diffusers and back: all draw the same images.
#[test]
fn a_run_becomes_a_folder_of_diffusers_and_a_weights_file() -> Result<()> {
    let temp = TempDir::new()?;
    cifar(temp.path())?;
    let path = |name: &str| temp.path().join(name);
    let network = UNet2DConfig {
        block_out_channels: vec![8, 16, 16, 16],
        norm_num_groups: 4,
        ..UNet2DConfig::cifar10()
    };
    let config = serde_json::json!({
        "network": network,
        "diffusion": Diffusion::ddpm(),
        "train": TrainConfig { batch_size: 2, log_every: 1, ..TrainConfig::ho() },
        "sampling": SamplerConfig::new(Solver::ddim(), 2).spacing(Spacing::Leading),
        "save_every": 1,
        "sample_every": 1,
        "sample_count": 1,
    });
    fs::write(path("ho.json"), config.to_string())?;
    let cifar10 = |args: &[&str]| {
        let mut command = example("cifar10");
        command.arg("--data").arg(temp.path()).arg("--out").arg(path("run")).args(args);
        command
    };
    let ho = path("ho.json");
    let ho = ho.to_str().ok_or("a path in UTF-8")?;
    succeed(&mut cifar10(&["--network", "ho", "--config", ho, "--steps", "1"]))?;
    let other = ["network.kind is unet2d in the checkpoint", "by --network"];
    assert_fails(&mut cifar10(&["--resume", "--steps", "2"]), &other)?;
    succeed(&mut cifar10(&["--network", "ho", "--resume", "--steps", "2"]))?;

    let convert = |from: &Path, to: &str, args: &[&str]| {
        let mut command = example("convert");
        command.arg("--from").arg(from).arg("--to").arg(path(to)).args(args);
        command
    };
    let run = path("run/checkpoint");
    let said = succeed(&mut convert(&run, "pipeline", &[]))?;
    assert!(said.contains("a pipeline of diffusers, for num_inference_steps=2"), "{said}");
    assert!(!said.contains("instead of"), "{said}");
    succeed(&mut convert(&path("pipeline"), "back.safetensors", &[]))?;
    succeed(&mut convert(&path("back.safetensors"), "ancestral", &["--solver", "ddpm"]))?;
    let scheduler = fs::read_to_string(path("ancestral/scheduler/scheduler_config.json"))?;
    assert!(scheduler.contains("\"DDPMScheduler\"") && scheduler.contains("\"fixed_large\""));

    // Without sampler settings, as from OpenAI's programs. The DDIM of diffusers replaces that of the crate visibly.
    let openai = openai_network(&path("openai.safetensors"), "blocks")?;
    let heads = ["--image-size", "8", "--heads", "1"];
    let said = succeed(&mut convert(&openai, "own.safetensors", &heads))?;
    assert!(said.contains("process: 1000 timesteps, linear schedule"), "{said}");
    let rescaled = ["--timesteps", "4000", "--rescale-timesteps", "true"];
    let of_4000 = [&heads[..], &rescaled, &["--schedule", "cosine"]].concat();
    let said = succeed(&mut convert(&openai, "of-4000.safetensors", &of_4000))?;
    assert!(said.contains("process: 4000 timesteps, cosine schedule"), "{said}");
    let of_4000 = path("of-4000.safetensors");
    assert_eq!(WeightsFile::open(&of_4000)?.architecture::<UNet2DConfig>()?.time_scale, 0.25);
    let lacking = "time_scale is 0.25; it must be 1 in a folder of diffusers";
    assert_fails(&mut convert(&of_4000, "of-4000", &[]), &[lacking])?;
    // A folder of diffusers has a number of channels per head, so a number of heads needs levels of equal width.
    let four = ["--image-size", "8", "--heads", "4"];
    for (case, file) in [("improved", "equal"), ("widths", "widths")] {
        let openai = openai_network(&path("heads.safetensors"), case)?;
        let file = path(file).with_extension("safetensors");
        succeed(&mut convert(&openai, &file.to_string_lossy(), &four))?;
        let network = WeightsFile::open(&file)?.architecture::<UNet2DConfig>()?;
        assert_eq!((network.num_attention_heads, network.attention_head_dim), (Some(4), None));
    }
    succeed(&mut convert(&path("equal.safetensors"), "equal", &["--solver", "ddpm"]))?;
    let equal = fs::read_to_string(path("equal/unet/config.json"))?;
    assert!(equal.contains("\"attention_head_dim\": 16") && !equal.contains("heads"), "{equal}");
    let lacking = "num_attention_heads is 4; it must be 1 in a folder of diffusers, which has a number of channels per \
                   head; the levels with attention have [64, 96, 64, 96, 96] channels";
    assert_fails(&mut convert(&path("widths.safetensors"), "widths", &[]), &[lacking])?;
    let replaced =
        "sampler: DDIM with eta 0 and unclipped noise, leading, instead of DDIM with eta 0, even";
    for (to, args) in [("usual", &[][..]), ("ddim", &["--solver", "ddim"])] {
        let said = succeed(&mut convert(&path("own.safetensors"), to, args))?;
        assert!(said.contains(replaced), "{said}");
        let scheduler = path(to).join("scheduler/scheduler_config.json");
        let scheduler = fs::read_to_string(scheduler)?;
        let options =
            ["\"DDIMScheduler\"", "\"clip_sample\": true", "\"timestep_spacing\": \"leading\""];
        assert!(options.iter().all(|option| scheduler.contains(option)), "{scheduler}");
    }

    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let trainer = data.join("lucidrains/trainer.pt");
    let velocity = ["--image-size", "5x3", "--objective", "pred_v"];
    let said = succeed(&mut convert(&trainer, "lucidrains.safetensors", &velocity))?;
    assert!(said.contains("process: 100 timesteps, prediction of velocity"), "{said}");
    let learned = data.join("lucidrains/network.pt");
    let velocity = ["--image-size", "4x6", "--objective", "pred_v"];
    let expected = "--objective must be pred_noise for this file";
    assert_fails(&mut convert(&learned, "x.safetensors", &velocity), &[expected])?;
    let mut command = example("sample");
    command.args(["--count", "1", "--sampling-steps", "2"]).arg("--out").arg(path("image.png"));
    succeed(command.arg("--checkpoint").arg(path("lucidrains.safetensors")))?;
    // Small images are enlarged eight times, with an edge of two pixels.
    assert_eq!(image::image_dimensions(path("image.png"))?, (3 * 8 + 4, 5 * 8 + 4));
    // A network that learns the variance is sampled with it.
    let learning = openai_network(&path("learning.safetensors"), "unconditional")?;
    let heads_of_16 = ["--image-size", "8", "--head-channels", "16"];
    succeed(&mut convert(&learning, "learned.safetensors", &heads_of_16))?;
    for (file, solver) in [
        ("own.safetensors", "DDPM, 2 steps"),
        ("learned.safetensors", "DDPM with the learned variance, 2 steps"),
    ] {
        let mut command = example("sample");
        command.args(["--solver", "ddpm", "--sampling-steps", "2", "--count", "1", "--out"]);
        command.arg(path("image.png")).arg("--checkpoint").arg(path(file));
        let said = succeed(&mut command)?;
        assert!(said.contains(&format!("sampler     {solver}, clipped")), "{said}");
    }

    let mut pictures = BTreeSet::new();
    for from in ["run/checkpoint", "pipeline", "back.safetensors"] {
        let mut command = example("sample");
        command.args(["--count", "1", "--sampling-steps", "2"]).arg("--out").arg(path("image.png"));
        succeed(command.arg("--checkpoint").arg(path(from)))?;
        pictures.insert(fs::read(path("image.png"))?);
    }
    assert_eq!(pictures.len(), 1);

    let pytorch = data.join("pytorch_files/state.pt");
    for (from, to, args, expected) in [
        (&run, "pipeline", &[][..], "it must be a path at which there is nothing"),
        (&run, "x.safetensors", &heads, "are not for a directory"),
        (&path("pipeline"), "x.safetensors", &heads, "are not for a directory"),
        (&run, "x.safetensors", &[], "becomes a folder of diffusers"),
        (&path("back.safetensors"), "x.safetensors", &[], "becomes a folder of diffusers"),
        (&pytorch, "x.safetensors", &heads, "not the weights of a UNetModel"),
        (&pytorch, "x.safetensors", &velocity, "not the weights of a Unet"),
        (&trainer, "x.safetensors", &heads, "which LucidrainsFile reads"),
        (&trainer, "x.safetensors", &[], "needs --image-size and --objective"),
        (&trainer, "x.safetensors", &["--objective", "pred_v"], "--image-size"),
        (
            &trainer,
            "x.safetensors",
            &["--image-size", "5", "--objective", "pred_v", "--schedule", "linear"],
            "cannot be used with",
        ),
        (&openai, "x.safetensors", &["--image-size", "8"], "--heads <N>|--head-channels <N>"),
        (
            &openai,
            "x.safetensors",
            &["--image-size", "8", "--heads", "1", "--head-channels", "8"],
            "cannot be used with",
        ),
        (&openai, "x.safetensors", &["--heads", "1"], "--image-size"),
        (&path("pipeline"), "x.safetensors", &["--schedule", "cosine"], "--image-size"),
        (
            &openai,
            "x.safetensors",
            &["--image-size", "8", "--heads", "1", "--timesteps", "4000"],
            "--timesteps 4000 needs --rescale-timesteps true or false",
        ),
        (&pytorch, "x.safetensors", &[], "needs --image-size"),
        (&path("pipeline"), "x", &[], "--to is"),
        (
            &path("pipeline"),
            "x.safetensors",
            &["--solver", "ddim"],
            "--weights and --solver are for",
        ),
        (&path("none"), "x", &[], "no checkpoint here"),
    ] {
        assert_fails(&mut convert(from, to, args), &[expected])?;
    }
    Ok(())
}

/// Writes a file of zeros with the names and shapes of a small network of OpenAI's programs.
fn openai_network(path: &Path, case: &str) -> Result<PathBuf> {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/openai.safetensors");
    let (_, header) = safetensors::SafeTensors::read_metadata(&fs::read(cases)?)?;
    let cases = &header.metadata().as_ref().ok_or("no metadata")?["cases"];
    let cases: serde_json::Value = serde_json::from_str(cases)?;
    let shapes: BTreeMap<String, Vec<usize>> =
        serde_json::from_value(cases[case]["weights"].clone())?;
    let zeros = |shape: Vec<usize>| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let weights = shapes.into_iter().map(|(name, shape)| Ok((name, zeros(shape)?)));
    let weights = weights.collect::<Result<HashMap<_, _>>>()?;
    candle_core::safetensors::save(&weights, path)?;
    Ok(path.to_owned())
}

#[test]
fn a_folder_of_pictures_is_trained_on_and_its_configuration_repeats_the_run() -> Result<()> {
    let temp = TempDir::new()?;
    let data = temp.path().join("photos");
    for (class, shade) in [("dark", 40), ("light", 200)] {
        fs::create_dir_all(data.join(class))?;
        for k in 0..3u32 {
            let pixel = |x, y| image::Rgb([shade, (x * 9 % 256) as u8, ((y + k) * 7 % 256) as u8]);
            image::RgbImage::from_fn(30 + k, 20, pixel)
                .save(data.join(class).join(format!("{k}.png")))?;
        }
    }
    let train = |out: &Path, args: &[&str]| {
        let mut command = example("train");
        command.arg("--data").arg(&data).args(args).arg("--out").arg(out);
        command
    };
    let (run, again) = (temp.path().join("run"), temp.path().join("again"));
    let size = ["--height", "8", "--width", "12"];
    let small = [&SMALL[..], &size, &["--steps", "2", "--conditional"]].concat();
    let said = succeed(&mut train(&run, &small))?;
    assert!(said.contains("recipe   1 halving to 4 x 6 pixels"), "{said}");
    assert!(said.contains("cosine schedule; Muon, batches of 2\n"), "{said}");
    assert!(said.contains("the pictures of") && said.contains("6 images"), "{said}");
    assert!(said.contains("\nclasses  dark, light\n"), "{said}");
    let network: UNetConfig = Checkpoint::open(run.join("checkpoint"))?.architecture()?;
    assert_eq!((network.image_shape(), network.classes), ((3, 8, 12), Some(2)));
    assert!(run.join("samples/step-000002.png").is_file());

    let config = run.join("config.json");
    let config = config.to_str().ok_or("a path in UTF-8")?;
    succeed(&mut train(&again, &["--config", config]))?;
    for file in ["checkpoint/model.safetensors", "samples/step-000002.png", "config.json"] {
        assert!(fs::read(run.join(file))? == fs::read(again.join(file))?, "{file}");
    }
    succeed(&mut train(&run, &["--steps", "3", "--resume"]))?;
    classes_stay(&data, |args| train(&run, args))?;

    let odd = ["--height", "7"];
    let mut command = example("train");
    command.arg("--data").arg(data.join("light")).args(odd).args(["--width", "8"]);
    assert_fails(&mut command, &["the images have 7 x 8 pixels; it must be even numbers"])?;
    fs::write(temp.path().join("bad.json"), r#"{"network": 3}"#)?;
    let bad = temp.path().join("bad.json");
    let args = ["--config", bad.to_str().ok_or("a path in UTF-8")?];
    assert_fails(
        &mut train(&temp.path().join("bad"), &args),
        &["--config ", "bad.json: invalid type"],
    )?;

    fs::write(data.join("dark/0.png"), "no picture")?;
    let unreadable = ["1 of 6 pictures cannot be read", "0.png", "; --skip-unreadable leaves them"];
    assert_fails(&mut train(&again, &["--resume"]), &unreadable)?;
    // Checks that need no pictures come before the pictures are read.
    for (out, args, expected) in [
        (&again, &[][..], "holds a run at step 2"),
        (&again, &["--resume", "--seed", "9"], "train.seed is 0"),
        (&again, &["--resume", "--loss", "l1"], "omit --loss to continue the run, or begin"),
        (&temp.path().join("none"), &["--resume"], "requires the --out of a saved run"),
        (&temp.path().join("none"), &["--config", "no-such.json"], "no-such.json"),
        (
            &temp.path().join("none"),
            &["--schedule", "inverse-sqrt"],
            "--schedule inverse-sqrt needs --reference-steps N",
        ),
    ] {
        assert_fails(&mut train(out, args), &[expected])?;
    }
    Ok(())
}

#[test]
fn a_folder_of_pictures_is_trained_on_by_the_network_of_ho_et_al() -> Result<()> {
    let temp = TempDir::new()?;
    let path = |name: &str| temp.path().join(name);
    let data = path("photos");
    for (class, shade) in [("dark", 40), ("light", 200)] {
        fs::create_dir_all(data.join(class))?;
        for k in 0..6u32 {
            let pixel = |x, y| image::Luma([(shade + x * 3 + y * k) as u8]);
            image::GrayImage::from_fn(8, 8, pixel)
                .save(data.join(class).join(format!("{k}.png")))?;
        }
    }
    let train = |name: &str, args: &[&str]| {
        let mut command = example("train");
        command.arg("--data").arg(&data).args(args).arg("--out").arg(path(name));
        command
    };
    let ho = ["--network", "ho"];
    let new = [&SMALL[..], &ho, &["--image-size", "8", "--conditional", "--steps", "1"]].concat();
    let said = succeed(&mut train("run", &new))?;
    let recipe = "recipe   1 halving to 4 x 4 pixels, [64, 128] channels";
    // The options, and not the recipe, determine the batch size.
    assert!(said.contains(recipe) && said.contains("schedule; Adam, batches of 2\n"), "{said}");
    let run = path("run/checkpoint");
    let network: UNet2DConfig = Checkpoint::open(&run)?.architecture()?;
    assert_eq!((network.image_shape(), network.classes()), ((1, 8, 8), Some(2)));

    // The configuration repeats the run, and the run continues, by the same network only.
    let config = path("run/config.json").to_string_lossy().into_owned();
    let of_config = ["--config", &config, "--steps", "2"];
    let said = succeed(&mut train("again", &[&ho[..], &of_config].concat()))?;
    assert!(!said.contains("recipe"), "{said}");
    let expected = "config.json: the network is unet2d, and this run trains unet; select the network by --network";
    assert_fails(&mut train("other", &of_config), &["--config ", expected])?;
    let resume = ["--resume", "--steps", "2"];
    let expected = ["network.kind is unet2d in the checkpoint", "by --network"];
    assert_fails(&mut train("run", &resume), &expected)?;
    let other_size = [&ho[..], &resume, &["--image-size", "16"]].concat();
    assert_fails(&mut train("run", &other_size), &["images.height is 8 in the run, but 16 was"])?;
    succeed(&mut train("run", &[&ho[..], &resume].concat()))?;
    let weights = |name: &str| fs::read(path(name).join("checkpoint/model.safetensors"));
    assert!(weights("again")? == weights("run")?);

    let mut sample = example("sample");
    sample.args(["--class", "1", "--count", "1", "--sampling-steps", "2", "--checkpoint"]);
    succeed(sample.arg(&run).arg("--out").arg(path("image.png")))?;
    let mut evaluate = example("evaluate");
    evaluate.args(["--bits", "2", "--bits-terms", "2", "--checkpoint"]).arg(&run);
    let said = succeed(evaluate.arg("--data").arg(format!("pictures:{}", data.display())))?;
    assert!(said.contains("bits per dimension  "), "{said}");

    for (size, expected) in [
        ("33", "the images have 33 x 33 pixels; for the network of Ho et al., 1 to 5 halvings of"),
        ("1024", "must leave whole numbers from 4 to 16, as for 28, 32, 64, 96, 128, 256 or 512"),
    ] {
        let args = [&ho[..], &["--image-size", size]].concat();
        assert_fails(&mut train("none", &args), &[expected])?;
    }
    let help = help("train")?;
    assert!(help.contains("With --network ho, for images of 64 x 64 pixels"), "{help}");
    Ok(())
}

/// Class `k` of a network is always the same folder.
fn classes_stay(data: &Path, train: impl Fn(&[&str]) -> Command) -> Result<()> {
    let other = data.join("shade");
    for (name, expected) in [
        ("dark", "the folder of class 0 is dark in the run, and light in the pictures of"),
        ("light", "the folder of class 1 is light in the run, and shade in the pictures of"),
    ] {
        fs::rename(data.join(name), &other)?;
        for args in [&["--resume"][..], &["--resume", "--change"]] {
            assert_fails(&mut train(args), &["data.json: ", expected, "or begin a new run"])?;
        }
        fs::rename(&other, data.join(name))?;
    }
    fs::create_dir(&other)?;
    fs::copy(data.join("dark/0.png"), other.join("0.png"))?;
    let expected = "the folder of class 2 is none in the run, and shade in the pictures of";
    assert_fails(&mut train(&["--resume", "--change"]), &[expected])?;
    fs::rename(other.join("0.png"), data.join("lost.png"))?;
    fs::remove_dir(&other)?;
    let expected = ["lost.png: in no sub-folder", "or begin a new run without classes"];
    assert_fails(&mut train(&["--resume"]), &expected)?;
    Ok(fs::remove_file(data.join("lost.png"))?)
}

#[test]
fn the_settings_of_the_images_are_part_of_a_run() -> Result<()> {
    let temp = TempDir::new()?;
    let data = temp.path().join("photos");
    fs::create_dir(&data)?;
    for k in 0..4u32 {
        let pixel = |x, y| image::Rgb([x * 9, (y + k) * 7, x ^ y].map(|v| (v % 256) as u8));
        image::RgbImage::from_fn(30 + k, 20, pixel).save(data.join(format!("{k}.png")))?;
    }
    fs::write(data.join("broken.png"), "no picture")?;
    let path = |name: &str| temp.path().join(name);
    let train = |name: &str, args: &[&str]| {
        let mut command = example("train");
        command.arg("--data").arg(&data).args(args).arg("--out").arg(path(name));
        command
    };
    let json = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let settings = ["--image-size", "8", "--grey", "--random-crop", "--skip-unreadable"];
    let new = [&SMALL[..], &settings, &["--background", "#0a0B0c", "--steps", "1"]].concat();
    succeed(&mut train("run", &new))?;
    let images = json!({
        "height": 8, "width": 8, "channels": "grey", "background": [10, 11, 12],
        "crop": { "random": { "zoom": 1.25 } }, "filter": "bicubic", "classes": false,
        "unreadable": "skip", "max_pixels": 1 << 27,
    });
    assert_eq!(json(path("run/config.json"))?["images"], images);
    assert_eq!(json(path("run/data.json"))?["pictures"], images);

    // --config repeats the images; options replace its settings.
    let config = path("run/config.json").to_string_lossy().into_owned();
    succeed(&mut train("again", &["--config", &config]))?;
    succeed(&mut train("centre", &["--config", &config, "--random-crop", "false"]))?;
    let weights = |name: &str| fs::read(path(name).join("checkpoint/model.safetensors"));
    assert!(weights("again")? == weights("run")?);
    assert!(weights("centre")? != weights("run")?);
    assert_eq!(json(path("centre/config.json"))?["images"]["crop"], "centre");

    // A run that is resumed keeps its settings.
    for (args, expected) in [
        (
            &["--channels", "rgb"][..],
            "channels of the images: 3 requested, and 1 in the network of the run; omit --channels or --grey",
        ),
        (&["--channels", "rgba", "--change"], "channels of the images: 4 requested"),
        (&["--random-crop", "false"], r#"but "centre" was requested; omit --random-crop to"#),
        (&["--background", "0"], "images.background is [10,11,12] in the run, but [0,0,0] was"),
        (&["--image-size", "16", "--change"], "images.height is 8 in the run, but 16 was"),
        (&["--width", "16", "--change"], "omit --width or --image-size to continue the run, or"),
        (&["--conditional", "--change"], "images.classes is false in the run, but true was"),
        (&["--skip-unreadable", "false"], "broken.png"),
    ] {
        let args = [&["--resume", "--steps", "2"], args].concat();
        assert_fails(&mut train("run", &args), &[expected])?;
    }
    let resume = |steps| ["--resume", "--steps", steps];
    succeed(&mut train("run", &resume("2")))?;

    // A change is recorded, and then holds.
    let changed = [&resume("3")[..], &["--random-crop", "false", "--change"]].concat();
    succeed(&mut train("run", &changed))?;
    let history = Checkpoint::open(path("run/checkpoint"))?.history().to_vec();
    let change = history.iter().find(|change| change.field == "images").ok_or("no change")?;
    let crops = [&change.from, &change.to].map(|images| images["pictures"]["crop"].clone());
    assert_eq!(crops, [images["crop"].clone(), "centre".into()]);
    succeed(&mut train("run", &resume("4")))?;
    assert_fails(
        &mut train("run", &[&resume("5")[..], &["--random-crop"]].concat()),
        &["images.crop is \"centre\" in the run"],
    )?;

    // If files changed, the error says so, and does not name settings.
    fs::remove_file(data.join("broken.png"))?;
    fs::remove_file(data.join("3.png"))?;
    assert_fails(
        &mut train("run", &resume("5")),
        &["photos have changed since: from 4 images, sha256 ", ", to 3 images, sha256 "],
    )?;

    // A run of an earlier version has no settings. Its network has the size, and other options are needed again.
    let begin = ["--image-size", "8", "--random-crop", "--steps", "1"];
    succeed(&mut train("earlier", &[&SMALL[..], &begin].concat()))?;
    for (file, field) in [("config.json", "images"), ("data.json", "pictures")] {
        let file = path("earlier").join(file);
        let mut content = json(file.clone())?;
        content.as_object_mut().and_then(|fields| fields.remove(field)).ok_or("no settings")?;
        fs::write(file, content.to_string())?;
    }
    let expected = "(3 images, sha256 ";
    assert_fails(&mut train("earlier", &resume("2")), &["the run is of", expected])?;
    succeed(&mut train("earlier", &[&resume("2")[..], &["--random-crop"]].concat()))?;
    succeed(&mut train("earlier", &resume("3")))?;
    assert_eq!(json(path("earlier/data.json"))?["pictures"]["height"], 8);

    // A configuration of an earlier version has no settings, either: without options, the defaults hold.
    let mut old = json(path("run/config.json"))?;
    old.as_object_mut().ok_or("an object")?.remove("images");
    fs::write(path("old.json"), old.to_string())?;
    let old = path("old.json").to_string_lossy().into_owned();
    let expected = "have (1, 8, 8); pass --height 8 --width 8 --channels grey";
    assert_fails(&mut train("old", &["--config", &old]), &[expected])?;
    Ok(())
}

#[test]
fn the_options_of_a_folder_choose_channels_background_and_memory() -> ddpm::cli::Result<()> {
    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        pictures: FolderArgs,
        #[command(flatten)]
        train: TrainArgs,
    }
    let temp = TempDir::new()?;
    let data = temp.path().join("photos");
    fs::create_dir(&data)?;
    image::RgbaImage::from_pixel(2, 2, image::Rgba([9, 9, 9, 0])).save(data.join("clear.png"))?;
    let open = |args: &[&str]| -> ddpm::cli::Result<Folder> {
        let data = data.to_str().ok_or("a path in UTF-8")?;
        let args = [&["train", "--image-size", "2", "--data", data], args].concat();
        let Cli { pictures, train } = Cli::try_parse_from(args)?;
        pictures.open(pictures.config(&train, &RunDir::open(&train, "none")?)?)
    };
    for (args, expected) in [
        (&[][..], &[255, 255, 255][..]),
        (&["--channels", "grey"], &[255]),
        (&["--grey", "--background", "7"], &[7]),
        (&["--background", "#0102ff"], &[1, 2, 255]),
        (&["--channels", "rgba"], &[9, 9, 9, 0]),
    ] {
        let folder = open(args)?;
        let mut pixels = vec![1; 4 * expected.len()];
        folder.read(0, &mut pixels)?;
        let first: Vec<u8> = pixels.iter().step_by(4).copied().collect();
        assert_eq!(first, expected, "{args:?}");
    }
    assert_eq!(open(&[])?.in_memory(), 1);
    assert_eq!(open(&["--memory-limit", "0"])?.in_memory(), 0);
    let refused = open(&["--channels", "rgba", "--background", "0"]).err().ok_or("accepted")?;
    assert!(refused.to_string().contains("--background is for images without alpha"), "{refused}");
    Ok(())
}

#[test]
fn each_data_set_has_its_own_directory() -> Result<()> {
    let temp = TempDir::new()?;
    write_idx(&temp.path().join("data/mnist"), 5)?;
    write_idx(&temp.path().join("data/fashion-mnist"), 4)?;
    let sets: [(&[&str], &str, &str); 3] = [
        (&[], "out/mnist", "10,000 images"),
        (&["--data", "data"], "out/mnist-full", "5 images"),
        (&["--data", "data", "--fashion"], "out/fashion-mnist", "4 images"),
    ];
    for (args, out, images) in sets {
        let mut command = example("mnist");
        command.args(SMALL).args(args).args(["--steps", "1"]).current_dir(&temp);
        let said = succeed(&mut command)?;
        assert!(said.contains(images) && said.contains(&format!("done: {out}\n")), "{said}");
        assert_eq!(saved_step(&temp.path().join(out))?, 1);
        let (help, out) = (help("mnist")?, format!("--out {out}"));
        assert!(help.split(&out).skip(1).any(|next| next.starts_with([' ', '.'])), "{help}");
    }
    Ok(())
}

/// The files of both sets have the same names.
#[test]
fn the_folder_of_another_set_is_not_trained_on() -> Result<()> {
    let temp = TempDir::new()?;
    write_idx(&temp.path().join("mnist"), 5)?;
    write_idx(&temp.path().join("fashion-mnist"), 5)?;
    let train = |dir: &str, data: &str, args: &[&str]| {
        let mut command = example("mnist");
        command.args(["--out", "run", "--data", data]).args(args).args(SMALL);
        command.args(["--steps", "1"]).current_dir(temp.path().join(dir));
        command
    };
    let clothes = "the folder of Fashion-MNIST; it must be that of MNIST, or pass --fashion";
    let digits = "the folder of MNIST; it must be that of Fashion-MNIST, or omit --fashion";
    assert_fails(&mut train(".", "fashion-mnist", &[]), &["--data is fashion-mnist,", clothes])?;
    assert_fails(&mut train("fashion-mnist", ".", &[]), &[clothes])?;
    assert_fails(&mut train(".", "mnist/", &["--fashion"]), &["--data is mnist/,", digits])?;
    succeed(&mut train(".", "fashion-mnist", &["--fashion"]))?;
    succeed(&mut train("mnist", ".", &[]))?;
    Ok(())
}

/// The set has the same number of images, so the trainer alone could not detect the difference.
#[test]
fn a_run_goes_on_with_its_own_images_only() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("run");
    let data = temp.path().to_str().ok_or("a path in UTF-8")?;
    let clothes = temp.path().join("fashion-mnist");
    write_idx(&temp.path().join("mnist"), 5)?;
    write_idx(&clothes, 5)?;
    let images = clothes.join("train-images-idx3-ubyte");
    let mut bytes = fs::read(&images)?;
    // Changes the last pixel.
    *bytes.last_mut().ok_or("pixels")? ^= 1;
    fs::write(&images, bytes)?;

    mnist(&out, &[&SMALL[..], &["--data", data, "--steps", "1"]].concat())?;
    let small = [&SMALL[..], &["--resume", "--data"]].concat();
    let resume = [&small[..], &[data, "--steps", "2"]].concat();
    let (digits, others) = ("the run is of MNIST (5 images", "not of Fashion-MNIST (5 images");
    assert_fails(
        example("mnist").args(&resume).args(["--fashion", "--out"]).arg(&out),
        &["data.json", digits, others, "pass --data", "no --fashion"],
    )?;
    assert_eq!(saved_step(&out)?, 1);
    mnist(&out, &resume)?;

    // The same images in another directory.
    fs::rename(temp.path().join("mnist"), temp.path().join("elsewhere"))?;
    let elsewhere = temp.path().join("elsewhere");
    let elsewhere = [&small[..], &[elsewhere.to_str().ok_or("a path in UTF-8")?]].concat();
    mnist(&out, &[&elsewhere[..], &["--steps", "3"]].concat())?;

    // A run without a file of its images accepts the given ones, and records them.
    fs::remove_file(out.join("data.json"))?;
    for (steps, warned) in [("4", true), ("5", false)] {
        let args = [&elsewhere[..], &["--steps", steps]].concat();
        let Output { status, stderr, .. } =
            example("mnist").args(args).arg("--out").arg(&out).output()?;
        let said = String::from_utf8(stderr)?;
        assert!(status.success(), "{said}");
        assert_eq!(
            said.contains("data.json does not exist: the images with which the run"),
            warned
        );
        assert_eq!(said.lines().count(), usize::from(warned), "{said}");
    }
    assert_eq!(saved_step(&out)?, 5);
    assert_fails(
        example("mnist").args(&resume).args(["--fashion", "--out"]).arg(&out),
        &["data.json", digits, others],
    )?;

    // The checkpoint records other images before their first update.
    let before = fs::read(out.join("data.json"))?;
    let fashion = [&small[..], &[data, "--fashion"]].concat();
    let changed = [&fashion[..], &["--change"]].concat();
    let said = mnist(&out, &changed)?;
    assert!(said.contains("changed  the images to Fashion-MNIST (5 images"), "{said}");
    let history = Checkpoint::open(out.join("checkpoint"))?.history().to_vec();
    let [change] = &history[..] else { return Err(format!("{history:?}").into()) };
    assert_eq!((change.step, &*change.field), (5, "images"));
    assert_eq!(
        (&change.from["name"], &change.to["name"]),
        (&"MNIST".into(), &"Fashion-MNIST".into())
    );
    // An interruption before data.json was written: the history states the images.
    let after = fs::read(out.join("data.json"))?;
    assert_ne!(after, before);
    fs::write(out.join("data.json"), before)?;
    assert_fails(
        example("mnist").args(&elsewhere).arg("--out").arg(&out),
        &["the run is of Fashion-MNIST (5 images", "not of MNIST"],
    )?;
    mnist(&out, &[&fashion[..], &["--steps", "6"]].concat())?;
    assert_eq!(fs::read(out.join("data.json"))?, after);
    assert_eq!(saved_step(&out)?, 6);
    Ok(())
}

/// Files that a run without a checkpoint, or a foreign program, may have left.
#[test]
fn a_new_run_among_an_old_ones_files_loses_none_and_draws_its_own() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("run");
    write_idx(&temp.path().join("mnist"), 5)?;
    let data = temp.path().to_str().ok_or("a path in UTF-8")?;
    let grid = out.join("samples/step-000001.png");
    fs::create_dir_all(out.join("samples"))?;
    for (round, n) in ["", "-2"].into_iter().enumerate() {
        let (aside, grids) = (format!("metrics-old{n}.jsonl"), format!("samples-old{n}"));
        let old = format!("not ours, {round}\n{{\"step\":1,\"loss\":9.0}}\n");
        fs::write(out.join("metrics.jsonl"), &old)?;
        fs::write(&grid, "an old grid")?;
        fs::write(out.join("samples/step-000900.png"), "a later one")?;
        let args = [&SMALL[..], &["--data", data, "--steps", "1"]].concat();
        let said = mnist(&out, &args)?;
        for name in [&aside, &grids] {
            assert!(said.contains(&format!("{name}, of an earlier run")), "{said}");
        }
        assert_eq!(fs::read_to_string(out.join(aside))?, old);
        assert_eq!(fs::read_to_string(out.join(&grids).join("step-000001.png"))?, "an old grid");
        assert!(out.join(&grids).join("step-000900.png").is_file());
        assert_eq!(fs::read_dir(out.join("samples"))?.count(), 1);
        assert_eq!(metrics(&out)?.len(), 1);
        assert_eq!(image::open(&grid)?.width(), 118);
        fs::remove_dir_all(out.join("checkpoint"))?;
    }
    assert_eq!(fs::read_to_string(out.join("metrics-old.jsonl"))?.lines().count(), 2);
    Ok(())
}

fn samples(checkpoint: &Path, temp: &Path) -> Result<()> {
    let sample = |args: &[&str], png: &str| {
        let mut command = example("sample");
        command.args(args).arg("--checkpoint").arg(checkpoint).arg("--out").arg(temp.join(png));
        command.arg("--cpu");
        command
    };
    assert!(help("sample")?.contains("any U-Net with images of 1 to 4 channels"));
    // The defaults are the settings of the run's grids.
    let grid = checkpoint.with_file_name("samples").join("step-000003.png");
    let said = succeed(&mut sample(&["--count", "3"], "a.png"))?;
    assert!(fs::read(temp.join("a.png"))? == fs::read(&grid)?, "not the run's grid");
    let sampler = "sampler     UniPC-2, 2 steps, clipped (same as the run's grids)\n";
    assert!(said.contains(sampler), "{said}");
    for (args, sampler) in [
        (
            &["--solver", "ddim", "--sampling-steps", "2"][..],
            "DDIM with eta 0, 2 steps, clipped (different from the run's grids)",
        ),
        (&["--no-clip"], "UniPC-2, 2 steps, not clipped (different from the run's grids)"),
        (&["--sampling-steps", "3"], "UniPC-2, 3 steps, clipped (different from the run's grids)"),
        (&["--solver", "unipc-2"], "UniPC-2, 2 steps, clipped (same as the run's grids)"),
        (
            &["--solver", "heun", "--sampling-steps", "2"],
            "Heun, 2 steps (even in log-SNR), clipped (different from the run's grids)",
        ),
        (
            &["--solver", "euler-ancestral", "--eta", "0.5", "--sampling-steps", "2"],
            "DDIM with eta 0.5, 2 steps, clipped (different from the run's grids)",
        ),
        (
            &["--solver", "unipc-3", "--spacing", "karras", "--sampling-steps", "4"],
            "UniPC-3, 4 steps (Karras with rho 7), clipped (different from the run's grids)",
        ),
        (
            &["--spacing", "trailing"],
            "UniPC-2, 2 steps (trailing), clipped (different from the run's grids)",
        ),
    ] {
        let said = succeed(sample(args, "a.png").args(["--count", "1"]))?;
        assert!(said.contains(sampler), "{args:?}: {said}");
    }
    let gif = temp.join("new/denoising.gif");
    let said = succeed(
        sample(&["--count", "2", "--sampling-steps", "3"], "a.png").arg("--gif").arg(&gif),
    )?;
    assert!(said.contains("2 images in ") && said.contains("a.png"), "{said}");
    let film = || -> Result<_> {
        let frames = GifDecoder::new(BufReader::new(File::open(&gif)?))?.into_frames();
        Ok(frames.collect_frames()?)
    };
    let (frames, picture) = (film()?, image::open(temp.join("a.png"))?);
    assert_eq!(frames.len(), 3);
    assert_eq!(frames[2].delay().numer_denom_ms(), (2000, 1));
    assert!(frames[2].buffer() == &picture.to_rgba8(), "the last frame is not the picture");

    // The same seed gives the same picture. The first image does not depend on the number of images.
    let read = |png: &str| fs::read(temp.join(png));
    for threads in ["1 thread", "3 threads"] {
        let mut again = sample(&["--count", "2", "--sampling-steps", "3"], "b.png");
        let said = succeed(again.env("RAYON_NUM_THREADS", &threads[..1]))?;
        assert!(said.contains(&format!("device      CPU, {threads}\n")), "{said}");
        assert!(read("a.png")? == read("b.png")?, "{threads}");
    }
    // Each hundred has its own seed: with one image more, the first hundred are the same, and the last is
    // different.
    for (count, png) in [("100", "g.png"), ("101", "h.png")] {
        let mut command = sample(&["--count", count, "--sampling-steps", "1"], png);
        succeed(command.arg("--gif").arg(&gif))?;
    }
    let image = |png: &str, columns: u32, k: u32| -> Result<_> {
        let picture = image::open(temp.join(png))?;
        assert_eq!(picture.width(), columns * 58 + 2);
        Ok(picture.crop_imm(2 + k % columns * 58, 2 + k / columns * 58, 56, 56).into_luma8())
    };
    for k in [0, 37, 99] {
        assert!(image("g.png", 10, k)? == image("h.png", 11, k)?, "image {k}");
    }
    assert!(image("h.png", 11, 100)? != image("h.png", 11, 0)?);
    assert!(film()?[0].buffer() == &image::open(temp.join("h.png"))?.to_rgba8());
    for (args, png) in [
        (vec!["--seed", "1"], "c.png"),
        (vec!["--solver", "ddim"], "d.png"),
        (vec!["--solver", "ddpm"], "e.png"),
        (vec!["--weights", "model"], "f.png"),
        (vec!["--no-clip"], "f.png"),
    ] {
        succeed(&mut sample(
            &[&args[..], &["--count", "2", "--sampling-steps", "3"]].concat(),
            png,
        ))?;
        assert!(read("a.png")? != read(png)?, "{args:?} changed nothing");
    }
    edits(checkpoint, temp)
}

/// Samples from a weights file: the same images as from the directory, variations, interpolations and inpainting.
fn edits(checkpoint: &Path, temp: &Path) -> Result<()> {
    let weights = temp.join("weights.safetensors");
    fs::copy(checkpoint.join("ema.safetensors"), &weights)?;
    let dir = |name: &str| temp.join("edits").join(name);
    let sample = |name: &str, args: &[&str]| {
        let mut command = example("sample");
        command.args(["--cpu", "--sampling-steps", "4"]).args(args).arg("--images").arg(dir(name));
        command.arg("--out").arg(temp.join("edits.png"));
        command
    };
    let edit = |name: &str, args: &[&str]| -> Result<String> {
        succeed(sample(name, args).arg("--checkpoint").arg(&weights))
    };
    let read = |name: &str, k: usize| fs::read(dir(name).join(format!("{k:06}.png")));
    let said = edit("alone", &["--count", "2", "--seed", "3"])?;
    assert!(said.contains("weights.safetensors, step 3\n"), "{said}");
    succeed(sample("whole", &["--count", "2", "--seed", "3"]).arg("--checkpoint").arg(checkpoint))?;
    assert!(read("alone", 0)? == read("whole", 0)? && read("alone", 1)? == read("whole", 1)?);
    let asked = sample("x", &["--weights", "ema"]).arg("--checkpoint").arg(&weights).output()?;
    let expected = "--weights is for the directory of a checkpoint, not ";
    assert!(String::from_utf8(asked.stderr)?.contains(expected));

    // A picture of more than the network's size, and a mask.
    let (picture, mask) = (temp.join("picture.png"), temp.join("mask.png"));
    let shade = |x: u32, y: u32| image::Luma([(x * 9 + y * 3) as u8]);
    image::GrayImage::from_fn(28, 28, shade).save(&picture)?;
    let white = |x, _| image::Luma([if x < 14 { 255 } else { 0 }]);
    image::GrayImage::from_fn(28, 28, white).save(&mask)?;
    let (picture, mask) = (picture.display().to_string(), mask.display().to_string());
    let said = edit("varied", &["--vary", &picture, "--strength", "0.7", "--count", "3"])?;
    assert!(said.contains("picture.png, strength 0.7, 3 of 4 steps"), "{said}");
    edit("one", &["--vary", &picture, "--strength", "0.7", "--count", "1", "--from", "2"])?;
    assert!(read("varied", 2)? == read("one", 2)? && read("varied", 0)? != read("one", 2)?);

    edit("seed", &["--count", "1", "--seed", "7"])?;
    edit("path", &["--interpolate", "3", "7", "--count", "3"])?;
    assert!(read("path", 0)? == read("alone", 0)? && read("path", 2)? == read("seed", 0)?);
    let between = ["--interpolate-pictures", &picture, &picture, "--count", "2"];
    let said = edit("pictures", &between)?;
    assert!(said.contains("inverting   ") && said.contains("picture.png, 4 steps each"), "{said}");
    assert!(read("pictures", 0)? == read("pictures", 1)?);
    let mut command = sample("x", &[&between[..], &["--solver", "ddpm"]].concat());
    let expected = "--interpolate-pictures needs a solver without noise";
    assert_fails(command.arg("--checkpoint").arg(&weights), &[expected])?;

    let fill = ["--inpaint", &picture, "--mask", &mask, "--solver", "ddpm"];
    let twice = ["--jump", "1", "--resamplings", "2", "--count", "2"];
    let said = edit("filled", &[&fill[..], &twice].concat())?;
    assert!(said.contains("picture.png, 7 evaluations"), "{said}");
    let known = image::open(&picture)?.into_luma8();
    for k in 0..2 {
        let filled = image::open(dir("filled").join(format!("{k:06}.png")))?.into_luma8();
        let differs = |x: u32| (0..28).any(|y| filled.get_pixel(x, y) != known.get_pixel(x, y));
        assert!((14..28).all(|x| !differs(x)) && (0..14).any(differs), "image {k}");
    }
    edit("second", &[&fill[..], &twice[..4], &["--count", "1", "--from", "1"]].concat())?;
    assert!(read("filled", 1)? == read("second", 1)? && read("filled", 0)? != read("second", 1)?);
    image::GrayImage::new(28, 27).save(temp.join("small.png"))?;
    let small = temp.join("small.png").display().to_string();
    let mut command = sample("x", &["--inpaint", &picture, "--mask", &small]);
    let expected = "small.png: 27 x 28 pixels (height x width); a mask has 28 x 28";
    assert_fails(command.arg("--checkpoint").arg(&weights), &[expected])?;
    single_files(&weights, &picture, temp)
}

/// Writes a PNG file per image while further ones are drawn.
fn single_files(weights: &Path, picture: &str, temp: &Path) -> Result<()> {
    let sample = |dir: &Path, args: &[&str]| {
        let mut command = example("sample");
        command.args(["--cpu", "--sampling-steps", "1"]).args(args).arg("--checkpoint");
        command.arg(weights).arg("--images").arg(dir).current_dir(temp);
        command
    };
    let dir = temp.join("many");
    let first = dir.join("000000.png");
    let mut many = sample(&dir, &["--count", "1000000"]).stdout(Stdio::null()).spawn()?;
    let begun = Instant::now();
    while !first.is_file() && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    many.kill()?;
    many.wait()?;
    let drawn = fs::read(&first)?;
    fs::write(dir.join(".000007.png.1-0"), "what a killed process left")?;
    let said = succeed(&mut sample(&dir, &["--count", "1"]))?;
    assert!(said.ends_with(&format!(": {}\n", dir.display())), "{said}");
    assert!(fs::read(&first)? == drawn && !temp.join("samples.png").exists());
    for entry in fs::read_dir(&dir)? {
        let name = entry?.file_name();
        assert!(!name.to_string_lossy().starts_with('.'), "{name:?} is left");
    }

    let most = "it must be at most 1,024";
    let expected = "--count is 1,025; with --out or --gif, or without --images, ";
    for option in [["--out", "grid.png"], ["--gif", "film.gif"]] {
        let mut command = sample(&dir, &["--count", "1025"]);
        assert_fails(command.args(option), &[expected, most])?;
    }
    let mut command = example("sample");
    command.args(["--cpu", "--count", "1025", "--checkpoint"]).arg(weights);
    assert_fails(&mut command, &[expected, most])?;
    // Nothing is drawn for a directory that cannot be written.
    let picture = Path::new(picture);
    let blocked = [(picture.into(), "a file; it must be a directory"), (picture.join("in"), "")];
    for (dir, expected) in blocked {
        let mut command = sample(&dir, &["--count", "1"]);
        assert_fails(&mut command, &["picture.png", expected])?;
        assert!(command.output()?.stdout.is_empty());
    }
    Ok(())
}

fn a_number(checkpoint: &Path, temp: &Path) -> Result<()> {
    let (data, dir) = (temp.join("ten"), temp.join("mnist-fd"));
    write_idx(&data, 10)?;
    let number = |name: &str, args: &[&str]| {
        let mut command = example("mnist-fd");
        command.args(["--count", "10"]).args(args);
        if !args.contains(&"--sampling-steps") {
            command.args(["--sampling-steps", "2"]);
        }
        command.arg("--data").arg(&data).arg("--checkpoint").arg(checkpoint);
        command.arg("--classifier").arg(dir.join(format!("{name}.safetensors")));
        command.arg("--json").arg(temp.join(format!("{name}.json")));
        command
    };
    let Output { status, stdout, stderr } = number("a", &["--classifier-steps", "2"]).output()?;
    let (said, warned) = (String::from_utf8(stdout)?, String::from_utf8(stderr)?);
    assert!(status.success(), "{warned}");
    assert!(said.contains("training    a classifier, 2 steps"), "{said}");
    for warning in ["a good classifier is right on over 99%", "the fewer images, the larger"] {
        assert!(warned.contains(&format!("warning: {warning}")), "{warned}");
    }
    let read = |name: &str| -> Result<Value> {
        Ok(serde_json::from_slice(&fs::read(temp.join(format!("{name}.json")))?)?)
    };
    let json = read("a")?;
    assert_eq!((&json["step"], &json["test_images"]), (&3.into(), &10.into()));
    // The solver of the run, with the given number of steps.
    assert_eq!(json["solver"]["unipc"]["order"], 2);
    assert_eq!((&json["sampling_steps"], &json["clip_denoised"]), (&2.into(), &true.into()));
    for set in ["samples", "train_images", "uniform_noise"] {
        let figures = &json[set];
        let classes = figures["classes"].as_array().ok_or("an array")?;
        assert_eq!(classes.iter().filter_map(Value::as_u64).sum::<u64>(), 10);
        assert_eq!((&figures["images"], classes.len()), (&10.into(), 10));
    }
    // The training set and the test set have the same files.
    let distance = |set: &str| json[set]["mnist_fd"].as_f64().ok_or("a number");
    let [same, noise] = [distance("train_images")?, distance("uniform_noise")?];
    assert!((0.0..1e-6).contains(&same) && noise > 1.0, "{same}, {noise}");
    for (name, set) in [
        ("train images", "train_images"),
        ("samples", "samples"),
        ("uniform noise", "uniform_noise"),
    ] {
        assert_eq!(row(&said, name)?, printed(&json[set])?);
    }
    // There is one image of each digit, so at most as many are right as there are classes found.
    let right = 100.0 * json["test_accuracy"].as_f64().ok_or("a number")?;
    assert!(said.contains(&format!("right on {right:.2}% of 10 test images\n")), "{said}");
    let classes = json["train_images"]["classes"].as_array().ok_or("an array")?;
    let told_apart = classes.iter().filter(|&n| n != 0).count();
    assert!(right <= 10.0 * told_apart as f64 + 1e-9, "{right}, {classes:?}");
    let of = |key: &str| json[key].as_str();
    assert_eq!(of("precision"), Some("highest"));
    let crc32 = of("classifier_crc32").ok_or("a string")?.to_owned();
    assert!(said.contains(&format!("a.safetensors, crc32 {crc32}, right on ")), "{said}");

    // An existing classifier is only read. Training it again gives the same one, and shorter training a
    // different one.
    let before = fs::metadata(&dir)?.modified()?;
    let said = succeed(&mut number("a", &[]))?;
    assert!(!said.contains("training"), "{said}");
    assert_eq!(fs::metadata(&dir)?.modified()?, before);
    assert_eq!(read("a")?, json);
    succeed(&mut number("b", &["--classifier-steps", "2"]))?;
    assert_eq!(read("b")?["samples"], json["samples"]);
    assert_eq!(read("b")?["classifier_crc32"], crc32);
    #[cfg(unix)]
    {
        // The reader of the output is closed.
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let mut deaf = number("c", &["--classifier-steps", "1"]);
        assert!(deaf.stdout(writer.try_clone()?).stderr(writer).status()?.success());
        assert_ne!(read("c")?["classifier_crc32"], crc32);
        stopped(&mut number("d", &["--classifier-steps", "1000000"]), "training", &dir)?;
        stopped(&mut number("a", &["--sampling-steps", "1000"]), "drawing", &dir)?;
    }
    succeed(&mut number("a", &["--seed", "1"]))?;
    assert_ne!(read("a")?["samples"], json["samples"]);

    let trained = &["--classifier-steps is 2", "a.safetensors exists", "another --classifier"];
    assert_fails(&mut number("a", &["--classifier-steps", "2"]), trained)?;
    let identity = checkpoint.with_file_name("data.json");
    let ours = fs::read_to_string(&identity)?;
    fs::write(&identity, ours.replace("MNIST", "Fashion-MNIST"))?;
    let other = "data.json: the run is of Fashion-MNIST; mnist-fd measures digits";
    assert_fails(&mut number("a", &[]), &[other])?;
    let mut here = example("mnist-fd");
    here.args(["--data", "absent", "--checkpoint", "."]).current_dir(checkpoint);
    assert_fails(&mut here, &[other])?;
    fs::write(&identity, ours)?;
    for (data, expected) in [
        ("hub", "--data hub is for the examples that train"),
        ("no digits", "scripts/fetch-data mnist 'no digits'"),
        ("fashion-mnist", "the folder of Fashion-MNIST; it must be that of MNIST\n"),
    ] {
        let mut command = example("mnist-fd");
        command.args(["--data", data, "--checkpoint"]).arg(checkpoint);
        assert_fails(&mut command, &[expected])?;
    }

    fs::copy(checkpoint.join("ema.safetensors"), dir.join("unet.safetensors"))?;
    assert_fails(&mut number("unet", &[]), &["unet.safetensors", "conv1.weight", "missing"])?;
    fs::write(dir.join("cut.safetensors"), "{")?;
    assert_fails(&mut number("cut", &[]), &["cut.safetensors", "truncated"])?;
    assert_fails(&mut number("a", &["--solver", "ddpm", "--eta", "1"]), &["--solver ddim only"])?;
    dependences(checkpoint, &data, &dir.join("a.safetensors"))?;
    fs::write(
        data.join("t10k-labels-idx1-ubyte"),
        [[0, 0, 8, 1], [0, 0, 0, 10], [77; 4]].concat(),
    )?;
    assert_fails(&mut number("a", &[]), &["t10k-labels-idx1-ubyte", "12 bytes"])?;
    let labels = [&[0, 0, 8, 1, 0, 0, 0, 10][..], &[77; 10]].concat();
    fs::write(data.join("t10k-labels-idx1-ubyte"), labels)?;
    assert_fails(&mut number("a", &[]), &["the label of image 0 is 77", "0 to 9"])?;
    fs::remove_file(data.join("t10k-labels-idx1-ubyte"))?;
    assert_fails(&mut number("a", &[]), &["t10k-labels-idx1-ubyte", "fetch-data mnist"])
}

/// The example `dependence`: ten images of each of two seeds.
fn dependences(checkpoint: &Path, data: &Path, classifier: &Path) -> Result<()> {
    let mut command = example("dependence");
    command.args(["--count", "10", "--seeds", "2", "--sampling-steps", "2", "--checkpoint"]);
    command.arg(checkpoint).arg("--data").arg(data).arg("--extractor");
    let said = succeed(command.arg(format!("digits:{}", classifier.display())))?;
    let rows: Vec<&str> = said.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 12, "{said}");
    assert!(rows[2].starts_with("| 10 images, one seed per set | 2 | "), "{said}");
    // Ten real images are all there are, so nothing changes.
    assert!(rows[6].starts_with("| 10 real images | 2 | +0.000 ± 0.000 | +0.000 "), "{said}");
    // Rounding changes the distance, by far less than the distance.
    let cell = |row: usize| rows[row].split(['|', '±']).nth(3).unwrap_or_default().trim();
    let (plain, truncated): (f64, f64) = (cell(2).parse()?, cell(7).parse()?);
    assert!(truncated != 0.0 && truncated.abs() < 0.1 * plain, "{said}");
    Ok(())
}

/// The program `evaluate`, with the classifier and the data of [`a_number`].
fn figures(checkpoint: &Path, temp: &Path) -> Result<()> {
    let text = |path: PathBuf| path.to_str().map(str::to_owned).ok_or("a path in UTF-8");
    let data = format!("mnist:{}", text(temp.join("ten"))?);
    let extractor = format!("digits:{}", text(temp.join("mnist-fd/a.safetensors"))?);
    let (json, npz) = (text(temp.join("figures.json"))?, text(temp.join("ten.npz"))?);
    let (checkpoint, drawn) = (text(checkpoint.into())?, text(temp.join("drawn"))?);
    let evaluate = |args: &[&str]| {
        let mut command = example("evaluate");
        command.args(["--extractor", &extractor, "--json", &json]).args(args);
        command
    };
    let read = || -> Result<Value> { Ok(serde_json::from_slice(&fs::read(&json)?)?) };
    let few = ["--checkpoint", &checkpoint, "--seed", "1", "--count", "10"];
    let few = [&few[..], &["--sampling-steps", "2"]].concat();
    let to_ten = ["--data", &data, "--save-statistics", &npz];
    let output = evaluate(&[&few[..], &to_ten].concat()).output()?;
    let (said, warned) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    assert!(output.status.success(), "{warned}");
    for name in ["Fréchet distance", "kernel distance", "sliced distance", "class score"] {
        assert!(said.contains(&format!("{name} (digits)")), "{said}");
    }
    // These are names of figures in the features of Inception.
    for name in ["FID", "KID", "MIND", "Inception"] {
        assert!(!said.contains(name) && !warned.contains(name), "{said}{warned}");
    }
    for warning in [
        "samples: 10 images; 10,000 are needed for Fréchet distance (digits), class score (digits),",
        "data: 10 images are not more than",
    ] {
        assert!(warned.contains(&format!("warning: {warning}")), "{warned}");
    }
    let of_samples = read()?;
    // The same samples and the same data have the same distance in the other program.
    let other: Value = serde_json::from_slice(&fs::read(temp.join("a.json"))?)?;
    let number = |value: &Value| value.as_f64().ok_or("a number");
    let frechet = number(&of_samples["figures"]["samples"]["frechet_distance"])?;
    let expected = number(&other["samples"]["mnist_fd"])?;
    assert!((frechet / expected - 1.0).abs() < 1e-9, "{frechet}, {expected}");
    assert_eq!(of_samples["extractor"]["weights_sha256"], other["classifier_sha256"]);
    assert_eq!(other["classifier_sha256"].as_str().map(str::len), Some(64));
    let samples = &of_samples["samples"];
    assert_eq!(samples["weights_sha256"].as_str().map(str::len), Some(64));
    for (field, value) in [("weights", "ema"), ("precision", "highest")] {
        assert_eq!(samples[field], value);
    }
    assert_eq!((&samples["seed"], &samples["sampling_steps"]), (&1.into(), &2.into()));
    for field in ["solver", "spacing", "guidance", "clip_denoised", "rounding", "weights_file"] {
        assert!(samples.get(field).is_some(), "{field}");
    }
    assert_eq!(of_samples["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(
        (&of_samples["data"]["part"], &of_samples["data"]["name"]),
        (&"test".into(), &"MNIST".into())
    );
    assert!(of_samples["data"]["crc32"].is_string());
    let figures = &of_samples["figures"]["samples"];
    assert_eq!(figures["kernel_distance"]["subset_size"], 5);
    assert!(number(&figures["kernel_distance"]["standard_error"])? > 0.0, "{figures}");
    for field in
        ["sliced_distance", "class_score", "manifold", "classes", "nearest_training_images"]
    {
        assert!(figures[field].is_object(), "{field}: {figures}");
    }
    // The training set and the test set have the same files.
    let floor = &of_samples["figures"]["other_part"];
    assert!(number(&floor["frechet_distance"])?.abs() < 1e-6, "{floor}");
    assert_eq!((&floor["manifold"]["precision"], &floor["images"]), (&1.0.into(), &10.into()));
    assert!(floor.get("nearest_training_images").is_none());

    // The same samples as pictures, and the same data as statistics.
    let draw = ["--images", &drawn, "--seed", "1", "--count", "10", "--sampling-steps", "2"];
    succeed(example("sample").args(["--checkpoint", &checkpoint]).args(draw))?;
    let said = succeed(&mut evaluate(&["--samples", &drawn, "--statistics", &npz]))?;
    let of_pictures = read()?;
    let found = number(&of_pictures["figures"]["samples"]["frechet_distance"])?;
    assert!((found / frechet - 1.0).abs() < 1e-6, "{found}, {frechet}");
    assert!(!said.contains("precision"), "{said}");
    assert!(of_pictures["figures"]["samples"].get("sliced_distance").is_none());
    assert_eq!(of_pictures["samples"]["resizing"]["filter"], "bicubic");
    assert!(of_pictures["statistics"]["sha256"].is_string());

    // Pictures that copy the training images.
    let same = format!("pictures:{drawn}");
    let said = succeed(&mut evaluate(&["--samples", &drawn, "--data", &same]))?;
    let figures = &read()?["figures"];
    let copied = &figures["samples"]["nearest_training_images"];
    assert_eq!(copied["share_below_third_of_second"], 1.0);
    assert!(figures["other_part"].is_null() && said.contains("100.00%"), "{said}");

    // Twelve of more pictures, at random, beside one half of all pictures against the other.
    let more = text(temp.join("more"))?;
    let draw = ["--images", &more, "--count", "24", "--sampling-steps", "2"];
    succeed(example("sample").args(["--checkpoint", &checkpoint]).args(draw))?;
    let of_more = format!("pictures:{more}");
    let mut seeds = Vec::new();
    for seed in ["3", "4"] {
        let twelve = ["--samples", &more, "--data", &of_more, "--count", "12", "--seed", seed];
        let said = succeed(&mut evaluate(&twelve))?;
        assert!(said.contains("24 pictures, of which 12 at random"), "{said}");
        assert!(said.contains("half of the data"), "{said}");
        let json = read()?;
        let samples = &json["samples"];
        assert_eq!((&samples["images"], &samples["chosen"]), (&24.into(), &12.into()));
        let floor = &json["figures"]["half_of_data"];
        assert_eq!((&floor["images"], &floor["compared_with"]), (&12.into(), &12.into()));
        assert!(number(&floor["frechet_distance"])? > 0.0, "{floor}");
        // A picture is its own nearest one, so its number is that in the folder.
        let nearest = &json["figures"]["samples"]["nearest_training_images"]["nearest"];
        let nearest = nearest.as_array().ok_or("an array")?;
        assert!(nearest.iter().all(|pair| pair["sample"] == pair["training_image"]), "{json}");
        let chosen: BTreeSet<u64> =
            nearest.iter().filter_map(|pair| pair["sample"].as_u64()).collect();
        assert!(chosen.last().is_some_and(|&last| last >= 12), "{chosen:?}");
        seeds.push((chosen, json["figures"]["samples"]["frechet_distance"].clone()));
    }
    assert_ne!(seeds[0], seeds[1]);
    let too_many = ["--samples", &more, "--data", &of_more, "--count", "25"];
    assert_fails(&mut evaluate(&too_many), &["--count is 25", "24 pictures"])?;
    bits(&checkpoint, &data, &json)?;

    #[cfg(unix)]
    stopped(
        &mut evaluate(&["--data", &data, "--checkpoint", &checkpoint, "--sampling-steps", "1000"]),
        "drawing",
        temp,
    )?;
    let cifar = format!("cifar10:{}", text(cifar(temp)?)?);
    fn join<'a>(drawn: &'a str, args: &[&'a str]) -> Vec<&'a str> {
        [&["--samples", drawn], args].concat()
    }
    let large = join(&drawn, &["--data", &same, "--image-size", "32"]);
    let text_file = join(&drawn, &["--data", &data, "--save-statistics", "x.txt"]);
    for (args, expected) in [
        (join(&drawn, &["--data", &cifar]), ["test_batch.bin", "scripts/fetch-data cifar10"]),
        (join(&drawn, &["--data", "mnist:absent"]), ["absent", "scripts/fetch-data mnist absent"]),
        (
            join(&drawn, &["--data", &data, "--image-size", "9"]),
            ["--image-size is for", "pictures"],
        ),
        (large, ["(1, 32, 32)", "it must be (1, 28, 28)"]),
        (text_file, ["--save-statistics is x.txt", "must end in .npz"]),
        (join(&drawn, &["--statistics", &json]), ["figures.json", ""]),
        (vec!["--samples", "absent", "--statistics", &npz], ["absent", ""]),
    ] {
        assert_fails(&mut evaluate(&args), &expected)?;
    }
    judged(&extractor, temp)
}

/// The bits per dimension of images of `data`, which the library also computes.
fn bits(checkpoint: &str, data: &str, json: &str) -> Result<()> {
    let measure = |args: &[&str]| {
        let mut command = example("evaluate");
        command.args(["--checkpoint", checkpoint, "--data", data, "--seed", "5"]).args(args);
        command.args(["--json", json]);
        command
    };
    let opened = Checkpoint::open(checkpoint)?;
    let unet = opened.ema::<UNetConfig>(&Device::Cpu)?;
    let dir = data.strip_prefix("mnist:").ok_or("digits")?;
    let images = sets::mnist(dir, sets::Split::Test)?;
    let four = Subset::random(&images, 4, 5)?;
    let batch = || Batch::read(&four, 0..4, &Device::Cpu);
    let go_on = |_| Ok(ControlFlow::Continue(()));
    let bound = VariationalBound::new(opened.diffusion(), Variance::Posterior, 5)?.sampled(3)?;
    let bound = bound.clip_denoised(true).evaluate(&unet, batch()?, go_on)?.ok_or("bounds")?;
    let flow = ProbabilityFlow::new(opened.diffusion(), 2, 5)?;
    let flow = flow.evaluate(&unet, batch()?, go_on)?.ok_or("densities")?;

    for (args, measured, expected) in [
        (
            &["--bits", "4", "--bits-terms", "3"][..],
            "variational bound",
            bound.iter().map(|bound| bound.total).collect::<Vec<_>>(),
        ),
        (
            &["--bits", "4", "--bits-by", "flow", "--bits-steps", "2"],
            "probability flow",
            flow.iter().map(|flow| flow.bits).collect(),
        ),
    ] {
        let said = succeed(&mut measure(args))?;
        assert!(said.contains("bits per dimension  ") && !said.contains("drawing"), "{said}");
        let json: Value = serde_json::from_slice(&fs::read(json)?)?;
        let found = &json["bits_per_dimension"];
        let mean = expected.iter().sum::<f64>() / 4.0;
        let squares: f64 = expected.iter().map(|bits| (bits - mean).powi(2)).sum();
        for (field, expected) in [("mean", mean), ("standard_error", (squares / 12.0).sqrt())] {
            let found = found[field].as_f64().ok_or("a number")?;
            assert!((found / expected - 1.0).abs() < 1e-9, "{field}: {found}, not {expected}");
        }
        assert_eq!((&found["images"], &found["seed"]), (&4.into(), &5.into()));
        assert_eq!((&found["measure"], &found["conditional"]), (&measured.into(), &false.into()));
        assert!(found["dequantisation"].is_string() && json["data"]["crc32"].is_string());
        assert!(json.get("figures").is_none() && json.get("extractor").is_none(), "{json}");
        let terms = found["terms"]["values"].as_array().map(Vec::len);
        assert_eq!(terms.is_some(), measured == "variational bound", "{found}");
    }
    for (args, expected) in [
        (&["--bits", "11"][..], ["--bits is 11", "10 test images"]),
        (&["--bits", "2", "--bits-steps", "2"], ["--bits-steps is for", "--bits-by flow"]),
        (
            &["--bits", "2", "--bits-by", "flow", "--bits-terms", "2"],
            ["--bits-terms is for", "--bits-by bound"],
        ),
        (&["--bits", "2", "--bits-terms", "1000"], ["sampled terms is 1000", "from 1 to 999"]),
    ] {
        assert_fails(&mut measure(args), &expected)?;
    }
    Ok(())
}

/// A run whose samples are judged, and which holds out images.
fn judged(extractor: &str, temp: &Path) -> Result<()> {
    let (out, data) = (temp.join("judged"), temp.join("ten"));
    let data = data.to_str().ok_or("a path in UTF-8")?;
    let judge = ["--judge", "4", "--judge-share", "1", "--extractor", extractor];
    let args = [&SMALL[..], &["--data", data, "--steps", "6", "--held-out", "2"], &judge].concat();
    let said = mnist(&out, &args)?;
    assert!(said.contains("best     judge/sliced "), "{said}");
    let lines = metrics(&out)?;
    let judged = lines.iter().filter(|line| line["judge/sliced"].is_f64()).collect::<Vec<_>>();
    assert!(!judged.is_empty() && judged.iter().all(|line| line["judge/frechet"].is_f64()));
    let best: Value = serde_json::from_slice(&fs::read(out.join("best/best.json"))?)?;
    assert_eq!(best["metric"], "judge/sliced");
    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json"))?)?;
    assert_eq!((&config["judge"], &config["extractor"]), (&4.into(), &extractor.into()));

    // The settings are those of config.json, and numbers of another way are not compared.
    let resume = ["--data", data, "--resume", "--steps"];
    let said = mnist(&out, &[&resume[..], &["7"]].concat())?;
    assert!(!said.contains("kept"), "{said}");
    let said = mnist(&out, &[&resume[..], &["8", "--judge", "5"]].concat())?;
    assert!(said.contains("best-old, the best before the change"), "{said}");
    Ok(())
}

/// Returns the cells after a name in the table of mnist-fd.
fn row<'a>(said: &'a str, name: &str) -> Result<Vec<&'a str>> {
    let row = said.lines().find_map(|line| line.strip_prefix(name)).ok_or("a row")?;
    Ok(row.split_whitespace().collect())
}

/// Formats figures like these cells.
fn printed(figures: &Value) -> Result<Vec<String>> {
    let number = |value: &Value| value.as_f64().ok_or("a number");
    let (count, fd) = (number(&figures["images"])?, number(&figures["mnist_fd"])?);
    let confident = 100.0 * number(&figures["confident"])?;
    let mut row = vec![format!("{count}"), format!("{fd:.3}"), format!("{confident:.1}%")];
    for class in figures["classes"].as_array().ok_or("an array")? {
        row.push(format!("{:.1}", 100.0 * number(class)? / count));
    }
    Ok(row)
}

/// Stops a command with Ctrl-C after a line that begins with `line`, and asserts that no files are left.
#[cfg(unix)]
fn stopped(command: &mut Command, line: &str, dir: &Path) -> Result<()> {
    let names = || -> std::io::Result<BTreeSet<_>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect()
    };
    let before = names()?;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let said = BufReader::new(child.stdout.take().ok_or("a pipe")?);
    let mut said = said.lines().map_while(std::io::Result::ok);
    assert!(said.any(|said| said.starts_with(line)), "{line}");
    signal("INT", &child)?;
    let Output { status, stderr, .. } = child.wait_with_output()?;
    let warned = String::from_utf8(stderr)?;
    assert_eq!(status.code(), Some(130), "{warned}");
    assert!(
        warned.contains("stopping after this step") && warned.ends_with("stopped\n"),
        "{warned}"
    );
    assert_eq!(names()?, before);
    Ok(())
}

fn errors_about_a_run(out: &Path, temp: &Path) -> Result<()> {
    let checkpoint = out.join("checkpoint");
    let before = fs::read(out.join("metrics.jsonl"))?;
    let runs: &[(&[&str], &[&str])] = &[
        (&[], &["holds a run at step 3", "--resume", "another --out"]),
        (&["--seed", "9", "--data", "no-such"], &["holds a run at step 3", "another --out"]),
        (
            &["--resume", "--batch-size", "4"],
            &["train.batch_size is 2", "but 4 was requested; omit --batch-size to continue"],
        ),
        (&["--resume", "--seed", "9"], &["train.seed is 0", "but 9 was requested; omit --seed"]),
        (
            &["--resume", "--accumulation", "2"],
            &["train.accumulation is 1", "omit --accumulation", "or begin a new run"],
        ),
        (&["--resume", "--precision", "high"], &["train.precision is", "omit --precision"]),
        (&["--resume", "--schedule", "cosine"], &["train.schedule is null", "add --change"]),
        (
            &["--resume", "--change", "--seed", "9"],
            &["train.seed is 0", "omit --seed to continue the run, or begin a new run"],
        ),
        (
            &["--resume", "--change", "--loss", "l1"],
            &[
                "train.objective.loss is \"mse\" in the checkpoint, but \"l1\" was requested; omit --loss to continue",
                "another --out; --change can change only --batch-size, --learning-rate, --warmup-steps, ",
                "--precision and the images\n",
            ],
        ),
        (&["--resume", "--warmup-steps", "5"], &["train.warmup_steps is 0", "add --change"]),
        (&["--resume", "--cooldown", "0.5"], &["train.cooldown is 0.7", "add --change"]),
        (
            &["--resume", "--learning-rate", "1"],
            &["train.optimizer.learning_rate is 0.001", "omit --learning-rate"],
        ),
        (&["--resume", "--data", "no-such"], &["no-such", "scripts/fetch-data mnist no-such"]),
    ];
    for (args, expected) in runs {
        assert_fails(example("mnist").args(*args).arg("--out").arg(out), expected)?;
    }
    assert_fails(
        example("cifar10").args(["--resume", "--data"]).arg(cifar(temp)?).arg("--out").arg(out),
        &["(3, 32, 32)", "the network's have (1, 28, 28)"],
    )?;
    write_idx(&temp.join("other"), 3)?;
    let mut other = example("mnist");
    other
        .args(["--resume", "--steps", "9", "--out"])
        .arg(out)
        .arg("--data")
        .arg(temp.join("other"));
    let (ours, theirs) = ("MNIST (10000 images, crc32 ", "not of MNIST (3 images, crc32 ");
    assert_fails(&mut other, &["data.json", ours, theirs, "pass neither --data nor --fashion"])?;
    // A run of an earlier version.
    let identity = fs::read(out.join("data.json"))?;
    fs::remove_file(out.join("data.json"))?;
    assert_fails(&mut other, &["number of images is 3; it must be 10000"])?;
    assert!(!out.join("data.json").exists(), "data.json names images of another run");
    fs::write(out.join("data.json"), "{}")?;
    assert_fails(&mut other, &["data.json", "missing field"])?;
    fs::write(out.join("data.json"), identity)?;
    assert!(before == fs::read(out.join("metrics.jsonl"))?, "an error changed the log");

    let samples: [(&[&str], &[&str]); 6] = [
        (&["--out", "x.jpg"], &["--out is x.jpg", "must end in .png"]),
        (&["--gif", "x.png"], &["--gif is x.png", "must end in .gif"]),
        (&["--out", "/proc/version/x.png"], &["/proc/version"]),
        (&["--sampling-steps", "2000"], &["sampling steps is 2000", "from 1 to 1000"]),
        (&["--solver", "ddpm", "--eta", "0.5"], &["--eta is for --solver ddim"]),
        (&["--weights", "best"], &["[possible values: ema, model]"]),
    ];
    for (args, expected) in samples {
        assert_fails(example("sample").args(args).arg("--checkpoint").arg(&checkpoint), expected)?;
    }
    assert_fails(
        example("sample").arg("--checkpoint").arg(out),
        &["no checkpoint here", &checkpoint.display().to_string()],
    )?;

    let model = File::options().write(true).open(checkpoint.join("ema.safetensors"))?;
    model.set_len(1000)?;
    let damaged = ["ema.safetensors: damaged file: 1000 bytes long"];
    assert_fails(example("sample").arg("--checkpoint").arg(checkpoint), &damaged)
}

/// Writes batches of one image, of which the last is incomplete.
fn cifar(temp: &Path) -> Result<PathBuf> {
    let dir = temp.join("cifar-10-batches-bin");
    fs::create_dir_all(&dir)?;
    for batch in 1..=5 {
        fs::write(dir.join(format!("data_batch_{batch}.bin")), [7; 3073])?;
    }
    Ok(dir)
}

#[test]
fn a_classifier_of_pictures_learns_them() -> Result<()> {
    let temp = TempDir::new()?;
    let dir = cifar(temp.path())?;
    // Four classes: dark or light pictures in red or blue.
    let picture = |class: u8, shade: u8| {
        let planes = [class & 1, 0, class >> 1].map(|bright| [bright * 200 + shade; 1024]);
        [&[class][..], &planes.concat()].concat()
    };
    let pictures: Vec<u8> = (0..8).flat_map(|i| picture(i % 4, 10 * (i / 4))).collect();
    for batch in fs::read_dir(&dir)? {
        fs::write(batch?.path(), &pictures)?;
    }
    fs::write(dir.join("test_batch.bin"), &pictures)?;
    let file = temp.path().join("classifier.safetensors");
    let train = |epochs| {
        let mut command = example("cifar10-classifier");
        command.args(["--cpu", "--epochs", epochs, "--data"]).arg(&dir).arg("--out").arg(&file);
        command
    };
    let said = succeed(&mut train("25"))?;
    assert!(said.contains("100.00% of 8 images are recognised"), "{said}");
    let weights = fs::read(&file)?;
    succeed(&mut train("25"))?;
    assert_eq!(fs::read(&file)?, weights, "the same seed gives the same weights");
    assert_fails(&mut train("0"), &["--epochs", "1"])
}

#[test]
fn wrong_arguments_are_reported_in_one_line() -> Result<()> {
    let temp = TempDir::new()?;
    let path = |name: &str| temp.path().join(name).to_string_lossy().into_owned();
    let (nothing, file, cut, spaced) = (path("nothing"), path("file"), path("cut"), path("my run"));
    let (mine, empty) = (path("mine"), path("empty"));
    fs::create_dir(&empty)?;
    fs::create_dir(&mine)?;
    fs::write(Path::new(&mine).join("holiday.jpg"), "of my own")?;
    fs::create_dir_all(Path::new(&spaced).join("checkpoint"))?;
    File::create(&file)?;
    write_idx(Path::new(&cut), 2)?;
    File::options()
        .write(true)
        .open(Path::new(&cut).join("train-images-idx3-ubyte"))?
        .set_len(99)?;
    let batches = cifar(temp.path())?;
    fs::write(batches.join("data_batch_5.bin"), [7; 3000])?;
    let batches = batches.to_string_lossy();
    let digits = format!("digits:{}", path("absent.safetensors"));

    let cases: &[(&str, &[&str], &[&str])] = &[
        ("mnist", &["--steps", "0"], &["--steps", "whole number from 1 to 1000000000"]),
        ("mnist", &["--steps", "ten"], &["'ten'", "whole number from 1"]),
        ("mnist", &["--steps", "1.5"], &["'1.5'", "whole number from 1"]),
        ("mnist", &["--steps"], &["a value is required for '--steps"]),
        ("mnist", &["--steps", "1", "--steps", "2"], &["cannot be used multiple times"]),
        ("mnist", &["--batch-size", "-3"], &["'-3'", "whole number from 1 to 65536"]),
        ("mnist", &["--learning-rate", "0"], &["'0'", "a number above 0, up to 1"]),
        ("mnist", &["--learning-rate", "-1"], &["'-1'", "a number above 0, up to 1"]),
        ("mnist", &["--learning-rate", "1.1"], &["'1.1'", "a number above 0, up to 1"]),
        ("mnist", &["--seed", "-1"], &["'-1'", "whole number from 0"]),
        ("mnist", &["--sample-count", "5000"], &["from 1 to 1024"]),
        ("mnist", &["--sampling-steps", "1001"], &["from 1 to 1000"]),
        ("mnist", &["--stepz", "3"], &["'--stepz'", "exists: '--steps'"]),
        ("mnist", &["extra"], &["unexpected argument 'extra'", "--help"]),
        ("mnist", &["--out", &nothing, "--fashion"], &["--data", "fetch-data fashion-mnist"]),
        ("mnist", &["--out", &nothing, "--data", "absent"], &["scripts/fetch-data mnist absent"]),
        ("mnist", &["--out", &nothing, "--data", &file], &["file", "scripts/fetch-data mnist"]),
        ("mnist", &["--out", &nothing, "--data", "my own"], &["scripts/fetch-data mnist 'my own'"]),
        ("mnist", &["--out", &nothing, "--data", &cut], &["99 bytes", "16 + 2 x 28 x 28"]),
        // A download is not suggested into a folder that holds other files.
        ("mnist", &["--out", &nothing, "--data", &mine], &[IMAGES, "fetch-data mnist data`"]),
        ("mnist", &["--out", &nothing, "--data", &empty], &[IMAGES, "fetch-data mnist ", &empty]),
        ("mnist", &["--out", &nothing, "--data", &cut], &["fetch-data mnist data`", "--data data"]),
        ("mnist", &["--out", &nothing, "--resume"], &["no checkpoint here", "--resume requires"]),
        ("mnist", &["--out", &file], &["--out is ", "file; it must be a directory"]),
        (
            "mnist",
            &["--out", &nothing, "--batch-size", "4", "--accumulation", "3"],
            &["accumulation is 3", "a divisor of batch_size, which is 4"],
        ),
        ("cifar10", &["--out", &nothing, "--data", "absent"], &["scripts/fetch-data cifar10"]),
        ("cifar10", &["--out", &nothing, "--data", &batches], &["3000 bytes", "3073"]),
        ("cifar10", &["--fashion"], &["unexpected argument '--fashion'"]),
        ("train", &["--data", "x", "--channels", "cmyk"], &["[possible values: auto, grey, rgb, "]),
        ("train", &["--data", "x", "--grey", "--channels", "rgb"], &["cannot be used with"]),
        ("train", &["--data", "x", "--background", "#12345"], &["expected #rrggbb in hexadecimal"]),
        ("train", &["--data", "x", "--background", "256"], &["or a grey value from 0 to 255"]),
        ("train", &["--data", "x", "--memory-limit", "2.5"], &["whole number from 0"]),
        ("sample", &[], &["required", "--checkpoint <PATH>"]),
        ("sample", &["--strength", "0"], &["'0'", "a number above 0, up to 1"]),
        ("sample", &["--checkpoint", "a", "--strength", "1"], &["not provided: --vary <FILE>"]),
        ("sample", &["--checkpoint", "a", "--inpaint", "b"], &["not provided: --mask <FILE>"]),
        ("sample", &["--checkpoint", "a", "--jump", "3"], &["not provided: ", "--inpaint <FILE>"]),
        (
            "sample",
            &["--checkpoint", "a", "--vary", "b", "--interpolate", "1", "2"],
            &["'--vary <FILE>' cannot be used with"],
        ),
        (
            "sample",
            &["--checkpoint", "a", "--interpolate", "1", "2", "--seed", "3"],
            &["cannot be used with", "--seed <K>"],
        ),
        ("sample", &["--checkpoint", "a", "--interpolate", "1"], &["2 values required"]),
        ("sample", &["--checkpoint", &nothing], &["nothing", "no checkpoint here"]),
        ("sample", &["--checkpoint", &file], &["file", "no checkpoint here"]),
        ("sample", &["--checkpoint", &spaced], &["--checkpoint '", "my run/checkpoint' is one"]),
        ("sample", &["--solver", "dpm"], &["'dpm'", "[possible values: ddpm, ddim, "]),
        ("sample", &["--spacing", "odd"], &["'odd'", "[possible values: even, leading, "]),
        ("sample", &["--eta", "2"], &["'2'", "a number from 0 to 1"]),
        ("sample", &["--eta", "nan"], &["'nan'", "a number from 0 to 1"]),
        ("sample", &["--count", "0"], &["'0'", "whole number from 1 to 10000000"]),
        ("mnist", &["--judge", "9", "--out", &nothing], &["--judge needs --extractor KIND:FILE"]),
        ("mnist", &["--extractor", "digits:x", "--out", &nothing], &["need --judge N"]),
        (
            "mnist",
            &["--extractor", "clip:x"],
            &["'clip:x'", "expected digits:FILE, cifar10:FILE, efficientnet:FILE, "],
        ),
        ("mnist", &["--judge", "1"], &["'1'", "expected 0, or a whole number from 2"]),
        (
            "mnist",
            &["--judge", "9", "--extractor", &digits, "--out", &nothing],
            &["absent.safetensors"],
        ),
        ("evaluate", &["--extractor", &digits, "--data", "mnist:x"], &["--checkpoint <PATH>"]),
        ("evaluate", &["--samples", "x", "--data", "mnist:x"], &["--extractor <KIND:FILE>"]),
        ("evaluate", &["--samples", "x", "--extractor", &digits], &["--data <KIND:DIR>"]),
        ("evaluate", &["--samples", "x", "--checkpoint", "y"], &["cannot be used with"]),
        ("evaluate", &["--data", "mnist"], &["'mnist'", "expected mnist:DIR, fashion-mnist:DIR"]),
        ("evaluate", &["--count", "9"], &["'9'", "whole number from 10 to 10000000"]),
        ("evaluate", &["--checkpoint", "x", "--bits", "9"], &["--data <KIND:DIR>"]),
        ("evaluate", &["--data", "mnist:x", "--bits", "9"], &["--checkpoint <PATH>"]),
        (
            "evaluate",
            &["--samples", "x", "--data", "mnist:x", "--bits", "9"],
            &["cannot be used with"],
        ),
        (
            "evaluate",
            &[
                "--checkpoint",
                "x",
                "--data",
                "mnist:x",
                "--extractor",
                &digits,
                "--bits-steps",
                "9",
            ],
            &["--bits <N>"],
        ),
        (
            "evaluate",
            &["--samples", "x", "--data", "mnist:x", "--extractor", &digits],
            &["absent.safetensors"],
        ),
        ("mnist-fd", &["--checkpoint", &nothing], &["required", "--data <DIR>"]),
        ("mnist-fd", &["--data", &cut], &["required", "--checkpoint <PATH>"]),
        ("mnist-fd", &["--data", &cut, "--checkpoint", &nothing], &["no checkpoint here"]),
        ("mnist-fd", &["--count", "1"], &["'1'", "whole number from 2 to 60000"]),
        ("mnist-fd", &["--classifier-steps", "0"], &["'0'", "whole number from 1 to 1000000"]),
    ];
    for (name, args, expected) in cases {
        assert_fails(example(name).args(*args), expected)?;
    }
    #[cfg(not(feature = "hub"))]
    assert_fails(example("mnist").args(["--data", "hub", "--out", &nothing]), &["--features hub"])?;
    assert!(!Path::new(&nothing).exists(), "an error left something behind");
    let lines = succeed(example("mnist").arg("--help"))?;
    assert!(lines.lines().all(|line| line.len() <= 100), "{lines}");
    let help = help("mnist")?;
    assert!(help.contains("--save-every") && help.contains("--steps 1875"), "{help}");
    assert!(help.contains("--steps 20000"), "{help}");
    let help = self::help("train")?;
    assert!(help.contains("Defaults for images of 64 x 64 pixels"), "{help}");
    assert!(help.contains("--batch-size 8 ") && help.contains("--steps 20000"), "{help}");
    Ok(())
}

/// Training does not use labels.
#[test]
fn a_folder_without_labels_is_trained_on_and_not_measured_by() -> Result<()> {
    let temp = TempDir::new()?;
    let (data, out) = (temp.path().join("digits"), temp.path().join("run"));
    write_idx(&data, 10)?;
    for part in ["train", "t10k"] {
        fs::remove_file(data.join(format!("{part}-labels-idx1-ubyte")))?;
    }
    let dir = data.to_str().ok_or("a path in UTF-8")?;
    mnist(&out, &[&SMALL[..], &["--data", dir, "--steps", "1"]].concat())?;
    let mut measure = example("mnist-fd");
    measure.args(["--data", dir, "--checkpoint"]).arg(out.join("checkpoint"));
    let hint = "scripts/fetch-data mnist data`";
    assert_fails(&mut measure, &["train-labels-idx1-ubyte is not here", hint])?;
    fs::write(data.join("train-labels-idx1-ubyte"), "no labels")?;
    let mut wrong = example("mnist");
    assert_fails(wrong.args(["--data", dir, "--out", "x"]), &["train-labels-idx1-ubyte: starts"])
}

/// The obstacle is found before the first step, and before the directory is changed.
#[cfg(unix)]
#[test]
fn what_is_in_the_way_of_checkpoints_is_found_before_the_first_step() -> Result<()> {
    let temp = TempDir::new()?;
    let train = |name: &str| {
        let mut command = example("mnist");
        command.args(SMALL).args(["--steps", "2", "--out"]).arg(temp.path().join(name));
        command
    };
    type Put = fn(&Path) -> Result<()>;
    let ways: [(&str, Put, &str); 3] = [
        ("file", |at| Ok(fs::write(at, "a file")?), "it is a file"),
        ("link", |at| Ok(std::os::unix::fs::symlink("nowhere", at)?), "a link to nowhere"),
        (
            "directory",
            |at| {
                fs::create_dir(at)?;
                Ok(fs::write(at.join("notes.txt"), "of my own")?)
            },
            "it holds notes.txt",
        ),
    ];
    for (name, put, found) in ways {
        let out = temp.path().join(name);
        fs::create_dir(&out)?;
        fs::write(out.join("metrics.jsonl"), "an earlier run's")?;
        put(&out.join("checkpoint"))?;
        assert_fails(&mut train(name), &["checkpoint: ", found, "or choose another --out"])?;
        assert_eq!(fs::read_dir(&out)?.count(), 2, "{name}: files were made or moved");
    }
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_second_process_on_the_same_directory_changes_nothing_of_the_first() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("run");
    let train = |args: &[&str]| {
        let mut command = example("mnist");
        command.args(args).arg("--out").arg(&out);
        command
    };
    let mut first = train(&[&SMALL[..], &["--save-every", "1000"]].concat());
    let mut first = first.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_for_steps(&mut first, &out, 2)?;
    let names = || -> std::io::Result<BTreeSet<_>> {
        fs::read_dir(&out)?.map(|entry| Ok(entry?.file_name())).collect()
    };
    let before = names()?;
    let process = format!("process {} saves here", first.id());
    let refused = [process.as_str(), "wait until it ends, or choose another --out"];
    assert_fails(&mut train(&[&SMALL[..], &["--seed", "5"]].concat()), &refused)?;
    assert_eq!(names()?, before);
    signal("INT", &first)?;
    assert_eq!(first.wait()?.code(), Some(130));
    let last = saved_step(&out)?;
    assert_eq!(steps(&out)?, (1..=last).collect::<Vec<_>>());

    // This also applies to two runs that resume.
    let mut second = train(&["--resume"]);
    let mut second = second.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_for_steps(&mut second, &out, last as usize + 1)?;
    let process = format!("process {} saves here", second.id());
    assert_fails(&mut train(&["--resume"]), &[&process])?;
    signal("INT", &second)?;
    assert_eq!(second.wait()?.code(), Some(130));
    assert_eq!(steps(&out)?, (1..=saved_step(&out)?).collect::<Vec<_>>());
    Ok(())
}

#[cfg(unix)]
#[test]
fn an_old_checkpoint_that_cannot_be_removed_is_a_warning() -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    use std::os::unix::process::CommandExt;

    const NOBODY: u32 = 65534;
    let temp = TempDir::new()?;
    let (program, out) = (temp.path().join("mnist"), temp.path().join("run"));
    // Copied by a separate process: a program that another test's child still has open for writing is
    // busy.
    succeed(Command::new("cp").arg(example("mnist").get_program()).arg(&program))?;
    write_idx(&temp.path().join("data"), 5)?;
    let is_root = temp.path().metadata()?.uid() == 0;
    if is_root {
        // Root is not restricted by permissions.
        fs::set_permissions(&temp, fs::Permissions::from_mode(0o755))?;
        chown(&temp, Some(NOBODY), Some(NOBODY))?;
    }
    let train = |steps: &str| {
        let mut command = Command::new(&program);
        command.args(["--data", "data", "--out", "run", "--save-every", "1", "--steps", steps]);
        command.args(["--sample-count", "1", "--sampling-steps", "1"]).current_dir(&temp);
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    };
    succeed(train("2").args(["--batch-size", "2"]))?;
    let kept = out.join("checkpoint-000000001");
    fs::set_permissions(&kept, fs::Permissions::from_mode(0o555))?;
    let Output { status, stderr, .. } = train("4").arg("--resume").output()?;
    fs::set_permissions(&kept, fs::Permissions::from_mode(0o755))?;
    let said = String::from_utf8(stderr)?;
    assert!(status.success(), "{said}");
    // One warning for each of two saves.
    let warnings: Vec<&str> = said.lines().collect();
    let is_warning =
        |line: &&str| line.starts_with("warning: ") && line.contains("cannot be removed");
    assert!(warnings.len() == 2 && warnings.iter().all(is_warning), "{said}");
    assert_eq!((saved_step(&out)?, Checkpoint::open(&kept)?.step()), (4, 1));
    Ok(())
}

/// If the latest checkpoint is missing, the previous one is that of the run.
#[test]
fn the_checkpoint_that_holds_a_run_is_named() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("run");
    mnist(&out, &[&SMALL[..], &["--steps", "2", "--save-every", "1"]].concat())?;
    fs::remove_dir_all(out.join("checkpoint"))?;
    let mut again = example("mnist");
    let holds = "checkpoint-000000001 holds a run at step 1; continue it with --resume";
    assert_fails(again.args(SMALL).arg("--out").arg(&out), &[holds])?;
    mnist(&out, &["--resume", "--steps", "2", "--sample-count", "1"])?;
    assert_eq!(saved_step(&out)?, 2);
    Ok(())
}

/// Killed programs leave files that they had not yet renamed.
#[test]
fn leftovers_of_killed_programs_are_cleared_and_nothing_else_is() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("run");
    fs::create_dir_all(out.join("samples"))?;
    let dead = [".loss.png.123", ".data.json.4", "samples/.step-000001.png.99", "../.a.png.5"];
    let others = [".loss.png.bak", ".mine.png.123", "loss.png.123"];
    let alive = ".metrics.jsonl.77";
    for name in dead.iter().chain(&others).chain([&alive]) {
        fs::write(out.join(name), "half of it")?;
    }
    // Held open like a file of a living process.
    let written = File::open(out.join(alive))?;
    written.lock()?;
    mnist(&out, &[&SMALL[..], &["--steps", "1"]].concat())?;
    let mut sample = example("sample");
    sample.args(["--count", "1", "--sampling-steps", "1", "--checkpoint"]);
    succeed(sample.arg(out.join("checkpoint")).arg("--out").arg(temp.path().join("a.png")))?;
    for name in dead {
        assert!(!out.join(name).exists(), "{name} is left");
    }
    for name in others.iter().chain([&alive]) {
        assert!(out.join(name).exists(), "{name} is not ours to remove");
    }
    drop(written);
    mnist(&out, &["--resume", "--steps", "2", "--sample-count", "1", "--sampling-steps", "1"])?;
    assert!(!out.join(alive).exists());
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_run_whose_directory_is_removed_warns_and_creates_it_again() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("run");
    let mut command = example("mnist");
    command.args(SMALL).args(["--sample-every", "1"]).arg("--out").arg(&out);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    wait_for_steps(&mut child, &out, 2)?;
    // Renamed in one step: the run would recreate the directory while its files are removed one by one.
    let removed = temp.path().join("removed");
    fs::rename(&out, &removed)?;
    fs::remove_dir_all(removed)?;
    wait_for_steps(&mut child, &out, 2)?;
    signal("INT", &child)?;
    let warned = String::from_utf8(child.wait_with_output()?.stderr)?;
    let removed: Vec<_> = warned.lines().filter(|line| line.contains("was removed")).collect();
    let [warning] = removed[..] else { panic!("{warned}") };
    let logged = steps(&out)?;
    let expected = format!(
        "warning: {} was removed during the run; its lines are lost, up to step {}",
        out.join("metrics.jsonl").display(),
        logged[0] - 1
    );
    assert_eq!(warning, expected);
    let last = *logged.last().ok_or("a step")?;
    assert_eq!((logged.clone(), saved_step(&out)?), ((logged[0]..=last).collect(), last));
    assert!(out.join("data.json").is_file() && fs::read_dir(out.join("samples"))?.count() > 0);
    Ok(())
}

/// Only a few images are drawn at a time, so that many images need no more memory.
#[cfg(target_os = "linux")]
#[test]
fn memory_that_ends_is_an_error_and_a_large_grid_does_not_take_it() -> Result<()> {
    let temp = TempDir::new()?;
    let limited = |name: &str, args: &[&str]| {
        let mut command = Command::new("sh");
        command.args(["-c", r#"ulimit -v 600000; exec "$0" "$@""#]);
        command.arg(example("mnist").get_program()).args(args);
        command
            .args(["--steps", "1", "--sampling-steps", "1", "--out"])
            .arg(temp.path().join(name));
        // Each thread reserves some memory of its own.
        command.current_dir(env!("CARGO_MANIFEST_DIR")).env("RAYON_NUM_THREADS", "2");
        command
    };
    succeed(&mut limited("grid", &["--batch-size", "1", "--sample-count", "300"]))?;
    assert_fails(
        &mut limited("batch", &["--batch-size", "1000", "--sample-count", "1"]),
        &["not enough memory for a feature map of ", " bytes; use fewer images at a time"],
    )
}

/// The warning appears at the beginning of the run, and only if it applies.
#[cfg(all(feature = "f16", target_arch = "x86_64"))]
#[test]
fn bf16_without_instructions_for_it_is_a_warning() -> Result<()> {
    let temp = TempDir::new()?;
    let warning = "warning: --precision bf16: this CPU has no bf16 instructions";
    for (precision, warned) in [("bf16", true), ("highest", false)] {
        let (out, size) = (temp.path().join(precision), ["--steps", "1", "--precision", precision]);
        let mut train = example("mnist");
        train.args(SMALL).args(size).arg("--out").arg(&out);
        let mut sample = example("sample");
        sample.args(["--count", "1", "--sampling-steps", "1", "--precision", precision]);
        sample.arg("--checkpoint").arg(out.join("checkpoint")).arg("--out").arg(out.join("a.png"));
        for mut command in [train, sample] {
            let Output { status, stderr, .. } = command.env("DDPM_MAX_CPU_ISA", "avx2").output()?;
            let said = String::from_utf8(stderr)?;
            assert!(status.success(), "{said}");
            assert_eq!(said.contains(warning), warned, "{said}");
        }
    }
    Ok(())
}

/// If the output is a file or a pipe, the program prints a line about every ten seconds.
#[cfg(unix)]
#[test]
fn a_redirected_run_says_that_it_samples() -> Result<()> {
    let temp = TempDir::new()?;
    let mut command = example("mnist");
    // This takes longer than ten seconds on any machine.
    command.args(["--steps", "1", "--batch-size", "1", "--sample-count", "1024"]);
    command.args(["--sampling-steps", "1000", "--out"]);
    let mut child =
        command.arg(temp.path()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let said = BufReader::new(child.stderr.take().ok_or("a pipe")?).lines().next();
    signal("INT", &child)?;
    assert_eq!(child.wait()?.code(), Some(130));
    let said = said.ok_or("it says nothing")??;
    let step = said.strip_prefix("1/1 sampling, step ").and_then(|s| s.strip_suffix(" of 52000"));
    assert!(step.is_some_and(|step| step.parse::<u64>().is_ok()), "{said}");
    Ok(())
}

/// Returns the rows of a terminal with `columns` columns after a program wrote `written` to it, in ASCII.
#[cfg(target_os = "linux")]
fn screen(written: &[u8], columns: usize) -> Vec<String> {
    let (mut rows, mut row, mut column) = (vec![vec![]], 0usize, 0);
    let mut written = written.iter().copied();
    while let Some(byte) = written.next() {
        match byte {
            b'\r' => column = 0,
            b'\n' => row += 1,
            0x1b => {
                // An escape sequence: a bracket, a number, and a letter.
                let (mut number, mut letter) = (vec![], b'[');
                while !letter.is_ascii_alphabetic() {
                    number.extend(Some(letter).filter(u8::is_ascii_digit));
                    letter = written.next().unwrap_or(b'm');
                }
                let number = String::from_utf8(number).ok().and_then(|n| n.parse().ok());
                match letter {
                    b'A' => row = row.saturating_sub(number.unwrap_or(1)),
                    b'B' => row += number.unwrap_or(1),
                    b'K' => rows[row].clear(),
                    _ => {}
                }
            }
            byte => {
                (row, column) = if column == columns { (row + 1, 0) } else { (row, column) };
                rows.resize(rows.len().max(row + 1), vec![]);
                let line = &mut rows[row];
                line.resize(line.len().max(column + 1), b' ');
                line[column] = byte;
                column += 1;
            }
        }
        rows.resize(rows.len().max(row + 1), vec![]);
    }
    rows.iter().map(|row| String::from_utf8_lossy(row).trim_end().to_owned()).collect()
}

/// Each step is drawn over the previous one, which requires a line that does not wrap.
#[cfg(target_os = "linux")]
#[test]
fn the_progress_is_one_line_of_a_terminal_of_any_width() -> Result<()> {
    let temp = TempDir::new()?;
    let program = example("mnist").get_program().to_string_lossy().into_owned();
    for (columns, expected) in [
        (20, "4/4 00:00:00 left"),
        (40, "4/4 loss "),
        (60, "4/4 "),
        (80, "[========================] 4/4 "),
        (200, "[========================] 4/4 "),
    ] {
        let out = temp.path().join(columns.to_string());
        let (size, args) = (format!("stty cols {columns} rows 50"), SMALL.join(" "));
        let run = format!("{size}; exec {program} {args} --steps 4 --out {}", out.display());
        let mut terminal = Command::new("script");
        terminal.args(["-q", "-e", "-c", &run, "/dev/null"]).env("TERM", "xterm");
        terminal.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
        let Output { status, stdout, .. } = match terminal.output() {
            // The system lacks the program that creates terminals.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            output => output?,
        };
        let rows = screen(&stdout, columns);
        assert!(status.success(), "{rows:#?}");
        let is_progress = |row: &&String| row.contains("/4 ") || row.ends_with("/4");
        let progress: Vec<_> = rows.iter().filter(is_progress).collect();
        let [line] = progress[..] else { panic!("{columns} columns: {rows:#?}") };
        assert!(line.starts_with(expected) && line.len() < columns, "{columns}: {line:?}");
        assert!(line.ends_with("00:00:00 left"), "{columns}: {line:?}");
        assert_eq!(line.contains("steps/s"), columns >= 60, "{columns}: {line:?}");
    }
    Ok(())
}

/// The reader closes the pipe before the end.
#[cfg(unix)]
#[test]
fn the_help_of_fetch_data_may_be_cut_off() -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fetch-data");
    let Output { status, stderr, .. } =
        Command::new(script).arg("--help").stdout(writer).output()?;
    assert!(status.success() && stderr.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    Ok(())
}

/// Waits until a run has logged `count` steps.
fn wait_for_steps(child: &mut Child, out: &Path, count: usize) -> Result<()> {
    let start = Instant::now();
    while steps(out).map_or(0, |steps| steps.len()) < count {
        assert!(child.try_wait()?.is_none(), "it ended by itself");
        if start.elapsed() > Duration::from_secs(300) {
            child.kill()?;
            panic!("it does not train");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(unix)]
fn signal(name: &str, child: &Child) -> Result<()> {
    let kill =
        Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status()?;
    assert!(kill.success());
    Ok(())
}

/// The step of a checkpoint whose weights can be read.
fn saved_step(out: &Path) -> Result<u64> {
    let checkpoint = Checkpoint::open(out.join("checkpoint"))?;
    checkpoint.ema::<UNetConfig>(&Device::Cpu)?;
    Ok(checkpoint.step())
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_prints_the_command_to_resume() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("it's a run");
    let stopped = |command: &mut Command, out: &Path, step: usize| -> Result<String> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.arg("--out").arg(out).spawn()?;
        wait_for_steps(&mut child, out, step)?;
        assert!(step == 1 || out.join("loss.png").is_file(), "it is drawn at the end only");
        signal("INT", &child)?;
        let Output { status, stdout, stderr } = child.wait_with_output()?;
        let (said, warned) = (String::from_utf8(stdout)?, String::from_utf8(stderr)?);
        assert_eq!(status.code(), Some(130), "{said}{warned}");
        assert!(warned.contains("stopping after this step"), "{warned}");
        Ok(said)
    };
    // The second step begins after the first is saved and the loss drawn.
    let said = stopped(example("mnist").args(SMALL).args(["--save-every", "1"]), &out, 2)?;
    assert!(out.join("loss.png").is_file());

    let done = steps(&out)?.last().copied().ok_or("a step")?;
    assert!(said.contains(&format!("stopped and saved at step {done} of ")), "{said}");
    let (_, command) = said.split_once("resume with: ").ok_or("a command")?;
    let command = format!("{} --steps {}", command.trim(), done + 1);
    let said = succeed(Command::new("sh").args(["-c", &command]))?;
    assert!(said.contains("done: "), "{said}");
    assert_eq!(steps(&out)?, (1..=done + 1).collect::<Vec<_>>());

    // Started as `cargo run` does it: the suggested command must not contain the path of the built
    // program.
    let other = temp.path().join("another's");
    let mut longer = example("mnist");
    longer.env("CARGO", "cargo").args(SMALL).args(["--steps", "7500"]);
    let said = stopped(&mut longer, &other, 1)?;
    // A twentieth of the steps that were asked for.
    let config: Value = serde_json::from_slice(&fs::read(other.join("config.json"))?)?;
    assert_eq!(config["train"]["warmup_steps"], 375);
    let (_, command) = said.split_once("resume with: ").ok_or("a command")?;
    let (cargo, arguments) = command.split_once(" -- ").ok_or("arguments")?;
    let release = if cfg!(debug_assertions) { "" } else { " --release" };
    assert!(cargo.starts_with(&format!("cargo run{release}")), "{command}");
    assert!(cargo.ends_with(" --example mnist"), "{command}");
    for (feature, on) in [("f16", cfg!(feature = "f16")), ("hub", cfg!(feature = "hub"))] {
        assert_eq!(cargo.contains(feature), on, "{command}");
    }
    assert!(arguments.starts_with("--batch-size 2 ") && arguments.contains(r"another'\''s"));
    assert!(arguments.ends_with(" --resume\n"), "{command}");
    Ok(())
}

#[test]
fn a_curve_that_cannot_be_drawn_on_the_way_is_a_warning() -> Result<()> {
    let temp = TempDir::new()?;
    let curve = temp.path().join("run/loss.png");
    fs::create_dir_all(&curve)?;
    let mut command = example("mnist");
    command.args(SMALL).args(["--steps", "2", "--save-every", "1", "--out"]);
    let Output { status, stderr, .. } = command.arg(temp.path().join("run")).output()?;
    let said = String::from_utf8(stderr)?;
    let (warning, error) = said.trim_end().split_once('\n').ok_or("two lines")?;
    assert!(warning.starts_with("warning: ") && warning.contains("loss.png: "), "{said}");
    assert!(error.starts_with("error: ") && error.contains("loss.png: "), "{said}");
    assert_eq!((status.code(), saved_step(&temp.path().join("run"))?), (Some(1), 2));
    Ok(())
}

/// The state after a terminal was closed: the output has no reader, and the signal arrives twice.
#[cfg(unix)]
#[test]
fn a_closed_terminal_ends_a_run_that_saves() -> Result<()> {
    let temp = TempDir::new()?;
    let out = temp.path().join("run");
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let mut child = example("mnist")
        .args(SMALL)
        .arg("--out")
        .arg(&out)
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()?;
    wait_for_steps(&mut child, &out, 2)?;
    signal("HUP", &child)?;
    std::thread::sleep(Duration::from_millis(20));
    signal("HUP", &child)?;
    assert_eq!(child.wait()?.code(), Some(130));
    assert_eq!(Some(saved_step(&out)?), steps(&out)?.last().copied());
    Ok(())
}

#[cfg(unix)]
#[test]
fn an_error_ends_a_run_that_saves_and_a_missing_picture_does_not() -> Result<()> {
    let temp = TempDir::new()?;
    let (out, log) = (temp.path().join("run"), temp.path().join("run/metrics.jsonl"));
    fs::create_dir(&out)?;
    assert!(Command::new("mkfifo").arg(&log).status()?.success());
    // The log is a pipe, which is read to its end before the run, and accepts no line after the second.
    let (samples, fifo) = (out.join("samples"), log.clone());
    let reader = std::thread::spawn(move || -> std::io::Result<()> {
        File::options().write(true).open(&fifo)?;
        let mut lines = BufReader::new(File::open(&fifo)?).lines();
        lines.next().transpose()?;
        fs::remove_dir_all(samples)?;
        lines.next().transpose()?;
        Ok(())
    });
    let Output { status, stderr, .. } =
        example("mnist").args(SMALL).args(["--sample-every", "1", "--out"]).arg(&out).output()?;
    let said = String::from_utf8(stderr)?;
    assert_eq!(status.code(), Some(1), "{said}");
    reader.join().expect("the reader does not panic")?;

    let step = saved_step(&out)?;
    assert!(step >= 3, "{said}");
    let (warnings, error) = said.trim_end().rsplit_once('\n').ok_or("several lines")?;
    for line in warnings.lines() {
        assert!(line.starts_with("warning: ") && line.contains("samples/step-00000"), "{said}");
    }
    assert!(error.starts_with("error: ") && error.contains("metrics.jsonl: Broken pipe"), "{said}");
    assert!(error.contains(&format!("saved at step {step}")), "{said}");
    fs::remove_file(&log)?;
    mnist(&out, &["--resume", "--steps", &(step + 1).to_string(), "--sample-count", "3"])?;
    assert_eq!(steps(&out)?, [step + 1]);
    Ok(())
}

/// The message of the failed save appears beside the first error. No file may be larger than one block.
#[cfg(unix)]
#[test]
fn both_errors_are_reported_if_saving_fails() -> Result<()> {
    let temp = TempDir::new()?;
    let mut command = Command::new("sh");
    let limited = r#"trap '' XFSZ; ulimit -f 8; exec "$0" "$@""#;
    command.args(["-c", limited]).arg(example("mnist").get_program()).args(SMALL);
    // Fast updates, so that no line of progress is due before the error.
    command.args(["--optimizer", "adam"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.arg("--out").arg(temp.path().join("run"));
    assert_fails(
        &mut command,
        &["metrics.jsonl: File too large", "saving the run at step", "failed, too"],
    )
}
