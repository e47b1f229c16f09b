use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::train::{Checkpoint, Observer, Published, Run};

/// Saves a checkpoint whenever a published number is better than all earlier ones.
///
/// Its directory holds `checkpoint`, which is written as [`Trainer::save`](crate::Trainer::save) does, and `best.json`,
/// a [`Best`]: the name, the value and the step. A resumed run continues from this value, also if it was reached after
/// the step at which the run is resumed, because such a run repeats its steps. A new run puts the directory of another
/// one [aside](files::put_aside), with a warning. The same happens
///
/// - if the directory belongs to another value,
/// - if its checkpoint has a configuration that the run has left, for example because it was saved after a change, and
///   the run continues from before the change with another one,
/// - if its checkpoint would be replaced by one of an earlier step,
/// - if its record or `checkpoint.json` is damaged. The other files of the checkpoint are not read.
///
/// If the value is measured in another way from some step on, such as on other images, put the directory aside before
/// the run continues. NaN and infinite values are never the best. No older checkpoints are kept.
///
/// ```no_run
/// # use ddpm::data::Images;
/// # use ddpm::{Result, Trainer, UNetConfig};
/// use ddpm::observe::{HeldOutLoss, SaveBest};
///
/// # fn fit(mut trainer: Trainer<UNetConfig>, images: Images, held_out: Images) -> Result<()> {
/// let loss = HeldOutLoss::steps(500, &held_out);
/// trainer.fit(&images, (loss, SaveBest::lowest(HeldOutLoss::NAME, "out/best")))
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SaveBest {
    metric: String,
    higher_is_better: bool,
    dir: PathBuf,
    best: Option<Best>,
    /// The step of the checkpoint in the directory.
    saved: Option<u64>,
}

/// The best value so far, as `best.json` holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Best {
    /// The name of the published number.
    pub metric: String,
    /// The value.
    pub value: f64,
    /// The number of updates.
    pub step: u64,
    /// Whether higher values are better.
    pub higher_is_better: bool,
}

impl Best {
    /// Reads the best value from the directory of a [`SaveBest`]. Returns `None` if the directory holds no best value.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn read(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = file(dir.as_ref());
        let text = files::existing(fs::read(&path)).map_err(Error::io(&path))?;
        let Some(text) = text else { return Ok(None) };
        let best = serde_json::from_slice(&text);
        best.map(Some).map_err(|error| Error::damaged(path, error.to_string()))
    }
}

impl SaveBest {
    /// Saves to `dir` whenever the number of this name is lower than all earlier ones.
    pub fn lowest(metric: impl Into<String>, dir: impl Into<PathBuf>) -> Self {
        let (metric, dir) = (metric.into(), dir.into());
        Self { metric, higher_is_better: false, dir, best: None, saved: None }
    }

    /// Saves to `dir` whenever the number of this name is higher than all earlier ones.
    pub fn highest(metric: impl Into<String>, dir: impl Into<PathBuf>) -> Self {
        Self { higher_is_better: true, ..Self::lowest(metric, dir) }
    }

    /// The best value so far.
    pub fn best(&self) -> Option<&Best> {
        self.best.as_ref()
    }

    /// The directory of the checkpoint.
    pub fn checkpoint(&self) -> PathBuf {
        self.dir.join("checkpoint")
    }

    fn is_better(&self, value: f64) -> bool {
        value.is_finite()
            && self.best.as_ref().is_none_or(|best| match self.higher_is_better {
                true => value > best.value,
                false => value < best.value,
            })
    }

    /// Reads the directory that an earlier part of the run left.
    fn find(&mut self) -> Result<()> {
        self.best = Best::read(&self.dir)?;
        self.saved = Checkpoint::saved_step(&self.checkpoint())?;
        Ok(())
    }

    fn put_aside(&mut self, run: &Run<'_>, reason: &str) -> Result<()> {
        let aside = files::put_aside(&self.dir)?;
        run.warn(&format!("{} is now {}: {reason}", self.dir.display(), aside.display()));
        (self.best, self.saved) = (None, None);
        self.create()
    }

    fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir))
    }

    fn save(&mut self, run: &Run<'_>, value: f64) -> Result<()> {
        if self.saved.is_some_and(|saved| saved > run.step()) {
            self.put_aside(run, "its checkpoint is of a later step")?;
        }
        run.working("saving");
        self.create()?;
        let saved = run.save_one(self.checkpoint());
        run.working("");
        for warning in saved?.warnings {
            run.warn(&format!("{warning:?}"));
        }
        let (metric, higher_is_better) = (self.metric.clone(), self.higher_is_better);
        let best = Best { metric, value, step: run.step(), higher_is_better };
        let mut json = serde_json::to_vec(&best).map_err(Error::external)?;
        json.push(b'\n');
        // The checkpoint is written first. If the process is killed in between, the resumed run saves this step again.
        files::write(file(&self.dir), &json)?;
        (self.saved, self.best) = (Some(run.step()), Some(best));
        Ok(())
    }
}

impl Observer for SaveBest {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        self.create()?;
        match self.find() {
            Err(error @ Error::Damaged { .. }) => self.put_aside(run, &error.to_string())?,
            found => found?,
        }
        let is_used = self.best.is_some() || self.saved.is_some();
        let is_other = self.best.as_ref().is_some_and(|best| {
            (&best.metric, best.higher_is_better) != (&self.metric, self.higher_is_better)
        });
        if is_other {
            self.put_aside(run, "it is of another value")?;
        } else if is_used && run.step() == 0 {
            self.put_aside(run, "it is of an earlier run")?;
        }
        match run.check_save(self.checkpoint()) {
            Err(error @ Error::ConfigMismatch { .. }) => {
                self.put_aside(run, &format!("it is not of this run: {error}"))?;
                run.check_save(self.checkpoint())
            }
            // Only a better value of an earlier step would replace it.
            Err(_) if self.saved.is_some_and(|saved| saved > run.step()) => Ok(()),
            checked => checked,
        }
    }

    fn on_published(&mut self, run: &Run<'_>, published: &[Published]) -> Result<()> {
        for published in published {
            if let Some(value) = published.scalar()
                && published.name == self.metric
                && self.is_better(value)
            {
                self.save(run, value)?;
            }
        }
        Ok(())
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("best.json")
}
