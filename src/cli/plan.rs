use std::fmt;

use candle_core::Device;

use super::arguments::with_options;
use super::device::pick;
use super::network::NetworkConfig;
use super::recipe::{Recipe, TrainArgs};
use super::result::Result;
use super::run_config::RunConfig;
use super::run_files::RunFiles;
use super::watching::extractor;
use crate::eval::Extractor;
use crate::observe::is_removed;
use crate::train::{Checkpoint, TrainConfig, Trainer};

/// The directory of a run, and the checkpoint in it if the run is resumed.
#[derive(Debug)]
pub struct RunDir {
    pub(super) files: RunFiles,
    pub(super) saved: Option<Checkpoint>,
    follows_recipe: bool,
}

impl RunDir {
    /// Opens the directory `--out`, or else `usual`, and with `--resume` the checkpoint in it.
    ///
    /// # Errors
    /// Returns an error if the run cannot begin or continue there.
    pub fn open(args: &TrainArgs, usual: &str) -> Result<Self> {
        let files = RunFiles::of(args.out.as_deref(), usual);
        let saved = files.find(args.resume)?;
        let follows_recipe = saved.is_none() && args.config.is_none();
        Ok(Self { files, saved, follows_recipe })
    }

    /// Returns whether the network is that of the recipe: the run is new, and has no `--config`.
    pub fn follows_recipe(&self) -> bool {
        self.follows_recipe
    }
}

/// A run that can begin or continue with its options, before its images are read. [`train`](Self::train) trains it.
///
/// The checkpoint of a run that is resumed is read when the plan is created, and not again.
pub struct RunPlan<N: NetworkConfig> {
    pub(super) args: TrainArgs,
    pub(super) recipe: Recipe<N>,
    pub(super) files: RunFiles,
    pub(super) config: TrainConfig,
    pub(super) device: Device,
    /// The network that judges samples.
    pub(super) extractor: Option<Box<dyn Extractor>>,
    /// The checkpoint and the trainer of a run that is resumed.
    pub(super) resumed: Option<(Checkpoint, Trainer<N>)>,
}

impl<N: NetworkConfig> fmt::Debug for RunPlan<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { recipe, config, .. } = self;
        f.debug_struct("RunPlan")
            .field("recipe", recipe)
            .field("config", config)
            .finish_non_exhaustive()
    }
}

impl<N: NetworkConfig> RunPlan<N> {
    /// Checks the configuration and the directory, and reads the checkpoint of a run that is resumed.
    ///
    /// # Errors
    /// Returns an error if the run cannot begin or continue there with these options.
    pub fn new(dir: RunDir, recipe: &Recipe<N>, args: &TrainArgs) -> Result<Self> {
        let RunDir { files, saved, .. } = dir;
        // Checked first, because config.json of another network has other fields.
        if let Some(saved) = &saved {
            saved.architecture::<N>().map_err(with_options)?;
        }
        let (recipe, config) = in_force(recipe, args, &files, saved.as_ref())?;
        let device = pick(args.cpu)?;
        let extractor = extractor(&recipe, args, &device)?;
        let resumed = match saved {
            Some(saved) => {
                let trainer = resume(&saved, args.change, config.clone(), &device)?;
                Some((saved, trainer))
            }
            None => None,
        };
        Ok(Self { args: args.clone(), recipe, files, config, device, extractor, resumed })
    }

    /// Replaces the recipe, for a program that knows it only after its images. A run that is resumed keeps its network
    /// and its training, and `--config` keeps its own.
    ///
    /// # Errors
    /// Returns the errors of [`new`](Self::new) about the configuration.
    pub fn with_recipe(self, recipe: &Recipe<N>) -> Result<Self> {
        let saved = self.resumed.as_ref().map(|(saved, _)| saved);
        let (recipe, config) = in_force(recipe, &self.args, &self.files, saved)?;
        Ok(Self { recipe, config, ..self })
    }

    /// The training configuration, with the values of the options.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The optimiser and the batch size in words, with the values of the options.
    pub fn training(&self) -> String {
        let optimizer = if self.config.muon.is_some() { "Muon" } else { "Adam" };
        format!("{optimizer}, batches of {}", self.config.batch_size)
    }
}

/// The recipe and the training configuration of a run with these options: those of `recipe`, of `--config`, or of the
/// checkpoint and of the run's directory.
fn in_force<N: NetworkConfig>(
    recipe: &Recipe<N>,
    args: &TrainArgs,
    files: &RunFiles,
    saved: Option<&Checkpoint>,
) -> Result<(Recipe<N>, TrainConfig)> {
    let recipe = match &args.config {
        Some(path) => RunConfig::read(path).map_err(|e| format!("--config {e}"))?.replace(recipe),
        None if saved.is_some() && !is_removed(&files.config) => {
            let remedy = "remove this file to continue with the usual values";
            let config = RunConfig::read(&files.config);
            config.map_err(|e| format!("{e}; {remedy}"))?.watch(recipe)
        }
        None => args.scale(recipe.clone()),
    };
    let recipe = args.watch(recipe);
    let config = args.apply(saved.map_or(&recipe.train, Checkpoint::train_config))?;
    config.validate()?;
    Ok((recipe, config))
}

