use crate::model::{UNet2DConfig, UNetConfig};

/// The configuration of a network that the programs know.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Network {
    /// The U-Net of the crate.
    UNet(UNetConfig),
    /// The network of Ho et al.
    UNet2D(UNet2DConfig),
}

impl Network {
    /// The shape of the images: (channels, height, width).
    pub fn image_shape(&self) -> (usize, usize, usize) {
        match self {
            Self::UNet(config) => config.image_shape(),
            Self::UNet2D(config) => config.image_shape(),
        }
    }

    /// The number of classes, if the network has classes.
    pub fn classes(&self) -> Option<usize> {
        match self {
            Self::UNet(config) => config.classes,
            Self::UNet2D(config) => config.classes(),
        }
    }
}
