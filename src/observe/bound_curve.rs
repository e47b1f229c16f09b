use std::path::Path;

use super::line_chart::{Line, LineChart, STRONG};
use crate::error::{Error, Result};
use crate::eval::Bound;
use crate::{files, pictures};

/// Draws the terms of a variational bound over their timesteps into a PNG file, with a logarithmic axis. The decoder
/// term is that of timestep 0. Terms that are 0 or negative are left out. Nichol and Dhariwal 2021, figure 2.
///
/// The file is written beside `path`, flushed to disk and renamed.
///
/// # Errors
/// Returns an error if no term is positive, or if the file cannot be written.
pub fn save_bound_curve(bound: &Bound, path: impl AsRef<Path>) -> Result<()> {
    let points: Vec<(f64, f64)> = bound
        .terms
        .iter()
        .filter(|term| term.bits > 0.0)
        .map(|term| (term.t as f64, term.bits))
        .collect();
    let title = format!("Terms of the variational bound ({:.2} bits/dim in total)", bound.total);
    let lines = [Line { name: "terms", points: &points, color: STRONG, width: 2 }];
    let chart = LineChart { title: &title, x: "timestep", y: "bits/dim", lines: &lines };
    let picture = chart.draw()?.ok_or_else(|| {
        Error::config(
            "terms of the bound",
            format!("{} values", bound.terms.len()),
            "at least one above 0",
        )
    })?;
    files::write(path, &pictures::png(&picture)?)
}
