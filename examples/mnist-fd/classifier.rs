//! A classifier of digits. The inputs of its last layer are the features.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, VarBuilder, linear, loss, ops};
use ddpm::cli::{Interrupted, Result, check_output, out};
use ddpm::data::normalized;
use ddpm::data::{Dataset, Images};
use ddpm::eval::Statistics;
use ddpm::files;
use ddpm::nn::Parameters;
use ddpm::observe::Progress;
use ddpm::train::{AdamConfig, AdamW, gradients};

/// Height and width of an image.
pub const SIZE: usize = 28;
pub const CLASSES: usize = 10;
/// Number of features of an image.
pub const FEATURES: usize = 64;

/// Channels of the image, and of maps 14, 7 and 4 pixels high.
const CHANNELS: [usize; 4] = [1, 16, 64, 64];
/// Height and width of the first convolution's map.
const FIRST: usize = SIZE / 2;
/// Number of image pixels from which the first convolution computes each pixel of its output.
pub const PATCH: usize = 4 * 4;

/// The default number of updates.
const STEPS: u64 = 3_000;
const SEED: u64 = 0;
const BATCH: usize = 100;
const LEARNING_RATE: f64 = 2e-3;
/// Maximum shift of training images in pixels.
const SHIFT: usize = 2;

pub struct Classifier {
    convolutions: [Linear; 3],
    hidden: Linear,
    output: Linear,
    device: Device,
}

impl Classifier {
    pub const DEFAULT_PATH: &str = "out/mnist-fd/classifier.safetensors";

    fn new(vb: VarBuilder, device: &Device) -> candle_core::Result<Self> {
        let convolution =
            |i: usize| linear(PATCH * CHANNELS[i - 1], CHANNELS[i], vb.pp(format!("conv{i}")));
        Ok(Self {
            convolutions: [convolution(1)?, convolution(2)?, convolution(3)?],
            hidden: linear(4 * 4 * CHANNELS[3], FEATURES, vb.pp("hidden"))?,
            output: linear(FEATURES, CLASSES, vb.pp("output"))?,
            device: device.clone(),
        })
    }

    /// Returns an error if the classifier cannot be written to `path`, or if `steps` is given for an existing one,
    /// which is only read.
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

    /// Loads the classifier at `path`, or trains it if it does not exist.
    pub fn load_or_train(
        path: &Path,
        steps: Option<u64>,
        images: &Images,
        device: &Device,
        stop: impl Fn() -> bool,
    ) -> Result<Self> {
        if !path.exists() {
            let steps = steps.unwrap_or(STEPS);
            out(format_args!("training    a classifier, {steps} steps"));
            return Self::train(images, steps, path, device, stop);
        }
        let parameters = Parameters::load(path, DType::F32, device)?;
        Self::new(parameters.builder(), device)
            .map_err(|e| format!("{}: not a classifier of mnist-fd: {e}", path.display()).into())
    }

    /// Trains a classifier on images with labels, using Adam with a learning rate that falls to 0. Writes the weights
    /// to `path`.
    pub fn train(
        images: &Images,
        steps: u64,
        path: &Path,
        device: &Device,
        stop: impl Fn() -> bool,
    ) -> Result<Self> {
        let labels = labels(images)?;
        let parameters = Parameters::new(SEED, DType::F32, device);
        let classifier = Self::new(parameters.builder(), device)?;
        let vars = parameters.vars();
        let mut adam = AdamW::new(AdamConfig::adam(LEARNING_RATE), &vars)?;
        let mut random = Random(SEED);
        let mut order: Vec<usize> = vec![];
        let progress = Progress::started(steps);
        for step in 0..steps {
            if stop() {
                return Err(Interrupted.into());
            }
            let (mut patches, mut targets) = (vec![], vec![]);
            for _ in 0..BATCH {
                if order.is_empty() {
                    order = (0..images.len()).collect();
                    random.shuffle(&mut order);
                }
                let index = order.pop().ok_or("there are no images")?;
                let mut shift = || random.below(2 * SHIFT + 1) as isize - SHIFT as isize;
                lay_out(images, index, (shift(), shift()), &mut patches)?;
                targets.push(u32::from(labels[index]));
            }
            let output = classifier.output.forward(&classifier.see(patches)?)?;
            let loss = loss::cross_entropy(&output, &Tensor::new(targets, device)?)?;
            let rate = LEARNING_RATE * (1.0 - step as f64 / steps as f64);
            adam.step(&gradients(&loss, &vars)?, rate)?;
            progress.loss(step + 1, loss.to_scalar::<f32>()?.into());
            progress.advance(step + 1);
        }
        progress.finish();
        let weights = vars.iter().map(|(name, var)| (name.as_str(), var.as_tensor().clone()));
        files::write(path, &safetensors::serialize(weights, None)?)?;
        Ok(classifier)
    }

