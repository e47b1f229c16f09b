use std::error::Error as StdError;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::Value;

use super::arguments::{resume_command, with_options};
use super::datasets::DataSet;
use super::device::{check_speed, describe};
use super::identity::Identity;
use super::network::NetworkConfig;
use super::plan::{RunDir, RunPlan};
use super::print::{err, grouped, out};
use super::recipe::{Recipe, TrainArgs};
use super::result::Result;
use super::run_config::RunConfig;
use super::run_files::RunFiles;
use super::sets::try_out;
use super::watching::{Watching, Way};
use crate::data::{Dataset, hold_out};
use crate::error::Error;
use crate::observe::{
    LossCurve, MetricsFile, Progress, SampleGrid, SaveEvery, StopOnSignal, duration, is_removed,
};
use crate::sample::Guidance;
use crate::train::{Checkpoint, Trainer, on_metrics};

/// Begins or resumes the run of a recipe, trains, saves, and draws samples. `load` reads the images.
///
/// Returns success if the run is complete, and the exit code 130 if the user stopped it.
///
/// # Errors
/// Returns an error if the run cannot begin or continue there with these options and images, and the errors of training
/// and saving. After an error of training the run is saved.
pub fn train<N: NetworkConfig, D: Dataset>(
    recipe: &Recipe<N>,
    args: &TrainArgs,
    load: impl FnOnce() -> Result<DataSet<D>>,
) -> Result<ExitCode> {
    RunPlan::new(RunDir::open(args, recipe.out)?, recipe, args)?.train(load)
}

impl<N: NetworkConfig> RunPlan<N> {
    /// Reads the images by `load`, and trains as [`train`] does.
    ///
    /// # Errors
    /// Returns the errors of [`train`].
    pub fn train<D: Dataset>(self, load: impl FnOnce() -> Result<DataSet<D>>) -> Result<ExitCode> {
        begin(self, &load()?)
    }
}

