//! The cache of compiled kernels on disk: only the first program that uses them compiles them.
//!
//! The libraries of `tests/stand-in-cuda` count compilations in the file that `STAND_IN_COMPILES` names. On a GPU
//! there is no count, and only the results are compared.
#![cfg(feature = "cuda")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use candle_core::{Device, Tensor};
use ddpm::train::AdamConfig;
use ddpm::{Diffusion, Result, Sampler, TrainConfig, Trainer, UNetConfig};

/// The environment variable of the child process: the work, and the file for its results.
const CHILD: &str = "DDPM_TEST_CUDA_CACHE";

fn noise(device: &Device) -> Result<Tensor> {
    Sampler::prior((2, 3), 1, device)
}

/// The weights after two steps.
fn training(device: &Device) -> Result<Tensor> {
    let network = UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![8, 16],
        time_dim: 12,
        dropout: 0.1,
        ..UNetConfig::mnist()
    };
    let optimizer = AdamConfig::adamw(1e-3, 0.1);
    let config = TrainConfig { optimizer, batch_size: 2, ..TrainConfig::mnist() };
    let mut run = Trainer::new(network, config, Diffusion::ddpm(), device)?;
    for seed in 0..2 {
        run.step(&Sampler::prior((2, 1, 8, 8), seed, device)?)?;
    }
    let weights = run.vars().values().map(|var| var.to_device(&Device::Cpu)?.flatten_all());
    Ok(Tensor::cat(&weights.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

/// Computes `what` in a separate process with a cache. Returns the result and the number of compiled modules, if
/// it is known.
fn run(what: &str, cache: &Path) -> (Vec<u8>, Option<u64>) {
    let temporary = tempfile::tempdir().unwrap();
    let [output, compiles] = ["output", "compiles"].map(|name| temporary.path().join(name));
    let start = Instant::now();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kernels_are_compiled_once"])
        .env(CHILD, what)
        .env("DDPM_TEST_CUDA_CACHE_OUTPUT", &output)
        .env("DDPM_CUDA_CACHE", cache)
        .env("STAND_IN_COMPILES", &compiles)
        .status()
        .unwrap();
    assert!(status.success(), "{what}");
    println!("{what}, cache {}: {:.2} s", cache.display(), start.elapsed().as_secs_f64());
    let is_stand_in = std::env::var_os("STAND_IN").is_some();
    let count = fs::metadata(&compiles).map_or(0, |file| file.len());
    (fs::read(output).unwrap(), is_stand_in.then_some(count))
}

fn files(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn kernels_are_compiled_once() -> Result<()> {
    if let Some(what) = std::env::var_os(CHILD) {
        let device = Device::new_cuda(0)?;
        let found = if what == "noise" { noise(&device)? } else { training(&device)? };
        let values = found.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        fs::write(std::env::var_os("DDPM_TEST_CUDA_CACHE_OUTPUT").unwrap(), bytes).unwrap();
        return Ok(());
    }
    let temporary = tempfile::tempdir().unwrap();
    let cache = temporary.path().join("cache");
    let check = |found: Option<u64>, expected: u64| {
        if let Some(found) = found {
            assert_eq!(found, expected, "compilations");
        }
    };

    // Only modules whose kernels are used are compiled.
    check(run("noise", &cache).1, 1);
    assert_eq!(files(&cache).len(), 1);

    // Without a cache, with an incomplete one, and with a complete one.
    let (expected, all) = run("training", Path::new("0"));
    assert!(!Path::new("0").exists());
    let (found, more) = run("training", &cache);
    assert_eq!(found, expected);
    let count = files(&cache).len() as u64;
    check(all, count);
    check(more, count - 1);
    let (found, none) = run("training", &cache);
    assert_eq!(found, expected);
    check(none, 0);

    // A damaged file is compiled again, and replaced.
    let file = &files(&cache)[0];
    let whole = fs::read(file).unwrap();
    fs::write(file, &whole[..whole.len() / 2]).unwrap();
    let (found, one) = run("training", &cache);
    assert_eq!(found, expected);
    check(one, 1);
    assert_eq!(fs::read(file).unwrap(), whole);

    // So is a file that the driver does not load, here because a library is missing.
    if all.is_some() {
        let at = whole.windows(9).rposition(|bytes| bytes == b"stand-in:").unwrap() + 9;
        let library = std::str::from_utf8(&whole[at..whole.len() - 1]).unwrap();
        fs::remove_file(library).unwrap();
        let (found, one) = run("training", &cache);
        assert_eq!(found, expected);
        check(one, 1);
    }

    // In a directory where others may write, nothing is read or written.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;

        fs::write(file, b"written by another user").unwrap();
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
        let (found, compiled) = run("training", &cache);
        assert_eq!(found, expected);
        check(compiled, count);
        assert_eq!(fs::read(file).unwrap(), b"written by another user");
    }
    Ok(())
}
