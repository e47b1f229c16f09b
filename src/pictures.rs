//! Samples as pictures: grids as PNG files, and animations of grids as GIF files. Requires the feature `image`.
//!
//! ```
//! use candle_core::Device;
//! use ddpm::{Sampler, pictures};
//!
//! # let temp = tempfile::tempdir().unwrap();
//! # let path = temp.path().join("noise.png");
//! // Any batch can be drawn, for example the noise from which sampling starts.
//! let noise = Sampler::prior((16, 1, 28, 28), 0, &Device::Cpu)?;
//! pictures::save(&noise, &path)?;
//! assert!(path.is_file());
//! # Ok::<(), ddpm::Error>(())
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::Path;

use candle_core::Tensor;
use gif::{DisposalMethod, Encoder, Frame, Repeat};
use image::{DynamicImage, GrayAlphaImage, GrayImage, ImageFormat, RgbImage, Rgba, RgbaImage};

use crate::error::{Error, Result};
pub use crate::eval::bytes;
use crate::files;
use crate::memory::filled;

/// Width in pixels of the gaps between and around the images of a grid.
const GAP: usize = 2;
const GAP_GREY: u8 = 64;

/// The size in pixels up to which images are enlarged: images of 28 or 32 pixels to twice their size.
const VISIBLE: usize = 64;

/// The delay of a frame in hundredths of a second, the unit of GIF.
const FRAME_DELAY: u16 = 7;
const LAST_FRAME_DELAY: u16 = 200;

/// The speed of the colour selection for a GIF, from 1 (uses all pixels) to 30 (coarsest).
const QUANTISER_SPEED: i32 = 10;

/// Draws samples as a [`grid`] into a PNG file, and creates its directory if necessary.
///
/// The file is written beside `path`, flushed to disk and renamed. If this fails, for example on a full disk, an
/// earlier picture at `path` is kept.
///
/// # Errors
/// Returns the errors of [`grid`], and an error if `path` does not end in `.png` or if the file cannot be written.
pub fn save(samples: &Tensor, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    if !path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) {
        return Err(Error::config("path", path.display(), "a file name that ends in .png"));
    }
    let picture = png(&grid(samples)?)?;
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    files::write(path, &picture)
}

/// Draws a batch of samples (count, channels, height, width) in [-1, 1] as a grid. 1 channel is grey, 2 are grey and
/// alpha, 3 are red, green and blue, and 4 are red, green, blue and alpha. The grid is as nearly square as possible,
/// with opaque gaps. Small images are enlarged by integer factors, up to 64 pixels.
///
/// # Errors
/// Returns an error if the tensor has another shape, if there are not 1 to 4 channels, if a value is not finite,
/// or if there is not enough memory.
pub fn grid(samples: &Tensor) -> Result<DynamicImage> {
    match samples.dims() {
        &[_, channels @ 1..=4, height, width] if samples.elem_count() > 0 => {
            grid_of(&bytes(samples)?, (channels, height, width))
        }
        found => {
            let expected = "(count, 1 to 4 channels, height, width), each at least 1";
            Err(Error::shape("samples", found, expected))
        }
    }
}

