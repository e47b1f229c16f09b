//! Short runs of a small network, and the content of their directories.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use ddpm::data::{Dataset, ImageShape};
use ddpm::train::Saved;
use ddpm::{Diffusion, Result, TrainConfig, Trainer, UNetConfig};
use tempfile::TempDir;

pub const FILES: [&str; 3] = ["model.safetensors", "ema.safetensors", "optimizer.safetensors"];

pub fn network() -> UNetConfig {
    UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![16, 24],
        time_dim: 16,
        dropout: 0.1,
        ..UNetConfig::mnist()
    }
}

pub fn config(steps: u64) -> TrainConfig {
    TrainConfig { steps, batch_size: 4, horizontal_flip: true, ..TrainConfig::mnist() }
}

pub struct Waves(pub usize);

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

pub fn new(config: TrainConfig) -> Trainer<UNetConfig> {
    Trainer::new(network(), config, Diffusion::ddpm(), &Device::Cpu).unwrap()
}

pub fn resume(dir: &Path, config: TrainConfig) -> Result<Trainer<UNetConfig>> {
    Trainer::resume(dir, network(), config, Diffusion::ddpm(), &Device::Cpu)
}

/// Creates a directory with a checkpoint after two steps.
pub fn saved() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("checkpoint");
    let mut trainer = new(config(2));
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&checkpoint).unwrap();
    (dir, checkpoint)
}

pub fn names(dir: &Path) -> Vec<String> {
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

/// Rewrites `checkpoint.json`.
pub fn edit(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let file = path.join("checkpoint.json");
    let mut json = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    edit(&mut json);
    fs::write(file, serde_json::to_vec(&json).unwrap()).unwrap();
}

pub fn truncate(file: &Path, keep: impl FnOnce(usize) -> usize) {
    let bytes = fs::read(file).unwrap();
    fs::write(file, &bytes[..keep(bytes.len())]).unwrap();
}

/// Every file below a directory, with its content.
pub fn snapshot(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
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

pub fn step_and_save(trainer: &mut Trainer<UNetConfig>, path: &Path) -> Saved {
    let batch = trainer.next_batch(&Waves(11)).unwrap();
    trainer.step(&batch).unwrap();
    trainer.save(path).unwrap()
}
