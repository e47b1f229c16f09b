//! Measures how much the figures of samples depend on choices: `--checkpoint out/mnist/checkpoint --data data
//! --extractor digits:FILE`.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::Tensor;
use clap::Parser;
use ddpm::cli::{self, ExtractorChoice, Interrupted, Result, SamplingArgs, Trained, whole};
use ddpm::cli::{datasets, device, err, out};
use ddpm::data::{Dataset, Images};
use ddpm::eval::{
    Classes, Extractor, Features, Generator, KernelDistance, SlicedDistance, Statistics,
};
use ddpm::eval::{bytes, inception_score};
use ddpm::image::codecs::jpeg::JpegEncoder;
use ddpm::image::imageops::{FilterType, resize};
use ddpm::image::{GrayImage, ImageFormat, load_from_memory_with_format};
use ddpm::observe::{Progress, StopOnSignal};

const STOPPING: &str = "stopping after this step; press Ctrl-C again to quit at once";
/// Images that an extractor takes at a time.
const BATCH: usize = 500;
/// Height and width to which images are enlarged before they are reduced again.
const LARGE: u32 = 56;
/// The figures of a row.
const FIGURES: [&str; 4] =
    ["Fréchet distance", "kernel distance", "sliced distance", "class score"];

/// Measure how much figures of digits depend on count, rounding, resizing, compression and seed
#[derive(Parser)]
#[command(name = "dependence", version)]
struct Cli {
    /// Directory of the full set of MNIST
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Network whose features are compared, and its file, such as `digits:FILE`
    #[arg(long, value_name = "KIND:FILE")]
    extractor: ExtractorChoice,
    /// Number of images of each seed
    #[arg(long, value_name = "N", default_value = "1000", allow_negative_numbers = true,
          value_parser = whole::<usize>(8..=10_000))]
    count: usize,
    /// First seed
    #[arg(long, value_name = "K", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    /// Number of seeds
    #[arg(long, value_name = "N", default_value = "5", allow_negative_numbers = true,
          value_parser = whole::<u64>(2..=100))]
    seeds: u64,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(cli: Cli) -> Result<ExitCode> {
    let checkpoint = cli.sampling.open()?;
    let config = cli.sampling.config(&checkpoint)?;
    let device = device::pick(cli.sampling.cpu)?;
    let extractor = cli.extractor.open(&device)?;
    let (_, test) = datasets::mnist_with_labels(&cli.data)?;
    test.check_shape(checkpoint.architecture()?.image_shape())?;
    let stop = StopOnSignal::install(|| err(STOPPING))?;
    cli.sampling.announce(&config, &checkpoint, &device);
    let real = Features::extracted(&*extractor, &test.images, BATCH)?;
    let Some(classes) = real.classes() else {
        return Err(format!("--extractor {} has no classes for a score", cli.extractor).into());
    };
    let sets = draw(&cli, &checkpoint, || stop.is_stopped())?;
    let table = Table { real, classes, extractor: &*extractor };
    out(format_args!("extractor   {}\n", extractor.identity()));
    table.print(&sets)?;
    Ok(ExitCode::SUCCESS)
}

