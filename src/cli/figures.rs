//! The figures of a set of images, compared with other images.

use serde_json::{Value, json};

use super::choices::ExtractorChoice;
use super::print::grouped;
use super::result::Result;
use crate::eval::{
    Balance, Estimate, Features, Gaussian, KernelDistance, Nearest, Prdc, SlicedDistance,
    Statistics, inception_score,
};

/// The smallest number of images of a set: more than the neighbours that define a radius.
pub(super) const LEAST: usize = 10;

/// The neighbour that defines the radii of precision, recall, density and coverage. Naeem et al. 2020.
const RADIUS: usize = 5;

/// The parts of the Inception Score. Salimans et al. 2016.
const SPLITS: usize = 10;

/// The number of the nearest training images of a sample. Carlini et al. 2023.
const NEIGHBOURS: usize = 50;

/// The number of samples that the report names, those with the nearest training images.
const NAMED: usize = 10;

/// The numbers of images that figures need, and the figures.
const NEEDED: [(usize, &str); 2] = [
    (10_000, "the Fréchet distance, the Inception Score, precision, recall, density and coverage"),
    (1_000, "the kernel distance and MIND"),
];

/// The images with which others are compared.
pub(super) struct Reference {
    /// The normal distribution of the features.
    pub gaussian: Gaussian,
    /// The features, without which there is only the Fréchet distance.
    pub features: Option<Features>,
}

/// The figures of a set of images.
pub(super) struct Figures {
    images: usize,
    frechet: f64,
    others: Option<Others>,
}

/// The figures that need the features of the reference.
struct Others {
    kernel: Estimate,
    subset_size: usize,
    mind: f64,
    score: Option<Estimate>,
    prdc: Prdc,
    balance: Option<Balance>,
    nearest: Option<Nearest>,
}

impl Figures {
    /// Computes all figures. `training` has the features of the training images, among which the nearest ones are
    /// searched. `check` is called between two figures, and its error ends the computation.
    pub fn measure(
        reference: &Reference,
        images: &Features,
        training: Option<&Features>,
        check: impl Fn() -> Result<()>,
    ) -> Result<Self> {
        check()?;
        let gaussian = Statistics::of(images)?.gaussian()?;
        let frechet = reference.gaussian.frechet_distance(&gaussian)?;
        let others = match &reference.features {
            Some(real) => Some(Others::measure(real, images, training, check)?),
            None => None,
        };
        Ok(Self { images: images.count(), frechet, others })
    }

    /// The names and the values of the figures, for a table.
    pub fn rows(&self, extractor: &ExtractorChoice) -> Vec<(String, String)> {
        let [frechet, kernel, score] = extractor.figures();
        let mut rows = vec![
            ("images".to_owned(), grouped(self.images)),
            (frechet.to_owned(), format!("{:.4}", self.frechet)),
        ];
        let Some(others) = &self.others else { return rows };
        let mut add = |name: String, value: String| rows.push((name, value));
        let kind = extractor.kind();
        let share = |value: f64| format!("{:.2}%", 100.0 * value);
        let Estimate { mean, .. } = others.kernel;
        let error = others.kernel.standard_error();
        add(kernel.to_owned(), format!("{mean:.4} ± {error:.4}"));
        add(format!("MIND ({kind})"), format!("{:.4}", others.mind));
        if let Some(Estimate { mean, deviation, .. }) = others.score {
            add(score.to_owned(), format!("{mean:.3} ± {deviation:.3}"));
        }
        let Prdc { precision, recall, density, coverage } = others.prdc;
        add("precision".into(), share(precision));
        add("recall".into(), share(recall));
        add("density".into(), format!("{density:.4}"));
        add("coverage".into(), share(coverage));
        if let Some(balance) = &others.balance {
            for (name, (class, of_class)) in
                [("rarest class", balance.rarest()), ("commonest class", balance.commonest())]
            {
                add(name.into(), format!("{class} ({})", share(of_class)));
            }
            add("total variation".into(), format!("{:.4}", balance.total_variation()));
        }
        if let Some(nearest) = &others.nearest {
            add("memorised, 1/3 of second".into(), share(nearest.share_near_second(1.0 / 3.0)));
            add("memorised, 1/2 of mean".into(), share(nearest.share_near_mean(0.5)));
        }
        rows
    }

