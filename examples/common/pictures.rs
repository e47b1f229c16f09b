//! Grids of images, as a PNG or as the frames of a GIF.

use std::io::Cursor;

use candle_core::{DType, Tensor};
use image::codecs::gif::{GifEncoder, Repeat};
use image::{Delay, DynamicImage, Frame, ImageFormat, Rgb, RgbImage};

use super::cli::Result;

/// Pixels between two images.
const GAP: usize = 2;
const GAP_GREY: u8 = 64;

/// Images are enlarged to about this many pixels: 28 and 32 to twice their size.
const VISIBLE: usize = 64;

/// At most this many frames show the denoising.
const FRAMES: usize = 48;
const FRAME_MS: u32 = 70;
const LAST_FRAME_MS: u32 = 2000;

/// Whether pictures of so many channels can be shown.
pub fn check_channels(channels: usize) -> Result<()> {
    if !matches!(channels, 1 | 3) {
        let expected = "1 (grey) or 3 (colour) can be shown";
        return Err(format!("the network's images have {channels} channels; {expected}").into());
    }
    Ok(())
}

/// The pixels of images in [-1, 1] as files have them.
pub fn bytes(images: &Tensor) -> Result<Vec<u8>> {
    let pixels: Vec<f32> = images.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    // `as` saturates.
    Ok(pixels.into_iter().map(|p| ((p + 1.0) * 127.5).round() as u8).collect())
}

/// Images of `shape` (channels, height, width), in rows of equal length.
pub fn grid(pixels: &[u8], shape: (usize, usize, usize)) -> Result<DynamicImage> {
    let (channels, height, width) = shape;
    check_channels(channels)?;
    let count = pixels.len() / (channels * height * width);
    let scale = (VISIBLE / height.max(width)).clamp(1, 8);
    let columns = (1..=count).find(|c| c * c >= count).unwrap_or(1);
    let (cell_h, cell_w) = (height * scale + GAP, width * scale + GAP);

    let (total_w, total_h) = (columns * cell_w + GAP, count.div_ceil(columns) * cell_h + GAP);
    let mut picture = RgbImage::from_pixel(total_w as u32, total_h as u32, Rgb([GAP_GREY; 3]));
    for (k, image) in pixels.chunks_exact(channels * height * width).enumerate() {
        let (left, top) = (GAP + k % columns * cell_w, GAP + k / columns * cell_h);
        for y in 0..height * scale {
            for x in 0..width * scale {
                let place = y / scale * width + x / scale;
                // A grey image's only channel is all three colours.
                let byte = |c: usize| image[c % channels * height * width + place];
                let at = ((left + x) as u32, (top + y) as u32);
                picture.put_pixel(at.0, at.1, Rgb([byte(0), byte(1), byte(2)]));
            }
        }
    }
    Ok(if channels == 1 { DynamicImage::from(picture).into_luma8().into() } else { picture.into() })
}

pub fn png(picture: &DynamicImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(vec![]);
    picture.write_to(&mut bytes, ImageFormat::Png)?;
    Ok(bytes.into_inner())
}

/// Whether step `index` of `total` has a frame: all, or as many as are enough, evenly; the last
/// one always.
pub fn has_frame(index: usize, total: usize) -> bool {
    total <= FRAMES || (index + 1) * FRAMES / total > index * FRAMES / total
}

/// A GIF that begins again after some time on its last frame. Grey stays as it is; of colours, the
/// 256 that suit a frame best are used.
pub fn gif(frames: Vec<DynamicImage>) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    let mut encoder = GifEncoder::new_with_speed(&mut bytes, 10);
    encoder.set_repeat(Repeat::Infinite)?;
    let last = frames.len().saturating_sub(1);
    for (i, frame) in frames.into_iter().enumerate() {
        let delay = if i == last { LAST_FRAME_MS } else { FRAME_MS };
        let delay = Delay::from_numer_denom_ms(delay, 1);
        encoder.encode_frame(Frame::from_parts(frame.into_rgba8(), 0, 0, delay))?;
    }
    drop(encoder);
    Ok(bytes)
}
