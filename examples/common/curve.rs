//! The loss curve.

use epaint_default_fonts::UBUNTU_LIGHT;
use image::{DynamicImage, RgbImage};
use plotters::prelude::*;
use plotters::style::register_font;

use super::cli::Result;
use super::metrics::Logged;
use super::progress::Smoothed;

const SIZE: (u32, u32) = (960, 540);
const RAW: RGBColor = RGBColor(166, 197, 227);
const SMOOTH: RGBColor = RGBColor(20, 78, 140);
const INK: RGBColor = RGBColor(60, 60, 60);
const MESH: RGBColor = RGBColor(228, 228, 228);

/// Loss over steps, as logged and smoothed; none before the first positive loss.
pub fn draw(title: &str, history: &[Logged]) -> Result<Option<DynamicImage>> {
    let raw: Vec<(f64, f64)> =
        history.iter().filter(|l| l.loss > 0.0).map(|l| (l.step as f64, l.loss)).collect();
    let Some(&(last, _)) = raw.last() else { return Ok(None) };
    let mut mean = Smoothed::default();
    let smooth = raw.iter().map(|&(step, loss)| (step, mean.add(step as u64, loss)));

    let low = raw.iter().fold(f64::INFINITY, |low, &(_, loss)| low.min(loss)) / 1.15;
    let high = raw.iter().fold(0.0, |high: f64, &(_, loss)| high.max(loss)) * 1.15;
    let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
    register_font("sans-serif", FontStyle::Normal, UBUNTU_LIGHT)
        .map_err(|_| "the font of the loss curve cannot be read")?;

    let mut pixels = vec![0; (SIZE.0 * SIZE.1 * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, font(26))
            .margin(18)
            .margin_right(36)
            .x_label_area_size(48)
            .y_label_area_size(72)
            .build_cartesian_2d(
                0.0..last.max(1.0),
                (low..high).log_scale().with_key_points(ticks(low, high)),
            )?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(MESH)
            .axis_style(INK)
            .x_desc("step")
            .y_desc("loss")
            .x_label_formatter(&|x| format!("{x}"))
            .y_label_formatter(&|y| format!("{y}"))
            .label_style(font(18))
            .axis_desc_style(font(20))
            .draw()?;
        chart
            .draw_series(LineSeries::new(raw.iter().copied(), RAW.stroke_width(1)))?
            .label("as logged")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], RAW.stroke_width(1)));
        chart
            .draw_series(LineSeries::new(smooth, SMOOTH.stroke_width(3)))?
            .label("smoothed")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], SMOOTH.stroke_width(3)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .border_style(MESH)
            .label_font(font(18))
            .margin(14)
            .draw()?;
        area.present()?;
    }
    let picture = RgbImage::from_raw(SIZE.0, SIZE.1, pixels).ok_or("the loss curve is too big")?;
    Ok(Some(picture.into()))
}

/// 1, 2 and 5 times the powers of ten within a range; more where that is not many.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let within = |digits: &[u32]| -> Vec<f64> {
        let powers = low.log10().floor() as i32 - 1..=high.log10().ceil() as i32;
        // Parsing rounds as the label will be read; multiplying would give 0.30000000000000004.
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