/// Draws the images of every seed, not rounded.
fn draw(cli: &Cli, checkpoint: &Trained, stop: impl Fn() -> bool) -> Result<Vec<Vec<Tensor>>> {
    let config = cli.sampling.config(checkpoint)?;
    let network = checkpoint.architecture()?;
    let condition = cli.sampling.condition(&network, 0, cli.count)?;
    let sampler = config.sampler(checkpoint.diffusion())?.condition(condition);
    let device = device::pick(cli.sampling.cpu)?;
    let model = cli.sampling.model(checkpoint, &device)?;
    let generator = |seed| Generator::new(&sampler, network.image_shape(), seed, &device);
    let steps = generator(0).steps(cli.count) as u64;
    let progress = Progress::started(cli.seeds * steps);
    let mut sets = vec![];
    for i in 0..cli.seeds {
        let mut parts = vec![];
        let seed = cli.seed.wrapping_add(i);
        let flow = generator(seed).visit(&model, cli.count, |drawn| {
            if drawn.is_last {
                parts.push(drawn.x.clone());
            }
            progress.advance(i * steps + drawn.done as u64);
            Ok(if stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        if flow.is_break() {
            return Err(Interrupted.into());
        }
        sets.push(parts);
    }
    progress.finish();
    Ok(sets)
}

/// The figures of a set, in the order of [`FIGURES`].
type Row = [f64; FIGURES.len()];

struct Table<'a> {
    real: Features,
    classes: Classes,
    extractor: &'a dyn Extractor,
}

impl Table<'_> {
    fn print(&self, sets: &[Vec<Tensor>]) -> Result<()> {
        let images = |round: fn(f32) -> f32| -> Result<Vec<Images>> {
            sets.iter().map(|parts| rounded(parts, round)).collect()
        };
        let rounded = images(|x| x)?;
        let features: Vec<Features> =
            rounded.iter().map(|set| self.features(set)).collect::<ddpm::Result<_>>()?;
        let plain: Vec<Row> =
            features.iter().map(|set| self.figures(set, &self.real)).collect::<Result<_>>()?;

        out(format_args!("| choice | sets | {} |", FIGURES.join(" | ")));
        out(format_args!("| --- | --- |{}", " --- |".repeat(FIGURES.len())));
        let count = rounded[0].len();
        line(&format!("{count} images, one seed per set"), &plain, None);
        let mut all = Features::with_classes(self.real.size(), self.classes);
        features.iter().try_for_each(|set| all.append(set))?;
        for count in BTreeSet::from([count / 4, count / 2, 2 * count, all.count()]) {
            let part = |first: usize| {
                let part = all.select(&(first..first + count).collect::<Vec<_>>())?;
                self.figures(&part, &self.real)
            };
            let starts = (0..=all.count() - count).step_by(count);
            line(&format!("{count} images"), &starts.map(part).collect::<Result<Vec<_>>>()?, None);
        }
        let count = count.min(self.real.count());
        let few = self.real.select(&(0..count).collect::<Vec<_>>())?;
        let less =
            features.iter().map(|set| self.figures(set, &few)).collect::<Result<Vec<_>>>()?;
        line(&format!("{count} real images"), &less, Some(&plain));

        let truncated = images(|x| x - 0.5 / 127.5)?;
        let changed = |change: fn(GrayImage) -> Result<GrayImage>| -> Result<Vec<Images>> {
            rounded.iter().map(|set| each(set, change)).collect()
        };
        for (name, sets) in [
            ("truncated, not rounded", truncated),
            (
                "enlarged and reduced without antialiasing",
                changed(|p| resized(p, FilterType::Nearest))?,
            ),
            (
                "enlarged and reduced with antialiasing",
                changed(|p| resized(p, FilterType::Triangle))?,
            ),
            ("JPEG, quality 95", changed(|picture| compressed(&picture, 95))?),
            ("JPEG, quality 75", changed(|picture| compressed(&picture, 75))?),
        ] {
            let of_set = |set: &Images| self.figures(&self.features(set)?, &self.real);
            line(name, &sets.iter().map(of_set).collect::<Result<Vec<_>>>()?, Some(&plain));
        }
        Ok(())
    }

    fn features(&self, images: &Images) -> ddpm::Result<Features> {
        Features::extracted(self.extractor, images, BATCH)
    }

    fn figures(&self, samples: &Features, real: &Features) -> Result<Row> {
        let frechet = Statistics::of(samples)?.frechet_distance(&Statistics::of(real)?)?;
        let mut kernel = KernelDistance::default();
        kernel.subset_size = kernel.subset_size.min(samples.count()).min(real.count());
        let kernel = kernel.measure(real, samples)?.mean;
        let sliced = SlicedDistance::default().measure(real, samples)?;
        Ok([frechet, kernel, sliced, inception_score(samples, 1)?.mean])
    }
}

/// Prints a row: mean and standard deviation over the sets, of the figures or of their differences from `plain`.
fn line(name: &str, rows: &[Row], plain: Option<&[Row]>) {
    let cells = (0..FIGURES.len()).map(|i| {
        let value = |k: usize| rows[k][i] - plain.map_or(0.0, |plain| plain[k][i]);
        let count = rows.len() as f64;
        let mean = (0..rows.len()).map(value).sum::<f64>() / count;
        let squares = (0..rows.len()).map(|k| (value(k) - mean).powi(2)).sum::<f64>();
        let mean = if plain.is_some() { format!("{mean:+.3}") } else { format!("{mean:.3}") };
        if rows.len() < 2 {
            mean
        } else {
            format!("{mean} ± {:.3}", (squares / (count - 1.0)).sqrt())
        }
    });
    let cells = cells.collect::<Vec<_>>().join(" | ");
    out(format_args!("| {name} | {} | {cells} |", rows.len()));
}

/// The images as bytes, after a change of their values.
fn rounded(parts: &[Tensor], change: fn(f32) -> f32) -> Result<Images> {
    let mut pixels = vec![];
    let mut shape = (1, 0, 0);
    for part in parts {
        let (_, c, h, w) = part.dims4()?;
        shape = (c, h, w);
        let values = part.flatten_all()?.to_vec1::<f32>()?.into_iter().map(change).collect();
        pixels.extend(bytes(&Tensor::from_vec(values, part.dims(), part.device())?)?);
    }
    Ok(Images::new(pixels, shape)?)
}

/// Changes each image of a set.
fn each(set: &Images, change: fn(GrayImage) -> Result<GrayImage>) -> Result<Images> {
    let (_, h, w) = set.shape().into();
    let mut pixels = vec![];
    for image in (0..set.len()).filter_map(|index| set.get(index)) {
        let picture =
            GrayImage::from_raw(w as u32, h as u32, image.to_vec()).ok_or("grey images")?;
        pixels.extend(change(picture)?.into_raw());
    }
    Ok(Images::new(pixels, set.shape())?)
}

/// Enlarges a picture by bilinear interpolation, and reduces it again by `filter`.
fn resized(picture: GrayImage, filter: FilterType) -> Result<GrayImage> {
    let (width, height) = picture.dimensions();
    let large = resize(&picture, LARGE, LARGE, FilterType::Triangle);
    Ok(resize(&large, width, height, filter))
}

/// The picture after compression as JPEG.
fn compressed(picture: &GrayImage, quality: u8) -> Result<GrayImage> {
    let mut file = Cursor::new(vec![]);
    picture.write_with_encoder(JpegEncoder::new_with_quality(&mut file, quality))?;
    Ok(load_from_memory_with_format(file.get_ref(), ImageFormat::Jpeg)?.into_luma8())
}
