use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, VarBuilder, linear};

use super::extractor::{Extractor, ExtractorIdentity};
use super::features::{Classes, Features};
use super::weights;
use crate::data::dataset::{Dataset, normalized};
use crate::data::images::Images;
use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::model::Parameters;

/// Height and width of an image.
const SIZE: usize = 28;
/// Channels of the image, and of maps 14, 7 and 4 pixels high.
const CHANNELS: [usize; 4] = [1, 16, 64, 64];
/// Height and width of the first convolution's map.
const FIRST: usize = SIZE / 2;
/// Number of pixels from which a convolution computes each pixel of its output.
const PATCH: usize = 4 * 4;

/// A classifier of handwritten digits, an [`Extractor`] of 64 features and the logits of 10 classes.
///
/// It has three convolutions of 4 x 4 at stride 2, with 16, 64 and 64 channels, a hidden layer, whose 64 outputs are
/// the features, and an output layer, with a ReLU after each layer except the last. Images are grey, 28 x 28 pixels.
/// The example `mnist-fd` trains it on MNIST. Its figures are not comparable with those of Inception, nor with those of
/// other weights.
#[derive(Debug, Clone)]
pub struct DigitClassifier {
    convolutions: [Linear; 3],
    hidden: Linear,
    output: Linear,
    device: Device,
    sha256: Option<String>,
}

impl DigitClassifier {
    /// The shape of an image: channels, height, width.
    pub const SHAPE: (usize, usize, usize) = (1, SIZE, SIZE);
    /// The number of classes.
    pub const CLASSES: usize = 10;
    /// The number of features of an image.
    pub const FEATURES: usize = 64;

    /// Creates the classifier from weights in f32: `conv1`, `conv2`, `conv3`, `hidden` and `output`, each with a
    /// `weight` and a `bias`.
    ///
    /// # Errors
    /// Returns the errors of the builder.
    pub fn new(vb: VarBuilder<'_>) -> Result<Self> {
        let convolution =
            |i: usize| linear(PATCH * CHANNELS[i - 1], CHANNELS[i], vb.pp(format!("conv{i}")));
        Ok(Self {
            convolutions: [convolution(1)?, convolution(2)?, convolution(3)?],
            hidden: linear(4 * 4 * CHANNELS[3], Self::FEATURES, vb.pp("hidden"))?,
            output: linear(Self::FEATURES, Self::CLASSES, vb.pp("output"))?,
            device: vb.device().clone(),
            sha256: None,
        })
    }

    /// Loads the classifier from a safetensors file.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if it is not a file of these weights.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, sha256) = weights::load(path, device)?;
        let parameters = Parameters::frozen(path, tensors, DType::F32, device);
        let classifier = Self::new(parameters.builder())
            .map_err(|e| Error::data(path, format!("not a classifier of digits: {e}")))?;
        Ok(Self { sha256: Some(sha256), ..classifier })
    }

    /// Computes the features of images: (count, 64), at least 0.
    ///
    /// # Errors
    /// Returns an error if the images do not have the shape [`SHAPE`](Self::SHAPE), or if there is not enough memory.
    pub fn features(&self, images: &Images) -> Result<Tensor> {
        self.features_of_moved(images, &vec![(0, 0); images.len()])
    }

    /// Computes the [`features`](Self::features) of images that are first moved down and right by these numbers of
    /// pixels. The surroundings of an image are black. Training uses random moves.
    ///
    /// # Errors
    /// Returns the errors of [`features`](Self::features), and an error if there is not one move per image.
    pub fn features_of_moved(&self, images: &Images, moves: &[(isize, isize)]) -> Result<Tensor> {
        let found: (usize, usize, usize) = images.shape().into();
        if found != Self::SHAPE {
            let found = format!("{found:?}");
            let expected = format!("{:?}: the classifier is for grey digits", Self::SHAPE);
            return Err(Error::config("shape of the images", found, expected));
        }
        if moves.len() != images.len() {
            let expected = format!("{}, one per image", images.len());
            return Err(Error::config("moves.len()", moves.len(), expected));
        }
        let Some(mut patches) = reserved(&[images.len(), FIRST * FIRST, PATCH]) else {
            let expected = "small enough for the patches of all images to be in memory";
            return Err(Error::config("number of images", images.len(), expected));
        };
        for (image, by) in images.pixels().chunks_exact(SIZE * SIZE).zip(moves) {
            lay_out(image, *by, &mut patches);
        }
        let shape = (images.len() * FIRST * FIRST, PATCH);
        let patches = Tensor::from_vec(patches, shape, &self.device)?;
        let [first, others @ ..] = &self.convolutions;
        let maps = first.forward(&patches)?.relu()?;
        let mut maps = maps.reshape((images.len(), FIRST, FIRST, CHANNELS[1]))?;
        for convolution in others {
            maps = convolve(&maps, convolution)?.relu()?;
        }
        Ok(self.hidden.forward(&maps.flatten_from(1)?)?.relu()?)
    }

    /// Computes the logits of the classes from [`features`](Self::features): (count, 10).
    ///
    /// # Errors
    /// Returns an error if the features have another shape.
    pub fn logits(&self, features: &Tensor) -> Result<Tensor> {
        Ok(self.output.forward(features)?)
    }
}

impl Extractor for DigitClassifier {
    fn size(&self) -> usize {
        Self::FEATURES
    }

    fn identity(&self) -> ExtractorIdentity {
        let name = "classifier of digits, hidden layer";
        ExtractorIdentity { weights_sha256: self.sha256.clone(), ..ExtractorIdentity::new(name) }
    }

    fn extract(&self, images: &Images) -> Result<Features> {
        let mut all = Features::with_classes(Self::FEATURES, Classes::Logits(Self::CLASSES));
        if !images.is_empty() {
            let features = self.features(images)?.detach();
            let logits = self.logits(&features)?.flatten_all()?.to_vec1::<f32>()?;
            all.add_scored(&features.flatten_all()?.to_vec1::<f32>()?, &logits)?;
        }
        Ok(all)
    }
}

/// Adds the patches of the first convolution for an image that is moved down and right by some pixels.
fn lay_out(image: &[u8], (down, right): (isize, isize), patches: &mut Vec<f32>) {
    let pixel = |y: isize, x: isize| {
        let within = 0..SIZE as isize;
        let inside = within.contains(&y) && within.contains(&x);
        normalized(if inside { image[y as usize * SIZE + x as usize] } else { 0 })
    };
    for i in 0..(FIRST * FIRST) as isize {
        let (top, left) = (i / FIRST as isize * 2 - 1, i % FIRST as isize * 2 - 1);
        let (top, left) = (top.saturating_sub(down), left.saturating_sub(right));
        let at = |k: isize| pixel(top.saturating_add(k / 4), left.saturating_add(k % 4));
        patches.extend((0..PATCH as isize).map(at));
    }
}

/// Computes a convolution of 4 x 4 at stride 2 of maps (batch, height, width, channels). It is one product of all
/// patches, because the gradient of candle's `conv2d` is slow. A patch consists of 2 x 2 blocks of 2 x 2 pixels.
fn convolve(maps: &Tensor, weights: &Linear) -> candle_core::Result<Tensor> {
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
