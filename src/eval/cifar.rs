use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use super::extractor::{Extractor, ExtractorIdentity};
use super::features::{Classes, Features};
use super::weights;
use crate::data::dataset::Dataset;
use crate::data::images::Images;
use crate::data::loader::Batch;
use crate::denoiser::Denoiser;
use crate::engine::{Engine, Graph, Model};
use crate::error::{Error, Result};
use crate::kernels::op::activation::{Activation, VectorActivation};
use crate::kernels::op::conv::Add;
use crate::layers::{Conv2d, GroupNorm, Linear};
use crate::model::Parameters;
use crate::precision::Precision;

/// Channels of the maps of 32, 16, 8 and 4 pixels.
const CHANNELS: [usize; 4] = [32, 64, 192, 256];

/// A classifier of the pictures of CIFAR-10, an [`Extractor`] of 256 features and the logits of 10 classes.
///
/// It is a residual network of ten convolutions of 3 x 3. Group normalisation and SiLU precede each convolution except
/// the first, and each halving of the size. The features are the means of its last maps. Features and logits are means over
/// an image and its mirror image. Images are in colour, 32 x 32 pixels. The example `cifar10-classifier` trains it. Its figures are not comparable with those of Inception, nor with
/// those of other weights.
#[derive(Debug, Clone)]
pub struct CifarClassifier {
    model: Model<CifarNetwork>,
    device: Device,
    sha256: Option<String>,
}

impl CifarClassifier {
    /// The shape of an image: channels, height, width.
    pub const SHAPE: (usize, usize, usize) = (3, 32, 32);
    /// The number of classes.
    pub const CLASSES: usize = 10;
    /// The number of features of an image.
    pub const FEATURES: usize = CHANNELS[3];

    /// Creates the classifier from weights in f32.
    ///
    /// # Errors
    /// Returns the errors of the builder.
    pub fn new(vb: VarBuilder<'_>) -> Result<Self> {
        let model = Model::new(CifarNetwork::new(&vb)?)?;
        Ok(Self { model, device: vb.device().clone(), sha256: None })
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
            .map_err(|e| Error::data(path, format!("not a classifier of CIFAR-10: {e}")))?;
        Ok(Self { sha256: Some(sha256), ..classifier })
    }

    /// Sets the precision of products.
    ///
    /// # Errors
    /// Returns an error if this build or the device does not support the precision.
    pub fn with_precision(self, precision: Precision) -> Result<Self> {
        Ok(Self { model: self.model.with_precision(precision)?, ..self })
    }

    /// The network, which can be trained like any other [`Model`]. Its input is images (batch, 3, 32, 32) in [-1, 1],
    /// and its output is (batch, 266, 1, 1): 10 logits, then 256 features. The output does not depend on the
    /// timesteps.
    pub fn model(&self) -> &Model<CifarNetwork> {
        &self.model
    }
}

impl Extractor for CifarClassifier {
    fn size(&self) -> usize {
        Self::FEATURES
    }

    fn identity(&self) -> ExtractorIdentity {
        let name = "classifier of CIFAR-10, means of the last maps";
        ExtractorIdentity { weights_sha256: self.sha256.clone(), ..ExtractorIdentity::new(name) }
    }

    fn extract(&self, images: &Images) -> Result<Features> {
        let mut all = Features::with_classes(Self::FEATURES, Classes::Logits(Self::CLASSES));
        if images.is_empty() {
            return Ok(all);
        }
        let x = Batch::read(images, 0..images.len(), &self.device)?.images;
        let t = Tensor::zeros(images.len(), DType::U32, &self.device)?;
        let output = |x: &Tensor| -> Result<Tensor> {
            Ok(self.model.forward(x, &t)?.detach().flatten_from(1)?)
        };
        let output = ((output(&x)? + output(&x.flip(&[3])?)?)? * 0.5)?;
        let values = |first, count| output.narrow(1, first, count)?.flatten_all()?.to_vec1::<f32>();
        all.add_scored(&values(Self::CLASSES, Self::FEATURES)?, &values(0, Self::CLASSES)?)?;
        Ok(all)
    }
}

/// The network of [`CifarClassifier`].
#[derive(Debug, Clone)]
pub struct CifarNetwork {
    input: Conv2d,
    stages: Vec<Stage>,
    norm: GroupNorm,
    output: Linear,
}

impl CifarNetwork {
    fn new(vb: &VarBuilder<'_>) -> Result<Self> {
        let stage =
            |i: usize| Stage::new(CHANNELS[i - 1], CHANNELS[i], &vb.pp(format!("stage{i}")));
        Ok(Self {
            input: Conv2d::new(CifarClassifier::SHAPE.0, CHANNELS[0], 3, vb.pp("input"))?,
            stages: (1..CHANNELS.len()).map(stage).collect::<Result<_>>()?,
            norm: GroupNorm::new(CHANNELS[3], Activation::Silu, vb.pp("norm"))?,
            output: Linear::new(CHANNELS[3], CifarClassifier::CLASSES, vb.pp("output"))?,
        })
    }
}

impl Graph for CifarNetwork {
    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map) -> Result<E::Map> {
        let mut x = engine.conv(&self.input, x)?;
        for stage in &self.stages {
            x = stage.run(engine, &x)?;
        }
        // Two halvings of 4 x 4 pixels compute their mean.
        let features = engine.pool(&engine.pool(&engine.norm(&self.norm, &x)?)?)?;
        let logits = engine.linear(VectorActivation::None, &self.output, &features)?;
        engine.concatenate(&logits, &features)
    }

    fn check_images(&self, channels: usize, height: usize, width: usize) -> Result<()> {
        let (c, h, w) = CifarClassifier::SHAPE;
        if (channels, height, width) == (c, h, w) {
            return Ok(());
        }
        Err(Error::shape(
            "the images",
            [channels, height, width],
            format!("(batch, {c}, {h}, {w})"),
        ))
    }
}

/// A convolution to more channels, a normalisation with SiLU, the halving of the size, and a residual block.
#[derive(Debug, Clone)]
struct Stage {
    wider: Layer,
    norm: GroupNorm,
    first: Layer,
    second: Layer,
}

impl Stage {
    fn new(input: usize, output: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            wider: Layer::new(input, output, &vb.pp("wider"))?,
            norm: GroupNorm::new(output, Activation::Silu, vb.pp("norm"))?,
            first: Layer::new(output, output, &vb.pp("first"))?,
            second: Layer::new(output, output, &vb.pp("second"))?,
        })
    }

    fn run<'n, E: Engine<'n>>(&'n self, engine: &E, x: &E::Map) -> Result<E::Map> {
        let Self { wider, norm, first, second } = self;
        let x = engine.norm_conv(&wider.norm, &wider.conv, x)?;
        // Without the activation, convolution and mean would be one linear function.
        let x = engine.pool(&engine.norm(norm, &x)?)?;
        let h = engine.norm_conv(&first.norm, &first.conv, &x)?;
        engine.norm_conv_add(&second.norm, &second.conv, &h, Add::residual(&x))
    }
}

/// A normalisation, SiLU, and a convolution.
#[derive(Debug, Clone)]
struct Layer {
    norm: GroupNorm,
    conv: Conv2d,
}

impl Layer {
    fn new(input: usize, output: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            norm: GroupNorm::new(input, Activation::Silu, vb.pp("norm"))?,
            conv: Conv2d::new(input, output, 3, vb.pp("conv"))?,
        })
    }
}