/// Continues the run of a checkpoint.
fn resume<N: NetworkConfig>(
    saved: &Checkpoint,
    change: bool,
    config: TrainConfig,
    device: &Device,
) -> Result<Trainer<N>> {
    let builder = Trainer::builder(saved.architecture::<N>()?).config(config).device(device);
    let builder = builder.diffusion(saved.diffusion().clone());
    builder.resume_opened(saved, change).map_err(with_options)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::model::UNetConfig;
    use crate::process::Diffusion;

    /// The warm-up of a new run.
    fn warmup(recipe: &Recipe, out: &Path, args: &[&str]) -> u64 {
        let out = out.to_str().unwrap();
        let args = ["--cpu", "--out", out].into_iter().chain(args.iter().copied());
        let args = TrainArgs::parse(args).unwrap();
        let dir = RunDir::open(&args, recipe.out).unwrap();
        RunPlan::new(dir, recipe, &args).unwrap().config().warmup_steps
    }

    #[test]
    fn the_warmup_of_a_recommended_recipe_is_a_twentieth_of_the_steps_that_are_asked_for() {
        let temp = TempDir::new().unwrap();
        let paper = Recipe::new(UNetConfig::mnist(), Diffusion::ddpm(), TrainConfig::ho());
        let recommended = paper.clone().recommended(1_875, 16);
        let (pictures, _) = Recipe::for_images((3, 64, 64)).unwrap();
        for (recipe, args, expected) in [
            (&recommended, &[][..], 93),
            (&recommended, &["--steps", "1875"], 93),
            (&recommended, &["--steps", "7500"], 375),
            (&recommended, &["--steps", "500", "--batch-size", "8"], 25),
            (&recommended, &["--steps", "100000"], 500),
            (&recommended, &["--steps", "500", "--warmup-steps", "40"], 40),
            (&pictures, &[], 500),
            (&pictures, &["--steps", "500"], 25),
            // The warm-up of the paper is a number of updates.
            (&paper, &["--steps", "500"], 5_000),
            (&paper, &["--warmup-steps", "0"], 0),
        ] {
            assert_eq!(warmup(recipe, temp.path(), args), expected, "{args:?}");
        }

        // A configuration states its warm-up.
        let file = temp.path().join("config.json");
        let config = json!({
            "network": recommended.network, "diffusion": recommended.diffusion, "train": recommended.train,
            "sampling": recommended.sampling, "save_every": 1, "sample_every": 1, "sample_count": 1,
        });
        fs::write(&file, config.to_string()).unwrap();
        let args = ["--config", file.to_str().unwrap(), "--steps", "500"];
        assert_eq!(warmup(&recommended, temp.path(), &args), 93);
    }
    #[test]
    fn a_run_that_is_resumed_reads_its_checkpoint_once() {
        let temp = TempDir::new().unwrap();
        let checkpoint = temp.path().join("checkpoint");
        let network = UNetConfig { hidden_dims: vec![8, 16], ..UNetConfig::mnist() };
        let train = TrainConfig { steps: 1, ..TrainConfig::mnist() };
        let recipe = Recipe::new(network.clone(), Diffusion::ddpm(), train.clone());
        let trainer = Trainer::new(network, train, Diffusion::ddpm(), &Device::Cpu).unwrap();
        trainer.save(&checkpoint).unwrap();
        let out = temp.path().to_str().unwrap();
        let args = TrainArgs::parse(["--cpu", "--resume", "--out", out]).unwrap();
        let dir = RunDir::open(&args, "none").unwrap();
        assert!(!dir.follows_recipe());
        // Only the tensors are read after this.
        fs::remove_file(checkpoint.join("checkpoint.json")).unwrap();
        let plan = RunPlan::new(dir, &recipe, &args).unwrap();
        fs::remove_dir_all(&checkpoint).unwrap();
        assert!(plan.with_recipe(&recipe).unwrap().resumed.is_some());
    }

    #[test]
    fn the_training_in_force_is_described() {
        let temp = TempDir::new().unwrap();
        let recipe = Recipe::new(UNetConfig::mnist(), Diffusion::ddpm(), TrainConfig::mnist());
        let out = temp.path().to_str().unwrap();
        for (args, expected) in [
            (&[][..], "Adam, batches of 64"),
            (&["--batch-size", "3", "--optimizer", "muon"], "Muon, batches of 3"),
        ] {
            let args = ["--cpu", "--out", out].into_iter().chain(args.iter().copied());
            let args = TrainArgs::parse(args).unwrap();
            let dir = RunDir::open(&args, recipe.out).unwrap();
            assert!(dir.follows_recipe());
            assert_eq!(RunPlan::new(dir, &recipe, &args).unwrap().training(), expected);
        }
    }
}
