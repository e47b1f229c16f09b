use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use clap::Args;

use super::arguments::{positive_fraction, whole};
use super::network::Network;
use super::print::out;
use super::result::Result;
use super::sampling::SamplingArgs;
use crate::data::folder::{Channels, FolderConfig, read_mask, read_picture};
use crate::data::normalized;
use crate::denoiser::Denoiser;
use crate::error::Error;
use crate::observe::Progress;
use crate::sample::{Ends, Resampling, Sampler};

/// The options of a program that varies, interpolates or inpaints pictures. Each of these options excludes the others.
#[derive(Debug, Clone, Args)]
pub struct EditingArgs {
    /// Picture of which the images are variations; a network with classes needs --class
    #[arg(long, value_name = "FILE", group = "edit")]
    vary: Option<PathBuf>,
    /// Strength of the variations: the timestep to which the picture is noised, as a fraction of all timesteps
    #[arg(long, value_name = "S", default_value = "0.5", allow_negative_numbers = true,
          value_parser = positive_fraction, requires = "vary")]
    strength: f64,
    /// Interpolate from the first image of one seed to that of another, both included; a network with classes needs one
    /// --class
    #[arg(long, value_names = ["SEED", "SEED"], group = "edit", conflicts_with_all = ["seed", "from"],
          value_parser = whole::<u64>(0..=u64::MAX))]
    interpolate: Option<Vec<u64>>,
    /// Interpolate from one picture to another, both as the network draws them; needs a deterministic solver, such as
    /// ddim with eta 0, and one --class if the network has classes
    #[arg(long, value_names = ["FILE", "FILE"], group = "edit", conflicts_with = "from")]
    interpolate_pictures: Option<Vec<PathBuf>>,
    /// Picture to inpaint, with --solver ddpm or ddim; a network with classes needs --class
    #[arg(long, value_name = "FILE", group = "edit", requires = "mask")]
    inpaint: Option<PathBuf>,
    /// Mask of the size of the images; --inpaint fills its white pixels
    #[arg(long, value_name = "FILE", requires = "inpaint")]
    mask: Option<PathBuf>,
    /// Number of sampling steps that --inpaint repeats at a time
    #[arg(long, value_name = "S", default_value = "10", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1_000_000), requires = "inpaint")]
    jump: usize,
    /// Number of times that --inpaint computes these steps; 1 for no repetition
    #[arg(long, value_name = "N", default_value = "10", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1000), requires = "inpaint")]
    resamplings: usize,
}

impl EditingArgs {
    /// Checks that `--class` is given if the network has classes: one class for an interpolation, at least one for the
    /// other options.
    ///
    /// # Errors
    /// Returns an error that names the option and the classes that it needs.
    pub fn check(&self, sampling: &SamplingArgs, network: &Network) -> Result<()> {
        let given = [
            ("--vary", self.vary.is_some(), false),
            ("--interpolate", self.interpolate.is_some(), true),
            ("--interpolate-pictures", self.interpolate_pictures.is_some(), true),
            ("--inpaint", self.inpaint.is_some(), false),
        ];
        let Some((option, _, between)) = given.into_iter().find(|(_, given, _)| *given) else {
            return Ok(());
        };
        match (network.classes(), sampling.class.len()) {
            (None, _) | (_, 1) => Ok(()),
            // No class is that of the images between two classes.
            (Some(_), _) if between => Err(format!(
                "{option} needs --class with one class, such as --class 3: the ends and the images between them have \
                 the same class"
            )
            .into()),
            (Some(_), 0) => Err(format!(
                "{option} needs --class, such as --class 3: the network has classes, and that of the picture is unknown"
            )
            .into()),
            _ => Ok(()),
        }
    }

