//! A training run: begins or resumes, trains, saves, and draws samples.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::Device;
use clap::Args;
use ddpm::{
    AdamConfig, Checkpoint, Diffusion, Error, Precision, SamplerConfig, TrainConfig, Trainer,
    UNetConfig,
};

use super::cli::{Result, positive_fraction, precision, resume_command, whole};
use super::datasets::{DataSet, check_shape};
use super::identity::Identity;
use super::sampling::describe_solver;
use super::tell::{duration, err, grouped, out};
use super::watch::Watch;
use super::{device, files, interrupt};

/// The network and the defaults of an example.
pub struct Recipe {
    pub example: &'static str,
    pub network: UNetConfig,
    pub diffusion: fn() -> ddpm::Result<Diffusion>,
    pub train: TrainConfig,
    pub out: &'static str,
    pub save_every: u64,
    pub sample_every: u64,
    pub sample_count: usize,
    /// Sampler settings of the grids.
    pub sampling: SamplerConfig,
}

impl Recipe {
    /// Formats the defaults in the case `when`, for the end of --help.
    pub fn defaults(&self, when: &str) -> String {
        let Self { train, .. } = self;
        let clipping = train.clip_norm.map_or_else(
            || "no clipping of gradients".into(),
            |norm| format!("gradients clipped to norm {norm}"),
        );
        let cooldown = match train.cooldown {
            0.0 => "no cool-down".into(),
            share => format!("cool-down over the last {:.0}%", 100.0 * share),
        };
        let solver = describe_solver(self.sampling.solver);
        format!(
            "{when}: --out {} --save-every {} --sample-every {} --sample-count {}\n  \
             new runs only (--resume uses the checkpoint's values, and accepts others for the last three): \
             --batch-size {} --learning-rate {} --accumulation {} --precision {} --seed {} \
             --steps {} --log-every {} --sampling-steps {}\n  \
             fixed: warm-up over {} updates, {cooldown}, {clipping}; grids by {solver}.",
            self.out,
            self.save_every,
            self.sample_every,
            self.sample_count,
            train.batch_size,
            train.optimizer.learning_rate,
            train.accumulation,
            train.precision,
            train.seed,
            train.steps,
            train.log_every,
            self.sampling.steps,
            train.warmup_steps,
        )
    }
}

#[derive(Args)]
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
    /// Parts into which a batch is divided to save memory; --batch-size must be a multiple
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=65_536))]
    accumulation: Option<usize>,
    /// Precision of products: highest or high; bf16 or f16 (with the feature f16)
    #[arg(long, value_name = "P", value_parser = precision)]
    precision: Option<Precision>,
    /// Seed of all random numbers
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(0..=u64::MAX))]
    seed: Option<u64>,
    /// Directory for checkpoint/, samples/, metrics.jsonl, loss.png and data.json, which names the
    /// training images; a new run renames metrics.jsonl and samples/ of an earlier run to
    /// metrics-old.jsonl and samples-old/
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue the run in --out
    #[arg(long)]
    resume: bool,
    /// Updates from one checkpoint to the next; one is always written at the end
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    pub save_every: Option<u64>,
    /// Updates from one grid of samples to the next; one is always drawn at the end
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    pub sample_every: Option<u64>,
    /// Images in a grid
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1024))]
    pub sample_count: Option<usize>,
    /// Sampling steps for the grids
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<usize>(1..=1000))]
    pub sampling_steps: Option<usize>,
    /// Updates from one line in metrics.jsonl to the next
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = whole::<u64>(1..=1_000_000_000))]
    log_every: Option<u64>,
    /// Train on the CPU, even in a build for a GPU
    #[arg(long)]
    cpu: bool,
}

impl TrainArgs {
    /// Replaces the values of the configuration for which an option was given.
    fn apply(&self, config: &TrainConfig) -> TrainConfig {
        TrainConfig {
            seed: self.seed.unwrap_or(config.seed),
            steps: self.steps.unwrap_or(config.steps),
            batch_size: self.batch_size.unwrap_or(config.batch_size),
            optimizer: AdamConfig {
                learning_rate: self.learning_rate.unwrap_or(config.optimizer.learning_rate),
                ..config.optimizer
            },
            accumulation: self.accumulation.unwrap_or(config.accumulation),
            precision: self.precision.unwrap_or(config.precision),
            log_every: self.log_every.unwrap_or(config.log_every),
            ..config.clone()
        }
    }
}

