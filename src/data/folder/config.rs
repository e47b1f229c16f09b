use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The settings that determine the images of a [`Folder`](super::Folder), together with the files.
///
/// ```
/// use ddpm::data::folder::{Channels, Crop, FolderConfig};
///
/// let config = FolderConfig {
///     height: 48,
///     width: 64,
///     channels: Channels::Grey,
///     crop: Crop::Random { zoom: 1.25 },
///     ..FolderConfig::default()
/// };
/// config.validate()?;
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FolderConfig {
    /// Height of the images in pixels; at least 1.
    pub height: u32,
    /// Width of the images in pixels; at least 1.
    pub width: u32,
    /// The channels of the images.
    pub channels: Channels,
    /// The colour (red, green, blue) over which transparent pictures are laid. Not used with [`Channels::Rgba`].
    pub background: [u8; 3],
    /// The part of a picture that becomes the image.
    pub crop: Crop,
    /// The filter that scales pictures.
    pub filter: Filter,
    /// Whether the class of a picture is the sub-folder of the root in which it lies, at any depth. The classes are
    /// numbered in the order of the bytes of their names. A picture directly in the root is then an error, because it
    /// would have no class.
    pub classes: bool,
    /// The treatment of pictures that cannot be read.
    pub unreadable: Unreadable,
    /// Maximum number of pixels of a picture; from 1 to 2^40. A picture with more is unreadable. While a picture is
    /// decoded, up to about 24 bytes per pixel of this limit can be allocated on each thread, whatever a file claims.
    pub max_pixels: u64,
}

/// The channels of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Channels {
    /// [`Grey`](Self::Grey) if the header of every picture says that it has no colours, otherwise [`Rgb`](Self::Rgb).
    /// Palettes count as colours, and so does every GIF.
    Auto,
    /// One channel.
    Grey,
    /// Three channels: red, green and blue.
    Rgb,
    /// Four channels: red, green, blue and alpha. Alpha is 255 (opaque) in pictures without alpha.
    Rgba,
}

/// The part of a picture that becomes an image. The aspect ratio of the part is that of the image, up to rounding to
/// whole pixels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Crop {
    /// The largest part around the centre.
    Centre,
    /// A random part in training, and the largest part around the centre otherwise.
    ///
    /// A picture is first scaled so that it just covers `zoom` times the size of the images. The size of the part is
    /// drawn uniformly from those between the size of the images and `zoom` times this size, and its position from all
    /// positions. Then the part is scaled to the size of the images.
    Random {
        /// From 1 to 4. With 1, only the position along the longer side of a picture is random.
        zoom: f64,
    },
}

/// An antialiasing filter. Its support grows with the factor by which pictures are reduced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Filter {
    /// The cubic filter with a = -0.5 (Keys 1981), as Pillow's `BICUBIC`.
    Bicubic,
    /// Lanczos' filter of three lobes, as Pillow's `LANCZOS`. Sharper, with more ringing at edges.
    Lanczos,
}

/// The treatment of pictures that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Unreadable {
    /// Opening the folder returns an error that names them.
    Refuse,
    /// They are left out, and [listed](super::Folder::unreadable).
    Skip,
}

impl Default for FolderConfig {
    /// Images of 64 x 64 pixels from the centre of the pictures, grey or colour as the pictures are, over white,
    /// without classes. Unreadable pictures are refused, so that no data is missing unnoticed. Pictures have at most
    /// 2^27 (134 million) pixels.
    fn default() -> Self {
        Self {
            height: 64,
            width: 64,
            channels: Channels::Auto,
            background: [255; 3],
            crop: Crop::Centre,
            filter: Filter::Bicubic,
            classes: false,
            unreadable: Unreadable::Refuse,
            max_pixels: 1 << 27,
        }
    }
}

impl FolderConfig {
    /// Checks the configuration. [`Folder::open`](super::Folder::open) calls this.
    ///
    /// # Errors
    /// Returns an error that names the first invalid field, its value and the allowed values.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("height", self.height.into()),
            ("width", self.width.into()),
            ("max_pixels", self.max_pixels),
        ] {
            if value == 0 {
                return Err(Error::config(field, value, "at least 1"));
            }
        }
        if self.max_pixels > 1 << 40 {
            return Err(Error::config("max_pixels", self.max_pixels, "at most 2^40"));
        }
        if let Crop::Random { zoom } = self.crop
            && !(1.0..=4.0).contains(&zoom)
        {
            return Err(Error::config("zoom", zoom, "from 1 to 4"));
        }
        let (width, height) = self.covered();
        if u64::from(width) * u64::from(height) > self.max_pixels {
            let value = format!("{} x {}", self.height, self.width);
            let expected =
                format!("small enough for max_pixels, {}, after a zoom", self.max_pixels);
            return Err(Error::config("height x width", value, expected));
        }
        Ok(())
    }

    /// The size (width, height) that a scaled picture covers before it is cropped.
    pub(super) fn covered(&self) -> (u32, u32) {
        match self.crop {
            Crop::Centre => (self.width, self.height),
            Crop::Random { zoom } => {
                let zoomed = |size| (f64::from(size) * zoom).ceil() as u32;
                (zoomed(self.width), zoomed(self.height))
            }
        }
    }
}