    /// The figures and their settings.
    pub fn json(&self) -> Value {
        let mut json = json!({ "images": self.images, "frechet_distance": self.frechet });
        let Some(others) = &self.others else { return json };
        let Others { kernel, subset_size, mind, score, prdc, balance, nearest } = others;
        json["kernel_distance"] = json!({
            "mean": kernel.mean,
            "standard_error": kernel.standard_error(),
            "subsets": kernel.parts,
            "subset_size": subset_size,
            "seed": KernelDistance::default().seed,
        });
        let SlicedDistance { directions, seed } = SlicedDistance::default();
        json["mind"] = json!({ "value": mind, "directions": directions, "seed": seed });
        if let Some(Estimate { mean, deviation, parts }) = score {
            json["inception_score"] =
                json!({ "mean": mean, "deviation": deviation, "splits": parts });
        }
        let Prdc { precision, recall, density, coverage } = prdc;
        json["manifold"] = json!({
            "k": RADIUS,
            "precision": precision,
            "recall": recall,
            "density": density,
            "coverage": coverage,
        });
        if let Some(balance) = balance {
            json["classes"] = json!({
                "counts": balance.counts(),
                "total_variation": balance.total_variation(),
                "divergence": balance.divergence(),
            });
        }
        if let Some(nearest) = nearest {
            json["nearest_training_images"] = json!({
                "k": nearest.of(0).count(),
                "share_below_third_of_second": nearest.share_near_second(1.0 / 3.0),
                "share_below_half_of_mean": nearest.share_near_mean(0.5),
                "nearest": named(nearest),
            });
        }
        json
    }
}

impl Others {
    fn measure(
        real: &Features,
        images: &Features,
        training: Option<&Features>,
        check: impl Fn() -> Result<()>,
    ) -> Result<Self> {
        check()?;
        let mut distance = KernelDistance::default();
        distance.subset_size = distance.subset_size.min(real.count()).min(images.count());
        let kernel = distance.measure(real, images)?;
        check()?;
        let mind = SlicedDistance::default().measure(real, images)?;
        check()?;
        let prdc = Prdc::measure(real, images, RADIUS)?;
        let (mut score, mut balance, mut nearest) = (None, None, None);
        if images.classes().is_some() {
            score = Some(inception_score(images, SPLITS)?);
            // The expected classes are those that the same network finds in the reference.
            let expected: Vec<f64> = Balance::measure(real, None)?.shares().collect();
            balance = Some(Balance::measure(images, Some(&expected))?);
        }
        if let Some(training) = training {
            check()?;
            nearest = Some(Nearest::find(images, training, NEIGHBOURS.min(training.count()))?);
        }
        let subset_size = distance.subset_size;
        Ok(Self { kernel, subset_size, mind, score, prdc, balance, nearest })
    }
}

/// The samples whose nearest training image is nearest, in comparison with the second: the number of the sample, that
/// of the training image, and the distances of both training images.
fn named(nearest: &Nearest) -> Vec<Value> {
    let mut pairs: Vec<_> = (0..nearest.count())
        .filter_map(|sample| {
            let mut found = nearest.of(sample);
            let ((image, first), (_, second)) = (found.next()?, found.next()?);
            // Two equal training images are as near as one.
            let ratio = if first == 0.0 { 0.0 } else { first / second };
            Some((ratio, sample, image, first, second))
        })
        .collect();
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let named = pairs.into_iter().take(NAMED);
    named
        .map(|(_, sample, image, distance, second)| {
            json!({ "sample": sample, "training_image": image, "distance": distance, "second_distance": second })
        })
        .collect()
}

/// Warnings that a set has too few images for some figures. `all` tells whether figures other than the Fréchet distance
/// are computed.
pub(super) fn warnings(name: &str, count: usize, size: usize, all: bool) -> Vec<String> {
    let count_text = grouped(count);
    let needed = NEEDED.iter().take(if all { NEEDED.len() } else { 1 });
    let mut warnings: Vec<String> = needed
        .filter(|(needed, _)| count < *needed)
        .map(|(needed, figures)| {
            let figures = if all { figures } else { "the Fréchet distance" };
            format!("{name}: {count_text} images; {figures} need {}", grouped(*needed))
        })
        .collect();
    if count <= size {
        warnings.push(format!(
            "{name}: {count_text} images are not more than the {} features; the Fréchet distance says little",
            grouped(size)
        ));
    }
    warnings
}
