//! Measures the quality of generated digits: `--data data --checkpoint out/mnist/checkpoint`.

mod classifier;
#[path = "../common/mod.rs"]
mod common;
mod frechet;
mod measure;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use classifier::{Classifier, SIZE};
use common::cli::{self, Result, whole};
use common::identity::{self, Identity};
use common::progress::Progress;
use common::random::Random;
use common::sampling::SamplingArgs;
use common::tell::{err, grouped, out};
use common::{datasets, device, draw, files, interrupt};
use ddpm::{ImageSource, Images, UNetConfig};
use measure::{Figures, Reference};
use serde_json::json;

/// The number of images in MNIST's test set.
const ENOUGH: usize = 10_000;

/// The default number of updates of a classifier.
const CLASSIFIER_STEPS: u64 = 3_000;

/// The accuracy above which a classifier is good enough.
const GOOD: f64 = 0.99;

/// Measure digits drawn from a checkpoint by their Fréchet distance from MNIST's test images, in
/// the features of a classifier, which is trained if it does not exist
#[derive(Parser)]
#[command(name = "mnist-fd", version)]
struct Cli {
    /// Directory of the full set
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Number of images to draw, at most the number of MNIST's training images; with fewer than
    /// 10000 the distance is larger
    #[arg(long, value_name = "N", default_value = "10000", allow_negative_numbers = true,
          value_parser = whole::<usize>(2..=60_000))]
    count: usize,
    /// File of the classifier; if it does not exist, a classifier is trained and written
    #[arg(
        long,
        value_name = "FILE.safetensors",
        default_value = "out/mnist-fd/classifier.safetensors"
    )]
    classifier: PathBuf,
    /// Updates of a new classifier, with 100 images each; default 3000
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000))]
    classifier_steps: Option<u64>,
    /// File to which the results are also written
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(cli: Cli) -> Result<ExitCode> {
    let checkpoint = cli.sampling.open()?;
    check_digits(checkpoint.dir())?;
    let UNetConfig { channels, image_size, .. } = checkpoint.network()?;
    if (channels, image_size) != (1, SIZE) {
        let found = (channels, image_size, image_size);
        let expected = format!("the classifier's have {:?}", (1, SIZE, SIZE));
        return Err(format!("the network's images have shape {found:?}; {expected}").into());
    }
    let config = cli.sampling.config(&checkpoint)?;
    let sampler = config.sampler(checkpoint.diffusion())?;
    let (train, test) = datasets::mnist_digits(&cli.data)?;
    for set in [&train, &test] {
        datasets::check_shape(set, channels, image_size)?;
        classifier::labels(&set.images)?;
    }
    if train.images.len().min(test.images.len()) < 2 {
        return Err(format!("{}: at least 2 images of each kind are needed", test.about).into());
    }
    // An existing classifier is only read.
    if !cli.classifier.exists() {
        files::check("--classifier", &cli.classifier, "safetensors")?;
    } else if let Some(steps) = cli.classifier_steps {
        let file = cli.classifier.display();
        let expected = "omit it, or name another --classifier to train";
        return Err(format!("--classifier-steps is {steps}, but {file} exists; {expected}").into());
    }
    cli.json.as_deref().map_or(Ok(()), |json| files::check("--json", json, "json"))?;

    let device = device::pick(cli.sampling.cpu)?;
    interrupt::watch(|| err!("stopping after this step; press Ctrl-C again to quit at once"))?;
    out!("data        {}", test.about);
    out!("checkpoint  {}, step {}", checkpoint.dir().display(), checkpoint.step());
    out!("sampler     {}", SamplingArgs::describe(&config, &checkpoint));
    out!("device      {}", device::describe(&device));
    device::check_speed(cli.sampling.precision, &device);
    let classifier = classifier(&cli, &train.images, &device)?;
    let reference = Reference::new(&classifier, &test.images)?;
    let weights = fs::read(&cli.classifier).map_err(|e| files::at(&cli.classifier, e))?;
    let crc32 = identity::crc32(&weights);
    introduce(&cli, &crc32, &reference, &test.images);

    let model = cli.sampling.model(&checkpoint, &device)?;
    out!("drawing     {} images, {} steps each", cli.count, sampler.timesteps().len());
    let (shape, seed) = ((cli.count, channels, SIZE, SIZE), cli.sampling.seed);
    let mut progress = Progress::new(draw::steps(&sampler, cli.count, &device) as u64, 0);
    progress.start();
    let samples = draw::draw(&sampler, &model, shape, seed, &device, |step| {
        progress.advance(step.done as u64);
        Ok(())
    })?;
    progress.finish();
    let samples = Images::new(samples, (channels, SIZE, SIZE))?;
    // The same number as of samples, because the distance depends on it.
    let mut digits = train.images;
    digits.truncate(cli.count);
    let noise = noise(cli.count)?;
    let [samples, digits, noise] =
        [samples, digits, noise].map(|images| reference.compare(&classifier, &images));
    let (samples, digits, noise) = (samples?, digits?, noise?);
    if let Some(path) = &cli.json {
        let figures = json!({
            "checkpoint": checkpoint.dir(),
            "step": checkpoint.step(),
            "weights": cli.sampling.weights,
            "solver": config.solver,
            "sampling_steps": config.steps,
            "clip_denoised": config.clip_denoised,
            "seed": cli.sampling.seed,
            "precision": cli.sampling.precision,
            "classifier": cli.classifier,
            "classifier_crc32": crc32,
            "test_images": test.images.len(),
            "test_accuracy": reference.accuracy,
            "samples": samples,
            "train_images": digits,
            "uniform_noise": noise,
        });
        files::write(path, format!("{figures:#}\n").as_bytes())?;
    }
    out!("\n{:16}{:>7}{:>10}{:>8}  % of 0 to 9", "", "images", "mnist-fd", "> 0.9");
    for (name, figures) in
        [("train images", &digits), ("samples", &samples), ("uniform noise", &noise)]
    {
        out!("{name:16}{}", line(figures));
    }
    if let Some(path) = &cli.json {
        out!("\n{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns an error if the run is of other images than digits. A run has a file with its images beside its checkpoint.
/// Checkpoints without such a file are accepted.
fn check_digits(checkpoint: &Path) -> Result<()> {
    let file = match checkpoint.file_name() {
        Some(_) => checkpoint.with_file_name("data.json"),
        // A path such as `.` has no name to replace.
        None => checkpoint.join("../data.json"),
    };
    match Identity::read(&file)? {
        Some(run) if run.name != datasets::MNIST.name => {
            let (file, name) = (file.display(), run.name);
            Err(format!("{file}: the run is of {name}; mnist-fd measures digits").into())
        }
        _ => Ok(()),
    }
}

fn classifier(cli: &Cli, images: &Images, device: &Device) -> Result<Classifier> {
    if cli.classifier.exists() {
        return Classifier::load(&cli.classifier, device);
    }
    let steps = cli.classifier_steps.unwrap_or(CLASSIFIER_STEPS);
    out!("training    a classifier, {steps} steps");
    Classifier::train(images, steps, &cli.classifier, device)
}

/// Prints what the user must know about the measure before its results.
fn introduce(cli: &Cli, crc32: &str, reference: &Reference, images: &Images) {
    let (file, right) = (cli.classifier.display(), 100.0 * reference.accuracy);
    let count = grouped(images.len());
    out!("classifier  {file}, crc32 {crc32}, right on {right:.2}% of {count} test images");
    if reference.accuracy < GOOD {
        err!("warning: a good classifier is right on over 99%; this one is too inaccurate");
    }
    if cli.count < ENOUGH {
        err!("warning: the fewer images, the larger the distance; {ENOUGH} are usual");
    }
}

/// Draws images of independent pixels, with all values equally likely.
fn noise(count: usize) -> Result<Images> {
    let mut random = Random(0);
    let pixels = (0..count * SIZE * SIZE).map(|_| random.below(256) as u8).collect();
    Ok(Images::new(pixels, (1, SIZE, SIZE))?)
}

fn line(figures: &Figures) -> String {
    let count = figures.images as f64;
    let shares = figures.classes.map(|n| format!("{:5.1}", 100.0 * n as f64 / count));
    format!(
        "{:>7}{:>10.3}{:>7.1}%{}",
        figures.images,
        figures.mnist_fd,
        100.0 * figures.confident,
        shares.concat()
    )
}
