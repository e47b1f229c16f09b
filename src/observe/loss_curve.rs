use std::ops::ControlFlow;
use std::path::PathBuf;

use image::DynamicImage;

use super::line_chart::{self, Line, LineChart};
use super::metrics_file::MetricsFile;
use crate::error::Result;
use crate::train::{Observer, Outcome, Run};
use crate::{files, pictures};

/// Draws the loss over the steps, as logged and smoothed, at intervals and at the end.
///
/// The losses are read from the file of a [`MetricsFile`](super::MetricsFile), so that the curve of a resumed run
/// covers the whole run. A failure to draw or write a curve is a warning during the run, and an error at the end.
#[derive(Debug, Clone)]
pub struct LossCurve {
    every: u64,
    metrics: PathBuf,
    picture: PathBuf,
}

impl LossCurve {
    /// Draws the losses in the file `metrics` into the PNG file `picture`, every `every` updates. With 0, the curve is
    /// drawn only at the end.
    pub fn steps(every: u64, metrics: impl Into<PathBuf>, picture: impl Into<PathBuf>) -> Self {
        Self { every, metrics: metrics.into(), picture: picture.into() }
    }

    fn draw(&self, run: &Run<'_>) -> Result<()> {
        run.working("drawing the loss");
        let drawn = self.write();
        run.working("");
        drawn
    }

    fn write(&self) -> Result<()> {
        let losses = MetricsFile::losses(&self.metrics)?;
        match draw(&losses)? {
            Some(picture) => files::write(&self.picture, &pictures::png(&picture)?),
            None => Ok(()),
        }
    }
}

impl Observer for LossCurve {
    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        if run.step().is_multiple_of(self.every)
            && !run.is_complete()
            && !run.is_stopping()
            && let Err(error) = self.draw(run)
        {
            run.warn(&format!("{error:?}"));
        }
        Ok(ControlFlow::Continue(()))
    }

    fn on_end(&mut self, run: &Run<'_>, outcome: Outcome<'_>) -> Result<()> {
        match outcome {
            Outcome::Failed(_) => Ok(()),
            _ => self.draw(run),
        }
    }
}

/// Draws the loss over the steps, as logged and smoothed. Returns `None` before the first positive loss.
fn draw(losses: &[(u64, f64)]) -> Result<Option<DynamicImage>> {
    let raw: Vec<(f64, f64)> =
        losses.iter().filter(|l| l.1 > 0.0).map(|&(step, loss)| (step as f64, loss)).collect();
    let smooth = smoothed(&raw);
    let lines = [
        Line { name: "as logged", points: &raw, color: line_chart::PALE, width: 1 },
        Line { name: "smoothed", points: &smooth, color: line_chart::STRONG, width: 3 },
    ];
    LineChart { title: "Training loss", x: "step", y: "loss", lines: &lines }.draw()
}

/// Computes the mean around each point. Near the start, where the loss falls, it includes fewer points.
fn smoothed(raw: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |i: usize| {
        let reach = i.min(raw.len() / 40);
        let around = &raw[i - reach..raw.len().min(i + reach + 1)];
        around.iter().map(|(_, loss)| loss).sum::<f64>() / around.len() as f64
    };
    raw.iter().enumerate().map(|(i, &(step, _))| (step, mean(i))).collect()
}
