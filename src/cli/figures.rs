//! The figures of a set of images, compared with other images.

use serde_json::{Number, Value, json};

use super::choices::Names;
use super::print::grouped;
use super::result::Result;
use crate::eval::{
    Balance, Estimate, Features, Gaussian, KernelDistance, Nearest, Prdc, SlicedDistance,
    Statistics, inception_score,
};
use crate::random::{Noise, Purpose};

/// The smallest number of images of a set: more than the neighbours that define a radius.
pub(super) const LEAST: usize = 10;

/// The neighbour that defines the radii of precision, recall, density and coverage. Naeem et al. 2020.
const RADIUS: usize = 5;

/// The number of parts of the score of the classes. Salimans et al. 2016.
const SPLITS: usize = 10;

/// The number of the nearest training images of a sample. Carlini et al. 2023.
const NEIGHBOURS: usize = 50;

/// The number of samples that the report names, those with the nearest training images.
const NAMED: usize = 10;

/// The images with which others are compared.
pub(super) struct Reference {
    /// The normal distribution of the features.
    pub gaussian: Gaussian,
    /// The images, without which there is only the Fréchet distance.
    pub images: Option<Measured>,
}

impl Reference {
    /// The reference of these images.
    pub fn of(images: Measured) -> Result<Self> {
        let gaussian = Statistics::of(&images.features)?.gaussian()?;
        Ok(Self { gaussian, images: Some(images) })
    }
}

/// The features of images of a set.
pub(super) struct Measured {
    pub features: Features,
    /// The numbers of the images in their set. `None` if they are 0, 1, 2 and so on.
    pub numbers: Option<Vec<u32>>,
}

impl Measured {
    /// Returns the images with these indices.
    pub fn select(&self, indices: &[u32]) -> Result<Self> {
        let numbers = indices.iter().map(|&index| self.number(index as usize) as u32).collect();
        Ok(Self { features: select(&self.features, indices)?, numbers: Some(numbers) })
    }

    /// Divides the images at random into two halves.
    pub fn halves(&self, seed: u64) -> Result<[Self; 2]> {
        let order = order(seed, Use::Halves, self.features.count())?;
        let (first, second) = order.split_at(order.len() / 2);
        Ok([self.select(first)?, self.select(second)?])
    }

    /// The number of an image in its set.
    fn number(&self, index: usize) -> usize {
        let number = self.numbers.as_ref().and_then(|numbers| numbers.get(index));
        number.map_or(index, |&number| number as usize)
    }
}

fn select(features: &Features, indices: &[u32]) -> Result<Features> {
    let indices: Vec<usize> = indices.iter().map(|&index| index as usize).collect();
    Ok(features.select(&indices)?)
}

/// The use of a random order. Step 0 is that of [`Subset::random`](crate::data::Subset::random).
#[derive(Clone, Copy)]
enum Use {
    Splits = 1,
    Halves = 2,
}

fn order(seed: u64, of: Use, count: usize) -> Result<Vec<u32>> {
    Ok(Noise::new(seed).stream(Purpose::Choice, of as u64, 0).permutation(count)?)
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
    sliced: f64,
    score: Option<Estimate>,
    seed: u64,
    prdc: Prdc,
    balance: Option<Balance>,
    nearest: Option<(Nearest, Vec<Value>)>,
}

impl Figures {
    /// Computes all figures. `training` are the training images, among which the nearest ones are searched. `seed`
    /// determines the parts of the score of the classes. `check` is called between two figures, and its error ends the
    /// computation.
    pub fn measure(
        reference: &Reference,
        images: &Measured,
        training: Option<&Measured>,
        seed: u64,
        check: impl Fn() -> Result<()>,
    ) -> Result<Self> {
        check()?;
        let gaussian = Statistics::of(&images.features)?.gaussian()?;
        let frechet = reference.gaussian.frechet_distance(&gaussian)?;
        let others = match &reference.images {
            Some(real) => Some(Others::measure(&real.features, images, training, seed, check)?),
            None => None,
        };
        Ok(Self { images: images.features.count(), frechet, others })
    }

