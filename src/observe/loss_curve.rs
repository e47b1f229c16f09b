use std::error::Error as StdError;
use std::ops::ControlFlow;
use std::path::PathBuf;

use epaint_default_fonts::UBUNTU_LIGHT;
use image::imageops::{FilterType, resize};
use image::{DynamicImage, RgbImage};
use plotters::prelude::*;
use plotters::style::register_font;

use super::metrics_file::MetricsFile;
use crate::error::{Error, Result};
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
        match draw("Training loss", &losses).map_err(Error::external)? {
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

const SIZE: (u32, u32) = (960, 540);
/// The curve is drawn larger by this factor and then reduced, because plotters' thick lines have hard edges.
const FINE: u32 = 2;
const RAW: RGBColor = RGBColor(166, 197, 227);
const SMOOTH: RGBColor = RGBColor(20, 78, 140);
const INK: RGBColor = RGBColor(60, 60, 60);
const MESH: RGBColor = RGBColor(228, 228, 228);

/// Draws the loss over the steps, as logged and smoothed. Returns `None` before the first positive loss.
fn draw(
    title: &str,
    losses: &[(u64, f64)],
) -> std::result::Result<Option<DynamicImage>, Box<dyn StdError + Send + Sync>> {
    let raw: Vec<(f64, f64)> =
        losses.iter().filter(|l| l.1 > 0.0).map(|&(step, loss)| (step as f64, loss)).collect();
    let Some(&(last, _)) = raw.last() else { return Ok(None) };
    let smooth = smoothed(&raw);

    let low = raw.iter().fold(f64::INFINITY, |low, &(_, loss)| low.min(loss)) / 1.15;
    let high = raw.iter().fold(0.0, |high: f64, &(_, loss)| high.max(loss)) * 1.15;
    let font = |size: u32| ("sans-serif", size * FINE).into_font().color(&INK);
    register_font("sans-serif", FontStyle::Normal, UBUNTU_LIGHT)
        .map_err(|_| "the font of the loss curve cannot be read")?;

    let fine = (SIZE.0 * FINE, SIZE.1 * FINE);
    let mut pixels = vec![0; (fine.0 * fine.1 * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, fine).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, font(26))
            .margin(18 * FINE)
            .margin_right(36 * FINE)
            .x_label_area_size(48 * FINE)
            .y_label_area_size(72 * FINE)
            .build_cartesian_2d(
                0.0..last.max(1.0),
                (low..high).log_scale().with_key_points(ticks(low, high)),
            )?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(MESH.stroke_width(FINE))
            .axis_style(INK.stroke_width(FINE))
            .set_all_tick_mark_size(5 * FINE)
            .x_desc("step")
            .y_desc("loss")
            .x_label_formatter(&|x| format!("{x}"))
            .y_label_formatter(&|y| format!("{y}"))
            .label_style(font(18))
            .axis_desc_style(font(20))
            .draw()?;
        chart.draw_series(segments(&raw, RAW.stroke_width(FINE)))?.label("as logged").legend(
            |(x, y)| PathElement::new([(x, y), (x + 24 * FINE as i32, y)], RAW.stroke_width(FINE)),
        );
        chart
            .draw_series(segments(&smooth, SMOOTH.stroke_width(3 * FINE)))?
            .label("smoothed")
            .legend(|(x, y)| {
                PathElement::new([(x, y), (x + 24 * FINE as i32, y)], SMOOTH.stroke_width(3 * FINE))
            });
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .border_style(MESH)
            .label_font(font(18))
            .legend_area_size(34 * FINE)
            .margin(14 * FINE)
            .draw()?;
        area.present()?;
    }
    let picture = RgbImage::from_raw(fine.0, fine.1, pixels).ok_or("the loss curve is too big")?;
    Ok(Some(resize(&picture, SIZE.0, SIZE.1, FilterType::Triangle).into()))
}

/// Draws a line as separate segments, because plotters draws a sharp bend of a thick line as a long spike.
fn segments(
    line: &[(f64, f64)],
    style: ShapeStyle,
) -> impl Iterator<Item = PathElement<(f64, f64)>> + '_ {
    line.windows(2).map(move |ends| PathElement::new(ends.to_vec(), style))
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

/// Returns the values 1, 2 and 5 times the powers of ten within a range, or more values if those are few.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let within = |digits: &[u32]| -> Vec<f64> {
        let powers = low.log10().floor() as i32 - 1..=high.log10().ceil() as i32;
        // Parsing rounds to the number that the label shows. Multiplying would give 0.30000000000000004.
        powers
            .flat_map(|power| digits.iter().map(move |d| format!("{d}e{power}")))
            .filter_map(|text| text.parse().ok())
            .filter(|tick| (low..=high).contains(tick))
            .collect()
    };
    let few = within(&[1, 2, 5]);
    match few.len() {
        0..4 => within(&[10, 12, 14, 16, 18, 20, 25, 30, 35, 40, 45, 50, 60, 70, 80, 90]),
        _ => few,
    }
}
