//! From pictures to images: channels, crop and scale.

use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::{DynamicImage, Rgba};

use super::config::{Crop, Filter, FolderConfig};
use super::decode::{Reason, decode};
use crate::random::{Noise, Purpose};

/// A scaled picture: the image itself with [`Crop::Centre`], or what a random crop is taken from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scaled {
    pub width: u32,
    pub height: u32,
    /// Row by row, with the channels of a pixel together.
    pub pixels: Vec<u8>,
}

/// A rectangle of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    x: u32,
    y: u32,
    width: u32,
    height: u32,
}

impl Part {
    /// The part of this size around the centre of a picture. If the centre is half a pixel off, the part is nearer to
    /// the upper left.
    fn centred((width, height): (u32, u32), of: (u32, u32)) -> Self {
        Self { x: (of.0 - width) / 2, y: (of.1 - height) / 2, width, height }
    }
}

/// The steps from the content of a file to an image.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    pub config: FolderConfig,
    /// 1, 3 or 4.
    pub channels: u8,
}

impl Recipe {
    /// A text that is equal for recipes with the same settings of scaled pictures.
    pub fn identity(&self) -> String {
        let FolderConfig { height, width, background, crop, filter, .. } = &self.config;
        let size = (height, width, self.channels);
        format!("{size:?} {background:?} {crop:?} {filter:?}")
    }

    /// Decodes and scales a picture.
    pub fn scaled(&self, content: &[u8]) -> Result<Scaled, Reason> {
        let max_pixels = self.config.max_pixels;
        let image = decode(content, max_pixels)?;
        let size = (image.width(), image.height());
        let (part, to) = match self.config.crop {
            Crop::Centre => {
                let to = self.config.covered();
                (Part::centred(largest(to, size), size), to)
            }
            Crop::Random { .. } => {
                let whole = Part { x: 0, y: 0, width: size.0, height: size.1 };
                (whole, covering(self.config.covered(), size))
            }
        };
        // The picture between the two passes of scaling has fewer pixels than the larger of the two sizes.
        if u64::from(to.0) * u64::from(to.1) > max_pixels {
            let (width, height) = size;
            let to = format!("{} x {}", to.0, to.1);
            return Err(format!(
                "{width} x {height} pixels, scaled {to}; max_pixels is {max_pixels}"
            ));
        }
        let pixels = interleaved(image, self.channels, self.config.background)?;
        let pixels = self.resize(pixels, size, part, to)?;
        Ok(Scaled { width: to.0, height: to.1, pixels })
    }

    /// Returns whether a scaled picture has a size, and as many bytes, as this recipe can give.
    pub fn allows(&self, scaled: &Scaled) -> bool {
        let &Scaled { width, height, ref pixels } = scaled;
        let covered = self.config.covered();
        let count = u64::from(width) * u64::from(height);
        let fits = match self.config.crop {
            Crop::Centre => (width, height) == covered,
            Crop::Random { .. } => {
                width >= covered.0 && height >= covered.1 && count <= self.config.max_pixels
            }
        };
        fits && pixels.len() as u64 == count * u64::from(self.channels)
    }

    /// Writes the image (channels, height, width) of a scaled picture. `random` determines a random crop; `None` is the
    /// part around the centre.
    pub fn write(
        &self,
        scaled: &Scaled,
        random: Option<u64>,
        image: &mut [u8],
    ) -> Result<(), Reason> {
        let size = (scaled.width, scaled.height);
        let to = (self.config.width, self.config.height);
        let cut;
        let pixels = match self.part(size, random) {
            part if (part.width, part.height) == size && size == to => &scaled.pixels,
            part => {
                cut = self.resize(scaled.pixels.clone(), size, part, to)?;
                &cut
            }
        };
        let channels = usize::from(self.channels);
        for (channel, plane) in image.chunks_exact_mut(pixels.len() / channels).enumerate() {
            let values = pixels.iter().skip(channel).step_by(channels);
            plane.iter_mut().zip(values).for_each(|(to, from)| *to = *from);
        }
        Ok(())
    }

    /// The part of a scaled picture that becomes the image.
    fn part(&self, size: (u32, u32), random: Option<u64>) -> Part {
        let (FolderConfig { width, height, .. }, most) = (&self.config, self.config.covered());
        let (Crop::Random { .. }, Some(random)) = (self.config.crop, random) else {
            return Part::centred(most, size);
        };
        let mut stream = Noise::new(random).stream(Purpose::Augment, 0, 0);
        let zoom = stream.uniform();
        let between = |least: u32, most: u32| least + (zoom * f64::from(most - least + 1)) as u32;
        let (width, height) = (between(*width, most.0), between(*height, most.1));
        let (x, y) = (stream.below(size.0 - width + 1), stream.below(size.1 - height + 1));
        Part { x, y, width, height }
    }