/// Draws a [`grid`] of images of `shape` (channels, height, width) from their [`bytes`].
///
/// # Errors
/// Returns an error if there are not 1 to 4 channels, if the length of `pixels` is not a positive multiple of
/// channels x height x width, or if there is not enough memory.
pub fn grid_of(pixels: &[u8], shape: (usize, usize, usize)) -> Result<DynamicImage> {
    let (channels, height, width) = shape;
    check_channels(channels)?;
    let size = [height, width].into_iter().try_fold(channels, usize::checked_mul);
    let size = size.filter(|&size| size > 0).ok_or_else(|| {
        let expected = "three dimensions of at least 1, whose product fits in memory";
        Error::config("shape", format!("{shape:?}"), expected)
    })?;
    if pixels.is_empty() || !pixels.len().is_multiple_of(size) {
        let expected = format!("a positive multiple of {size}, the pixels of an image");
        return Err(Error::config("pixels.len()", pixels.len(), expected));
    }

    let count = pixels.len() / size;
    let columns = (1..=count).find(|c| c * c >= count).unwrap_or(1);
    let scale = (VISIBLE / height.max(width)).clamp(1, 8);
    let (cell_h, cell_w) = (height * scale + GAP, width * scale + GAP);
    let (total_h, total_w) = (count.div_ceil(columns) * cell_h + GAP, columns * cell_w + GAP);
    let mut picture = grey(total_h, total_w, channels)?;
    for (k, image) in pixels.chunks_exact(size).enumerate() {
        let (top, left) = (GAP + k / columns * cell_h, GAP + k % columns * cell_w);
        for y in 0..height * scale {
            let row = ((top + y) * total_w + left) * channels;
            for (x, pixel) in
                picture[row..].chunks_exact_mut(channels).take(width * scale).enumerate()
            {
                for (c, byte) in pixel.iter_mut().enumerate() {
                    *byte = image[(c * height + y / scale) * width + x / scale];
                }
            }
        }
    }
    let (h, w) = (total_h as u32, total_w as u32);
    picture_of(channels, w, h, picture).ok_or_else(|| too_large(total_h, total_w))
}

/// Writes each image of `shape` (channels, height, width) as a PNG file in its own size: `000042.png` for number 42. The
/// first image has number `first`. The directory is created if it does not exist. `pixels` are the [`bytes`].
///
/// # Errors
/// Returns an error if there are not 1 to 4 channels, if the length of `pixels` is not a multiple of channels x
/// height x width, or if a file cannot be written.
pub fn save_each(
    dir: impl AsRef<Path>,
    first: usize,
    pixels: &[u8],
    shape: (usize, usize, usize),
) -> Result<()> {
    let dir = dir.as_ref();
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let size = shape.0.saturating_mul(shape.1).saturating_mul(shape.2).max(1);
    for (number, pixels) in (first..).zip(pixels.chunks(size)) {
        files::write(dir.join(format!("{number:06}.png")), &png(&image_of(pixels, shape)?)?)?;
    }
    Ok(())
}

/// Draws one image of `shape` (channels, height, width) from its [`bytes`], in its own size.
///
/// # Errors
/// Returns an error if there are not 1 to 4 channels, or if the length of `pixels` is not channels x height x
/// width.
fn image_of(pixels: &[u8], shape: (usize, usize, usize)) -> Result<DynamicImage> {
    let (channels, height, width) = shape;
    check_channels(channels)?;
    let area =
        height.checked_mul(width).filter(|area| area.checked_mul(channels) == Some(pixels.len()));
    let Some(area) = area.filter(|&area| area > 0) else {
        let expected = format!("the values of an image of shape {shape:?}");
        return Err(Error::config("pixels.len()", pixels.len(), expected));
    };
    let mixed = (0..pixels.len()).map(|i| pixels[i % channels * area + i / channels]).collect();
    let (h, w) = (height as u32, width as u32);
    picture_of(channels, w, h, mixed).ok_or_else(|| too_large(height, width))
}

/// Creates the picture with these bytes. The channels of a pixel are adjacent.
fn picture_of(channels: usize, width: u32, height: u32, bytes: Vec<u8>) -> Option<DynamicImage> {
    match channels {
        1 => GrayImage::from_raw(width, height, bytes).map(DynamicImage::from),
        2 => GrayAlphaImage::from_raw(width, height, bytes).map(DynamicImage::from),
        3 => RgbImage::from_raw(width, height, bytes).map(DynamicImage::from),
        _ => RgbaImage::from_raw(width, height, bytes).map(DynamicImage::from),
    }
}

/// Returns an error if images with this number of channels cannot be drawn. A program calls this before long work.
///
/// # Errors
/// Returns an error if there are not 1 to 4 channels.
pub fn check_channels(channels: usize) -> Result<()> {
    match channels {
        1..=4 => Ok(()),
        _ => {
            let expected =
                "1 (grey), 2 (grey and alpha), 3 (colour) or 4 (colour and alpha) to be drawn";
            Err(Error::config("channels", channels, expected))
        }
    }
}

