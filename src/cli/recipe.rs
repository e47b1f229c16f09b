use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::arguments::{fraction, positive_fraction, precision, whole};
use super::choices::{ExtractorChoice, KINDS};
use super::network::NetworkConfig;
use super::objective_args::ObjectiveArgs;
use super::result::Result;
use crate::model::UNetConfig;
use crate::observe::Judge;
use crate::precision::Precision;
use crate::process::Diffusion;
use crate::sample::SamplerConfig;
use crate::train::{AdamConfig, LearningRateSchedule, TimestepSampling, TrainConfig};

/// A network, a process, and the defaults of a program that trains it.
#[derive(Debug, Clone)]
pub struct Recipe<N = UNetConfig> {
    /// The network.
    pub network: N,
    /// The process that the network learns to reverse.
    pub diffusion: Diffusion,
    /// The training configuration.
    pub train: TrainConfig,
    /// If true, the option `--steps` also sets the warm-up, to that of [`TrainConfig::recommended`] with as many steps.
    pub warmup_follows_steps: bool,
    /// The directory of the run.
    pub out: &'static str,
    /// The arguments by which `cargo run` selects the program, such as `--example mnist`. The program states them in
    /// the command that continues a run.
    pub cargo_target: &'static str,
    /// Number of updates between two checkpoints.
    pub save_every: u64,
    /// Number of updates between two grids of samples.
    pub sample_every: u64,
    /// Number of samples in a grid.
    pub sample_count: usize,
    /// Sampler settings of the grids.
    pub sampling: SamplerConfig,
    /// Number of images that are not trained on, by which the held-out loss is computed.
    pub held_out: usize,
    /// Number of updates between two held-out losses.
    pub held_out_every: u64,
    /// Number of updates between two lists of the gradient norms of all layers. With 0, none are computed.
    pub gradient_norms: u64,
    /// Whether event files for TensorBoard are written.
    pub tensorboard: bool,
    /// Number of samples that are judged during training. With 0, none are.
    pub judge: usize,
    /// The largest share of the time for judging.
    pub judge_share: f64,
    /// The network by whose features samples are judged.
    pub extractor: Option<ExtractorChoice>,
}

/// The name of a recipe for a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(
    missing_docs,
    reason = "clap would print a list of documented variants instead of their names"
)]
pub enum RecipeName {
    Ddpm,
    Recommended,
}

/// The usual number of updates between two held-out losses.
pub(super) const HELD_OUT_EVERY: u64 = 500;

impl<N: NetworkConfig> Recipe<N> {
    /// Creates a recipe that saves every 500 updates, draws a grid of 64 samples every 1,000 by the
    /// [usual](SamplerConfig::usual) sampler, holds out no images, and writes to `out`.
    pub fn new(network: N, diffusion: Diffusion, train: TrainConfig) -> Self {
        Self {
            sampling: SamplerConfig::usual(&diffusion),
            network,
            diffusion,
            train,
            warmup_follows_steps: false,
            out: "out",
            cargo_target: "",
            save_every: 500,
            sample_every: 1_000,
            sample_count: 64,
            held_out: 0,
            held_out_every: HELD_OUT_EVERY,
            gradient_norms: 0,
            tensorboard: false,
            judge: 0,
            judge_share: Judge::SHARE,
            extractor: None,
        }
    }

    /// Replaces the process, the training and the sampler by those that this crate recommends. Flips remain. The warm-up
    /// follows the option `--steps`.
    #[must_use]
    pub fn recommended(self, steps: u64, batch_size: usize) -> Self {
        let TrainConfig { horizontal_flip, log_every, .. } = self.train;
        let train = TrainConfig::recommended(steps, batch_size);
        Self {
            diffusion: Diffusion::velocity(),
            train: TrainConfig { horizontal_flip, log_every, ..train },
            sampling: SamplerConfig::recommended(),
            warmup_follows_steps: true,
            ..self
        }
    }