pub fn run(
    recipe: &Recipe,
    args: &TrainArgs,
    load: impl FnOnce() -> Result<DataSet>,
) -> Result<ExitCode> {
    let out = args.out.clone().unwrap_or_else(|| recipe.out.into());
    let saved = find(&out, args.resume)?;
    let network = saved.as_ref().map_or(Ok(recipe.network.clone()), Checkpoint::network)?;
    let config = args.apply(saved.as_ref().map_or(&recipe.train, Checkpoint::train_config));
    config.validate()?;

    let set = load()?;
    check_shape(&set, network.channels, network.image_size)?;
    let (identity, identity_file) = (Identity::of(&set), out.join("data.json"));
    let known = saved.is_some() && identity.check(&identity_file)?;
    let device = device::pick(args.cpu)?;
    let mut trainer = begin(recipe, saved.as_ref(), network, config, &device)?;
    let mut sampling = recipe.sampling;
    if let Some(&run) = saved.as_ref().and_then(Checkpoint::sampling) {
        sampling = run;
    }
    sampling.steps = args.sampling_steps.unwrap_or(sampling.steps);
    trainer.set_sampling(sampling)?;
    // From here on no other process changes the directory. Nothing in it has been changed yet.
    trainer.claim(out.join("checkpoint")).map_err(in_our_words)?;
    let samples = out.join("samples");
    let written = ["data.json", "loss.png", "metrics.jsonl"];
    files::clear_leftovers(&out, |name| written.contains(&name));
    files::clear_leftovers(&samples, |name| name.starts_with("step-"));
    if saved.is_none() && fs::read_dir(&samples).is_ok_and(|mut grids| grids.next().is_some()) {
        files::put_aside(&samples)?;
    }
    files::create_dir(&samples)?;
    if !known {
        if saved.is_some() {
            // Images in another number are not those of the run, and must not be recorded as such.
            trainer.next_batch(&set.images)?;
            let unknown = "the images with which the run began are unknown";
            let file = identity_file.display();
            err!("warning: {file} does not exist: {unknown}; it now names {identity}");
        }
        identity.write(&identity_file)?;
    }
    let (step, steps) = (trainer.steps(), trainer.config().steps);
    announce(&trainer, &set, &out);
    device::check_speed(trainer.config().precision, &device);

    let sampler = sampling.sampler(trainer.diffusion())?;
    let mut watch = Watch::new(recipe, args, &out, identity, sampler, &trainer)?;
    let say = watch.progress.say();
    interrupt::watch(move || {
        say("stopping after this step; press Ctrl-C again to quit without saving")
    })?;
    if step < steps {
        let config = trainer.config();
        out!(
            "steps    {} to {steps}, batches of {}, seed {}",
            step + 1,
            config.batch_size,
            config.seed
        );
    } else {
        out!(
            "nothing to train: the run is at step {step} of {steps}; use --steps to train further"
        );
    }
    watch.progress.start();
    let complete = match trainer.fit(&set.images, &mut watch) {
        Ok(()) => watch.finish(&trainer, step),
        Err(error) => Err(watch.rescue(&trainer, step, error)),
    };
    watch.progress.finish();
    if complete? {
        if let Some(loss) = watch.progress.smooth_loss() {
            out!("loss     {loss:.4}, smoothed, at step {}", trainer.steps());
        }
        if step < steps {
            out!("time     {}", duration(watch.progress.elapsed()));
        }
        out!("grid     {}", watch.grid(trainer.steps()).display());
        out!("done: {}", out.display());
        return Ok(ExitCode::SUCCESS);
    }
    let step = trainer.steps();
    out!(
        "stopped and saved at step {step} of {steps}; resume with: {}",
        resume_command(recipe.example)
    );
    Ok(ExitCode::from(interrupt::EXIT_CODE))
}

/// Opens the checkpoint of a run to be resumed. Returns an error if `out` does not fit `resume`.
fn find(out: &Path, resume: bool) -> Result<Option<Checkpoint>> {
    if out.exists() && !out.is_dir() {
        return Err(format!("--out is {}; it must be a directory", out.display()).into());
    }
    match Checkpoint::open(out.join("checkpoint")) {
        Ok(saved) if resume => Ok(Some(saved)),
        Ok(saved) => Err(format!(
            "{} holds a run at step {}; continue it with --resume, or choose another --out",
            saved.dir().display(),
            saved.step()
        )
        .into()),
        Err(Error::NoCheckpoint { .. }) if !resume => Ok(None),
        Err(error @ Error::NoCheckpoint { .. }) => {
            Err(format!("{error}; --resume requires the --out of a saved run").into())
        }
        Err(error) => Err(error.into()),
    }
}

fn begin(
    recipe: &Recipe,
    saved: Option<&Checkpoint>,
    network: UNetConfig,
    config: TrainConfig,
    device: &Device,
) -> Result<Trainer<UNetConfig>> {
    Ok(match saved {
        Some(saved) => {
            Trainer::resume(saved.dir(), network, config, saved.diffusion().clone(), device)
                .map_err(in_our_words)?
        }
        None => Trainer::new(network, config, (recipe.diffusion)()?, device)?,
    })
}

/// Adds to an error of beginning or resuming what the user of this program can do.
fn in_our_words(error: Error) -> Box<dyn std::error::Error + Send + Sync> {
    let remedy = match &error {
        Error::ConfigMismatch { field, found, expected, .. } => {
            let option = match field.as_str() {
                "train.batch_size" => "--batch-size",
                "train.optimizer.learning_rate" => "--learning-rate",
                "train.accumulation" => "--accumulation",
                "train.precision" => "--precision",
                "train.seed" => "--seed",
                _ => return error.into(),
            };
            return format!(
                "{field} is {found} in the checkpoint, but {expected} was requested; omit {option} \
                 to continue the run, or begin a new run with another --out"
            )
            .into();
        }
        Error::Occupied { .. } => "move it away, or choose another --out",
        Error::Locked { .. } => "wait until it ends, or choose another --out",
        _ => return error.into(),
    };
    format!("{error}; {remedy}").into()
}

fn announce(trainer: &Trainer<UNetConfig>, set: &DataSet, out: &Path) {
    use ddpm::ImageSource;

    let weights: usize = trainer.vars().values().map(|v| v.elem_count()).sum();
    out!("data     {}, {} images", set.about, grouped(set.images.len()));
    out!("network  {} weights", grouped(weights));
    out!("device   {}", device::describe(trainer.device()));
    out!("output   {}", out.display());
}
