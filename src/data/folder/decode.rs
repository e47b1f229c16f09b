//! Decoding of pictures, whose content is not trusted.

use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::scan::format_of;
use crate::error::in_short;

/// The reason why a picture cannot be read.
pub(super) type Reason = String;

/// Bytes per pixel of the largest samples: four channels of 16 bits.
const BYTES_PER_PIXEL: u64 = 8;

/// Reads a file of at most the size that a picture of `max_pixels` has uncompressed.
pub(super) fn content(path: &Path, max_pixels: u64) -> Result<Vec<u8>, Reason> {
    let limit = max_pixels.saturating_mul(BYTES_PER_PIXEL).saturating_add(1 << 20);
    let file = File::open(path).map_err(|e| e.to_string())?;
    let data = file.metadata().map_err(|e| e.to_string())?;
    let too_long =
        || format!("more than {limit} bytes, the most of a picture of {max_pixels} pixels");
    if !data.is_file() {
        return Err("not a regular file".into());
    }
    if data.len() > limit {
        return Err(too_long());
    }
    let mut content = Vec::new();
    content.try_reserve_exact(data.len() as usize).map_err(|e| e.to_string())?;
    file.take(limit + 1).read_to_end(&mut content).map_err(|e| e.to_string())?;
    // The file can grow in the meantime.
    if content.len() as u64 > limit { Err(too_long()) } else { Ok(content) }
}

/// Returns whether the header of a picture says that it has no colours.
pub(super) fn is_grey(content: &[u8], max_pixels: u64) -> Result<bool, Reason> {
    caught(|| Ok(!decoder(content, max_pixels)?.color_type().has_color()))
}

/// Decodes a picture, and turns it as its EXIF orientation says.
pub(super) fn decode(content: &[u8], max_pixels: u64) -> Result<DynamicImage, Reason> {
    caught(|| decode_unguarded(content, max_pixels))
}

/// Turns a panic of a decoder into a reason: decoders are not written here, and content is not trusted.
fn caught<T>(f: impl FnOnce() -> Result<T, Reason>) -> Result<T, Reason> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| Err("its decoder panicked".into()))
}

fn decode_unguarded(content: &[u8], max_pixels: u64) -> Result<DynamicImage, Reason> {
    let mut decoder = decoder(content, max_pixels)?;
    // The decoder takes missing data of a JPEG file as grey.
    if format_of(content) == Some(ImageFormat::Jpeg) && !is_complete_jpeg(content) {
        return Err("truncated: it has no end-of-image marker".into());
    }
    let orientation = decoder.orientation().map_err(reason)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(reason)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Reads the header. Nothing in the order of its claims is allocated.
fn decoder(content: &[u8], max_pixels: u64) -> Result<impl ImageDecoder + '_, Reason> {
    let Some(format) = format_of(content) else {
        return Err("its content is none of PNG, JPEG, WebP, GIF, BMP, TIFF".into());
    };
    let mut reader = ImageReader::with_format(Cursor::new(content), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(max_pixels.saturating_mul(BYTES_PER_PIXEL));
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(reason)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(format!("it has {width} x {height} pixels"));
    }
    if u64::from(width) * u64::from(height) > max_pixels {
        return Err(format!("{width} x {height} pixels; max_pixels is {max_pixels}"));
    }
    Ok(decoder)
}

fn reason(error: image::ImageError) -> Reason {
    in_short(&error.to_string())
}

/// Returns whether a JPEG file has the marker at its end. ITU-T T.81, annex B.
fn is_complete_jpeg(content: &[u8]) -> bool {
    const START_OF_IMAGE: u8 = 0xd8;
    const END_OF_IMAGE: u8 = 0xd9;
    const RESTART: std::ops::RangeInclusive<u8> = 0xd0..=0xd7;

    let mut at = 0;
    while let Some(offset) = content[at..].iter().position(|&byte| byte == 0xff) {
        let marker = at + offset + 1;
        match content.get(marker) {
            None => return false,
            Some(&END_OF_IMAGE) => return true,
            // A fill byte may precede a marker.
            Some(0xff) => at = marker,
            // In compressed data, a zero follows each byte 0xff that is no marker.
            Some(0 | 1 | &START_OF_IMAGE) => at = marker + 1,
            Some(code) if RESTART.contains(code) => at = marker + 1,
            // The segment's length includes the two bytes of the length. Segments may hold other pictures.
            Some(_) => match content.get(marker + 1..marker + 3) {
                Some(&[high, low]) => {
                    at = marker + 1 + usize::from(u16::from_be_bytes([high, low]))
                }
                _ => return false,
            },
        }
        if at > content.len() {
            return false;
        }
    }
    false
}
