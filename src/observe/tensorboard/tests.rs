use std::fs;
use std::path::PathBuf;

use candle_core::Device;

use super::*;
use crate::data::Images;
use crate::model::UNetConfig;
use crate::process::Diffusion;
use crate::train::{Picture, TrainConfig, Trainer};

fn data() -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tensorboard.events");
    fs::read(path).unwrap()
}

fn scalar(value: f64) -> Value {
    value.into()
}

#[test]
fn records_have_the_bytes_of_tensorboards_writer() {
    let png: Vec<u8> = (0..512).map(|i| i as u8).collect();
    let picture = |width, height, channels| {
        Value::Picture(Picture { width, height, channels, png: png.clone() })
    };
    let records = [
        record(1_700_000_000.25, 0, Content::Version),
        record(1_700_000_001.5, 501, Content::Restart),
        record(1_700_000_002.0, 0, Content::Values(&[("train/loss", &scalar(0.0))])),
        record(
            1_700_000_003.125,
            1_000_000,
            Content::Values(&[
                ("train/loss", &scalar(0.1)),
                ("train/lr", &scalar(-1e-4)),
                ("held_out/loss_q3", &scalar(f64::INFINITY)),
            ]),
        ),
        record(
            1_700_000_004.0,
            127,
            Content::Values(&[("samples", &picture(300, 70, 1)), ("colour", &picture(128, 1, 3))]),
        ),
    ];
    assert_eq!(records.concat(), data());
}

/// Returns the records of the event files of a directory with their times set to 0: of each file, in the order of names.
fn read(dir: &Path) -> Vec<Vec<Vec<u8>>> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = paths.collect();
    paths.sort();
    let records = |path: &PathBuf| {
        let (bytes, mut records) = (fs::read(path).unwrap(), Vec::new());
        let mut rest = &bytes[..];
        while let Some((length, _)) = rest.split_first_chunk::<8>() {
            let (record, after) = rest.split_at(16 + u64::from_le_bytes(*length) as usize);
            let mut event = record[12..record.len() - 4].to_vec();
            let (time, _) = event[1..].split_first_chunk_mut::<8>().unwrap();
            let age = now() - f64::from_le_bytes(*time);
            assert!((-1.0..600.0).contains(&age), "{age}");
            *time = [0; 8];
            records.push(event);
            rest = after;
        }
        assert!(rest.is_empty());
        records
    };
    paths.iter().map(records).collect()
}

/// An event as [`read`] returns it.
fn event(step: u64, content: Content<'_>) -> Vec<u8> {
    let record = record(0.0, step, content);
    record[12..record.len() - 4].to_vec()
}

/// Publishes a value after each update, and collects the metrics. Stops after a step.
#[derive(Default)]
struct Source {
    metrics: Vec<Metrics>,
    stop: u64,
}

impl Observer for Source {
    fn on_metrics(&mut self, _: &Run<'_>, metrics: &Metrics) -> Result<()> {
        self.metrics.push(metrics.clone());
        Ok(())
    }

    fn on_step(&mut self, run: &Run<'_>) -> Result<std::ops::ControlFlow<()>> {
        run.publish("twice/step", 2.0 * run.step() as f64);
        Ok(match run.step() == self.stop {
            true => std::ops::ControlFlow::Break(()),
            false => std::ops::ControlFlow::Continue(()),
        })
    }
}

fn run() -> (Trainer<UNetConfig>, Images) {
    let network = UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![16, 16],
        time_dim: 8,
        ..UNetConfig::mnist()
    };
    let config = TrainConfig { steps: 3, batch_size: 1, log_every: 2, ..TrainConfig::mnist() };
    let images = Images::new((0..192).collect(), (1, 8, 8)).unwrap();
    (Trainer::new(network, config, Diffusion::ddpm(), &Device::Cpu).unwrap(), images)
}

#[test]
fn a_resumed_run_begins_a_file_that_voids_the_steps_it_repeats() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("tensorboard");
    let (mut trainer, images) = run();
    let mut source = Source { stop: 2, ..Source::default() };
    trainer.fit(&images, (TensorBoard::new(&dir), &mut source)).unwrap();
    source.stop = 0;
    // The clock was set back since.
    let [first] = &fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>()[..]
    else {
        panic!("one file")
    };
    let later = format!("{PREFIX}{:010}.0.ddpm", now() as u64 + 1_000);
    fs::rename(first, dir.join(later)).unwrap();
    trainer.fit(&images, (TensorBoard::new(&dir), &mut source)).unwrap();

    let metrics =
        |Metrics { step, loss, lr, grad_norm, images_per_second, waiting, .. }: &Metrics| {
            let values = [
                ("train/grad_norm", scalar((*grad_norm).into())),
                ("train/images_per_second", scalar(*images_per_second)),
                ("train/loss", scalar((*loss).into())),
                ("train/lr", scalar(*lr)),
                ("train/waiting", scalar(*waiting)),
            ];
            let values: Vec<_> = values.iter().map(|(name, value)| (*name, value)).collect();
            event(*step, Content::Values(&values))
        };
    let twice = |step| {
        let value = scalar(2.0 * step as f64);
        event(step, Content::Values(&[("twice/step", &value)]))
    };
    let version = event(0, Content::Version);
    let [at_2, at_3] = &source.metrics[..] else { panic!("{:?}", source.metrics) };
    let expected = [
        vec![version.clone(), twice(1), metrics(at_2), twice(2)],
        vec![version, event(3, Content::Restart), metrics(at_3), twice(3)],
    ];
    assert_eq!(read(&dir), expected);

    // A new run.
    let (mut trainer, images) = run();
    trainer.fit(&images, TensorBoard::new(&dir)).unwrap();
    assert_eq!(read(&dir).len(), 1);
    assert_eq!(read(&temp.path().join("tensorboard-old")), expected);
}

#[test]
fn a_removed_file_is_begun_again() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("tensorboard");
    let (mut trainer, images) = run();
    let remove = crate::train::on_metrics(|metrics| match metrics.step {
        2 => fs::remove_dir_all(&dir).map_err(Error::io(&dir)),
        _ => Ok(()),
    });
    trainer.fit(&images, (remove, TensorBoard::new(&dir))).unwrap();
    let [file] = &read(&dir)[..] else { panic!("more than one file") };
    assert_eq!(file.len(), 3);
}

#[test]
fn every_number_of_a_report_has_a_name() {
    let json = serde_json::json!({"a": 1, "list": [0.5, null, 2], "none": null, "text": "x"});
    let mut numbers = Vec::new();
    flatten("train", &json, &mut numbers);
    let expected = [("train/a", 1.0), ("train/list/0", 0.5), ("train/list/2", 2.0)];
    assert_eq!(numbers, expected.map(|(name, number)| (name.to_string(), scalar(number))));
}
