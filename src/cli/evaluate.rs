use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::Device;
use clap::Args;
use serde_json::{Value, json};

use super::arguments::whole;
use super::choices::ExtractorChoice;
use super::device::{describe, pick};
use super::figures::{Figures, LEAST, Reference, warnings};
use super::print::{err, grouped, out};
use super::program::check_output;
use super::result::{Interrupted, Result};
use super::sampling::SamplingArgs;
use super::sets::{Part, Set, Sets, SetsArgs, Shape};
use super::trained::Trained;
use crate::data::{Dataset, Images};
use crate::denoiser::Condition;
use crate::error::Error;
use crate::eval::{Extractor, Features, Gaussian, Generator, Statistics, extract};
use crate::files;
use crate::observe::{Progress, StopOnSignal};
use crate::sample::SamplerConfig;

/// The number of images whose features are computed together.
const BATCH: usize = 100;

/// The method by which samples become bytes, for the report.
const ROUNDING: &str = "round((x + 1) * 127.5), from 0 to 255";

/// The options of a program that measures a set of images.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    sampling: Option<SamplingArgs>,
    #[command(flatten)]
    sets: SetsArgs,
    /// Statistics file (mu and sigma) of images to compare with; there is only the Fréchet distance then
    #[arg(long, value_name = "FILE.npz")]
    statistics: Option<PathBuf>,
    /// Network whose features are compared: digits:FILE, a classifier of digits that
    /// mnist-fd wrote, or inception:FILE, the network of FID, or inception-tf1:FILE, with the resizing of TensorFlow 1
    #[arg(long, value_name = "KIND:FILE")]
    extractor: ExtractorChoice,
    /// Number of images to draw, or the largest number of pictures of --samples to measure
    #[arg(long, value_name = "N", default_value = "10000", allow_negative_numbers = true,
          value_parser = whole::<usize>(LEAST as u64..=10_000_000))]
    count: usize,
    /// File to which the figures are also written, with every choice on which they depend
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
    /// File to which the statistics of --data are written, for --statistics and other programs
    #[arg(long, value_name = "FILE.npz", conflicts_with = "statistics")]
    save_statistics: Option<PathBuf>,
}

/// Compares a set of images with another, prints the figures, and writes them to a file if one is given. Ctrl-C stops
/// without results.
///
/// # Errors
/// Returns an error if a file cannot be read or written, if the images do not fit each other, and the errors of drawing
/// and of the metrics. Arguments, files and shapes are checked before the first long work.
pub fn evaluate(args: &EvaluateArgs) -> Result<ExitCode> {
    let drawn = match &args.sampling {
        Some(sampling) => Some(Drawn::new(sampling, args.count)?),
        None => None,
    };
    for (option, path, extension) in
        [("--json", &args.json, "json"), ("--save-statistics", &args.save_statistics, "npz")]
    {
        path.as_deref().map_or(Ok(()), |path| check_output(option, path, extension))?;
    }
    let device = pick(args.sampling.as_ref().is_some_and(|sampling| sampling.cpu))?;
    let extractor = &*args.extractor.open(&device)?;
    let saved = match &args.statistics {
        Some(path) => Some(statistics(path, extractor)?),
        None => None,
    };
    let stop = StopOnSignal::install(|| {
        err("stopping after this step; press Ctrl-C again to quit at once");
    })?;
    let (shape, usual) = (drawn.as_ref().map(|drawn| drawn.shape), args.extractor.image_shape());
    let sets = args.sets.open(shape, usual, extractor, &stop)?;
    let work = Work { stop, extractor, device: &device };
    let samples = match (&drawn, &sets.samples) {
        (Some(drawn), _) => Samples::Drawn(drawn),
        (None, Some(set)) => Samples::Pictures(set),
        (None, None) => return Err("--checkpoint or --samples is needed".into()),
    };
    args.announce(&samples, &sets, &work);

    let real = match &sets.data {
        Some(data) => Some(work.features("the data", &*data.images, usize::MAX)?),
        None => None,
    };
    let gaussian = match (&real, saved) {
        (Some(real), _) => Statistics::of(real)?.gaussian()?,
        (None, Some(saved)) => saved,
        (None, None) => return Err("--data or --statistics is needed".into()),
    };
    if let Some(path) = &args.save_statistics {
        gaussian.write(path)?;
    }
    let other = match &sets.other {
        Some(set) => {
            let name = args.sets.split.other().name();
            Some(work.features(&format!("the {name}"), &*set.images, usize::MAX)?)
        }
        None => None,
    };
    let reference = Reference { gaussian, features: real };
    // The images among which copies are searched. A folder of pictures has no other part.
    let training = match (&other, args.sets.split) {
        (Some(other), Part::Test) => Some(other),
        _ => reference.features.as_ref(),
    };
    let measured = match samples {
        Samples::Drawn(drawn) => work.features("the samples", &drawn.draw(&work)?, args.count)?,
        Samples::Pictures(set) => work.features("the samples", &*set.images, args.count)?,
    };
    out("figures     of all images");
    let figures = Figures::measure(&reference, &measured, training, || work.check())?;
    let floor = match &other {
        Some(other) => {
            // Figures depend on the number of images, so this set has as many images as the samples.
            let first: Vec<usize> = (0..measured.count().min(other.count())).collect();
            // Training images are their own nearest ones.
            let training = training.filter(|_| args.sets.split == Part::Train);
            let first = other.select(&first)?;
            Some(Figures::measure(&reference, &first, training, || work.check())?)
        }
        None => None,
    };
    print(&figures, floor.as_ref().map(|floor| (args.sets.split.other(), floor)), &args.extractor);
    let Some(path) = &args.json else { return Ok(ExitCode::SUCCESS) };
    let mut json = args.record(&work)?;
    json["count"] = json!(measured.count());
    json["samples"] = samples.record()?;
    json["data"] = json!(sets.data.as_ref().map(|data| &data.json));
    json["other_part"] = json!(sets.other.as_ref().map(|other| &other.json));
    json["figures"] = json!({ "samples": figures.json(), "other_part": floor.map(|f| f.json()) });
    files::write(path, format!("{json:#}\n").as_bytes())?;
    out(format_args!("\n{}", path.display()));
    Ok(ExitCode::SUCCESS)
}

