//! The Inception network of the Fréchet distance.

mod network;
mod resizing;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use self::network::{CLASSES, FEATURES, Network, SIZE};
pub use self::resizing::Resizing;
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

/// Images that are computed at once: their maps take about 220 MB. More images would save no time.
const GROUP: usize = 16;

/// The Inception network of published figures, an [`Extractor`] of 2,048 features and the logits of 1,008 classes.
///
/// The network is Inception v3 ([Szegedy et al. 2016](https://arxiv.org/abs/1512.00567)) as Google published it on 5
/// December 2015, and as pytorch-fid and torch-fidelity port it. Only distances of its features are called FID and KID.
/// It is not the network of the same name in torchvision:
///
/// - The average pooling does not count zeros beyond the edge.
/// - The last block has a maximum in place of the average pooling.
/// - It has 1,008 classes.
///
/// The features are the means of the last maps, at least 0. The logits lack the bias of the last layer, as those of the
/// original Inception Score (`logits_unbiased` in torch-fidelity).
///
/// Images are grey or RGB and have any size. Grey images have three equal channels for the network. The [`Resizing`] is
/// a part of every figure. The features of an image do not depend on the other images or on the number of threads. The
/// network is computed on the CPU, also if samples are drawn on a GPU.
pub struct Inception {
    network: Network,
    resizing: Resizing,
    sha256: Option<String>,
    /// Memory of feature maps, reused from call to call.
    pool: Arc<Pool>,
}

impl fmt::Debug for Inception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inception").field("identity", &self.identity()).finish_non_exhaustive()
    }
}

impl Inception {
    /// Loads the network from the file of pytorch-fid's weights, `pt_inception-2015-12-05-6726825d.pth`, or from a
    /// safetensors file with the same names, such as `Conv2d_1a_3x3.conv.weight`. No code of the file is run.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if it does not have exactly the weights of this network.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, sha256) = load(path, &Device::Cpu)?;
        Ok(Self { sha256: Some(sha256), ..Self::new(path, &tensors)? })
    }

    /// Sets the method of scaling, in place of that of pytorch-fid.
    #[must_use]
    pub fn with_resizing(self, resizing: Resizing) -> Self {
        Self { resizing, ..self }
    }

    /// Creates the network from weights by name, which were read from `path`.
    fn new(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        check_limit()?;
        let weights = Weights::new(path, tensors);
        let network = Network::new(&weights)?;
        weights.check_known()?;
        let resizing = Resizing::default();
        Ok(Self { network, resizing, sha256: None, pool: Arc::default() })
    }

    /// Computes the features and the logits of images.
    fn compute(&self, pixels: &[u8], shape: ImageShape, count: usize) -> Result<[Map; 2]> {
        self.pool.begin(count, false);
        let mut maps = Map::take(&self.pool, [count, SIZE, SIZE, 3])?;
        self.resizing.resize(pixels, shape, &mut maps.values);
        self.network.run(&self.pool, maps)
    }
}

impl Extractor for Inception {
    fn size(&self) -> usize {
        FEATURES
    }

    fn identity(&self) -> ExtractorIdentity {
        ExtractorIdentity {
            weights_sha256: self.sha256.clone(),
            resizing: Some(self.resizing.description().into()),
            ..ExtractorIdentity::new(
                "Inception v3 of 2015-12-05, 2048 features of the last pooling",
            )
        }
    }

    fn extract(&self, images: &Images) -> Result<Features> {
        groups::features(images, GROUP, [FEATURES, CLASSES], |pixels, shape, count| {
            self.compute(pixels, shape, count)
        })
    }
}
