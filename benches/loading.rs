//! Times training steps with a folder of JPEG files: decoded during the steps, read from a cache on disk, and in
//! memory.
//!
//! ```text
//! cargo bench --bench loading -- --images 5000 --size 64 [--side N] [--batch N] [--steps N] [--channels N]
//! ```
//!
//! The files are made in a temporary directory. Each line is the time of a step, the share of it in which training
//! waited for the next batch, and the time in which the folder was opened.

use std::path::Path;
use std::time::Instant;

use candle_core::Device;
use clap::Parser;
use ddpm::data::folder::{Channels, Folder, FolderBuilder, FolderConfig};
use ddpm::train::{Metrics, on_metrics};
use ddpm::{Diffusion, Result, TrainConfig, Trainer, UNetConfig};
use image::{ImageFormat, Rgb, RgbImage};
use rayon::prelude::*;

#[derive(Parser)]
struct Args {
    /// Number of JPEG files.
    #[arg(long, default_value_t = 5000)]
    images: u32,
    /// Height and width of the images on which the network is trained.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Height and width of the JPEG files.
    #[arg(long, default_value_t = 512)]
    side: u32,
    /// Images per step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Timed steps, after as many that are not timed.
    #[arg(long, default_value_t = 10)]
    steps: u64,
    /// Feature maps of the network's first level; two more levels have two and four times as many.
    #[arg(long, default_value_t = 32)]
    channels: usize,
    /// The directory in which the temporary directory is made, such as one on a slow disk.
    #[arg(long)]
    dir: Option<std::path::PathBuf>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let temp = match &args.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let (photos, cache) = (temp.path().join("photos"), temp.path().join("cache"));
    std::fs::create_dir(&photos)?;
    (0..args.images).into_par_iter().try_for_each(|k| photo(&photos, args.side, k))?;

    let Args { images, side, size, batch, .. } = args;
    println!(
        "{images} JPEG files of {side} x {side}, images of {size} x {size}, batches of {batch}"
    );
    let side = size as u32;
    let config =
        FolderConfig { height: side, width: side, channels: Channels::Rgb, ..Default::default() };
    let builder = || Folder::builder(&photos, config.clone());
    for (name, builder) in [
        ("decoded during steps", builder().memory_limit(0)),
        ("new cache", builder().memory_limit(0).cache(&cache)),
        ("old cache", builder().memory_limit(0).cache(&cache)),
        ("in memory", builder()),
    ] {
        measure(&args, name, builder)?;
    }
    Ok(())
}

fn measure(args: &Args, name: &str, builder: FolderBuilder<'_>) -> Result<()> {
    let start = Instant::now();
    let folder = builder.open()?;
    let opened = start.elapsed().as_secs_f64();
    let network = UNetConfig {
        image_size: args.size.into(),
        channels: 3,
        hidden_dims: [1, 2, 4].map(|k| k * args.channels).to_vec(),
        ..UNetConfig::mnist()
    };
    let mut reports: Vec<Metrics> = Vec::new();
    let config =
        TrainConfig { steps: 2 * args.steps, log_every: args.steps, ..TrainConfig::mnist() };
    let config = TrainConfig { batch_size: args.batch, ..config };
    let mut trainer = Trainer::new(network, config, Diffusion::ddpm(), &Device::Cpu)?;
    trainer.fit(
        &folder,
        on_metrics(|metrics| {
            reports.push(metrics.clone());
            Ok(())
        }),
    )?;
    // The first report includes steps for which memory is allocated.
    if let Some(Metrics { images_per_second, waiting, .. }) = reports.get(1) {
        let step = 1e3 * args.batch as f64 / images_per_second;
        let percent = 100.0 * waiting;
        println!("{name:<22} step {step:8.1} ms, waiting {percent:4.1}%, opened in {opened:.2} s");
    }
    Ok(())
}

/// Writes a JPEG file with edges and noise, about as large as a photo of its size.
fn photo(dir: &Path, side: u32, k: u32) -> image::ImageResult<()> {
    let mut random = u64::from(k) + 1;
    let image = RgbImage::from_fn(side, side, |x, y| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let noise = (random >> 60) as u32;
        let edge = ((x + k) / 40 + (y + 7 * k) / 56) % 2 * 90;
        Rgb([x + k, y + 3 * k, x + y].map(|v| ((v / 4 + edge + noise) % 256) as u8))
    });
    image.save_with_format(dir.join(format!("{k}.jpg")), ImageFormat::Jpeg)
}
