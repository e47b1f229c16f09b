use std::path::{Path, PathBuf};

use clap::Args;

use super::print::grouped;
use super::program::check_output;
use super::result::Result;
use crate::error::Error;
use crate::eval::{Drawn, bytes};
use crate::memory::reserved;
use crate::pictures::{self, Frames};
use crate::{error, files};

/// The picture that is written if no other output is chosen.
const PICTURE: &str = "samples.png";

/// The largest number of images of a picture or an animation.
const MOST: usize = 1024;

/// The options of a program that writes images as pictures.
#[derive(Debug, Clone, Args)]
pub struct OutputArgs {
    /// Directory for one PNG file per image, written as soon as it is drawn
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Picture of all images to write, of at most 1024 [default: samples.png, without --images]
    #[arg(long, value_name = "FILE.png")]
    out: Option<PathBuf>,
    /// Animation of the denoising to write, of at most 1024 images
    #[arg(long, value_name = "FILE.gif")]
    gif: Option<PathBuf>,
}

impl OutputArgs {
    /// Checks before long work that the files of `count` images can be written.
    ///
    /// # Errors
    /// Returns an error if a path is not that of a picture or of a directory, if it cannot be written, or if there are
    /// too many images for one picture.
    pub fn check(&self, count: usize) -> Result<()> {
        let picture = self.picture();
        if count > MOST && (picture.is_some() || self.gif.is_some()) {
            let (count, most) = (grouped(count), grouped(MOST));
            return Err(format!(
                "--count is {count}; with --out or --gif, or without --images, it must be at most {most}"
            )
            .into());
        }
        if let Some(dir) = &self.images {
            if dir.exists() && !dir.is_dir() {
                let shown = dir.display();
                return Err(format!("--images is {shown}, a file; it must be a directory").into());
            }
            files::clear_leftovers(dir, |leftover| leftover.ends_with(".png"));
            files::check_writable(dir.join("image.png"))?;
        }
        picture.map_or(Ok(()), |picture| check_output("--out", picture, "png"))?;
        self.gif.as_deref().map_or(Ok(()), |gif| check_output("--gif", gif, "gif"))
    }

    fn picture(&self) -> Option<&Path> {
        self.out.as_deref().or(self.images.is_none().then_some(Path::new(PICTURE)))
    }

    /// Begins to write `count` images of this shape (channels, height, width), each drawn in `steps` sampling steps.
    ///
    /// # Errors
    /// Returns an error if there is not enough memory for a picture of all images.
    pub fn begin(
        &self,
        shape: (usize, usize, usize),
        count: usize,
        steps: usize,
    ) -> Result<Output<'_>> {
        let (channels, height, width) = shape;
        let pixels = self.picture().map(|_| {
            reserved(&[channels, count, height, width]).ok_or_else(|| {
                let expected = "small enough for the pixels of a picture to be in memory";
                Error::config("count", count, expected)
            })
        });
        Ok(Output { args: self, shape, pixels: pixels.transpose()?, frames: Frames::new(steps) })
    }
}

/// Images that are written while they are drawn.
#[derive(Debug)]
pub struct Output<'a> {
    args: &'a OutputArgs,
    shape: (usize, usize, usize),
    /// The pixels of the images of the picture, if there is one.
    pixels: Option<Vec<u8>>,
    frames: Frames,
}

impl Output<'_> {
    /// Takes the samples of a step. Files of single images are written in the last step of their part.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written, or if a value is not finite.
    pub fn add(&mut self, step: &Drawn<'_>) -> error::Result<()> {
        if self.args.gif.is_some() {
            self.frames.add(step.index, step.x)?;
        }
        if !step.is_last {
            return Ok(());
        }
        let images = bytes(step.x)?;
        if let Some(dir) = &self.args.images {
            pictures::save_each(dir, step.first, &images, self.shape)?;
        }
        if let Some(pixels) = &mut self.pixels {
            pixels.extend(images);
        }
        Ok(())
    }

    /// Writes the picture and the animation of all images. Returns the paths for the user.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written.
    pub fn finish(self) -> Result<String> {
        let Self { args, shape, pixels, frames } = self;
        let picture = args.picture();
        if let Some((path, pixels)) = picture.zip(pixels) {
            files::write(path, &pictures::png(&pictures::grid_of(&pixels, shape)?)?)?;
        }
        if let Some(gif) = &args.gif {
            files::write(gif, &frames.gif(shape)?)?;
        }
        let written = [picture, args.images.as_deref(), args.gif.as_deref()];
        let written = written.into_iter().flatten().map(|path| path.display().to_string());
        Ok(written.collect::<Vec<_>>().join(", "))
    }
}
