//! Trains a classifier of CIFAR-10, an extractor for `evaluate`: `--data data --out classifier.safetensors`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;

use candle_core::{DType, Device, Tensor};
use candle_nn::ops;
use clap::Parser;
use ddpm::Precision;
use ddpm::cli::{
    self, DataSet, Interrupted, Result, check_output, datasets, device, err, out, whole,
};
use ddpm::data::{Dataset, Images, normalized};
use ddpm::eval::{CifarClassifier, Extractor, extract};
use ddpm::files;
use ddpm::nn::{Condition, Dropout, Output, Parameters, Trainable};
use ddpm::observe::{Progress, StopOnSignal};
use ddpm::train::{AdamConfig, AdamW, Muon, MuonConfig, WeightDecay};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const STOPPING: &str = "stopping after this step; press Ctrl-C again to quit at once";
/// Images per update, if there are as many.
const BATCH: usize = 125;
const LEARNING_RATE: f64 = 4e-3;
/// Updates over which the learning rate rises, as a fraction of all updates.
const WARM_UP: f64 = 0.1;
/// Decoupled weight decay, times the learning rate.
const WEIGHT_DECAY: f64 = 0.1;
/// The fraction of the target that is spread over all classes.
const SMOOTHING: f64 = 0.1;
/// Maximum shift of training images in pixels.
const SHIFT: usize = 4;
/// Height and width of the grey square in each training image, in pixels (DeVries and Taylor 2017).
const CUTOUT: usize = 8;
const SIZE: usize = CifarClassifier::SHAPE.1;

/// Train a classifier of CIFAR-10 by Muon, and count the test images that it recognises
#[derive(Parser)]
#[command(name = "cifar10-classifier", version)]
struct Cli {
    /// Directory that contains cifar-10-batches-bin/
    #[arg(long, value_name = "DIR", default_value = "data")]
    data: PathBuf,
    /// File of the classifier
    #[arg(
        long,
        value_name = "FILE.safetensors",
        default_value = "out/cifar10-classifier/classifier.safetensors"
    )]
    out: PathBuf,
    /// Number of times that each image is seen
    #[arg(long, value_name = "N", default_value = "20", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000))]
    epochs: u64,
    /// Seed of the initial weights and of the random changes of images
    #[arg(long, value_name = "N", default_value = "0", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    /// Use the CPU even if a GPU is available
    #[arg(long)]
    cpu: bool,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(cli: Cli) -> Result<ExitCode> {
    check_output("--out", &cli.out, "safetensors")?;
    let (train, test) = datasets::cifar10_with_labels(&cli.data)?;
    let device = device::pick(cli.cpu)?;
    let stop = StopOnSignal::install(|| err(STOPPING))?;
    let stopped = || stop.is_stopped();
    out(format_args!("data        {}", train.about));
    out(format_args!("training    {} epochs in batches of {BATCH}", cli.epochs));
    train_to(&cli.out, &train, (cli.epochs, cli.seed), &device, stopped)?;
    let classifier = CifarClassifier::load(&cli.out, &device)?;
    let right = right(&classifier, &test.images, stopped)?;
    out(format_args!("test        {right:.2}% of {} images are recognised", test.images.len()));
    out(format_args!("written     {}: {}", cli.out.display(), classifier.identity()));
    Ok(ExitCode::SUCCESS)
}

/// Trains a classifier, and writes its weights to `path`.
fn train_to(
    path: &Path,
    set: &DataSet,
    (epochs, seed): (u64, u64),
    device: &Device,
    stop: impl Fn() -> bool,
) -> Result<()> {
    let parameters = Parameters::new(seed, DType::F32, device);
    let classifier = CifarClassifier::new(parameters.builder())?.with_precision(Precision::High)?;
    let model = classifier.model();
    let vars = parameters.vars();
    let is_matrix = |name: &str| name.ends_with("conv.weight");
    let (matrices, others) = vars.clone().into_iter().partition(|(name, _)| is_matrix(name));
    let muon = MuonConfig { weight_decay: WEIGHT_DECAY, ..MuonConfig::default() };
    let mut muon = Muon::new(muon, &matrices)?;
    let adam = AdamConfig {
        weight_decay: WeightDecay::Decoupled(WEIGHT_DECAY),
        ..AdamConfig::adam(LEARNING_RATE)
    };
    let mut adam = AdamW::new(adam, &others)?;

    let mut batches = Batches::new(&set.images, seed)?;
    let steps = epochs * (set.images.len() / batches.size) as u64;
    let progress = Progress::started(steps);
    let t = Tensor::zeros(batches.size, DType::U32, device)?;
    for step in 0..steps {
        if stop() {
            return Err(Interrupted.into());
        }
        let (x, targets) = batches.next(device)?;
        let (sender, losses) = mpsc::channel();
        let mut d_output = |output: &Output| {
            let (loss, d) = cross_entropy(&output.prediction, &targets)?;
            let _ = sender.send(loss);
            Ok(Output::new(d))
        };
        let dropout = Dropout::new(seed, step);
        let mut store = model.gradients(&x, &t, &Condition::None, &dropout, &mut d_output)?;
        let gradients = vars
            .iter()
            .filter_map(|(name, var)| Some((name.clone(), store.remove(var)?)))
            .collect();
        let rate = LEARNING_RATE * rate_at(step as f64 / steps as f64);
        muon.step(&gradients, rate)?;
        adam.step(&gradients, rate)?;
        model.recycle(gradients.into_values().collect());
        progress.loss(step + 1, losses.recv()?);
        progress.advance(step + 1);
    }
    progress.finish();
    let weights = vars.iter().map(|(name, var)| (name.as_str(), var.as_tensor().clone()));
    Ok(files::write(path, &safetensors::serialize(weights, None)?)?)
}

