//! Trains on a folder of pictures: `--data photos --image-size 64`.

use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{self, DataSet, FolderArgs, Recipe, RunDir, RunPlan, TrainArgs, out};
use ddpm::data::Dataset;

/// The directory of a run without --out.
const OUT: &str = "out/train";

/// Train a DDPM on the pictures of a folder, and draw samples from it
#[derive(Parser)]
#[command(name = "train", version, after_help = defaults())]
struct Cli {
    #[command(flatten)]
    pictures: FolderArgs,
    #[command(flatten)]
    train: TrainArgs,
}

/// The recipe for images of `shape` (channels, height, width), and the reason for its network.
fn recipe(shape: (usize, usize, usize)) -> cli::Result<(Recipe, String)> {
    let (recipe, reason) = Recipe::for_images(shape)?;
    Ok((Recipe { out: OUT, cargo_target: "--example train", ..recipe }, reason))
}

fn defaults() -> String {
    let when = "Defaults for images of 64 x 64 pixels (--batch-size depends on the size)";
    recipe((3, 64, 64)).map_or_else(|e| e.to_string(), |(recipe, _)| recipe.defaults(when))
}

fn main() -> ExitCode {
    cli::main(|Cli { pictures, mut train }| {
        let dir = RunDir::open(&train, OUT)?;
        let config = pictures.config(&train, &dir)?;
        // The settings of --config, or of the run that is resumed, may have classes without the option.
        train.conditional = config.classes;
        // The channels are known only after the pictures.
        let (height, width) = (config.height as usize, config.width as usize);
        let by_recipe = dir.follows_recipe();
        let plan = RunPlan::new(dir, &recipe((3, height, width))?.0, &train)?;
        let folder = pictures.open(config)?;
        let (recipe, reason) = recipe(folder.shape().into())?;
        let plan = plan.with_recipe(&recipe)?;
        if by_recipe {
            out(format_args!("recipe   {reason}; {}", plan.training()));
        }
        plan.train(|| Ok(DataSet::folder(folder)))
    })
}