    /// Computes the statistics of the features of all images, and the class probabilities of each image.
    pub fn look(
        &self,
        images: &Images,
        stop: impl Fn() -> bool,
    ) -> Result<(Statistics, Vec<Vec<f32>>)> {
        let (mut statistics, mut probabilities) = (Statistics::new(FEATURES), vec![]);
        for start in (0..images.len()).step_by(BATCH) {
            if stop() {
                return Err(Interrupted.into());
            }
            let mut patches = vec![];
            for index in start..images.len().min(start + BATCH) {
                lay_out(images, index, (0, 0), &mut patches)?;
            }
            let seen = self.see(patches)?.detach();
            probabilities.extend(ops::softmax(&self.output.forward(&seen)?, 1)?.to_vec2::<f32>()?);
            statistics.add(&seen.flatten_all()?.to_vec1::<f32>()?)?;
        }
        Ok((statistics, probabilities))
    }

    /// Computes the features of a batch from the patches of its images.
    fn see(&self, patches: Vec<f32>) -> candle_core::Result<Tensor> {
        let [first, others @ ..] = &self.convolutions;
        let pixels = patches.len() / PATCH;
        let patches = Tensor::from_vec(patches, (pixels, PATCH), &self.device)?;
        let mut maps = first.forward(&patches)?.relu()?.reshape(((), FIRST, FIRST, CHANNELS[1]))?;
        for convolution in others {
            maps = convolve(&maps, convolution)?.relu()?;
        }
        self.hidden.forward(&maps.flatten_from(1)?)?.relu()
    }
}

/// Returns the labels of the digits. Returns an error if they are not digits.
pub fn labels(images: &Images) -> Result<&[u8]> {
    let labels = images.labels().ok_or("the digits have no labels")?;
    match labels.iter().position(|&label| usize::from(label) >= CLASSES) {
        Some(i) => {
            Err(format!("the label of image {i} is {}; digits are 0 to 9", labels[i]).into())
        }
        None => Ok(labels),
    }
}

/// Adds the patches of the first convolution for an image that is moved down and right by some pixels.
pub fn lay_out(
    images: &Images,
    index: usize,
    (down, right): (isize, isize),
    patches: &mut Vec<f32>,
) -> Result<()> {
    let mut image = [0; SIZE * SIZE];
    images.read(index, &mut image)?;
    let image = image.map(normalized);
    let pixel = |y: isize, x: isize| {
        let within = 0..SIZE as isize;
        let inside = within.contains(&y) && within.contains(&x);
        // The surroundings of an image are black.
        if inside { image[y as usize * SIZE + x as usize] } else { -1.0 }
    };
    for i in 0..(FIRST * FIRST) as isize {
        let (top, left) = (i / FIRST as isize * 2 - 1 - down, i % FIRST as isize * 2 - 1 - right);
        patches.extend((0..PATCH as isize).map(|k| pixel(top + k / 4, left + k % 4)));
    }
    Ok(())
}

/// Computes a convolution of 4 x 4 at stride 2 of maps (batch, height, width, channels). It is one product of all
/// patches, because the gradient of candle's `conv2d` is slow. A patch consists of 2 x 2 blocks of 2 x 2 pixels.
pub fn convolve(maps: &Tensor, weights: &Linear) -> candle_core::Result<Tensor> {
    let (batch, h, w, channels) = maps.dims4()?;
    let (h_out, w_out) = (h.div_ceil(2), w.div_ceil(2));
    let blocks = maps
        .pad_with_zeros(1, 1, 2 * h_out + 1 - h)?
        .pad_with_zeros(2, 1, 2 * w_out + 1 - w)?
        .reshape((batch, h_out + 1, 2, w_out + 1, 2 * channels))?
        .transpose(2, 3)?
        .reshape((batch, h_out + 1, w_out + 1, 4 * channels))?;
    let mut parts = vec![];
    for y in 0..2 {
        for x in 0..2 {
            parts.push(blocks.narrow(1, y, h_out)?.narrow(2, x, w_out)?);
        }
    }
    let patches = Tensor::cat(&parts, 3)?.reshape((batch * h_out * w_out, PATCH * channels))?;
    weights.forward(&patches)?.reshape((batch, h_out, w_out, ()))
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
