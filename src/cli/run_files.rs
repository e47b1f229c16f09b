use std::fs;
use std::path::{Path, PathBuf};

use super::print::out;
use super::result::Result;
use crate::error::Error;
use crate::files;
use crate::train::Checkpoint;

/// The files of a run's directory.
#[derive(Debug)]
pub(super) struct RunFiles {
    pub out: PathBuf,
    pub checkpoint: PathBuf,
    pub samples: PathBuf,
    pub metrics: PathBuf,
    pub curve: PathBuf,
    pub best: PathBuf,
    pub judge: PathBuf,
    pub tensorboard: PathBuf,
    pub identity: PathBuf,
    pub config: PathBuf,
}

impl RunFiles {
    /// The files of the run in the directory `out`, or else in `usual`.
    pub fn of(out: Option<&Path>, usual: &str) -> Self {
        let out = out.unwrap_or(Path::new(usual));
        Self {
            checkpoint: out.join("checkpoint"),
            samples: out.join("samples"),
            metrics: out.join("metrics.jsonl"),
            curve: out.join("loss.png"),
            best: out.join("best"),
            judge: out.join("judge.json"),
            tensorboard: out.join("tensorboard"),
            identity: out.join("data.json"),
            config: out.join("config.json"),
            out: out.into(),
        }
    }

    /// Opens the checkpoint of a run to be resumed.
    ///
    /// # Errors
    /// Returns an error if the directory does not fit `resume`.
    pub fn find(&self, resume: bool) -> Result<Option<Checkpoint>> {
        let out = &self.out;
        if out.exists() && !out.is_dir() {
            return Err(format!("--out is {}; it must be a directory", out.display()).into());
        }
        match Checkpoint::open(&self.checkpoint) {
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

    /// Prepares the directory for the run. A new run keeps the directories of an earlier one.
    pub fn prepare(&self, new: bool) -> Result<()> {
        let written = ["config.json", "data.json", "judge.json", "loss.png", "metrics.jsonl"];
        files::clear_leftovers(&self.out, |name| written.contains(&name));
        files::clear_leftovers(&self.samples, |name| name.starts_with("step-"));
        files::clear_leftovers(&self.best, |name| name == "best.json");
        for dir in [&self.samples, &self.best, &self.tensorboard] {
            if new && fs::read_dir(dir).is_ok_and(|mut content| content.next().is_some()) {
                keep(dir)?;
            }
        }
        if new && fs::metadata(&self.metrics).is_ok_and(|f| f.is_file() && f.len() > 0) {
            keep(&self.metrics)?;
        }
        Ok(fs::create_dir_all(&self.samples).map_err(Error::io(&self.samples))?)
    }

    /// Renames the directory of the best checkpoint, whose value was measured in another way.
    pub fn keep_best(&self) -> Result<()> {
        if fs::read_dir(&self.best).is_ok_and(|mut content| content.next().is_some()) {
            let aside = files::put_aside(&self.best)?;
            out(format_args!("kept     {}, the best before the change", aside.display()));
        }
        Ok(())
    }
}

/// Renames a file of an earlier run.
fn keep(path: &Path) -> Result<()> {
    out(format_args!("kept     {}, of an earlier run", files::put_aside(path)?.display()));
    Ok(())
}
