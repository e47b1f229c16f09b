use std::path::PathBuf;

use clap::Args;

use super::program::check_output;
use super::result::Result;
use crate::data::{Dataset, Images};
use crate::{files, pictures};

/// The options of a program that writes images as pictures.
#[derive(Debug, Clone, Args)]
pub struct OutputArgs {
    /// Directory for one PNG file per image
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Picture to write
    #[arg(long, value_name = "FILE.png", default_value = "samples.png")]
    out: PathBuf,
    /// Animation of the denoising to write
    #[arg(long, value_name = "FILE.gif")]
    gif: Option<PathBuf>,
}

impl OutputArgs {
    /// Checks that the files can be written. A program calls this before long work.
    ///
    /// # Errors
    /// Returns an error if a path has another extension than its picture, or cannot be written.
    pub fn check(&self) -> Result<()> {
        check_output("--out", &self.out, "png")?;
        self.gif.as_deref().map_or(Ok(()), |gif| check_output("--gif", gif, "gif"))
    }

    /// Returns whether an animation is written.
    pub fn is_animated(&self) -> bool {
        self.gif.is_some()
    }

    /// Writes the images and the animation. The first image has the number `first`. Returns the paths for the user.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written.
    pub fn write(
        &self,
        first: usize,
        images: &Images,
        frames: &pictures::Frames,
    ) -> Result<String> {
        let shape = images.shape().into();
        let grid = pictures::grid_of(images.pixels(), shape)?;
        files::write(&self.out, &pictures::png(&grid)?)?;
        let mut written = self.out.display().to_string();
        if let Some(dir) = &self.images {
            pictures::save_each(dir, first, images.pixels(), shape)?;
            written += &format!(", {}", dir.display());
        }
        if let Some(gif) = &self.gif {
            files::write(gif, &frames.gif(shape)?)?;
            written += &format!(", {}", gif.display());
        }
        Ok(written)
    }
}