/// The factor of the learning rate after this fraction of the updates: it rises linearly, then falls linearly to 0.
fn rate_at(part: f64) -> f64 {
    (part / WARM_UP).min((1.0 - part) / (1.0 - WARM_UP))
}

/// The mean cross entropy with smoothed targets, and its gradient with respect to the network's output, whose first
/// channels are the logits.
fn cross_entropy(output: &Tensor, targets: &Tensor) -> ddpm::Result<(f64, Tensor)> {
    let (batch, channels, _, _) = output.dims4()?;
    let classes = CifarClassifier::CLASSES;
    let logits = output.flatten_from(1)?.narrow(1, 0, classes)?;
    let smooth = (targets * (1.0 - SMOOTHING))?.affine(1.0, SMOOTHING / classes as f64)?;
    let loss = (ops::log_softmax(&logits, 1)? * &smooth)?.sum_all()?.to_scalar::<f32>()?;
    let d = ((ops::softmax(&logits, 1)? - smooth)? / batch as f64)?;
    let d = d.pad_with_zeros(1, 0, channels - classes)?.reshape(output.dims())?;
    Ok((-f64::from(loss) / batch as f64, d))
}

/// The training images in random order, shifted, mirrored, and with a grey square at a random place. An image that is
/// mirrored in one epoch is not in the next (Jordan 2024, section 3.6).
struct Batches<'a> {
    images: &'a Images,
    labels: &'a [u8],
    size: usize,
    random: ChaCha8Rng,
    mirrored: Vec<bool>,
    order: Vec<usize>,
}

impl<'a> Batches<'a> {
    fn new(images: &'a Images, seed: u64) -> Result<Self> {
        let labels = images.labels().ok_or("the pictures have no classes")?;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mirrored = (0..images.len()).map(|_| random.random()).collect();
        let size = BATCH.min(images.len());
        Ok(Self { images, labels, size, random, mirrored, order: vec![] })
    }

    /// The next images (batch, 3, 32, 32), and their classes as (batch, 10) of zeros and ones.
    fn next(&mut self, device: &Device) -> Result<(Tensor, Tensor)> {
        let (size, classes) = (self.size, CifarClassifier::CLASSES);
        if self.order.len() < size {
            self.order = (0..self.images.len()).collect();
            self.order.shuffle(&mut self.random);
            self.mirrored.iter_mut().for_each(|mirrored| *mirrored = !*mirrored);
        }
        let (mut pixels, mut targets) = (vec![], vec![0f32; size * classes]);
        let indices = self.order.split_off(self.order.len() - size);
        for (index, target) in indices.into_iter().zip(targets.chunks_mut(classes)) {
            let image = self.images.get(index).ok_or("there are no images")?;
            let mut shift = || self.random.random_range(0..=2 * SHIFT) as isize - SHIFT as isize;
            let by = (shift(), shift());
            let first = pixels.len();
            moved(image, by, self.mirrored[index], &mut pixels);
            let mut corner = || self.random.random_range(0..=SIZE - CUTOUT);
            cut_out((corner(), corner()), &mut pixels[first..]);
            target[usize::from(self.labels[index])] = 1.0;
        }
        let x = Tensor::from_vec(pixels, (size, 3, SIZE, SIZE), device)?;
        Ok((x, Tensor::from_vec(targets, (size, classes), device)?))
    }
}

/// Adds an image that is moved down and right by some pixels, then mirrored.
fn moved(image: &[u8], (down, right): (isize, isize), mirrored: bool, pixels: &mut Vec<f32>) {
    for plane in image.chunks(SIZE * SIZE) {
        for y in 0..SIZE {
            let row = &plane[reflected(y as isize - down) * SIZE..][..SIZE];
            pixels.extend((0..SIZE).map(|x| {
                let x = if mirrored { SIZE - 1 - x } else { x };
                normalized(row[reflected(x as isize - right)])
            }));
        }
    }
}

/// Fills a square of an image with grey. The top left corner of the square is at this row and column.
fn cut_out((top, left): (usize, usize), image: &mut [f32]) {
    for plane in image.chunks_mut(SIZE * SIZE) {
        for row in plane.chunks_mut(SIZE).skip(top).take(CUTOUT) {
            row[left..][..CUTOUT].fill(0.0);
        }
    }
}

/// The pixel at this coordinate of a row or column that is continued by its reflection.
fn reflected(i: isize) -> usize {
    let last = SIZE as isize - 1;
    (if i > last { 2 * last - i } else { i.abs() }) as usize
}

/// The percentage of the images that the classifier recognises.
fn right(classifier: &CifarClassifier, images: &Images, stop: impl Fn() -> bool) -> Result<f64> {
    let labels = images.labels().ok_or("the pictures have no classes")?;
    let (mut seen, mut right) = (0, 0);
    let flow = extract(classifier, images, 500, |features| {
        for scores in features.scores().chunks(CifarClassifier::CLASSES) {
            let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
            right += usize::from(best == Some(usize::from(labels[seen])));
            seen += 1;
        }
        Ok(if stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    match flow {
        ControlFlow::Continue(()) => Ok(100.0 * right as f64 / seen as f64),
        ControlFlow::Break(()) => Err(Interrupted.into()),
    }
}
