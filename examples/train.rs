//! Trains on a folder of pictures: `--data photos --image-size 64`.

use std::process::ExitCode;

use clap::Parser;
use ddpm::cli::{
    self, DataSet, FolderArgs, NetworkConfig, NetworkName, Recipe, RunDir, RunPlan, TrainArgs, out,
};
use ddpm::data::Dataset;
use ddpm::nn::UNet2DConfig;

/// The shape of images: (channels, height, width).
type Shape = (usize, usize, usize);

/// The shape for which --help shows the defaults.
const USUAL: Shape = (3, 64, 64);

/// Train a DDPM on the pictures of a folder, and draw samples from it
#[derive(Parser)]
#[command(name = "train", version, after_help = defaults())]
struct Cli {
    #[command(flatten)]
    pictures: FolderArgs,
    /// Network: unet, that of this crate, or ho, that of Ho et al. with their process and optimiser; --resume and
    /// --config need the network with which the run began. For ho, 1 to 5 halvings of height and width must leave whole numbers from 4
    /// to 16
    #[arg(long, value_name = "N", value_enum, default_value = "unet")]
    network: NetworkName,
    #[command(flatten)]
    train: TrainArgs,
}

/// The recipe for images of `shape`, and the reason for its network.
fn unet(shape: Shape) -> cli::Result<(Recipe, String)> {
    let (recipe, reason) = Recipe::for_images(shape)?;
    Ok((Recipe { out: "out/train", cargo_target: "--example train", ..recipe }, reason))
}

/// The recipe of Ho et al. for images of `shape`, and the reason for its network.
fn ho(shape: Shape) -> cli::Result<(Recipe<UNet2DConfig>, String)> {
    let (recipe, reason) = Recipe::ho_for_images(shape)?;
    Ok((Recipe { out: "out/train-ho", cargo_target: "--example train", ..recipe }, reason))
}

fn defaults() -> String {
    let when = "for images of 64 x 64 pixels (--batch-size depends on the size)";
    let of_ho =
        "for images of 64 x 64 pixels (--batch-size and --learning-rate depend on the size)";
    let all = || -> cli::Result<String> {
        let [unet, ho] = [
            unet(USUAL)?.0.defaults(&format!("Defaults {when}")),
            ho(USUAL)?.0.defaults(&format!("With --network ho, {of_ho}")),
        ];
        Ok(format!("{unet}\n\n{ho}"))
    };
    all().unwrap_or_else(|e| e.to_string())
}

/// Trains by the recipe for the shape of the images.
fn run<N: NetworkConfig>(
    recipe: impl Fn(Shape) -> cli::Result<(Recipe<N>, String)>,
    pictures: &FolderArgs,
    mut train: TrainArgs,
) -> cli::Result<ExitCode> {
    let (usual, _) = recipe(USUAL)?;
    let dir = RunDir::open(&train, usual.out)?;
    let config = pictures.config(&train, &dir)?;
    // The settings of --config, or of the run that is resumed, may have classes without the option.
    train.conditional = config.classes;
    if !dir.follows_recipe() {
        let plan = RunPlan::new(dir, &usual, &train)?;
        let folder = pictures.open(config)?;
        return plan.train(|| Ok(DataSet::folder(folder)));
    }
    // The channels are known only after the pictures.
    let (height, width) = (config.height as usize, config.width as usize);
    let plan = RunPlan::new(dir, &recipe((3, height, width))?.0, &train)?;
    let folder = pictures.open(config)?;
    let (recipe, reason) = recipe(folder.shape().into())?;
    let plan = plan.with_recipe(&recipe)?;
    out(format_args!("recipe   {reason}; {}", plan.training()));
    plan.train(|| Ok(DataSet::folder(folder)))
}

fn main() -> ExitCode {
    cli::main(|Cli { pictures, network, train }| match network {
        NetworkName::Unet => run(unet, &pictures, train),
        NetworkName::Ho => run(ho, &pictures, train),
    })
}