impl EvaluateArgs {
    /// Prints what is compared, and warnings that there are too few images.
    fn announce(&self, samples: &Samples<'_>, sets: &Sets, work: &Work<'_>) {
        out(format_args!("extractor   {}", self.extractor));
        if let Some(data) = &sets.data {
            out(format_args!("data        {}", data.about));
        }
        let count = match samples {
            Samples::Drawn(Drawn { sampling, config, checkpoint, .. }) => {
                sampling.announce(config, checkpoint, work.device);
                self.count
            }
            Samples::Pictures(set) => {
                out(format_args!("samples     {}", set.about));
                set.images.len().min(self.count)
            }
        };
        let all = sets.data.is_some();
        let data = sets.data.as_ref().map(|data| ("data", data.images.len()));
        for (name, count) in [Some(("samples", count)), data].into_iter().flatten() {
            for warning in warnings(name, count, work.extractor.size(), all) {
                err(format_args!("warning: {warning}"));
            }
        }
    }

    /// The choices that do not concern the images.
    fn record(&self, work: &Work<'_>) -> Result<Value> {
        let identity = work.extractor.identity();
        let statistics = match &self.statistics {
            Some(path) => json!({ "file": path.to_string_lossy(), "sha256": sha256(path)? }),
            None => Value::Null,
        };
        Ok(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "device": describe(work.device),
            "extractor": {
                "kind": self.extractor.kind(),
                "file": self.extractor.file(),
                "name": identity.name,
                "weights_sha256": identity.weights_sha256,
                "resizing": identity.resizing,
                "features": work.extractor.size(),
            },
            "statistics": statistics,
        }))
    }
}

/// The images that are measured.
enum Samples<'a> {
    Drawn(&'a Drawn<'a>),
    Pictures(&'a Set),
}

impl Samples<'_> {
    /// The choices on which the images depend.
    fn record(&self) -> Result<Value> {
        let Drawn { sampling, checkpoint, config, sha256, .. } = match self {
            Self::Drawn(drawn) => drawn,
            Self::Pictures(set) => return Ok(set.json.clone()),
        };
        let mut json = sampling.record(config, checkpoint);
        let file = checkpoint.weights_file(sampling.weights);
        json["weights_file"] = json!(file.to_string_lossy());
        json["weights_sha256"] = json!(sha256);
        json["rounding"] = json!(ROUNDING);
        Ok(json)
    }
}