    /// Formats the defaults in the case `when`, for the end of --help.
    pub fn defaults(&self, when: &str) -> String {
        let Self { train, .. } = self;
        let clipping = train.clip_norm.map_or_else(
            || "no clipping of gradients".into(),
            |norm| format!("gradients clipped to norm {norm}"),
        );
        let warmup = match self.warmup_follows_steps {
            true => " (a twentieth of --steps, at most 500)",
            false => "",
        };
        let solver = self.sampling.solver;
        let optimizer = if train.muon.is_some() { "muon" } else { "adam" };
        let timesteps = match train.timesteps {
            TimestepSampling::Uniform => "uniform",
            TimestepSampling::Stratified => "stratified",
            TimestepSampling::LogNormal { .. } => "log-normal",
            TimestepSampling::Importance => "importance",
        };
        format!(
            "{when}: --out {} --save-every {} --sample-every {} --sample-count {} \
             --held-out-every {}\n  \
             new runs only (--resume uses the checkpoint's values, and accepts others for the last three): \
             --batch-size {} --optimizer {optimizer} --learning-rate {} --warmup-steps {}{warmup} --cooldown {} \
             --timesteps {timesteps} --accumulation {} --precision {} --seed {} --steps {} --log-every {} \
             --sampling-steps {}\n  \
             fixed: prediction of {}, {clipping}; grids by {solver}.",
            self.out,
            self.save_every,
            self.sample_every,
            self.sample_count,
            self.held_out_every,
            train.batch_size,
            train.optimizer.learning_rate,
            train.warmup_steps,
            train.cooldown,
            train.accumulation,
            train.precision,
            train.seed,
            train.steps,
            train.log_every,
            self.sampling.steps,
            self.diffusion.prediction(),
        )
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OptimizerName {
    Adam,
    Muon,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ScheduleName {
    Constant,
    Linear,
    Cosine,
    InverseSqrt,
}

/// The options of a program that trains. Without an option, the value of the [`Recipe`] holds, or that of the run
/// which is resumed.
#[derive(Debug, Clone, Args)]
pub struct TrainArgs {
    /// Total number of updates of the weights, including those before --resume
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    steps: Option<u64>,
    /// Images per update
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=65_536))]
    batch_size: Option<usize>,
    /// Learning rate after the warm-up
    #[arg(long, value_name = "R", allow_negative_numbers = true,
          value_parser = positive_fraction)]
    learning_rate: Option<f64>,
    /// Updates over which the learning rate rises to its full value; 0 for none. In a new run of a recommended recipe,
    /// or of train, the default is a twentieth of --steps, at most 500
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=1_000_000_000))]
    warmup_steps: Option<u64>,
    /// Share of all updates, at the end, over which the learning rate falls to zero; 0 for none
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = fraction)]
    cooldown: Option<f64>,
    /// Optimiser: adam, with the weight decay of the recipe, or muon, which is Muon for matrices and Adam for the rest
    #[arg(long, value_name = "O", value_enum)]
    optimizer: Option<OptimizerName>,
    /// Learning rate after the warm-up: constant; falling to zero at --steps as a line or a cosine; or inverse-sqrt,
    /// falling after --reference-steps
    #[arg(long, value_name = "S", value_enum)]
    schedule: Option<ScheduleName>,
    /// Updates with the full learning rate of --schedule inverse-sqrt
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    reference_steps: Option<u64>,
    /// Parts into which a batch is divided to save memory; --batch-size must be a multiple
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=65_536))]
    accumulation: Option<usize>,
    /// Compute feature maps again in the backward pass instead of keeping them. This takes less memory and more time,
    /// and gives the same weights. When a run continues, false switches it off
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    recompute: Option<bool>,
    /// Precision of products: highest or high; bf16 or f16 (with the feature f16)
    #[arg(long, value_name = "P", value_parser = precision)]
    precision: Option<Precision>,
    /// Condition a new network on the classes of the images
    #[arg(long)]
    pub conditional: bool,
    /// Seed of all random numbers
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    seed: Option<u64>,
    /// Directory for checkpoint/, samples/, metrics.jsonl, loss.png, config.json, and data.json, which
    /// names the training images; a new run renames metrics.jsonl, samples/, best/ and tensorboard/ of an
    /// earlier run to metrics-old.jsonl, samples-old/ and so on
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Configuration of a new run: the config.json of another run, which may be edited; other options
    /// replace its values
    #[arg(long, value_name = "FILE.json", conflicts_with = "resume")]
    pub(super) config: Option<PathBuf>,
    /// Continue the run in --out
    #[arg(long)]
    pub(super) resume: bool,
    /// With --resume: change the run to the given options and images; its checkpoints record the changes
    #[arg(long, requires = "resume")]
    pub(super) change: bool,
    /// Updates from one checkpoint to the next; one is always written at the end
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    save_every: Option<u64>,
    /// Updates from one grid of samples to the next; one is always drawn at the end
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    sample_every: Option<u64>,
    /// Images in a grid
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1024))]
    sample_count: Option<usize>,
    /// Sampling steps for the grids
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1000))]
    pub(super) sampling_steps: Option<usize>,
    /// Updates from one line in metrics.jsonl to the next
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    log_every: Option<u64>,
    /// Images that a new run does not train on, chosen at random; their loss is logged, and best/ in --out
    /// holds the checkpoint with the lowest
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(0..=1_000_000_000))]
    pub(super) held_out: Option<usize>,
    /// Updates from one loss of the --held-out images to the next; one is always computed at the end
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    held_out_every: Option<u64>,
    /// Updates from one list of the gradient norms of all layers to the next; 0 for none
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=1_000_000_000))]
    gradient_norms: Option<u64>,
    /// Write event files for TensorBoard to tensorboard/ in --out
    #[arg(long)]
    tensorboard: bool,
    /// Samples that are judged while the network is trained, by their distance from training images in the features
    /// of --extractor; best/ in --out then holds the checkpoint with the lowest judge/sliced; 0 for none
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = judged)]
    judge: Option<usize>,
    /// Largest share of the time for --judge, above 0 and up to 1 [default: 0.05]
    #[arg(long, value_name = "F", allow_negative_numbers = true,
          value_parser = positive_fraction)]
    judge_share: Option<f64>,
    #[arg(long, value_name = "KIND:FILE", help = format!("Network by whose features --judge judges: {KINDS}"))]
    extractor: Option<ExtractorChoice>,
    /// Train on the CPU, even in a build for a GPU
    #[arg(long)]
    pub(super) cpu: bool,
    #[command(flatten)]
    objective: ObjectiveArgs,
}