fn begin<N: NetworkConfig, D: Dataset>(plan: RunPlan<N>, set: &DataSet<D>) -> Result<ExitCode> {
    let RunPlan { args, recipe, files, config, device, extractor, resumed } = plan;
    let (args, recipe, extractor) = (&args, &recipe, extractor.as_deref());

    let network = resumed.as_ref().map_or(&recipe.network, |(_, run)| run.architecture());
    let mut network = network.clone();
    let guidance = condition(&mut network, args, set, resumed.is_none())?;
    set.check_shape(network.image_shape())?;
    extractor.map_or(Ok(()), |extractor| try_out(extractor, network.image_shape()))?;
    let (saved, mut trainer) = match resumed {
        Some((saved, trainer)) => (Some(saved), trainer),
        None => (None, Trainer::new(network, config, recipe.diffusion.clone(), &device)?),
    };
    let before = match &saved {
        Some(_) => Identity::of_run(&files.identity, trainer.history())?,
        None => None,
    };
    let held_out = match &saved {
        Some(_) => before.as_ref().map_or(0, |before| before.held_out),
        None => recipe.held_out,
    };
    let held_out = args.held_out.unwrap_or(held_out);
    let identity = Identity::of(set).holding_out(held_out);
    // Also with --change, because each class vector of the network belongs to a folder.
    if let Some(before) = before.as_ref().filter(|_| trainer.architecture().classes().is_some()) {
        identity.check_classes(before, &files.identity)?;
    }
    let other_images = before.as_ref().is_some_and(|before| !identity.has_images_of(before));
    if let (Some(before), true, false) = (&before, other_images, args.change) {
        return Err(identity.mismatch(before, &files.identity).into());
    }
    let parts = match held_out {
        0 => None,
        count => Some(hold_out(&set.images, count).map_err(|e| format!("--held-out: {e}"))?),
    };
    let images = parts.as_ref().map_or(&set.images as &dyn Dataset, |(train, _)| train);
    let mut sampling = recipe.sampling;
    sampling.guidance = sampling.guidance.or(guidance);
    if let Some(&run) = saved.as_ref().and_then(Checkpoint::sampling) {
        sampling = run;
    }
    sampling.steps = args.sampling_steps.unwrap_or(sampling.steps);
    trainer.set_sampling(sampling)?;
    // From here on, no other process changes the directory. This process has not changed it yet.
    trainer.claim(&files.checkpoint).map_err(with_options)?;
    files.prepare(saved.is_none())?;
    if saved.is_none() {
        let recipe = Recipe { sampling, held_out, ..recipe.clone() };
        RunConfig::new(&trainer, &recipe, set.pictures.clone()).write(&files.config)?;
    }
    if other_images {
        trainer.record_change(Identity::FIELD, value(&before)?, value(&identity)?)?;
        // Records the number of images in the history.
        trainer.next_batch(images)?;
        // After an interruption, only the history of the checkpoint names the new images.
        for warning in trainer.save(&files.checkpoint)?.warnings {
            err(format_args!("warning: {warning}"));
        }
        out(format_args!("changed  the images to {identity}"));
        files.keep_best()?;
        identity.write(&files.identity)?;
    } else if !identity.is_in(&files.identity)? {
        if saved.is_some() && before.is_none() {
            // Another number of images shows that these are not the images of the run. They must not be recorded as the
            // images of the run.
            trainer.next_batch(images)?;
            let unknown = "the images with which the run began are unknown";
            let file = files.identity.display();
            err(format_args!("warning: {file} does not exist: {unknown}; it now names {identity}"));
        } else if saved.is_some() {
            // The images were changed, and the process was killed after it saved the change.
            files.keep_best()?;
        }
        identity.write(&files.identity)?;
    } else if identity.completes(&files.identity)? {
        identity.write(&files.identity)?;
    }
    if let Some(extractor) = extractor {
        let way = Way::of(recipe, trainer.diffusion(), sampling, extractor);
        way.record(&files.judge, || files.keep_best())?;
    }
    if let Some(before) = saved.as_ref().map(|saved| saved.train_config().steps)
        && before != trainer.config().steps
        && trainer.config().rate_depends_on_steps()
    {
        err(format_args!(
            "warning: the run had --steps {before}; its learning rate depends on --steps, and changes"
        ));
    }
    let recorded = saved.as_ref().map_or(0, |saved| saved.history().len());
    let changes = trainer.history().iter().skip(recorded);
    for change in changes.filter(|change| change.field != Identity::FIELD) {
        out(format_args!("changed  {} from {} to {}", change.field, change.from, change.to));
    }
    announce(&trainer, set, held_out, &files.out);
    check_speed(trainer.config().precision, &device);
    let held_out = parts.as_ref().map(|(_, held_out)| held_out as &dyn Dataset);
    let directories = (&*files.best, &*files.tensorboard);
    let watching = Watching::new(recipe, (images, held_out), extractor, directories);
    fit(recipe, &mut trainer, images, watching, (&identity, &files))
}

fn value(images: &impl Serialize) -> Result<Value> {
    Ok(serde_json::to_value(images)?)
}

/// Adds the classes of the images to a new network, if the user asks for that. Returns the guidance of its grids.
///
/// # Errors
/// Returns an error if the images or the network of the run have no classes.
fn condition(
    network: &mut impl NetworkConfig,
    args: &TrainArgs,
    set: &DataSet<impl Dataset>,
    new: bool,
) -> Result<Option<Guidance>> {
    let classes = set.images.classes();
    match (args.conditional, new, network.classes()) {
        (true, _, _) if classes == 0 => {
            Err(format!("--conditional needs images with classes; {} have none", set.about).into())
        }
        (true, false, None) => {
            Err("the run in --out is not conditional; omit --conditional to continue it".into())
        }
        (true, true, _) => {
            network.set_classes(classes);
            Ok(Some(Guidance::new(GUIDANCE)))
        }
        (false, _, Some(_)) if classes == 0 => {
            let expected = "pass --conditional, so that the folders of the pictures are classes";
            Err(format!("the network has classes, and {} have none; {expected}", set.about).into())
        }
        _ => Ok(None),
    }
}

