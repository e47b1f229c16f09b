//! The observer of a training run: metrics, checkpoints, grids and the loss curve.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ddpm::{Metrics, Observer, Sampler, Trainer, UNetConfig};

use super::cli::{Result, one_line};
use super::identity::Identity;
use super::interrupt::Interrupted;
use super::metrics::{self, Log};
use super::progress::Progress;
use super::train::{Recipe, TrainArgs};
use super::{curve, draw, files, interrupt, pictures};

/// The seed of every grid, so that grids show the effect of training.
const SAMPLE_SEED: u64 = 0;

pub struct Watch {
    pub progress: Progress,
    out: PathBuf,
    identity: Identity,
    log: Log,
    sampler: Sampler,
    sample_count: usize,
    sample_every: u64,
    save_every: u64,
}

impl Watch {
    pub fn new(
        recipe: &Recipe,
        args: &TrainArgs,
        out: &Path,
        identity: Identity,
        sampler: Sampler,
        trainer: &Trainer<UNetConfig>,
    ) -> Result<Self> {
        Ok(Self {
            progress: Progress::new(trainer.config().steps, trainer.steps()),
            out: out.into(),
            identity,
            log: Log::open(&out.join("metrics.jsonl"), trainer.steps())?,
            sampler,
            sample_count: args.sample_count.unwrap_or(recipe.sample_count),
            sample_every: args.sample_every.unwrap_or(recipe.sample_every),
            save_every: args.save_every.unwrap_or(recipe.save_every),
        })
    }

    /// Ends a run that began at step `from`: saves, and draws grid and curve. Returns whether the run is complete;
    /// otherwise the user stopped it.
    pub fn finish(&mut self, trainer: &Trainer<UNetConfig>, from: u64) -> Result<bool> {
        let complete = trainer.steps() >= trainer.config().steps;
        let grid = self.grid(trainer.steps());
        if trainer.steps() > from {
            let removed = if complete && grid.exists() {
                // A grid from before the run was resumed must not remain if the run is stopped before drawing.
                fs::remove_file(&grid)
            } else {
                Ok(())
            };
            self.save(trainer)?;
            removed.map_err(|e| files::at(&grid, e))?;
        }
        self.restore(trainer.steps() + 1)?;
        self.draw_curve()?;
        if !complete || grid.is_file() {
            return Ok(complete);
        }
        self.draw_grid(trainer)
    }

    /// Saves a run that began at step `from` after an error. Returns the error with the outcome of saving.
    pub fn rescue(
        &mut self,
        trainer: &Trainer<UNetConfig>,
        from: u64,
        error: ddpm::Error,
    ) -> Box<dyn std::error::Error + Send + Sync> {
        let step = trainer.steps();
        // Weights that are not finite need not be saved.
        if step == from || matches!(error, ddpm::Error::NonFinite { .. }) {
            return error.into();
        }
        match self.save(trainer) {
            Ok(()) => {
                format!("{error:?}; the run was saved at step {step}; continue it with --resume")
                    .into()
            }
            Err(other) => {
                format!("{error:?}; saving the run at step {step} failed, too: {other:?}").into()
            }
        }
    }

    fn save(&mut self, trainer: &Trainer<UNetConfig>) -> ddpm::Result<()> {
        self.progress.note("saving");
        let saved = trainer.save(self.out.join("checkpoint"));
        self.progress.note("");
        let say = self.progress.say();
        saved?.warnings.iter().for_each(|warning| say(&format!("warning: {warning:?}")));
        Ok(())
    }

    fn draw_curve(&mut self) -> Result<()> {
        self.progress.note("drawing the loss");
        let history = metrics::history(&self.out.join("metrics.jsonl"))?;
        if let Some(picture) = curve::draw("Training loss", &history)? {
            files::write(&self.out.join("loss.png"), &pictures::png(&picture)?)?;
        }
        self.progress.note("");
        Ok(())
    }

    /// Prints a warning, because a missing picture is no reason to end a run.
    fn warn(&self, drawn: Result<()>) {
        if let Err(error) = drawn {
            self.progress.say()(&format!("warning: {}", one_line(error)));
        }
    }

    /// The path of the grid of a step.
    pub fn grid(&self, step: u64) -> PathBuf {
        self.out.join("samples").join(format!("step-{step:06}.png"))
    }

    /// Draws a grid. Returns false if the user stopped it.
    fn draw_grid(&mut self, trainer: &Trainer<UNetConfig>) -> Result<bool> {
        let UNetConfig { channels, image_size, .. } = *trainer.network();
        let shape = (self.sample_count, channels, image_size, image_size);
        let model = trainer.ema_model()?;
        let total = draw::steps(&self.sampler, self.sample_count, trainer.device());
        let progress = &mut self.progress;
        let drawn =
            draw::draw(&self.sampler, &model, shape, SAMPLE_SEED, trainer.device(), |step| {
                progress.note(&format!("sampling, step {} of {total}", step.done));
                Ok(())
            });
        self.progress.note("");
        let pixels = match drawn {
            Err(error) if error.is::<Interrupted>() => return Ok(false),
            drawn => drawn?,
        };
        let picture = pictures::grid(&pixels, (channels, image_size, image_size))?;
        files::write(&self.grid(trainer.steps()), &pictures::png(&picture)?)?;
        Ok(true)
    }

    /// Creates the directory of the run again, with a warning, if it was removed before the metrics of `step`.
    /// Otherwise lines would go to a file without a name.
    fn restore(&mut self, step: u64) -> Result<()> {
        if !self.log.is_removed() {
            return Ok(());
        }
        self.log.begin_again()?;
        files::create_dir(&self.out.join("samples"))?;
        self.identity.write(&self.out.join("data.json"))?;
        let log = self.out.join("metrics.jsonl");
        let removed = "was removed during the run; its lines are lost, up to step";
        self.progress.say()(&format!("warning: {} {removed} {}", log.display(), step - 1));
        Ok(())
    }
}

impl Observer<UNetConfig> for Watch {
    fn on_metrics(&mut self, _: &Trainer<UNetConfig>, metrics: &Metrics) -> ddpm::Result<()> {
        self.progress.loss(metrics.step, metrics.loss.into());
        let logged = self.restore(metrics.step).and_then(|()| self.log.append(metrics));
        logged.map_err(ddpm::Error::external)
    }

    fn on_step(&mut self, trainer: &Trainer<UNetConfig>) -> ddpm::Result<ControlFlow<()>> {
        let step = trainer.steps();
        self.progress.advance(step);
        // At the end, or when the user stops the run, `finish` saves and draws samples.
        let due = |every| step.is_multiple_of(every) && step < trainer.config().steps;
        if due(self.save_every) && !interrupt::stopped() {
            self.save(trainer)?;
            let drawn = self.draw_curve();
            self.warn(drawn);
        }
        if due(self.sample_every) && !interrupt::stopped() {
            let drawn = self.draw_grid(trainer).map(drop);
            self.warn(drawn);
        }
        Ok(if interrupt::stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }
}
