use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::Device;
use clap::Args;
use serde_json::{Value, json};

use super::arguments::whole;
use super::bits::BitsArgs;
use super::choices::{ExtractorChoice, KINDS};
use super::compared::{Chosen, Real, SavedStatistics};
use super::device::{describe, pick};
use super::figures::{LEAST, Measured};
use super::identity::sha256;
use super::print::{err, grouped, out};
use super::program::check_output;
use super::result::{Interrupted, Result};
use super::sampling::SamplingArgs;
use super::sets::{Set, Sets, SetsArgs, Shape};
use super::trained::Trained;
use super::work::Work;
use crate::data::{Dataset, Images, Subset};
use crate::denoiser::{Condition, Denoiser};
use crate::eval::Generator;
use crate::files;
use crate::observe::{Progress, StopOnSignal};
use crate::process::Diffusion;
use crate::sample::SamplerConfig;

/// The method by which samples become bytes, for the report.
const ROUNDING: &str = "round((x + 1) * 127.5), from 0 to 255";

/// The default number of images to draw.
const COUNT: usize = 10_000;

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
    #[arg(long, value_name = "KIND:FILE", help = format!("Network whose features are compared: {KINDS}"), required_unless_present = "bits")]
    extractor: Option<ExtractorChoice>,
    /// Number of images to draw, default 10000; or of pictures of --samples to measure, chosen at random, default all
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(LEAST as u64..=10_000_000))]
    count: Option<usize>,
    /// Seed of the images to draw, and of all other random choices
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    #[command(flatten)]
    bits: BitsArgs,
    /// File to which the figures are also written, with every choice on which they depend
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
    /// File to which the statistics of --data are written, for --statistics and other programs
    #[arg(long, value_name = "FILE.npz", conflicts_with = "statistics", requires = "extractor")]
    save_statistics: Option<PathBuf>,
}

/// Compares a set of images with another, measures the bits per dimension of images, or does both. Prints the figures,
/// and writes them to a file if one is given. Ctrl-C stops without results.
///
/// # Errors
/// Returns an error if a file cannot be read or written, if the images do not fit each other, and the errors of drawing
/// and of the metrics. Arguments, files and shapes are checked before the first long work.
pub fn evaluate(args: &EvaluateArgs) -> Result<ExitCode> {
    let drawn = match &args.sampling {
        Some(sampling) => Some(Drawn::new(sampling, args.count.unwrap_or(COUNT), args.seed)?),
        None => None,
    };
    for (option, path, extension) in
        [("--json", &args.json, "json"), ("--save-statistics", &args.save_statistics, "npz")]
    {
        path.as_deref().map_or(Ok(()), |path| check_output(option, path, extension))?;
    }
    let device = pick(args.sampling.as_ref().is_some_and(|sampling| sampling.cpu))?;
    let extractor = match &args.extractor {
        Some(choice) => Some(Chosen { choice, extractor: choice.open(&device)? }),
        None => None,
    };
    let saved = match (&args.statistics, &extractor) {
        (Some(path), Some(chosen)) => Some(SavedStatistics::read(path, &*chosen.extractor)?),
        _ => None,
    };
    let stop = StopOnSignal::install(|| {
        err("stopping after this step; press Ctrl-C again to quit at once");
    })?;
    let shape = drawn.as_ref().map(|drawn| drawn.shape);
    let usual = args.extractor.as_ref().and_then(ExtractorChoice::image_shape);
    let network = extractor.as_ref().map(|chosen| &*chosen.extractor);
    let sets = args.sets.open(shape, usual, network, &stop)?;
    let work = Work { stop, device: &device };
    let samples = match (&drawn, &sets.samples) {
        (Some(drawn), _) => Samples::Drawn(drawn),
        (None, Some(set)) => Samples::pictures(set, args.count, args.seed)?,
        (None, None) => return Err("--checkpoint or --samples is needed".into()),
    };
    let bits = match (&drawn, &sets.data) {
        (Some(drawn), Some(data)) => args.bits.prepare(data, drawn.process(), args.seed)?,
        _ => None,
    };
    let mut json = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "device": describe(&device),
        "seed": args.seed,
        "samples": samples.record(),
        "data": sets.data.as_ref().map(|data| &data.json),
    });
    args.announce(&samples, &sets, &work);
    if let Some(chosen) = &extractor {
        json["extractor"] = chosen.record();
        json["statistics"] = json!(saved.as_ref().map(|saved| &saved.json));
        json["other_part"] = json!(sets.other.as_ref().map(|other| &other.json));
        chosen.warn(samples.count(), sets.data.as_ref().map(|data| data.images.len()));
        let real = Real::of(chosen, (&sets, args.sets.split), saved, &work)?;
        if let Some(path) = &args.save_statistics {
            real.reference.gaussian.write(path)?;
        }
        let measured = match &samples {
            Samples::Drawn(drawn) => chosen.features("the samples", &drawn.draw(&work)?, &work)?,
            Samples::Pictures { chosen: pictures, .. } => {
                let numbers = Some(pictures.indices().to_vec());
                Measured { numbers, ..chosen.features("the samples", pictures, &work)? }
            }
        };
        json["count"] = json!(measured.features.count());
        json["figures"] = real.compare(&measured, chosen, args.seed, &work)?;
    }
    if let (Some(bits), Some(drawn)) = (bits, &drawn) {
        let model = drawn.model(&device)?;
        json["bits_per_dimension"] = bits.measure(&model, &device, || work.flow())?;
    }
    let Some(path) = &args.json else { return Ok(ExitCode::SUCCESS) };
    files::write(path, format!("{json:#}\n").as_bytes())?;
    out(format_args!("\n{}", path.display()));
    Ok(ExitCode::SUCCESS)
}