/// Parses the number of samples to judge.
fn judged(text: &str) -> std::result::Result<usize, String> {
    let number = text.parse().ok().filter(|n| (0..=1_000_000).contains(n) && *n != 1);
    number.ok_or_else(|| "expected 0, or a whole number from 2 to 1000000".into())
}

impl TrainArgs {
    /// Sets the warm-up of a new run to that of `--steps`, if the warm-up of the recipe follows the number of steps.
    pub(super) fn scale<N>(&self, mut recipe: Recipe<N>) -> Recipe<N> {
        if let (true, Some(steps)) = (recipe.warmup_follows_steps, self.steps) {
            recipe.train.warmup_steps = TrainConfig::recommended_warmup(steps);
        }
        recipe
    }

    /// Replaces the values of the configuration for which an option was given.
    ///
    /// # Errors
    /// Returns an error that names the option if options do not fit each other.
    pub(super) fn apply(&self, config: &TrainConfig) -> Result<TrainConfig> {
        Ok(TrainConfig {
            seed: self.seed.unwrap_or(config.seed),
            steps: self.steps.unwrap_or(config.steps),
            batch_size: self.batch_size.unwrap_or(config.batch_size),
            optimizer: AdamConfig {
                learning_rate: self.learning_rate.unwrap_or(config.optimizer.learning_rate),
                ..config.optimizer
            },
            muon: match self.optimizer {
                None => config.muon.clone(),
                Some(OptimizerName::Adam) => None,
                Some(OptimizerName::Muon) => Some(config.muon.clone().unwrap_or_default()),
            },
            warmup_steps: self.warmup_steps.unwrap_or(config.warmup_steps),
            schedule: self.schedule(config.schedule)?,
            cooldown: self.cooldown.unwrap_or(config.cooldown),
            accumulation: self.accumulation.unwrap_or(config.accumulation),
            precision: self.precision.unwrap_or(config.precision),
            log_every: self.log_every.unwrap_or(config.log_every),
            recompute: self.recompute.unwrap_or(config.recompute),
            ..self.objective.apply(config)
        })
    }

    /// Replaces the values of the recipe that are not part of a checkpoint and for which an option was given, except for
    /// the number of held-out images.
    pub(super) fn watch<N>(&self, recipe: Recipe<N>) -> Recipe<N> {
        Recipe {
            save_every: self.save_every.unwrap_or(recipe.save_every),
            sample_every: self.sample_every.unwrap_or(recipe.sample_every),
            sample_count: self.sample_count.unwrap_or(recipe.sample_count),
            held_out_every: self.held_out_every.unwrap_or(recipe.held_out_every),
            gradient_norms: self.gradient_norms.unwrap_or(recipe.gradient_norms),
            tensorboard: self.tensorboard || recipe.tensorboard,
            judge: self.judge.unwrap_or(recipe.judge),
            judge_share: self.judge_share.unwrap_or(recipe.judge_share),
            extractor: self.extractor.clone().or(recipe.extractor),
            ..recipe
        }
    }

    /// Whether an option asks for a judge.
    pub(super) fn judges(&self) -> bool {
        self.extractor.is_some() || self.judge_share.is_some()
    }

    fn schedule(&self, present: LearningRateSchedule) -> Result<LearningRateSchedule> {
        let schedule = match self.schedule {
            None => present,
            Some(ScheduleName::Constant) => LearningRateSchedule::Constant,
            Some(ScheduleName::Linear) => LearningRateSchedule::Linear { end: 0.0 },
            Some(ScheduleName::Cosine) => LearningRateSchedule::Cosine { end: 0.0 },
            Some(ScheduleName::InverseSqrt) => match (self.reference_steps, present) {
                (Some(reference_steps), _)
                | (None, LearningRateSchedule::InverseSqrt { reference_steps }) => {
                    LearningRateSchedule::InverseSqrt { reference_steps }
                }
                _ => {
                    let expected = "the number of updates with the full learning rate";
                    return Err(format!(
                        "--schedule inverse-sqrt needs --reference-steps N, {expected}"
                    )
                    .into());
                }
            },
        };
        match (schedule, self.reference_steps) {
            (LearningRateSchedule::InverseSqrt { .. }, Some(reference_steps)) => {
                Ok(LearningRateSchedule::InverseSqrt { reference_steps })
            }
            (_, Some(_)) => Err("--reference-steps needs --schedule inverse-sqrt".into()),
            (schedule, None) => Ok(schedule),
        }
    }
}

#[cfg(test)]
impl TrainArgs {
    /// Parses the options of a program that trains.
    pub(super) fn parse<'a>(
        args: impl IntoIterator<Item = &'a str>,
    ) -> std::result::Result<Self, clap::Error> {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            train: TrainArgs,
        }
        let args = ["train"].into_iter().chain(args);
        <Cli as clap::Parser>::try_parse_from(args).map(|cli| cli.train)
    }
}
