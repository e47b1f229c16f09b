use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::arguments::{whole, with_options};
use super::identity::Identity;
use super::network::Network;
use super::plan::RunDir;
use super::print::err;
use super::recipe::TrainArgs;
use super::result::Result;
use super::run_config::read_images;
use super::run_files::RunFiles;
use crate::data::folder::{Channels, Crop, Folder, FolderConfig, Unreadable};
use crate::train::Checkpoint;

/// The zoom of random crops, which vary the size of the part by a quarter.
const ZOOM: f64 = 1.25;

/// The options of a program that trains on a folder of pictures. Without an option, the value of the run that is
/// resumed holds, or that of `--config`, or else the default of [`FolderConfig`].
#[derive(Debug, Clone, Args)]
pub struct FolderArgs {
    /// Folder of PNG, JPEG, WebP, GIF, BMP and TIFF files; with --conditional, each of its folders is a class
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Height and width of the images; pictures are cropped and scaled to this size [default: 64]
    #[arg(long, value_name = "N", value_parser = whole::<u32>(2..=4096))]
    image_size: Option<u32>,
    /// Height of the images, instead of --image-size
    #[arg(long, value_name = "N", value_parser = whole::<u32>(2..=4096))]
    height: Option<u32>,
    /// Width of the images, instead of --image-size
    #[arg(long, value_name = "N", value_parser = whole::<u32>(2..=4096))]
    width: Option<u32>,
    /// Channels of the images: auto, which is grey if no picture has colours and otherwise rgb; grey; rgb; or rgba, which
    /// keeps alpha [default: auto]
    #[arg(long, value_name = "C", value_enum)]
    channels: Option<ChannelsName>,
    /// Train on grey images, even if the pictures are coloured: --channels grey
    #[arg(long, conflicts_with = "channels")]
    grey: bool,
    /// Colour behind transparent pixels: '#rrggbb' in hexadecimal, or a grey value from 0 to 255 [default: 255]
    #[arg(long, value_name = "COLOUR", value_parser = background)]
    background: Option<[u8; 3]>,
    /// Draw a random part of each picture in each epoch, instead of its centre; false switches off that of --config
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    random_crop: Option<bool>,
    /// Skip files that cannot be read, instead of stopping; false switches off that of --config or of the run
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    skip_unreadable: Option<bool>,
    /// Directory that keeps scaled pictures for the next run
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Scaled pictures that are kept in memory, in MiB; further ones are decoded during training [default: 2048]
    #[arg(long, value_name = "MIB", value_parser = whole::<u64>(0..=1_000_000_000))]
    memory_limit: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ChannelsName {
    Auto,
    Grey,
    Rgb,
    Rgba,
}

/// Parses a colour.
fn background(text: &str) -> std::result::Result<[u8; 3], String> {
    let colour = match text.strip_prefix('#') {
        Some(digits) if digits.len() == 6 && digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
            let number = u32::from_str_radix(digits, 16).ok();
            number.map(u32::to_be_bytes).map(|[_, r, g, b]| [r, g, b])
        }
        Some(_) => None,
        None => text.parse().ok().map(|grey| [grey; 3]),
    };
    colour.ok_or_else(|| "expected #rrggbb in hexadecimal, or a grey value from 0 to 255".into())
}

impl FolderArgs {
    /// Determines the settings of the images of the run in `dir`, before any picture is read. The folders of the
    /// pictures are [classes](FolderConfig::classes) if [`TrainArgs::conditional`] is set, or if they are classes of
    /// the run or of `--config`.
    ///
    /// # Errors
    /// Returns an error if options do not fit each other. For a run that is resumed, also returns an error that names
    /// the first option with another value than in the run. With `--change`, only the shape of the images and the
    /// classes cannot be changed. `--skip-unreadable` always can.
    pub fn config(&self, train: &TrainArgs, dir: &RunDir) -> Result<FolderConfig> {
        let Some(run) = &dir.saved else {
            let before = train.config.as_ref().map(|path| read_images(path));
            let before = before.transpose().map_err(|e| format!("--config {e}"))?.flatten();
            let config = self.replace(before.unwrap_or_default(), train.conditional)?;
            config.validate()?;
            return Ok(config);
        };
        let (before, network) = (saved(&dir.files, run)?, Network::of(run).map_err(with_options)?);
        let known = before.is_some();
        let before = before.unwrap_or_else(|| of_network(&network));
        let config = self.replace(before.clone(), train.conditional)?;
        check_same((&before, known), &config, &network, train.change)?;
        config.validate()?;
        Ok(config)
    }