/// Returns whether the last channel is alpha, as in PNG files.
fn has_alpha(channels: usize) -> bool {
    matches!(channels, 2 | 4)
}

/// Creates the background of a picture, which is opaque.
fn grey(height: usize, width: usize, channels: usize) -> Result<Vec<u8>> {
    let fits = height.max(width) <= u32::MAX as usize;
    let picture = fits.then(|| filled(&[channels, height, width], GAP_GREY)).flatten();
    let mut picture = picture.ok_or_else(|| too_large(height, width))?;
    if has_alpha(channels) {
        picture.iter_mut().skip(channels - 1).step_by(channels).for_each(|alpha| *alpha = 255);
    }
    Ok(picture)
}

fn too_large(height: usize, width: usize) -> Error {
    let expected = "small enough for the available memory; draw fewer samples";
    Error::config("picture", format!("{height} x {width} pixels"), expected)
}

/// Encodes a picture as the content of a PNG file.
///
/// # Errors
/// Returns an error if there is not enough memory.
pub fn png(picture: &DynamicImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(vec![]);
    picture.write_to(&mut bytes, ImageFormat::Png).map_err(Error::external)?;
    Ok(bytes.into_inner())
}

/// Encodes pictures of one size as the content of a GIF file. The animation repeats forever, and shows each picture for
/// 70 ms and the last one for two seconds. Grey pictures are exact. Each coloured picture is reduced to 256 colours.
/// Transparent pictures are composited over white, because a pixel of a GIF is either opaque or invisible.
///
/// # Errors
/// Returns an error if there is no picture, if the pictures differ in size, or if their width or height is more than
/// 65,535 pixels.
pub fn gif(pictures: &[DynamicImage]) -> Result<Vec<u8>> {
    let Some(first) = pictures.first() else {
        return Err(Error::config("pictures.len()", 0, "at least 1"));
    };
    let size = (first.width(), first.height());
    let (Ok(width @ 1..), Ok(height @ 1..)) = (u16::try_from(size.0), u16::try_from(size.1)) else {
        let expected = "from 1 to 65,535 pixels either way";
        return Err(Error::config("size of an animation", format!("{size:?}"), expected));
    };
    if let Some(other) = pictures.iter().find(|p| (p.width(), p.height()) != size) {
        let other = format!("({}, {})", other.width(), other.height());
        let expected = format!("{size:?}, that of the first picture");
        return Err(Error::config("size of a picture", other, expected));
    }

    // The palette of the file is that of its first frame, which all grey frames share. If the file's palette were
    // empty, Pillow would use it for frames whose own palette is all greys in order.
    let mut frames = pictures.iter().map(|picture| frame(picture, width, height)).peekable();
    let palette = frames.peek().and_then(|frame| frame.palette.clone()).unwrap_or_default();
    let mut encoder = Encoder::new(vec![], width, height, &palette).map_err(Error::external)?;
    encoder.set_repeat(Repeat::Infinite).map_err(Error::external)?;
    while let Some(mut frame) = frames.next() {
        frame.delay = if frames.peek().is_some() { FRAME_DELAY } else { LAST_FRAME_DELAY };
        frame.palette = frame.palette.filter(|own| *own != palette);
        encoder.write_frame(&frame).map_err(Error::external)?;
    }
    encoder.into_inner().map_err(Error::external)
}

/// Converts a picture to a frame with its own palette.
fn frame(picture: &DynamicImage, width: u16, height: u16) -> Frame<'static> {
    let mut frame = match picture {
        DynamicImage::ImageLuma8(grey) => {
            let ramp: Vec<u8> = (0..=255).flat_map(|grey| [grey; 3]).collect();
            Frame::from_palette_pixels(width, height, grey.as_raw().as_slice(), ramp, None)
        }
        other => {
            let pixels = match other.color().has_alpha() {
                true => over_white(&other.to_rgba8()),
                false => other.to_rgb8().into_raw(),
            };
            Frame::from_rgb_speed(width, height, &pixels, QUANTISER_SPEED)
        }
    };
    frame.dispose = DisposalMethod::Background;
    frame
}

