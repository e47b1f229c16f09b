use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use crate::denoiser::{Condition, Denoiser};
use crate::error::{Error, Result};
use crate::eval::Generator;
use crate::train::{Observer, Outcome, Picture, Run};
use crate::{files, pictures};

/// Draws grids of samples at intervals, and one when the run is complete.
///
/// The grids are also [published](Run::publish) as `samples`. The samples are drawn from the averaged weights, with the
/// sampler settings that the run [records](crate::Trainer::set_sampling). A network with classes draws one class after
/// the other. The seed is always the same, so that grids show the effect of training. A failure to draw or write a grid
/// is a warning during the run, and an error at the end. A run that stops draws no last grid.
#[derive(Debug, Clone)]
pub struct SampleGrid {
    every: u64,
    dir: PathBuf,
    count: usize,
    seed: u64,
}

impl SampleGrid {
    /// Draws 64 samples every `every` updates into files of `dir`: `step-000500.png` and so on. With 0, only one grid
    /// is drawn, at the end.
    pub fn steps(every: u64, dir: impl Into<PathBuf>) -> Self {
        Self { every, dir: dir.into(), count: 64, seed: 0 }
    }

    /// Sets the number of samples in a grid. Only a few are in memory at a time.
    #[must_use]
    pub fn count(self, count: usize) -> Self {
        Self { count, ..self }
    }

    /// Sets the seed of the samples. The default is 0.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// The path of the grid of a step.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:06}.png"))
    }

    /// Draws a grid, unless the run is asked to stop in the meantime.
    fn draw(&self, run: &Run<'_>) -> Result<()> {
        let mut sampler = run.sampling().sampler(run.diffusion())?;
        let model = run.ema()?;
        if let Some(classes) = model.classes() {
            sampler = sampler.condition(Condition::each_class(classes, self.count)?);
        }
        let generator = Generator::new(&sampler, run.image_shape(), self.seed, run.device());
        let total = generator.steps(self.count);
        let images = generator.draw(&model, self.count, |drawn| {
            if run.is_stopping() {
                return Ok(ControlFlow::Break(()));
            }
            run.working(&format!("sampling, step {} of {total}", drawn.done));
            Ok(ControlFlow::Continue(()))
        });
        run.working("");
        let Some(images) = images? else { return Ok(()) };
        let picture = pictures::grid_of(images.pixels(), run.image_shape())?;
        let png = pictures::png(&picture)?;
        files::write(self.path(run.step()), &png)?;
        let (width, height) = (picture.width(), picture.height());
        run.publish(
            "samples",
            Picture { width, height, channels: picture.color().channel_count(), png },
        );
        Ok(())
    }
}

impl Observer for SampleGrid {
    fn on_start(&mut self, _: &Run<'_>) -> Result<()> {
        fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir))
    }

    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        if run.is_complete() {
            // A grid from before the run was resumed must not remain if the run stops before the last one is drawn.
            let path = self.path(run.step());
            files::existing(fs::remove_file(&path)).map_err(Error::io(path))?;
        } else if run.step().is_multiple_of(self.every)
            && !run.is_stopping()
            && let Err(error) = self.draw(run)
        {
            run.warn(&format!("{error:?}"));
        }
        Ok(ControlFlow::Continue(()))
    }

    fn on_end(&mut self, run: &Run<'_>, outcome: Outcome<'_>) -> Result<()> {
        match outcome {
            Outcome::Complete if !self.path(run.step()).is_file() => self.draw(run),
            _ => Ok(()),
        }
    }
}
