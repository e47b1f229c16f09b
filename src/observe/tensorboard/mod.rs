mod events;
#[cfg(test)]
mod tests;

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value as Json;

use self::events::{Content, record};
use super::metrics_file::is_removed;
use crate::error::{Error, Result};
use crate::files;
use crate::train::{Metrics, Observer, Published, Run, Value};

/// Writes event files for [TensorBoard](https://www.tensorflow.org/tensorboard). `tensorboard --logdir DIR` shows them.
///
/// The files hold every number of [`Metrics`] under names such as `train/loss`. They also hold all values that
/// observers [publish](Run::publish), under their published names: the grids of [`SampleGrid`](super::SampleGrid), the
/// losses of [`HeldOutLoss`](super::HeldOutLoss), the norms of [`GradientNorms`](super::GradientNorms).
///
/// Each part of a run has its own file. The file of a resumed run begins with a restart event. TensorBoard then
/// discards the values of the steps that the run repeats. Values are only appended to a file. If the process is killed,
/// all complete values can be read. A new run puts a directory with the files of another run [aside](files::put_aside).
/// If a file is removed during the run, another one is created, with a warning.
#[derive(Debug)]
pub struct TensorBoard {
    dir: PathBuf,
    /// `None` before the run begins.
    file: Option<(PathBuf, File)>,
}

/// The prefix of the names of event files, by which TensorBoard finds them.
const PREFIX: &str = "events.out.tfevents.";

impl TensorBoard {
    /// Creates an observer that writes to files of `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), file: None }
    }

    /// Begins a file. TensorBoard reads the files of a directory in the order of their names, so the name is after those
    /// of all earlier files, even if the clock was set back.
    fn open(&mut self, restart: Option<u64>) -> Result<()> {
        fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir))?;
        let newest = event_files(&self.dir)?.max().unwrap_or(0);
        let seconds = (now() as u64).max(newest.saturating_add(1));
        for n in 0.. {
            let path = self.dir.join(format!("{PREFIX}{seconds:010}.{n}.ddpm"));
            match OpenOptions::new().create_new(true).append(true).open(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                file => {
                    self.file = Some((path.clone(), file.map_err(Error::io(path))?));
                    break;
                }
            }
        }
        self.append(0, Content::Version)?;
        restart.map_or(Ok(()), |step| self.append(step, Content::Restart))
    }

    fn append(&mut self, step: u64, content: Content<'_>) -> Result<()> {
        match &mut self.file {
            Some((path, file)) => {
                file.write_all(&record(now(), step, content)).map_err(Error::io(path))
            }
            None => Ok(()),
        }
    }

    fn write(&mut self, run: &Run<'_>, step: u64, values: &[(&str, &Value)]) -> Result<()> {
        if let Some((path, _)) = self.file.as_ref().filter(|(path, _)| is_removed(path)) {
            run.warn(&format!(
                "{} was removed during the run; its values are lost",
                path.display()
            ));
            self.open(None)?;
        }
        self.append(step, Content::Values(values))
    }
}

impl Observer for TensorBoard {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        let step = run.step();
        if step == 0 && event_files(&self.dir)?.next().is_some() {
            files::put_aside(&self.dir)?;
        }
        // The values of the present step are not repeated.
        self.open((step > 0).then_some(step + 1))
    }

    fn on_metrics(&mut self, run: &Run<'_>, metrics: &Metrics) -> Result<()> {
        let fields = serde_json::to_value(metrics).map_err(Error::external)?;
        let mut numbers = Vec::new();
        flatten("train", &fields, &mut numbers);
        let numbers = numbers.iter().filter(|(name, _)| name != "train/step");
        let numbers: Vec<_> = numbers.map(|(name, value)| (name.as_str(), value)).collect();
        self.write(run, metrics.step, &numbers)
    }

    fn on_published(&mut self, run: &Run<'_>, published: &[Published]) -> Result<()> {
        let values: Vec<_> = published.iter().map(|p| (p.name.as_str(), &p.value)).collect();
        self.write(run, run.step(), &values)
    }
}

/// Collects the numbers of a JSON value with their paths, such as `train/loss`.
fn flatten(path: &str, json: &Json, numbers: &mut Vec<(String, Value)>) {
    match json {
        Json::Object(fields) => {
            fields
                .iter()
                .for_each(|(name, json)| flatten(&format!("{path}/{name}"), json, numbers));
        }
        Json::Array(items) => {
            let items = items.iter().enumerate();
            items.for_each(|(k, json)| flatten(&format!("{path}/{k}"), json, numbers));
        }
        json => numbers.extend(json.as_f64().map(|number| (path.into(), number.into()))),
    }
}

/// Returns the seconds in the names of the event files of a directory, or 0 if a name has none.
fn event_files(dir: &Path) -> Result<impl Iterator<Item = u64>> {
    let entries = files::existing(fs::read_dir(dir)).map_err(Error::io(dir))?;
    let seconds = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let rest = name.to_str()?.strip_prefix(PREFIX)?;
        Some(rest.split('.').next()?.parse().unwrap_or(0))
    };
    Ok(entries.into_iter().flatten().flatten().filter_map(seconds))
}

/// The seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
