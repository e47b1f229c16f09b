//! What happens while the network trains.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ddpm::{Metrics, Observer, Sampler, Trainer, UNetConfig};

use super::cli::Result;
use super::metrics::{self, Log};
use super::progress::Progress;
use super::train::{Recipe, TrainArgs};
use super::{curve, files, interrupt, pictures};

/// The same for every grid, so that one sees what training changes.
const SAMPLE_SEED: u64 = 0;

pub struct Watch {
    pub progress: Progress,
    out: PathBuf,
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
        trainer: &Trainer<UNetConfig>,
    ) -> Result<Self> {
        let sampling_steps = args.sampling_steps.unwrap_or(recipe.sampling_steps);
        let sampler = Sampler::new(trainer.diffusion(), recipe.solver, sampling_steps)?;
        Ok(Self {
            progress: Progress::new(trainer.config().steps, trainer.steps()),
            out: out.into(),
            log: Log::open(&out.join("metrics.jsonl"), trainer.steps())?,
            sampler: sampler.clip_denoised(true),
            sample_count: args.sample_count.unwrap_or(recipe.sample_count),
            sample_every: args.sample_every.unwrap_or(recipe.sample_every),
            save_every: args.save_every.unwrap_or(recipe.save_every),
        })
    }

    /// The end of a run that began at step `from`: saves, and draws grid and curve. Whether that
    /// was all, or the user wanted to stop.
    pub fn finish(&mut self, trainer: &Trainer<UNetConfig>, from: u64) -> Result<bool> {
        let complete = trainer.steps() >= trainer.config().steps;
        let grid = self.grid(trainer.steps());
        if trainer.steps() > from {
            if complete && grid.exists() {
                // An earlier run's: it must not pass for this one's if we are stopped before ours.
                fs::remove_file(&grid).map_err(|e| files::at(&grid, e))?;
            }
            self.save(trainer)?;
        }
        let history = metrics::history(&self.out.join("metrics.jsonl"))?;
        if let Some(picture) = curve::draw("Training loss", &history)? {
            files::write(&self.out.join("loss.png"), &pictures::png(&picture)?)?;
        }
        Ok(complete && (grid.is_file() || self.sample(trainer)?))
    }

    fn save(&mut self, trainer: &Trainer<UNetConfig>) -> ddpm::Result<()> {
        self.progress.note("saving");
        let saved = trainer.save(self.out.join("checkpoint"));
        self.progress.note("");
        saved
    }

    fn grid(&self, step: u64) -> PathBuf {
        self.out.join("samples").join(format!("step-{step:06}.png"))
    }

    /// Draws a grid; false if the user stopped it.
    fn sample(&mut self, trainer: &Trainer<UNetConfig>) -> Result<bool> {
        let UNetConfig { channels, image_size, .. } = *trainer.model().config();
        let shape = (self.sample_count, channels, image_size, image_size);
        let model = trainer.ema_model()?;
        let total = self.sampler.timesteps().len();
        let mut images = None;
        for step in self.sampler.steps(&model, shape, SAMPLE_SEED, trainer.device())? {
            if interrupt::stopped() {
                return Ok(false);
            }
            let step = step?;
            self.progress.note(&format!("sampling, step {} of {total}", step.index + 1));
            images = Some(step.x);
        }
        let images = images.ok_or("the sampler has no steps")?;
        let path = self.grid(trainer.steps());
        files::write(&path, &pictures::png(&pictures::grid(&images)?)?)?;
        self.progress.note("");
        Ok(true)
    }
}

impl Observer<UNetConfig> for Watch {
    fn on_metrics(&mut self, _: &Trainer<UNetConfig>, metrics: &Metrics) -> ddpm::Result<()> {
        self.progress.loss(metrics.step, metrics.loss.into());
        self.log.append(metrics).map_err(ddpm::Error::external)
    }

    fn on_step(&mut self, trainer: &Trainer<UNetConfig>) -> ddpm::Result<ControlFlow<()>> {
        let step = trainer.steps();
        self.progress.advance(step);
        // At the end, `finish` saves and samples; also if the user wants the end now.
        let due = |every| step.is_multiple_of(every) && step < trainer.config().steps;
        if due(self.save_every) && !interrupt::stopped() {
            self.save(trainer)?;
        }
        if due(self.sample_every) && !interrupt::stopped() {
            self.sample(trainer).map_err(ddpm::Error::external)?;
        }
        Ok(if interrupt::stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }
}
