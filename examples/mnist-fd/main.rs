//! Measures the quality of generated digits: `--data data --checkpoint out/mnist/checkpoint`.

mod classifier;
mod report;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, Result, SamplingArgs, device, err, out, whole};
use ddpm::eval::{DigitClassifier, Generator};
use ddpm::observe::{Progress, StopOnSignal};
use report::{Reference, Report};

const STOPPING: &str = "stopping after this step; press Ctrl-C again to quit at once";

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
    /// Seed of the images
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    /// Number of images to draw, at most the number of MNIST's training images; with fewer than
    /// 10000 the distance is larger
    #[arg(long, value_name = "N", default_value = "10000", allow_negative_numbers = true,
          value_parser = whole::<usize>(2..=60_000))]
    count: usize,
    /// File of the classifier; if it does not exist, a classifier is trained and written
    #[arg(long, value_name = "FILE.safetensors", default_value = classifier::DEFAULT_PATH)]
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
    report::check_digits(&checkpoint)?;
    let config = cli.sampling.config(&checkpoint)?;
    let condition = cli.sampling.condition(&checkpoint.architecture()?, 0, cli.count)?;
    let sampler = config.sampler(checkpoint.diffusion())?.condition(condition.clone());
    let (train, test) = report::data_sets(&cli.data)?;
    classifier::check(&cli.classifier, cli.classifier_steps)?;
    cli.json.as_deref().map_or(Ok(()), |json| cli::check_output("--json", json, "json"))?;

    let device = device::pick(cli.sampling.cpu)?;
    let stop = StopOnSignal::install(|| err(STOPPING))?;
    let stopped = || stop.is_stopped();
    out(format_args!("data        {}", test.about));
    cli.sampling.announce(&config, &checkpoint, &device);
    let (file, steps) = (&cli.classifier, cli.classifier_steps);
    let classifier = classifier::load_or_train(file, steps, &train.images, &device, stopped)?;
    let reference = Reference::new(classifier, &test.images, stopped)?;
    let mut report = Report::new(cli.sampling.record(&config, &checkpoint, cli.seed));
    report.introduce(file, &reference, cli.count)?;
    let model = cli.sampling.model(&checkpoint, &device)?;
    out(format_args!("drawing     {} images, {} steps each", cli.count, config.steps));
    let generator = Generator::new(&sampler, DigitClassifier::SHAPE, cli.seed, &device);
    let progress = Progress::started(generator.steps(cli.count) as u64);
    let drawn = generator.draw(&model, cli.count, |step| {
        progress.advance(step.done as u64);
        Ok(if stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    progress.finish();
    let samples = (drawn.ok_or(cli::Interrupted)?, &condition);
    report.compare(&reference, samples, train.images, stopped)?;
    report.print(cli.json.as_deref())
}