    /// Replaces the values for which an option was given.
    fn replace(&self, config: FolderConfig, conditional: bool) -> Result<FolderConfig> {
        let replaced = FolderConfig {
            height: self.height.or(self.image_size).unwrap_or(config.height),
            width: self.width.or(self.image_size).unwrap_or(config.width),
            channels: match self.channels {
                None if self.grey => Channels::Grey,
                None => config.channels,
                Some(ChannelsName::Auto) => Channels::Auto,
                Some(ChannelsName::Grey) => Channels::Grey,
                Some(ChannelsName::Rgb) => Channels::Rgb,
                Some(ChannelsName::Rgba) => Channels::Rgba,
            },
            background: self.background.unwrap_or(config.background),
            crop: match (self.random_crop, config.crop) {
                (None, crop) | (Some(true), crop @ Crop::Random { .. }) => crop,
                (Some(true), _) => Crop::Random { zoom: ZOOM },
                (Some(false), _) => Crop::Centre,
            },
            classes: conditional || config.classes,
            unreadable: match self.skip_unreadable {
                None => config.unreadable,
                Some(true) => Unreadable::Skip,
                Some(false) => Unreadable::Refuse,
            },
            ..config
        };
        if self.background.is_some() && replaced.channels == Channels::Rgba {
            return Err(
                "--background is for images without alpha; omit it, or --channels rgba".into()
            );
        }
        Ok(replaced)
    }

    /// Opens the folder. Reports the progress and the skipped files on standard error.
    ///
    /// # Errors
    /// Returns the errors of [`FolderBuilder::open`](crate::data::folder::FolderBuilder::open), with the options that
    /// solve them.
    pub fn open(&self, config: FolderConfig) -> Result<Folder> {
        let mut builder = Folder::builder(&self.data, config).on_progress(|progress| {
            if progress.done > 0 && progress.done.is_multiple_of(1000) {
                err(progress);
            }
            ControlFlow::Continue(())
        });
        if let Some(mebibytes) = self.memory_limit {
            builder = builder.memory_limit(mebibytes << 20);
        }
        if let Some(cache) = &self.cache {
            builder = builder.cache(cache);
        }
        let folder = builder.open().map_err(with_options)?;
        for file in folder.unreadable() {
            err(format_args!("warning: skipped {}: {}", file.path.display(), file.reason));
        }
        Ok(folder)
    }
}

/// Reads the settings of the images of a run. Returns `None` for a run of an earlier version, whose files do not have
/// them.
fn saved(files: &RunFiles, run: &Checkpoint) -> Result<Option<FolderConfig>> {
    let images = Identity::of_run(&files.identity, run.history())?;
    // An error of this file is reported later, with a remedy.
    let in_config = || read_images(&files.config).ok().flatten();
    Ok(images.and_then(|images| images.pictures).or_else(in_config))
}

/// The settings that follow from the network of a run. The others are the defaults.
fn of_network(network: &Network) -> FolderConfig {
    let (_, height, width) = network.image_shape();
    FolderConfig {
        height: height as u32,
        width: width as u32,
        classes: network.classes().is_some(),
        ..FolderConfig::default()
    }
}

/// Compares settings with those of the run. Only those of its network count if the others are not `known`.
///
/// # Errors
/// Returns an error that names the first setting that differs from that of the run and cannot change.
fn check_same(
    (run, known): (&FolderConfig, bool),
    given: &FolderConfig,
    network: &Network,
    change: bool,
) -> Result<()> {
    let (of_network, ..) = network.image_shape();
    let channels = match given.channels {
        // The pictures decide.
        Channels::Auto => of_network,
        Channels::Grey => 1,
        Channels::Rgb => 3,
        Channels::Rgba => 4,
    };
    if channels != of_network {
        return Err(format!(
            "channels of the images: {channels} requested, and {of_network} in the network of the run; omit --channels \
             or --grey to continue the run, or begin a new run with another --out"
        )
        .into());
    }
    let (run, given) = (serde_json::to_value(run)?, serde_json::to_value(given)?);
    // The size and the classes belong to the network. Which unreadable files are skipped is a part of the fingerprint.
    for (field, option, changeable) in [
        ("height", "--height or --image-size", false),
        ("width", "--width or --image-size", false),
        ("classes", "--conditional", false),
        ("background", "--background", true),
        ("crop", "--random-crop", true),
    ] {
        let (found, expected) = (&run[field], &given[field]);
        if found == expected || (changeable && (change || !known)) {
            continue;
        }
        let differs = format!("images.{field} is {found} in the run, but {expected} was requested");
        let change = if changeable { ", add --change to change it" } else { "" };
        return Err(format!(
            "{differs}; omit {option} to continue the run{change}, or begin a new run with another --out"
        )
        .into());
    }
    Ok(())
}
