use std::fmt::Debug;

use clap::ValueEnum;

use crate::error::Result;
use crate::model::{Architecture, LucidrainsConfig, UNet2DConfig, UNetConfig};
use crate::train::Checkpoint;

/// The name of a network that a program trains: `unet`, that of this crate, or `ho`, that of Ho et al.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(
    missing_docs,
    reason = "clap would print a list of documented variants instead of their names"
)]
pub enum NetworkName {
    Unet,
    Ho,
}

/// The configuration of a network that the programs train.
pub trait NetworkConfig: Architecture + Clone + Debug {
    /// The shape of the images: (channels, height, width).
    fn image_shape(&self) -> (usize, usize, usize);

    /// The number of classes, if the network has classes.
    fn classes(&self) -> Option<usize>;

    /// Sets the number of classes.
    fn set_classes(&mut self, classes: usize);

    /// Checks the configuration.
    ///
    /// # Errors
    /// Returns an error that names the first invalid field.
    fn validate(&self) -> Result<()>;
}

impl NetworkConfig for UNetConfig {
    fn image_shape(&self) -> (usize, usize, usize) {
        self.image_shape()
    }

    fn classes(&self) -> Option<usize> {
        self.classes
    }

    fn set_classes(&mut self, classes: usize) {
        self.classes = Some(classes);
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }
}

impl NetworkConfig for UNet2DConfig {
    fn image_shape(&self) -> (usize, usize, usize) {
        self.image_shape()
    }

    fn classes(&self) -> Option<usize> {
        self.classes()
    }

    fn set_classes(&mut self, classes: usize) {
        // Training hides classes, for which the last vector stands.
        self.num_class_embeds = Some(classes + 1);
        self.null_class = true;
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }
}

/// The configuration of a trained network.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Network {
    /// The U-Net of the crate.
    UNet(UNetConfig),
    /// The network of Ho et al.
    UNet2D(UNet2DConfig),
    /// The network of denoising-diffusion-pytorch.
    Lucidrains(LucidrainsConfig),
}

impl Network {
    /// The configuration of the network of a checkpoint.
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoint::architecture`], also if the network is of a kind that the programs do not
    /// know.
    pub(super) fn of(saved: &Checkpoint) -> Result<Self> {
        match saved.network_kind() {
            UNet2DConfig::KIND => saved.architecture().map(Self::UNet2D),
            LucidrainsConfig::KIND => saved.architecture().map(Self::Lucidrains),
            _ => saved.architecture().map(Self::UNet),
        }
    }

    /// The shape of the images: (channels, height, width).
    pub fn image_shape(&self) -> (usize, usize, usize) {
        match self {
            Self::UNet(config) => config.image_shape(),
            Self::UNet2D(config) => config.image_shape(),
            Self::Lucidrains(config) => config.image_shape(),
        }
    }

    /// Returns whether the network also outputs the variance.
    pub fn learns_variance(&self) -> bool {
        match self {
            Self::UNet(config) => config.learned_variance,
            Self::UNet2D(config) => config.learns_variance(),
            Self::Lucidrains(config) => config.learned_variance,
        }
    }

    /// The number of classes, if the network has classes.
    pub fn classes(&self) -> Option<usize> {
        match self {
            Self::UNet(config) => config.classes,
            Self::UNet2D(config) => config.classes(),
            Self::Lucidrains(_) => None,
        }
    }
}
