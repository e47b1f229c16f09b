use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::train::{Observer, Outcome, Run};

/// Saves checkpoints at intervals, at the end of the run, and when the run stops or fails.
///
/// After an error the run is saved, too, unless the error is [`Error::NonFinite`]: such weights are of no use. If
/// saving also fails, the error contains both.
#[derive(Debug, Clone)]
pub struct SaveEvery {
    every: u64,
    dir: PathBuf,
    saved: u64,
    /// Whether a save has failed.
    failed: bool,
}

impl SaveEvery {
    /// Saves every `every` updates to `dir`, as [`Trainer::save`](crate::Trainer::save) does. With 0, the observer
    /// saves only at the end.
    ///
    /// When training begins, the observer checks whether the directory can be saved to, as
    /// [`Trainer::claim`](crate::Trainer::claim) does, but without a lock for the whole run.
    pub fn steps(every: u64, dir: impl Into<PathBuf>) -> Self {
        Self { every, dir: dir.into(), saved: 0, failed: false }
    }

    /// The step of the latest checkpoint, or the step at which training began.
    pub fn saved_step(&self) -> u64 {
        self.saved
    }

    fn save(&mut self, run: &Run<'_>) -> Result<()> {
        run.working("saving");
        let saved = run.save(&self.dir);
        run.working("");
        self.failed = saved.is_err();
        for warning in saved?.warnings {
            run.warn(&format!("{warning:?}"));
        }
        self.saved = run.step();
        Ok(())
    }
}

impl Observer for SaveEvery {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        self.saved = run.step();
        run.check_save(&self.dir)
    }

    // After the values of the step reached all observers: a run that is killed before repeats the step.
    fn after_step(&mut self, run: &Run<'_>) -> Result<()> {
        // The end of the run saves in any case.
        if run.step().is_multiple_of(self.every) && !run.is_complete() && !run.is_stopping() {
            self.save(run)?;
        }
        Ok(())
    }

    fn on_end(&mut self, run: &Run<'_>, outcome: Outcome<'_>) -> Result<()> {
        let step = run.step();
        if step == self.saved {
            return Ok(());
        }
        match outcome {
            Outcome::Failed(Error::NonFinite { .. }) => Ok(()),
            Outcome::Failed(_) if self.failed => Ok(()),
            Outcome::Failed(error) => self.save(run).map_err(|other| {
                let both =
                    format!("{error:?}; saving the run at step {step} failed, too: {other:?}");
                Error::external(both)
            }),
            Outcome::Complete | Outcome::Stopped => self.save(run),
        }
    }
}