impl EvaluateArgs {
    /// Prints what is compared.
    fn announce(&self, samples: &Samples<'_>, sets: &Sets, work: &Work<'_>) {
        if let Some(extractor) = &self.extractor {
            out(format_args!("extractor   {extractor}"));
        }
        if let Some(data) = &sets.data {
            out(format_args!("data        {}", data.about));
        }
        match samples {
            Samples::Drawn(Drawn { sampling, config, checkpoint, .. }) => {
                sampling.announce(config, checkpoint, work.device);
            }
            Samples::Pictures { set, chosen } => {
                let (about, all) = (&set.about, set.images.len());
                let which = match chosen.len() {
                    count if count < all => format!(", of which {} at random", grouped(count)),
                    _ => String::new(),
                };
                out(format_args!("samples     {about}{which}"));
            }
        }
    }
}

/// The images that are measured.
enum Samples<'a> {
    Drawn(&'a Drawn<'a>),
    Pictures { set: &'a Set, chosen: Subset<'a> },
}

impl<'a> Samples<'a> {
    /// Chooses `count` pictures at random, or all.
    fn pictures(set: &'a Set, count: Option<usize>, seed: u64) -> Result<Self> {
        let all = set.images.len();
        match count {
            Some(count) if count > all => Err(format!("--count is {count}; {}", set.about).into()),
            count => {
                let chosen = Subset::random(&*set.images, count.unwrap_or(all), seed)?;
                Ok(Self::Pictures { set, chosen })
            }
        }
    }

    fn count(&self) -> usize {
        match self {
            Self::Drawn(drawn) => drawn.count,
            Self::Pictures { chosen, .. } => chosen.len(),
        }
    }

    /// The choices on which the images depend.
    fn record(&self) -> Value {
        let Drawn { sampling, checkpoint, config, sha256, seed, .. } = match self {
            Self::Drawn(drawn) => drawn,
            Self::Pictures { set, chosen } => {
                let mut json = set.json.clone();
                json["chosen"] = json!(chosen.len());
                return json;
            }
        };
        let mut json = sampling.record(config, checkpoint, *seed);
        let file = checkpoint.weights_file(sampling.weights);
        json["weights_file"] = json!(file.to_string_lossy());
        json["weights_sha256"] = json!(sha256);
        json["rounding"] = json!(ROUNDING);
        json
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
    /// True if the network learns the variance.
    learned: bool,
    count: usize,
    seed: u64,
}

impl<'a> Drawn<'a> {
    fn new(sampling: &'a SamplingArgs, count: usize, seed: u64) -> Result<Self> {
        let checkpoint = sampling.open()?;
        let config = sampling.config(&checkpoint)?;
        config.sampler(checkpoint.diffusion())?;
        let network = checkpoint.architecture()?;
        let condition = sampling.condition(&network, 0, count)?;
        let (shape, learned) = (network.image_shape(), network.learns_variance());
        let sha256 = sha256(&checkpoint.weights_file(sampling.weights))?;
        Ok(Self { sampling, checkpoint, config, sha256, condition, shape, learned, count, seed })
    }

    /// The process, the sampler settings, and whether the network learns the variance.
    fn process(&self) -> (&Diffusion, &SamplerConfig, bool) {
        (self.checkpoint.diffusion(), &self.config, self.learned)
    }

    fn model(&self, device: &Device) -> Result<impl Denoiser> {
        self.sampling.model(&self.checkpoint, device)
    }

    fn draw(&self, work: &Work<'_>) -> Result<Images> {
        let sampler = self.config.sampler(self.checkpoint.diffusion())?;
        let sampler = sampler.condition(self.condition.clone());
        let model = self.model(work.device)?;
        let generator = Generator::new(&sampler, self.shape, self.seed, work.device);
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