/// Composites a transparent picture over white.
fn over_white(picture: &RgbaImage) -> Vec<u8> {
    let over = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    let pixels = picture.pixels().map(|Rgba([r, g, b, alpha])| [r, g, b].map(|v| over(*v, *alpha)));
    pixels.flatten().collect()
}

/// Collects the frames of an animation of the denoising, for images that may be drawn in parts.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ddpm::nn::from_fn;
/// use ddpm::{Diffusion, Sampler, Solver, pictures};
///
/// # let denoiser = from_fn(|x_t: &Tensor, _t: &Tensor| Ok(x_t.clone()));
/// let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 100)?;
/// let mut frames = pictures::Frames::new(sampler.timesteps().len());
/// for step in sampler.steps(&denoiser, (4, 1, 8, 8), 0, &Device::Cpu)? {
///     let step = step?;
///     frames.add(step.index, &step.x)?;
/// }
/// let gif = frames.gif((1, 8, 8))?; // the content of a GIF file
/// # assert!(gif.starts_with(b"GIF89a"));
/// # Ok::<(), ddpm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Frames {
    steps: usize,
    /// The pixels of each frame, by the index of its sampling step.
    pixels: BTreeMap<usize, Vec<u8>>,
}

impl Frames {
    /// Maximum number of frames of an animation. If there are more sampling steps, evenly spaced ones are shown.
    pub const MOST: usize = 48;

    /// Creates an animation of `steps` sampling steps.
    pub fn new(steps: usize) -> Self {
        Self { steps, pixels: BTreeMap::new() }
    }

    /// Appends samples (count, channels, height, width) to the frame of sampling step `index`, if it has one. The
    /// last step always has one.
    ///
    /// # Errors
    /// Returns an error if a value is not finite.
    pub fn add(&mut self, index: usize, samples: &Tensor) -> Result<()> {
        let count = |index: usize| index * Self::MOST / self.steps.max(1);
        if self.steps <= Self::MOST || count(index + 1) > count(index) {
            self.pixels.entry(index).or_default().extend(bytes(samples)?);
        }
        Ok(())
    }

