//! Trains on a folder of pictures: `--data photos --image-size 64`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, DataSet, Recipe, TrainArgs, err, out, whole};
use ddpm::data::Dataset;
use ddpm::data::folder::{Channels, Crop, Folder, FolderConfig, Unreadable};

/// Train a DDPM on the pictures of a folder, and draw samples from it
#[derive(Parser)]
#[command(name = "train", version)]
struct Cli {
    /// Folder of PNG, JPEG, WebP, GIF, BMP and TIFF files; with --conditional, each of its folders is a class
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Height and width of the images; pictures are cropped and scaled to this size
    #[arg(long, value_name = "N", default_value = "64", value_parser = whole::<u32>(2..=4096))]
    image_size: u32,
    /// Height of the images, instead of --image-size
    #[arg(long, value_name = "N", value_parser = whole::<u32>(2..=4096))]
    height: Option<u32>,
    /// Width of the images, instead of --image-size
    #[arg(long, value_name = "N", value_parser = whole::<u32>(2..=4096))]
    width: Option<u32>,
    /// Train on grey images, even if the pictures are coloured
    #[arg(long)]
    grey: bool,
    /// Draw a random part of each picture in each epoch, instead of its centre
    #[arg(long)]
    random_crop: bool,
    /// Skip files that cannot be read, instead of stopping
    #[arg(long)]
    skip_unreadable: bool,
    /// Directory that keeps scaled pictures for the next run
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> ExitCode {
    cli::main(|cli: Cli| {
        let config = FolderConfig {
            height: cli.height.unwrap_or(cli.image_size),
            width: cli.width.unwrap_or(cli.image_size),
            channels: if cli.grey { Channels::Grey } else { Channels::Auto },
            crop: if cli.random_crop { Crop::Random { zoom: 1.25 } } else { Crop::Centre },
            classes: cli.train.conditional,
            unreadable: if cli.skip_unreadable { Unreadable::Skip } else { Unreadable::Refuse },
            ..FolderConfig::default()
        };
        // The channels are known only after the pictures.
        let (height, width) = (config.height as usize, config.width as usize);
        cli::check(&recipe((3, height, width))?.0, &cli.train)?;
        let mut builder = Folder::builder(&cli.data, config).on_progress(|progress| {
            if progress.done > 0 && progress.done.is_multiple_of(1000) {
                err(progress);
            }
            ControlFlow::Continue(())
        });
        if let Some(cache) = &cli.cache {
            builder = builder.cache(cache);
        }
        let folder = builder.open()?;
        for file in folder.unreadable() {
            err(format_args!("warning: skipped {}: {}", file.path.display(), file.reason));
        }
        let (recipe, reason) = recipe(folder.shape().into())?;
        out(format_args!("recipe   {reason}"));
        cli::train(&recipe, &cli.train, || Ok(DataSet::folder(folder)))
    })
}

fn recipe(shape: (usize, usize, usize)) -> cli::Result<(Recipe, String)> {
    let (recipe, reason) = Recipe::for_images(shape)?;
    Ok((Recipe { out: "out/train", cargo_target: "--example train", ..recipe }, reason))
}
