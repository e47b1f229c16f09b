//! A classifier of digits: its training, and the distribution of its features and classes.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{loss, ops};
use ddpm::cli::{Interrupted, Result, check_output, out};
use ddpm::data::{Dataset, Images};
use ddpm::eval::{DigitClassifier, Extractor, Statistics, extract};
use ddpm::files;
use ddpm::nn::Parameters;
use ddpm::observe::Progress;
use ddpm::train::{AdamConfig, AdamW, gradients};

/// The default number of updates.
const STEPS: u64 = 3_000;
const SEED: u64 = 0;
const BATCH: usize = 100;
const LEARNING_RATE: f64 = 2e-3;
/// Maximum shift of training images in pixels.
const SHIFT: usize = 2;

/// The default path of the classifier.
pub const DEFAULT_PATH: &str = "out/mnist-fd/classifier.safetensors";

/// Returns an error if the classifier cannot be written to `path`, or if `steps` is given for an existing one, which is
/// only read.
pub fn check(path: &Path, steps: Option<u64>) -> Result<()> {
    match steps {
        _ if !path.exists() => check_output("--classifier", path, "safetensors"),
        None => Ok(()),
        Some(steps) => {
            let expected = "omit it, or name another --classifier to train";
            let exists = format!("but {} exists; {expected}", path.display());
            Err(format!("--classifier-steps is {steps}, {exists}").into())
        }
    }
}

/// Loads the classifier at `path`, which is first trained if it does not exist.
pub fn load_or_train(
    path: &Path,
    steps: Option<u64>,
    images: &Images,
    device: &Device,
    stop: impl Fn() -> bool,
) -> Result<DigitClassifier> {
    if !path.exists() {
        let steps = steps.unwrap_or(STEPS);
        out(format_args!("training    a classifier, {steps} steps"));
        train(images, steps, path, device, stop)?;
    }
    Ok(DigitClassifier::load(path, device)?)
}

/// Trains a classifier on images with labels, using Adam with a learning rate that falls to 0. Writes the weights to
/// `path`.
pub fn train(
    images: &Images,
    steps: u64,
    path: &Path,
    device: &Device,
    stop: impl Fn() -> bool,
) -> Result<()> {
    let labels = labels(images)?;
    let parameters = Parameters::new(SEED, DType::F32, device);
    let classifier = DigitClassifier::new(parameters.builder())?;
    let vars = parameters.vars();
    let mut adam = AdamW::new(AdamConfig::adam(LEARNING_RATE), &vars)?;
    let mut random = Random(SEED);
    let mut order: Vec<usize> = vec![];
    let progress = Progress::started(steps);
    for step in 0..steps {
        if stop() {
            return Err(Interrupted.into());
        }
        let (mut pixels, mut moves, mut targets) = (vec![], vec![], vec![]);
        for _ in 0..BATCH {
            if order.is_empty() {
                order = (0..images.len()).collect();
                random.shuffle(&mut order);
            }
            let index = order.pop().ok_or("there are no images")?;
            let mut shift = || random.below(2 * SHIFT + 1) as isize - SHIFT as isize;
            pixels.extend(images.get(index).unwrap_or_default());
            moves.push((shift(), shift()));
            targets.push(u32::from(labels[index]));
        }
        let batch = Images::new(pixels, images.shape())?;
        let output = classifier.logits(&classifier.features_of_moved(&batch, &moves)?)?;
        let loss = loss::cross_entropy(&output, &Tensor::new(targets, device)?)?;
        let rate = LEARNING_RATE * (1.0 - step as f64 / steps as f64);
        adam.step(&gradients(&loss, &vars)?, rate)?;
        progress.loss(step + 1, loss.to_scalar::<f32>()?.into());
        progress.advance(step + 1);
    }
    progress.finish();
    let weights = vars.iter().map(|(name, var)| (name.as_str(), var.as_tensor().clone()));
    Ok(files::write(path, &safetensors::serialize(weights, None)?)?)
}

/// Computes the statistics of the features of all images, and the class probabilities of each image.
pub fn look(
    classifier: &DigitClassifier,
    images: &Images,
    stop: impl Fn() -> bool,
) -> Result<(Statistics, Vec<Vec<f32>>)> {
    let (mut statistics, mut probabilities) = (Statistics::new(classifier.size()), vec![]);
    let flow = extract(classifier, images, BATCH, |features| {
        let shape = (features.count(), DigitClassifier::CLASSES);
        let logits = Tensor::from_slice(features.scores(), shape, &Device::Cpu)?;
        probabilities.extend(ops::softmax(&logits, 1)?.to_vec2::<f32>()?);
        statistics.add(features.values())?;
        Ok(if stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    match flow {
        ControlFlow::Continue(()) => Ok((statistics, probabilities)),
        ControlFlow::Break(()) => Err(Interrupted.into()),
    }
}

/// Returns the labels of the digits. Returns an error if they are not digits.
pub fn labels(images: &Images) -> Result<&[u8]> {
    let labels = images.labels().ok_or("the digits have no labels")?;
    match labels.iter().position(|&label| usize::from(label) >= DigitClassifier::CLASSES) {
        Some(i) => {
            Err(format!("the label of image {i} is {}; digits are 0 to 9", labels[i]).into())
        }
        None => Ok(labels),
    }
}

/// Random numbers that are the same everywhere: SplitMix64 (Steele et al. 2014).
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`, except for a bias of `bound` in 2^64.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// Shuffles by the method of Fisher and Yates.
    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