/// Samples of a checkpoint.
struct Drawn<'a> {
    sampling: &'a SamplingArgs,
    checkpoint: Trained,
    config: SamplerConfig,
    /// The SHA-256 of the file of the weights. A run can replace the file, but then opening the network is an error.
    sha256: String,
    condition: Condition,
    shape: Shape,
    count: usize,
}

impl<'a> Drawn<'a> {
    fn new(sampling: &'a SamplingArgs, count: usize) -> Result<Self> {
        let checkpoint = sampling.open()?;
        let config = sampling.config(&checkpoint)?;
        config.sampler(checkpoint.diffusion())?;
        let network = checkpoint.architecture()?;
        let condition = sampling.condition(&network, 0, count)?;
        let shape = network.image_shape();
        let sha256 = sha256(&checkpoint.weights_file(sampling.weights))?;
        Ok(Self { sampling, checkpoint, config, sha256, condition, shape, count })
    }

    fn draw(&self, work: &Work<'_>) -> Result<Images> {
        let sampler = self.config.sampler(self.checkpoint.diffusion())?;
        let sampler = sampler.condition(self.condition.clone());
        let model = self.sampling.model(&self.checkpoint, work.device)?;
        let generator = Generator::new(&sampler, self.shape, self.sampling.seed, work.device);
        let (count, steps) = (grouped(self.count), self.config.steps);
        out(format_args!("drawing     {count} images, {steps} steps each"));
        let progress = Progress::started(generator.steps(self.count) as u64);
        let drawn = generator.draw(&model, self.count, |step| {
            progress.advance(step.done as u64);
            Ok(work.flow())
        })?;
        progress.finish();
        Ok(drawn.ok_or(Interrupted)?)
    }
}

/// Work that shows its progress, and ends at Ctrl-C.
struct Work<'a> {
    stop: StopOnSignal,
    extractor: &'a dyn Extractor,
    device: &'a Device,
}

impl Work<'_> {
    fn flow(&self) -> ControlFlow<()> {
        if self.stop.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn check(&self) -> Result<()> {
        if self.stop.is_stopped() { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// Computes the features of the first images of a set, at most `most`.
    fn features(&self, of: &str, images: &dyn Dataset, most: usize) -> Result<Features> {
        let total = images.len().min(most);
        out(format_args!("features    of {of}, {} images", grouped(total)));
        let progress = Progress::started(total as u64);
        let mut all: Option<Features> = None;
        let flow = extract(self.extractor, images, BATCH, |features| {
            let done = match &mut all {
                Some(all) => all.append(features).map(|()| all.count())?,
                None => all.insert(features.clone()).count(),
            };
            progress.advance(done.min(total) as u64);
            Ok(if done >= total { ControlFlow::Break(()) } else { self.flow() })
        })?;
        progress.finish();
        self.check()?;
        let all = all.unwrap_or_else(|| Features::new(self.extractor.size()));
        match flow {
            ControlFlow::Break(()) => Ok(all.select(&(0..total).collect::<Vec<_>>())?),
            ControlFlow::Continue(()) => Ok(all),
        }
    }
}

/// Reads a statistics file of the extractor's features.
fn statistics(path: &Path, extractor: &dyn Extractor) -> Result<Gaussian> {
    let gaussian = Gaussian::read(path)?;
    let (found, expected) = (gaussian.mean().len(), extractor.size());
    if found != expected {
        let path = path.display();
        return Err(format!("{path}: {found} features; the extractor has {expected}").into());
    }
    Ok(gaussian)
}

fn sha256(path: &Path) -> Result<String> {
    let hash = File::open(path).and_then(files::sha256);
    Ok(hash.map_err(Error::io(path))?)
}

/// Prints a table of the figures of the samples, and of the other part of a published set.
fn print(figures: &Figures, floor: Option<(Part, &Figures)>, extractor: &ExtractorChoice) {
    let real = floor.map_or("", |(part, _)| part.name());
    out(format_args!("\n{:28}{:>20}{real:>20}", "", "samples"));
    let floor = floor.map_or_else(Vec::new, |(_, figures)| figures.rows(extractor));
    for (name, value) in figures.rows(extractor) {
        let real = floor.iter().find(|(row, _)| *row == name).map_or("", |(_, value)| value);
        out(format_args!("{name:28}{value:>20}{real:>20}"));
    }
}
