use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files;
use crate::train::{Metrics, Observer, Outcome, Published, Run};

/// Writes each report as a line of a file: a JSON object of the fields of [`Metrics`].
///
/// The numbers that observers [publish](Run::publish) after an update are a line of their own: a JSON object of the step
/// and of the numbers by their names, such as `{"step":500,"held_out/loss":0.0312}`. A number that a resumed run
/// publishes again, for the step at which it begins, is not written twice.
///
/// A new run puts an existing file [aside](files::put_aside). A resumed run first removes the lines of steps that it
/// repeats, and an incomplete last line. It then appends to the file. If the file is removed during the run, it is
/// created again, with a warning.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    /// `None` before the run begins.
    file: Option<File>,
    /// The content of the lines of the step at which the run begins.
    first: Map<String, Value>,
}

/// The fields of a line that are read back. A line of published numbers has no loss.
#[derive(Deserialize)]
struct Logged {
    step: u64,
    loss: Option<f64>,
}

impl MetricsFile {
    /// Creates an observer that writes to `path`, whose directory must exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), file: None, first: Map::new() }
    }

    /// Reads the steps and the losses of all reports in such a file. Returns an empty list if the file does not
    /// exist.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn losses(path: impl AsRef<Path>) -> Result<Vec<(u64, f64)>> {
        let text = read(path.as_ref())?;
        Ok(lines(&text).filter_map(|(_, logged)| Some((logged.step, logged.loss?))).collect())
    }

    /// Removes the lines that a run at `step` will repeat, and opens the file.
    fn open(&mut self, step: u64) -> Result<File> {
        let old = read(&self.path)?;
        let kept: Vec<u8> = lines(&old)
            .filter(|(_, logged)| logged.step <= step)
            .flat_map(|(line, _)| line.iter().copied())
            .collect();
        let present = lines(&old).filter(|(_, logged)| logged.step == step);
        let content = present.filter_map(|(line, _)| serde_json::from_slice(line).ok());
        self.first = content.flat_map(|line: Map<String, Value>| line).collect();
        if kept != old {
            files::write(&self.path, &kept)?;
        }
        create(&self.path)
    }

    /// Appends a line with the content of a step.
    fn write(&mut self, run: &Run<'_>, content: &impl Serialize) -> Result<()> {
        self.restore(run, run.step().saturating_sub(1))?;
        let mut line = serde_json::to_vec(content).map_err(Error::external)?;
        line.push(b'\n');
        match &mut self.file {
            Some(file) => file.write_all(&line).map_err(Error::io(&self.path)),
            None => Ok(()),
        }
    }

    /// Recreates the file and its directory if they were removed. The file then holds the lines up to `step`. Without
    /// this, further lines would go to a file without a name.
    fn restore(&mut self, run: &Run<'_>, step: u64) -> Result<()> {
        if !is_removed(&self.path) {
            return Ok(());
        }
        if let Some(parent) = self.path.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        self.file = Some(create(&self.path)?);
        let removed = "was removed during the run; its lines are lost, up to step";
        run.warn(&format!("{} {removed} {step}", self.path.display()));
        Ok(())
    }
}

impl Observer for MetricsFile {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        let is_of_another_run =
            || fs::metadata(&self.path).is_ok_and(|f| f.is_file() && f.len() > 0);
        if run.step() == 0 && is_of_another_run() {
            files::put_aside(&self.path)?;
        }
        self.file = Some(self.open(run.step())?);
        Ok(())
    }

    fn on_metrics(&mut self, run: &Run<'_>, metrics: &Metrics) -> Result<()> {
        self.write(run, metrics)
    }

    fn on_published(&mut self, run: &Run<'_>, published: &[Published]) -> Result<()> {
        let numbers = published.iter().filter_map(|p| Some((p.name.clone(), p.scalar()?.into())));
        let mut line: Map<String, Value> = numbers.collect();
        if self.first.get("step").is_some_and(|step| *step == run.step()) {
            line.retain(|name, number| self.first.get(name) != Some(number));
        }
        if line.is_empty() {
            return Ok(());
        }
        line.insert("step".into(), run.step().into());
        self.write(run, &line)
    }

    fn on_end(&mut self, run: &Run<'_>, outcome: Outcome<'_>) -> Result<()> {
        match outcome {
            Outcome::Failed(_) => Ok(()),
            _ => self.restore(run, run.step()),
        }
    }
}

/// Returns whether nothing exists at this path.
pub(crate) fn is_removed(path: &Path) -> bool {
    matches!(files::existing(fs::metadata(path)), Ok(None))
}

fn create(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    Ok(files::existing(fs::read(path)).map_err(Error::io(path))?.unwrap_or_default())
}

/// Returns the complete lines with their parsed content.
fn lines(text: &[u8]) -> impl Iterator<Item = (&[u8], Logged)> {
    text.split_inclusive(|&byte| byte == b'\n')
        .filter(|line| line.ends_with(b"\n"))
        .filter_map(|line| Some((line, serde_json::from_slice(line).ok()?)))
}
