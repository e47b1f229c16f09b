//! Charts of lines with a logarithmic axis.

use std::error::Error as StdError;

use epaint_default_fonts::UBUNTU_LIGHT;
use image::imageops::{FilterType, resize};
use image::{DynamicImage, RgbImage};
use plotters::prelude::*;
use plotters::style::register_font;

use crate::error::{Error, Result};

const SIZE: (u32, u32) = (960, 540);
/// The chart is drawn larger by this factor and then reduced, because plotters' thick lines have hard edges.
const FINE: u32 = 2;
const INK: RGBColor = RGBColor(60, 60, 60);
const MESH: RGBColor = RGBColor(228, 228, 228);

/// The colour of a line in the background.
pub(super) const PALE: RGBColor = RGBColor(166, 197, 227);
/// The colour of a line in the foreground.
pub(super) const STRONG: RGBColor = RGBColor(20, 78, 140);

/// A chart of lines: the horizontal axis begins at 0, and the vertical axis is logarithmic.
pub(super) struct LineChart<'a> {
    pub title: &'a str,
    /// The description of the horizontal axis.
    pub x: &'a str,
    /// The description of the vertical axis.
    pub y: &'a str,
    /// The lines. Those of a chart with more than one have a legend.
    pub lines: &'a [Line<'a>],
}

/// A line of a chart.
pub(super) struct Line<'a> {
    pub name: &'a str,
    /// Points in increasing order of x, with positive y.
    pub points: &'a [(f64, f64)],
    pub color: RGBColor,
    pub width: u32,
}

impl LineChart<'_> {
    /// Draws the chart. Returns `None` if the first line has no points. The vertical axis fits the first line.
    ///
    /// # Errors
    /// Returns an error if the font cannot be read, or if plotters fails.
    pub fn draw(&self) -> Result<Option<DynamicImage>> {
        let Some(first) = self.lines.first().filter(|line| !line.points.is_empty()) else {
            return Ok(None);
        };
        self.drawn(first.points).map(Some).map_err(Error::external)
    }

    fn drawn(
        &self,
        fitted: &[(f64, f64)],
    ) -> std::result::Result<DynamicImage, Box<dyn StdError + Send + Sync>> {
        let last = fitted.last().map_or(0.0, |point| point.0);
        let low = fitted.iter().fold(f64::INFINITY, |low, &(_, y)| low.min(y)) / 1.15;
        let high = fitted.iter().fold(0.0, |high: f64, &(_, y)| high.max(y)) * 1.15;
        let font = |size: u32| ("sans-serif", size * FINE).into_font().color(&INK);
        register_font("sans-serif", FontStyle::Normal, UBUNTU_LIGHT)
            .map_err(|_| "the font of the chart cannot be read")?;

        let fine = (SIZE.0 * FINE, SIZE.1 * FINE);
        let mut pixels = vec![0; (fine.0 * fine.1 * 3) as usize];
        {
            let area = BitMapBackend::with_buffer(&mut pixels, fine).into_drawing_area();
            area.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&area)
                .caption(self.title, font(26))
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
                .x_desc(self.x)
                .y_desc(self.y)
                .x_label_formatter(&|x| format!("{x}"))
                .y_label_formatter(&|y| format!("{y}"))
                .label_style(font(18))
                .axis_desc_style(font(20))
                .draw()?;
            for line in self.lines {
                let style = line.color.stroke_width(line.width * FINE);
                chart.draw_series(segments(line.points, style))?.label(line.name).legend(
                    move |(x, y)| PathElement::new([(x, y), (x + 24 * FINE as i32, y)], style),
                );
            }
            if self.lines.len() > 1 {
                chart
                    .configure_series_labels()
                    .position(SeriesLabelPosition::UpperRight)
                    .background_style(WHITE)
                    .border_style(MESH)
                    .label_font(font(18))
                    .legend_area_size(34 * FINE)
                    .margin(14 * FINE)
                    .draw()?;
            }
            area.present()?;
        }
        let picture = RgbImage::from_raw(fine.0, fine.1, pixels).ok_or("the chart is too big")?;
        Ok(resize(&picture, SIZE.0, SIZE.1, FilterType::Triangle).into())
    }
}

/// Draws a line as separate segments, because plotters draws a sharp bend of a thick line as a long spike.
fn segments(
    line: &[(f64, f64)],
    style: ShapeStyle,
) -> impl Iterator<Item = PathElement<(f64, f64)>> + '_ {
    line.windows(2).map(move |ends| PathElement::new(ends.to_vec(), style))
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
