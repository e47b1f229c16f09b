//! Single pictures and masks.

use std::path::Path;

use super::config::{Channels, FolderConfig};
use super::decode;
use super::recipe::{Recipe, interleaved};
use crate::data::images::Images;
use crate::error::{Error, Result};

/// The smallest grey value that is white in a mask.
const WHITE: u8 = 128;

/// Reads one picture as an image. The picture is decoded, rotated, cropped around its centre and scaled like the
/// pictures of a [`Folder`](super::Folder).
///
/// # Errors
/// Returns an error if the configuration is not valid, or if the picture cannot be read.
pub fn read_picture(path: impl AsRef<Path>, config: &FolderConfig) -> Result<Images> {
    let path = path.as_ref();
    config.validate()?;
    let data = |reason| Error::data(path, reason);
    let content = decode::content(path, config.max_pixels).map_err(data)?;
    let channels = match config.channels {
        Channels::Auto if decode::is_grey(&content, config.max_pixels).map_err(data)? => 1,
        Channels::Grey => 1,
        Channels::Auto | Channels::Rgb => 3,
        Channels::Rgba => 4,
    };
    let recipe = Recipe { config: config.clone(), channels };
    let scaled = recipe.scaled(&content).map_err(data)?;
    let shape = (usize::from(channels), config.height as usize, config.width as usize);
    let mut pixels = vec![0; shape.0 * shape.1 * shape.2];
    recipe.write(&scaled, None, &mut pixels).map_err(data)?;
    Images::new(pixels, shape)
}

/// Reads a mask: a grey or coloured picture of exactly this height and width. Returns, row by row, whether each pixel
/// is white. A white pixel has a grey value of at least 128. Transparent pixels are composited over black.
///
/// # Errors
/// Returns an error if the picture cannot be read, or if it has another size.
pub fn read_mask(path: impl AsRef<Path>, height: usize, width: usize) -> Result<Vec<bool>> {
    let path = path.as_ref();
    let data = |reason| Error::data(path, reason);
    let max_pixels = FolderConfig::default().max_pixels;
    let content = decode::content(path, max_pixels).map_err(data)?;
    let picture = decode::decode(&content, max_pixels).map_err(data)?;
    let found = (picture.height() as usize, picture.width() as usize);
    if found != (height, width) {
        let (h, w) = found;
        return Err(data(format!(
            "{h} x {w} pixels (height x width); a mask has {height} x {width}"
        )));
    }
    let grey = interleaved(picture, 1, [0; 3]).map_err(data)?;
    Ok(grey.into_iter().map(|value| value >= WHITE).collect())
}