    /// The names and the values of the figures, for a table.
    pub fn rows(&self, names: Names) -> Vec<(&'static str, String)> {
        let mut rows =
            vec![("images", grouped(self.images)), (names.frechet, format!("{:.4}", self.frechet))];
        let Some(others) = &self.others else { return rows };
        let mut add = |name: &'static str, value: String| rows.push((name, value));
        let share = |value: f64| format!("{:.2}%", 100.0 * value);
        let Estimate { mean, .. } = others.kernel;
        let error = others.kernel.standard_error();
        add(names.kernel, format!("{mean:.4} ± {error:.4}"));
        add(names.sliced, format!("{:.4}", others.sliced));
        if let Some(Estimate { mean, deviation, .. }) = others.score {
            add(names.score, format!("{mean:.3} ± {deviation:.3}"));
        }
        let Prdc { precision, recall, density, coverage } = others.prdc;
        add("precision", share(precision));
        add("recall", share(recall));
        add("density", format!("{density:.4}"));
        add("coverage", share(coverage));
        if let Some(balance) = &others.balance {
            for (name, (class, of_class)) in
                [("rarest class", balance.rarest()), ("commonest class", balance.commonest())]
            {
                add(name, format!("{class} ({})", share(of_class)));
            }
            add("total variation", format!("{:.4}", balance.total_variation()));
        }
        if let Some((nearest, _)) = &others.nearest {
            add("memorised, 1/3 of second", share(nearest.share_near_second(1.0 / 3.0)));
            add("memorised, 1/2 of mean", share(nearest.share_near_mean(0.5)));
        }
        rows
    }

    /// The figures and their settings.
    pub fn json(&self) -> Value {
        let mut json = json!({ "images": self.images, "frechet_distance": number(self.frechet) });
        let Some(others) = &self.others else { return json };
        let Others { kernel, subset_size, sliced, score, seed, prdc, balance, nearest } = others;
        json["kernel_distance"] = json!({
            "mean": number(kernel.mean),
            "standard_error": number(kernel.standard_error()),
            "subsets": kernel.parts,
            "subset_size": subset_size,
            "seed": KernelDistance::default().seed,
        });
        let SlicedDistance { directions, seed: of_directions } = SlicedDistance::default();
        json["sliced_distance"] = json!({
            "value": number(*sliced),
            "directions": directions,
            "seed": of_directions,
        });
        if let Some(Estimate { mean, deviation, parts }) = score {
            json["class_score"] = json!({
                "mean": number(*mean),
                "deviation": number(*deviation),
                "splits": parts,
                "seed": seed,
            });
        }
        let Prdc { precision, recall, density, coverage } = prdc;
        json["manifold"] = json!({
            "k": RADIUS,
            "precision": number(*precision),
            "recall": number(*recall),
            "density": number(*density),
            "coverage": number(*coverage),
        });
        if let Some(balance) = balance {
            json["classes"] = json!({
                "counts": balance.counts(),
                "total_variation": number(balance.total_variation()),
                "divergence": number(balance.divergence()),
            });
        }
        if let Some((nearest, named)) = nearest {
            json["nearest_training_images"] = json!({
                "k": nearest.of(0).count(),
                "share_below_third_of_second": number(nearest.share_near_second(1.0 / 3.0)),
                "share_below_half_of_mean": number(nearest.share_near_mean(0.5)),
                "nearest": named,
            });
        }
        json
    }
}

impl Others {
    fn measure(
        real: &Features,
        images: &Measured,
        training: Option<&Measured>,
        seed: u64,
        check: impl Fn() -> Result<()>,
    ) -> Result<Self> {
        let features = &images.features;
        check()?;
        let mut distance = KernelDistance::default();
        // If a subset were the whole set, all subsets would be the same, and their deviation would be 0.
        let half = real.count().min(features.count()) / 2;
        distance.subset_size = distance.subset_size.min(half);
        let kernel = distance.measure(real, features)?;
        check()?;
        let sliced = SlicedDistance::default().measure(real, features)?;
        check()?;
        let prdc = Prdc::measure(real, features, RADIUS)?;
        let (mut score, mut balance, mut nearest) = (None, None, None);
        if features.classes().is_some() {
            // Images are often ordered by class.
            let order = order(seed, Use::Splits, features.count())?;
            score = Some(inception_score(&select(features, &order)?, SPLITS)?);
            // The expected classes are those that the same network finds in the reference.
            let expected: Vec<f64> = Balance::measure(real, None)?.shares().collect();
            balance = Some(Balance::measure(features, Some(&expected))?);
        }
        if let Some(training) = training {
            check()?;
            let count = NEIGHBOURS.min(training.features.count());
            let found = Nearest::find(features, &training.features, count)?;
            let named = named(&found, images, training);
            nearest = Some((found, named));
        }
        let subset_size = distance.subset_size;
        Ok(Self { kernel, subset_size, sliced, score, seed, prdc, balance, nearest })
    }
}

/// The samples whose nearest training image is nearest, in comparison with the second: the number of the sample, that
/// of the training image, and the distances of both training images.
fn named(nearest: &Nearest, images: &Measured, training: &Measured) -> Vec<Value> {
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
            json!({
                "sample": images.number(sample),
                "training_image": training.number(image),
                "distance": number(distance),
                "second_distance": number(second),
            })
        })
        .collect()
}

/// A number in JSON, which has no infinity and no NaN. These are texts: `Infinity`, `-Infinity` and `NaN`.
pub(super) fn number(value: f64) -> Value {
    match Number::from_f64(value) {
        Some(number) => number.into(),
        None if value.is_nan() => "NaN".into(),
        None => if value > 0.0 { "Infinity" } else { "-Infinity" }.into(),
    }
}