    /// Scales a part of a picture. At the edges of the part the filter also reads the pixels beyond them.
    fn resize(
        &self,
        pixels: Vec<u8>,
        size: (u32, u32),
        Part { x, y, width, height }: Part,
        to: (u32, u32),
    ) -> Result<Vec<u8>, Reason> {
        let kind = match self.channels {
            1 => PixelType::U8,
            3 => PixelType::U8x3,
            _ => PixelType::U8x4,
        };
        let filter = match self.config.filter {
            Filter::Bicubic => FilterType::CatmullRom,
            Filter::Lanczos => FilterType::Lanczos3,
        };
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(filter))
            // Pixels are weighted by alpha, so that the colour of a transparent one does not bleed into its neighbours.
            // Weighting loses bits, so a part that is not scaled is only copied.
            .use_alpha(kind == PixelType::U8x4 && (width, height) != to)
            .crop(x.into(), y.into(), width.into(), height.into());
        let mut image = Image::new(to.0, to.1, kind);
        let source = Image::from_vec_u8(size.0, size.1, pixels, kind).map_err(|e| e.to_string())?;
        let resized = Resizer::new().resize(&source, &mut image, &options);
        resized.map_err(|e| e.to_string())?;
        Ok(image.into_vec())
    }
}

/// The largest size with the aspect ratio of `to` within a picture of size `of`.
fn largest(to: (u32, u32), of: (u32, u32)) -> (u32, u32) {
    if is_wider(of, to) {
        (scaled(of.1, to.0, to.1).clamp(1, of.0), of.1)
    } else {
        (of.0, scaled(of.0, to.1, to.0).clamp(1, of.1))
    }
}

/// The smallest size with the aspect ratio of `of` that covers `to`.
fn covering(to: (u32, u32), of: (u32, u32)) -> (u32, u32) {
    if is_wider(of, to) {
        (scaled(to.1, of.0, of.1).max(to.0), to.1)
    } else {
        (to.0, scaled(to.0, of.1, of.0).max(to.1))
    }
}

fn is_wider(a: (u32, u32), b: (u32, u32)) -> bool {
    u64::from(a.0) * u64::from(b.1) > u64::from(b.0) * u64::from(a.1)
}

/// `size * numerator / denominator`, rounded, and at most the largest `u32`.
fn scaled(size: u32, numerator: u32, denominator: u32) -> u32 {
    let (numerator, denominator) = (u64::from(numerator), u64::from(denominator));
    let value = (u64::from(size) * numerator + denominator / 2) / denominator;
    value.try_into().unwrap_or(u32::MAX)
}

/// The pixels of a picture with 1, 3 or 4 channels.
pub(super) fn interleaved(
    image: DynamicImage,
    channels: u8,
    background: [u8; 3],
) -> Result<Vec<u8>, Reason> {
    match (image, channels) {
        (DynamicImage::ImageLuma8(image), 1) => Ok(image.into_raw()),
        (DynamicImage::ImageRgb8(image), 3) => Ok(image.into_raw()),
        (DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_), _) => {
            Err("floating-point samples; 8 or 16 bits are supported".into())
        }
        (image, 4) => Ok(image.into_rgba8().into_raw()),
        (image, 3) => {
            let image = image.into_rgba8();
            Ok(image.pixels().flat_map(|pixel| over(pixel, background)).collect())
        }
        (image, _) => {
            let image = image.into_rgba8();
            Ok(image.pixels().map(|pixel| luma(over(pixel, background))).collect())
        }
    }
}

/// The colour of a transparent pixel over a background.
fn over(Rgba([r, g, b, alpha]): &Rgba<u8>, background: [u8; 3]) -> [u8; 3] {
    let alpha = u32::from(*alpha);
    let over = |value: u8, below: u8| {
        ((u32::from(value) * alpha + u32::from(below) * (255 - alpha) + 127) / 255) as u8
    };
    [over(*r, background[0]), over(*g, background[1]), over(*b, background[2])]
}

/// Luma by ITU-R BT.601, with factors in 65536ths.
fn luma([r, g, b]: [u8; 3]) -> u8 {
    let sum = 19595 * u32::from(r) + 38470 * u32::from(g) + 7471 * u32::from(b);
    ((sum + 0x8000) >> 16) as u8
}
