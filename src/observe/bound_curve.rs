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

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::denoiser::from_fn;
    use crate::eval::VariationalBound;
    use crate::process::{Diffusion, NoiseSchedule, Prediction};
    use crate::sample::Variance;

    /// The terms of a network that always predicts the image times `factor`.
    fn bound(factor: f64, variance: Variance) -> Bound {
        let diffusion = Diffusion::new(NoiseSchedule::cosine(50).unwrap(), Prediction::Sample);
        let image = Tensor::full(0.5f64, (1, 1, 1, 1), &Device::Cpu).unwrap();
        let predicted = image.affine(factor, 0.0).unwrap();
        let network = from_fn(move |_: &Tensor, _: &Tensor| Ok(predicted.clone()));
        let evaluator = VariationalBound::new(&diffusion, variance, 0).unwrap();
        let found = evaluator.evaluate(&network, &image, |_| Ok(ControlFlow::Continue(())));
        found.unwrap().unwrap().remove(0)
    }

    #[test]
    fn terms_are_drawn_as_a_picture() {
        let dir = tempfile::tempdir().unwrap();
        let drawn = |name: &str, bound: &Bound| {
            let path = dir.path().join(name);
            save_bound_curve(bound, &path).unwrap();
            image::open(path).unwrap().to_rgb8()
        };
        let [one, other] = [0.9, 0.5].map(|factor| bound(factor, Variance::Beta));
        let pictures = [drawn("one.png", &one), drawn("other.png", &other)];
        assert_eq!(pictures[0].dimensions(), (960, 540));
        assert_ne!(pictures[0], pictures[1]);
        let line = image::Rgb([STRONG.0, STRONG.1, STRONG.2]);
        assert!(pictures[0].pixels().filter(|pixel| **pixel == line).count() > 100);
        assert_eq!(drawn("again.png", &one), pictures[0]);
    }

    #[test]
    fn a_bound_without_positive_terms_is_refused() {
        let mut none = bound(1.0, Variance::Posterior);
        none.terms.iter_mut().for_each(|term| term.bits = 0.0);
        let error = save_bound_curve(&none, "never.png").unwrap_err().to_string();
        assert_eq!(error, "terms of the bound is 50 values; it must be at least one above 0");
    }
}