    /// Sets the start and the known pixels of a sampler of `count` images of this shape (channels, height, width).
    /// Without an option, returns the sampler unchanged. The condition of the sampler has passed [`check`](Self::check).
    ///
    /// # Errors
    /// Returns an error if a picture cannot be read or has another size than its mask, or if the solver does not fit.
    pub fn apply(
        &self,
        sampler: Sampler,
        shape: (usize, usize, usize),
        count: usize,
        denoiser: &impl Denoiser,
        device: &Device,
    ) -> Result<Sampler> {
        if let Some(path) = &self.vary {
            let all = sampler.timesteps().len();
            let sampler = sampler.vary(&picture(path, shape)?, self.strength)?;
            let (path, steps) = (path.display(), sampler.timesteps().len());
            let strength = self.strength;
            out(format_args!("variations  of {path}, strength {strength}, {steps} of {all} steps"));
            return Ok(sampler);
        }
        if let (Some(path), Some(mask)) = (&self.inpaint, &self.mask) {
            let (_, height, width) = shape;
            let filled = read_mask(mask, height, width)?.into_iter().map(u8::from).collect();
            let filled = Tensor::from_vec(filled, (1, height, width), &Device::Cpu);
            let filled = filled.map_err(Error::from)?;
            let resampling = Resampling { jump: self.jump, count: self.resamplings };
            let sampler = sampler.inpaint(&picture(path, shape)?, &filled, resampling)?;
            let evaluations = sampler.evaluations();
            out(format_args!("inpainting  {}, {evaluations} evaluations", path.display()));
            return Ok(sampler);
        }
        let last = count.saturating_sub(1).max(1) as f64;
        let weights: Vec<f64> = (0..count).map(|k| k as f64 / last).collect();
        if let Some(&[a, b]) = self.interpolate.as_deref() {
            return Ok(sampler.interpolate(Ends::Seeds([a, b]), &weights)?);
        }
        let Some([a, b]) = self.interpolate_pictures.as_deref() else { return Ok(sampler) };
        if !sampler.is_deterministic() {
            return Err(
                "--interpolate-pictures needs a solver without noise, such as --solver ddim \
                        with --eta 0"
                    .into(),
            );
        }
        let pictures = [picture(a, shape)?, picture(b, shape)?];
        let steps = sampler.timesteps().len() as u64;
        out(format_args!("inverting   {} and {}, {steps} steps each", a.display(), b.display()));
        let progress = Progress::started(2 * steps);
        // All images have the same condition.
        let sampler_of_one = sampler.part(0, 1)?;
        let inverted = |picture: &Tensor, done: u64| -> Result<Tensor> {
            let image = picture.unsqueeze(0).and_then(|image| image.to_device(device));
            let mut x = image.map_err(Error::from)?;
            for step in sampler_of_one.invert_steps(denoiser, x.clone())? {
                let step = step?;
                progress.advance(done + step.index as u64 + 1);
                x = step.x;
            }
            Ok(x)
        };
        let ends = [inverted(&pictures[0], 0)?, inverted(&pictures[1], steps)?];
        progress.finish();
        let noise = Tensor::cat(&ends, 0).map_err(Error::from)?;
        Ok(sampler.interpolate(Ends::Noise(noise), &weights)?)
    }
}

/// Reads a picture as an image of this shape (channels, height, width), with values in [-1, 1].
fn picture(path: &Path, shape: (usize, usize, usize)) -> Result<Tensor> {
    let (channels, height, width) = shape;
    let channels = match channels {
        1 => Channels::Grey,
        3 => Channels::Rgb,
        4 => Channels::Rgba,
        _ => {
            let expected = "1, 3 or 4 channels to start from a picture";
            return Err(format!("the network's images have {channels} channels; {expected}").into());
        }
    };
    let [height, width] = [height, width].map(u32::try_from);
    let config =
        FolderConfig { height: height?, width: width?, channels, ..FolderConfig::default() };
    let image = read_picture(path, &config)?;
    let values = image.pixels().iter().copied().map(normalized).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu).map_err(Error::from)?)
}