/// The scale of the guidance of grids: enough that each digit is of the class asked for.
const GUIDANCE: f64 = 2.0;

/// Trains with all observers, and reports the result.
fn fit<N: NetworkConfig>(
    recipe: &Recipe<N>,
    trainer: &mut Trainer<N>,
    images: &dyn Dataset,
    mut watching: Watching<'_>,
    (identity, files): (&Identity, &RunFiles),
) -> Result<ExitCode> {
    let (step, steps) = (trainer.steps(), trainer.config().steps);
    let progress = Progress::new().showing(watching.shown());
    let say = progress.clone();
    let stop = StopOnSignal::install(move || {
        say.say("stopping after this step; press Ctrl-C again to quit without saving");
    })?;
    if step < steps {
        let (batch, seed) = (trainer.config().batch_size, trainer.config().seed);
        out(format_args!("steps    {} to {steps}, batches of {batch}, seed {seed}", step + 1));
    } else {
        let further = "use --steps to train further";
        out(format_args!("nothing to train: the run is at step {step} of {steps}; {further}"));
    }
    let mut save = SaveEvery::steps(recipe.save_every, &files.checkpoint);
    let mut grid =
        SampleGrid::steps(recipe.sample_every, &files.samples).count(recipe.sample_count);
    // The observers recreate only their own files.
    let restore = || {
        if is_removed(&files.identity) {
            fs::create_dir_all(&files.samples).map_err(Error::io(&files.samples))?;
            identity.write(&files.identity).map_err(Error::external)?;
        }
        Ok(())
    };
    let observers = (
        progress.clone(),
        stop,
        on_metrics(|_| restore()),
        MetricsFile::new(&files.metrics),
        &mut save,
        LossCurve::steps(recipe.save_every, &files.metrics, &files.curve),
        &mut grid,
        watching.observers(),
    );
    let fitted = trainer.fit(images, observers).and_then(|()| restore());
    let now = trainer.steps();
    fitted.map_err(|error| -> Box<dyn StdError + Send + Sync> {
        if now == step || save.saved_step() != now {
            return error.into();
        }
        format!("{error:?}; the run was saved at step {now}; continue it with --resume").into()
    })?;
    let grid = grid.path(now);
    if now < steps || !grid.is_file() {
        let command = resume_command(recipe.cargo_target);
        out(format_args!("stopped and saved at step {now} of {steps}; resume with: {command}"));
        return Ok(ExitCode::from(StopOnSignal::EXIT_CODE));
    }
    if let Some(loss) = progress.smooth_loss() {
        out(format_args!("loss     {loss:.4}, smoothed, at step {now}"));
    }
    watching.report();
    if step < steps {
        out(format_args!("time     {}", duration(progress.elapsed())));
    }
    out(format_args!("grid     {}", grid.display()));
    out(format_args!("done: {}", files.out.display()));
    Ok(ExitCode::SUCCESS)
}

fn announce(
    trainer: &Trainer<impl NetworkConfig>,
    set: &DataSet<impl Dataset>,
    held_out: usize,
    directory: &Path,
) {
    let weights: usize = trainer.vars().values().map(|v| v.elem_count()).sum();
    let (about, count) = (&set.about, grouped(set.images.len()));
    match held_out {
        0 => out(format_args!("data     {about}, {count} images")),
        _ => out(format_args!("data     {about}, {count} images, {} held out", grouped(held_out))),
    }
    if trainer.architecture().classes().is_some() && !set.class_names.is_empty() {
        out(format_args!("classes  {}", listed(&set.class_names)));
    }
    out(format_args!("network  {} weights", grouped(weights)));
    out(format_args!("device   {}", describe(trainer.device())));
    out(format_args!("output   {}", directory.display()));
}

/// Formats names as a list, of which only the beginning is shown if it is long.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
