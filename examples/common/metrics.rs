//! `metrics.jsonl`: one JSON object per logged step. A resumed run removes the steps that it will repeat.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use ddpm::Metrics;
use serde::Deserialize;

use super::cli::Result;
use super::files;

/// The fields of a line that are read back.
#[derive(Deserialize)]
pub struct Logged {
    pub step: u64,
    pub loss: f64,
}

pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens the log of a run at `step`. Lines of later steps, which will be computed again, are removed first, and so
    /// is an unfinished line. A new run, at step 0, renames an existing file, which belongs to another run.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if step == 0 && fs::metadata(path).is_ok_and(|log| log.is_file() && log.len() > 0) {
            files::put_aside(path)?;
        }
        let old = read(path)?;
        let kept: Vec<u8> = lines(&old)
            .filter(|(_, logged)| logged.step <= step)
            .flat_map(|(line, _)| line.iter().copied())
            .collect();
        if kept != old {
            files::write(path, &kept)?;
        }
        Ok(Self { path: path.into(), file: create(path)? })
    }

    /// Returns whether the file was removed during the run, so that lines written to it would be lost.
    pub fn is_removed(&self) -> bool {
        fs::metadata(&self.path).is_err_and(|e| e.kind() == ErrorKind::NotFound)
    }

    /// Creates a removed file again, and its directory if that was removed, too.
    pub fn begin_again(&mut self) -> Result<()> {
        self.path.parent().map_or(Ok(()), files::create_dir)?;
        self.file = create(&self.path)?;
        Ok(())
    }

    pub fn append(&mut self, metrics: &Metrics) -> Result<()> {
        let mut line = serde_json::to_vec(metrics)?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|e| files::at(&self.path, e))
    }
}

fn create(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.map_err(|e| files::at(path, e))
}

/// Reads all logged steps.
pub fn history(path: &Path) -> Result<Vec<Logged>> {
    Ok(lines(&read(path)?).map(|(_, logged)| logged).collect())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    match fs::read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(vec![]),
        read => read.map_err(|e| files::at(path, e)),
    }
}

/// The whole lines, with what they say.
fn lines(text: &[u8]) -> impl Iterator<Item = (&[u8], Logged)> {
    text.split_inclusive(|&byte| byte == b'\n')
        .filter(|line| line.ends_with(b"\n"))
        .filter_map(|line| Some((line, serde_json::from_slice(line).ok()?)))
}