/// Warnings that a set has too few images for some figures. `all` tells whether figures other than the Fréchet distance
/// are computed.
pub(super) fn warnings(
    name: &str,
    count: usize,
    size: usize,
    (names, all): (Names, bool),
) -> Vec<String> {
    let Names { frechet, kernel, sliced, score } = names;
    let most = match all {
        true => format!("{frechet}, {score}, precision, recall, density and coverage"),
        false => frechet.to_owned(),
    };
    let mut needed = vec![(10_000, most)];
    if all {
        needed.push((1_000, format!("{kernel} and {sliced}")));
    }
    let count_text = grouped(count);
    let mut warnings: Vec<String> = needed
        .into_iter()
        .filter(|(needed, _)| count < *needed)
        .map(|(needed, figures)| {
            format!("{name}: {count_text} images; {} are needed for {figures}", grouped(needed))
        })
        .collect();
    if count <= size {
        warnings.push(format!(
            "{name}: {count_text} images are not more than the {} features; {frechet} says little",
            grouped(size)
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Classes;

    const NAMES: Names = Names { frechet: "f", kernel: "k", sliced: "s", score: "c" };

    /// Images of two features, and of the classes `class(i)` of three.
    fn images(count: usize, class: impl Fn(usize) -> usize) -> Measured {
        let mut features = Features::with_classes(2, Classes::Logits(3));
        for i in 0..count {
            let wave = |k: usize| ((i * i + k) as f32 * 0.7).sin();
            let mut logits = [0.0; 3];
            logits[class(i)] = 9.0;
            features.add_scored(&[wave(0), wave(1)], &logits).unwrap();
        }
        Measured { features, numbers: None }
    }

    fn measured(real: Measured, images: &Measured, seed: u64) -> Value {
        let reference = Reference::of(real).unwrap();
        Figures::measure(&reference, images, None, seed, || Ok(())).unwrap().json()
    }

    #[test]
    fn images_that_are_ordered_by_class_have_the_score_of_mixed_ones() {
        let ordered = images(300, |i| i / 100);
        let found = measured(images(300, |i| i % 3), &ordered, 0);
        // Parts of one class would have the score 1. With certain logits, parts of all three classes would have 3.
        let mean = found["class_score"]["mean"].as_f64().unwrap();
        assert!((2.7..3.0).contains(&mean), "{mean}");
        let other = measured(images(300, |i| i % 3), &ordered, 1);
        assert_ne!(found["class_score"]["mean"], other["class_score"]["mean"]);
        assert_eq!(found["frechet_distance"], other["frechet_distance"]);
    }

    #[test]
    fn subsets_of_the_kernel_distance_are_at_most_half_of_a_set() {
        let found = measured(images(60, |_| 0), &images(40, |_| 0), 0);
        assert_eq!(found["kernel_distance"]["subset_size"], 20);
        assert!(found["kernel_distance"]["standard_error"].as_f64().unwrap() > 0.0);
    }

    /// The divergence of a class that the reference lacks is infinite.
    #[test]
    fn infinite_figures_are_texts() {
        let found = measured(images(20, |_| 0), &images(20, |i| i % 2), 0);
        assert_eq!(found["classes"]["divergence"], "Infinity");
        assert_eq!([number(f64::NAN), number(-f64::INFINITY)], ["NaN", "-Infinity"]);
        assert_eq!(number(0.5), 0.5);
    }

    #[test]
    fn halves_hold_every_image_once_and_keep_its_number() {
        let whole = images(21, |_| 0).select(&Vec::from_iter((10..21).rev())).unwrap();
        let [first, second] = whole.halves(3).unwrap();
        assert_eq!((first.features.count(), second.features.count()), (5, 6));
        let mut numbers = Vec::new();
        for half in [&first, &second] {
            for i in 0..half.features.count() {
                let number = half.number(i);
                assert_eq!(half.features.get(i), images(21, |_| 0).features.get(number));
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        assert_eq!(numbers, Vec::from_iter(10..21));
        assert_ne!(first.numbers, whole.halves(4).unwrap()[0].numbers);
    }

    #[test]
    fn warnings_have_the_names_of_the_extractor() {
        let found = warnings("data", 500, 3, (NAMES, true));
        let expected = [
            "data: 500 images; 10,000 are needed for f, c, precision, recall, density and coverage",
            "data: 500 images; 1,000 are needed for k and s",
        ];
        assert_eq!(found, expected);
        let few = "data: 3 images are not more than the 3 features; f says little";
        let found = warnings("data", 3, 3, (NAMES, false));
        assert_eq!(found, ["data: 3 images; 10,000 are needed for f", few]);
    }
}