    /// Encodes the animation of grids of images of `shape` (channels, height, width) as the content of a GIF file.
    ///
    /// # Errors
    /// Returns the errors of [`grid_of`] and [`gif()`].
    pub fn gif(&self, shape: (usize, usize, usize)) -> Result<Vec<u8>> {
        let grids = self.pixels.values().map(|pixels| grid_of(pixels, shape));
        gif(&grids.collect::<Result<Vec<_>>>()?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use candle_core::{DType, Device};
    use image::AnimationDecoder;
    use image::codecs::gif::GifDecoder;

    use super::*;

    fn samples(values: &[f32], shape: (usize, usize, usize, usize)) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    fn message<T>(result: Result<T>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn values_from_minus_one_to_one_are_bytes_from_0_to_255_and_others_are_clamped() {
        let values = [-1.0, -0.996, 0.0, 0.5, 1.0, 7.0, -1e30];
        let bytes = bytes(&samples(&values, (1, 1, 1, 7))).unwrap();
        assert_eq!(bytes, [0, 1, 128, 191, 255, 255, 0]);
    }

    #[test]
    fn a_value_that_is_not_finite_is_an_error_and_no_black_pixel() {
        for (value, name) in
            [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")]
        {
            let expected = format!("samples is {name}; it must be finite");
            let found = message(grid(&samples(&[0.0, value], (2, 1, 1, 1))));
            assert!(found.starts_with(&expected), "{found}");
        }
    }

    #[test]
    fn every_pixel_of_a_grid_is_that_of_its_image() {
        for (count, channels, height, width) in [
            (1, 1, 8, 8),
            (3, 1, 28, 28),
            (5, 3, 32, 32),
            (7, 3, 5, 9),
            (2, 1, 100, 3),
            (10, 1, 1, 1),
            (3, 2, 5, 4),
            (5, 4, 6, 9),
        ] {
            let size = channels * height * width;
            let pixels: Vec<u8> = (0..count * size).map(|i| (i * 37 % 251) as u8).collect();
            let picture = grid_of(&pixels, (channels, height, width)).unwrap();
            assert_eq!(picture.color().channel_count() as usize, channels);
            let picture = picture.to_rgba8();

            let scale = (64 / height.max(width)).clamp(1, 8);
            let (cell_h, cell_w) = (height * scale + 2, width * scale + 2);
            let columns = (count as f64).sqrt().ceil() as usize;
            let expected = (columns * cell_w + 2, count.div_ceil(columns) * cell_h + 2);
            assert_eq!((picture.width() as usize, picture.height() as usize), expected);
            for (x, y, pixel) in picture.enumerate_pixels() {
                let (x, y) = (x as usize, y as usize);
                let k = y / cell_h * columns + x / cell_w;
                let gap = y % cell_h < 2 || x % cell_w < 2 || k >= count;
                let at = |channel: usize| {
                    let (y, x) = ((y % cell_h).saturating_sub(2), (x % cell_w).saturating_sub(2));
                    pixels[((k * channels + channel) * height + y / scale) * width + x / scale]
                };
                let expected = match channels {
                    _ if gap => [64, 64, 64, 255],
                    1 => [at(0), at(0), at(0), 255],
                    2 => [at(0), at(0), at(0), at(1)],
                    3 => [at(0), at(1), at(2), 255],
                    _ => [at(0), at(1), at(2), at(3)],
                };
                assert_eq!(
                    pixel.0, expected,
                    "{count} x {channels} x {height} x {width} at {x}, {y}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_drawn_is_an_error() {
        let zeros = |shape| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let drawn = |shape: &[usize]| message(grid(&zeros(shape.to_vec())));
        for shape in [&[2, 5, 8, 8][..], &[0, 1, 8, 8], &[2, 1, 0, 8], &[8, 8]] {
            let expected =
                format!("samples has shape {shape:?}; it must be (count, 1 to 4 channels, ");
            assert!(drawn(shape).starts_with(&expected), "{}", drawn(shape));
        }
        let found = message(grid_of(&[0; 20], (5, 2, 2)));
        assert!(found.starts_with("channels is 5; it must be 1 (grey), 2 (grey and"), "{found}");
        let found = message(grid_of(&[], (1, 2, 2)));
        assert!(found.starts_with("pixels.len() is 0; it must be a positive multiple"), "{found}");
        assert!(message(grid_of(&[0; 7], (1, 2, 3))).contains("pixels.len() is 7"));
        for shape in [(1, 0, 3), (1, usize::MAX, 3)] {
            assert!(message(grid_of(&[], shape)).starts_with("shape is (1, "), "{shape:?}");
        }
        let width = u32::MAX as usize;
        assert!(message(grey(usize::MAX, 2, 3)).contains("the available memory"));
        assert!(message(grey(1, width + 1, 1)).contains("1 x 4294967296 pixels"));
    }

    #[test]
    fn a_picture_is_replaced_as_a_whole_or_not_at_all() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("new/samples.png");
        let batch = samples(&[-1.0, 1.0, 0.0, 0.5], (2, 1, 1, 2));
        save(&batch, &path).unwrap();
        assert_eq!(image::open(&path).unwrap(), grid(&batch).unwrap());

        let before = fs::read(&path).unwrap();
        assert!(save(&samples(&[f32::NAN], (1, 1, 1, 1)), &path).is_err());
        assert_eq!(fs::read(&path).unwrap(), before);
        // A directory blocks the path.
        fs::create_dir(temp.path().join("new/taken.png")).unwrap();
        let found = message(save(&batch, temp.path().join("new/taken.png")));
        assert!(found.contains("taken.png: "), "{found}");
        assert_eq!(fs::read_dir(temp.path().join("new")).unwrap().count(), 2, "a file is left");
        let found = message(save(&batch, temp.path().join("samples.jpg")));
        assert!(found.contains("samples.jpg; it must be a file name that ends in .png"), "{found}");
    }

    /// Returns the palette of the whole file, those of its frames, and the frames as displayed.
    fn film(pictures: &[DynamicImage]) -> (Vec<u8>, Vec<Option<Vec<u8>>>, Vec<DynamicImage>) {
        let bytes = gif(pictures).unwrap();
        let mut decoder = gif::DecodeOptions::new().read_info(bytes.as_slice()).unwrap();
        let palette = decoder.global_palette().unwrap().to_vec();
        let mut palettes = vec![];
        while let Some(frame) = decoder.read_next_frame().unwrap() {
            palettes.push(frame.palette.clone());
        }
        let frames = GifDecoder::new(BufReader::new(Cursor::new(bytes))).unwrap().into_frames();
        let frames = frames.collect_frames().unwrap();
        let delays: Vec<_> = frames.iter().map(|frame| frame.delay().numer_denom_ms().0).collect();
        assert_eq!(delays.split_last(), Some((&2000, vec![70; pictures.len() - 1].as_slice())));
        (palette, palettes, frames.into_iter().map(|frame| frame.into_buffer().into()).collect())
    }

    #[test]
    fn the_frames_of_a_grey_film_are_exact_and_share_the_palette_of_the_file() {
        let pictures: Vec<_> =
            (1..=4).map(|k| grid_of(&[k * 10, 0, 255, k], (1, 2, 2)).unwrap()).collect();
        let (palette, palettes, frames) = film(&pictures);
        assert_eq!(palette, (0..=255).flat_map(|grey| [grey; 3]).collect::<Vec<u8>>());
        assert_eq!(palettes, [const { None }; 4]);
        for (frame, picture) in frames.iter().zip(&pictures) {
            assert_eq!(frame.to_luma8(), picture.to_luma8());
        }
    }

    #[test]
    fn the_first_palette_of_a_coloured_film_is_the_palette_of_the_file() {
        // Few colours, so that the palette of each frame holds exactly its colours.
        let pictures: Vec<_> =
            (1..=3).map(|k| grid_of(&[k * 40, 200, 9, k, 77, 0], (3, 1, 2)).unwrap()).collect();
        let (palette, palettes, frames) = film(&pictures);
        let colours = |picture: &DynamicImage| {
            let picture = picture.to_rgb8();
            picture.pixels().map(|pixel| pixel.0).collect::<std::collections::BTreeSet<_>>()
        };
        let first = palette.as_chunks::<3>().0;
        assert!(colours(&pictures[0]).iter().all(|colour| first.contains(colour)), "{palette:?}");
        assert_eq!(palettes.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true, true]);
        for (frame, picture) in frames.iter().zip(&pictures) {
            assert_eq!(frame.to_rgb8(), picture.to_rgb8());
        }
    }

    #[test]
    fn a_film_of_transparent_pictures_lies_over_white() {
        // A red pixel with an alpha of 64, an invisible one, and an opaque one.
        let colours = [200, 0, 10, 0, 0, 20, 0, 0, 30, 64, 0, 255];
        let picture = image_of(&colours, (4, 1, 3)).unwrap();
        assert_eq!(picture.to_rgba8().get_pixel(0, 0).0, [200, 0, 0, 64]);
        let (_, _, frames) = film(&[picture]);
        let shown: Vec<_> = frames[0].to_rgba8().pixels().map(|pixel| pixel.0).collect();
        // 255 - 64 (255 - 200) / 255 = 241.2, and 255 - 64 = 191.
        let expected = [[241, 191, 191, 255], [255, 255, 255, 255], [10, 20, 30, 255]];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_film_is_of_pictures_of_one_size() {
        assert!(message(gif(&[])).contains("pictures.len() is 0"));
        let sizes = [(3, 2), (4, 2)].map(|(w, h)| DynamicImage::new_luma8(w, h));
        let found = message(gif(&sizes));
        assert!(found.contains("(4, 2); it must be (3, 2), that of the first"), "{found}");
        for (w, h) in [(0, 0), (65_536, 1)] {
            let found = message(gif(&[DynamicImage::new_luma8(w, h)]));
            assert!(found.contains("it must be from 1 to 65,535 pixels either way"), "{found}");
        }
    }
}
