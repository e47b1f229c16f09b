//! The figures of sets of images: their distance from the test images, and the distribution of their classes.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use ddpm::cli::{DataSet, Identity, Result, Trained, datasets, err, grouped, out};
use ddpm::data::{Dataset, Images};
use ddpm::eval::{DigitClassifier, Extractor, Statistics};
use ddpm::files;
use ddpm::nn::Condition;
use serde::Serialize;
use serde_json::{Value, json};

use super::classifier::{Random, labels, look};

const CLASSES: usize = DigitClassifier::CLASSES;

/// The number of images in MNIST's test set.
const ENOUGH: usize = 10_000;

/// The minimum accuracy of a good classifier.
const GOOD: f64 = 0.99;

/// The probability of a class above which an image clearly belongs to it.
pub const CONFIDENT: f32 = 0.9;

/// The statistics of the images with which others are compared.
pub struct Reference {
    classifier: DigitClassifier,
    statistics: Statistics,
    images: usize,
    /// The fraction of these images that the classifier assigns to their class.
    pub accuracy: f64,
}

/// The figures of a set of images.
#[derive(Serialize)]
pub struct Figures {
    images: usize,
    /// The distance from the reference.
    mnist_fd: f64,
    /// The fraction of images that clearly belong to a class.
    confident: f64,
    /// The number of images that are most like each digit.
    classes: [usize; CLASSES],
    /// The fraction of images that are most like the digit that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    as_asked: Option<f64>,
}

impl Reference {
    pub fn new(
        classifier: DigitClassifier,
        images: &Images,
        stop: impl Fn() -> bool,
    ) -> Result<Self> {
        let labels = labels(images)?;
        let (statistics, probabilities) = look(&classifier, images, stop)?;
        let right = probabilities.iter().zip(labels).filter(|(p, l)| best(p) == usize::from(**l));
        let accuracy = right.count() as f64 / images.len() as f64;
        Ok(Self { classifier, statistics, images: images.len(), accuracy })
    }
}

impl Figures {
    /// `asked` are the digits that were asked for, if the images have a condition.
    fn new(
        reference: &Reference,
        images: &Images,
        asked: Option<&[u32]>,
        stop: impl Fn() -> bool,
    ) -> Result<Self> {
        let (statistics, probabilities) = look(&reference.classifier, images, stop)?;
        let mnist_fd = reference.statistics.frechet_distance(&statistics)?;
        let (confident, classes) = tally(&probabilities);
        let as_asked = asked.map(|asked| {
            let pairs = probabilities.iter().zip(asked);
            let right = pairs.filter(|(p, class)| best(p) == **class as usize).count();
            right as f64 / images.len() as f64
        });
        Ok(Self { images: images.len(), mnist_fd, confident, classes, as_asked })
    }

    fn row(&self) -> String {
        let Self { images, mnist_fd, confident, classes, as_asked } = self;
        let shares = classes.map(|n| format!("{:5.1}", 100.0 * n as f64 / *images as f64));
        let asked = as_asked.map(|share| format!("  {:.1}% as asked", 100.0 * share));
        let (confident, asked) = (100.0 * confident, asked.unwrap_or_default());
        format!("{images:>7}{mnist_fd:>10.3}{confident:>7.1}%{}{asked}", shares.concat())
    }
}

/// Returns the fraction of images that clearly belong to a class, and the number of images most similar to each class.
pub fn tally(probabilities: &[Vec<f32>]) -> (f64, [usize; CLASSES]) {
    let mut classes = [0; CLASSES];
    probabilities.iter().for_each(|p| classes[best(p)] += 1);
    let clear = probabilities.iter().filter(|p| p[best(p)] > CONFIDENT).count();
    (clear as f64 / probabilities.len() as f64, classes)
}

fn best(probabilities: &[f32]) -> usize {
    (0..probabilities.len())
        .max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]))
        .unwrap_or_default()
}

/// Returns an error if the run was trained on images other than digits. A file beside the checkpoint names the images
/// of the run. Checkpoints without such a file are accepted.
pub fn check_digits(checkpoint: &Trained) -> Result<()> {
    let dir = checkpoint.path();
    let file = match dir.file_name() {
        Some(_) => dir.with_file_name("data.json"),
        // A path such as `.` has no name to replace.
        None => dir.join("../data.json"),
    };
    match Identity::read(&file)? {
        Some(run) if run.name != "MNIST" => {
            let (file, name) = (file.display(), run.name);
            return Err(format!("{file}: the run is of {name}; mnist-fd measures digits").into());
        }
        _ => {}
    }
    let found = checkpoint.architecture()?.image_shape();
    if found != DigitClassifier::SHAPE {
        let expected = format!("the classifier's have {:?}", DigitClassifier::SHAPE);
        return Err(format!("the network's images have shape {found:?}; {expected}").into());
    }
    Ok(())
}

/// Reads the training set and the test set. Returns an error if they are not suitable for the measure.
pub fn data_sets(dir: &Path) -> Result<(DataSet, DataSet)> {
    let (train, test) = datasets::mnist_with_labels(dir)?;
    for set in [&train, &test] {
        set.check_shape(DigitClassifier::SHAPE)?;
        labels(&set.images)?;
    }
    if train.images.len().min(test.images.len()) < 2 {
        return Err(format!("{}: at least 2 images of each kind are needed", test.about).into());
    }
    Ok((train, test))
}

/// The results, in the order of their output.
pub struct Report {
    json: Value,
    rows: Vec<(&'static str, String)>,
}

impl Report {
    /// Creates a report that begins with the choices on which the images depend.
    pub fn new(choices: Value) -> Self {
        Self { json: choices, rows: vec![] }
    }

    /// Prints the information that the user needs before the results.
    pub fn introduce(&mut self, file: &Path, reference: &Reference, count: usize) -> Result<()> {
        let weights = fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
        let crc32 = Identity::crc32(&weights);
        let (name, images) = (file.display(), grouped(reference.images));
        let right = 100.0 * reference.accuracy;
        out(format_args!(
            "classifier  {name}, crc32 {crc32}, right on {right:.2}% of {images} test images"
        ));
        if reference.accuracy < GOOD {
            err("warning: a good classifier is right on over 99%; this one is too inaccurate");
        }
        if count < ENOUGH {
            err(format_args!(
                "warning: the fewer images, the larger the distance; {ENOUGH} are usual"
            ));
        }
        self.json["classifier"] = json!(file.to_string_lossy());
        self.json["classifier_crc32"] = json!(crc32);
        self.json["classifier_sha256"] = json!(reference.classifier.identity().weights_sha256);
        self.json["test_images"] = json!(reference.images);
        self.json["test_accuracy"] = json!(reference.accuracy);
        Ok(())
    }

    /// Compares samples, and the same numbers of training images and of noise images, with the reference. `condition`
    /// holds the digits that were asked for, if there are any.
    pub fn compare(
        &mut self,
        reference: &Reference,
        (samples, condition): (Images, &Condition),
        mut digits: Images,
        stop: impl Fn() -> bool,
    ) -> Result<()> {
        let asked = match condition {
            Condition::Classes(classes) => Some(classes.to_vec1()?),
            _ => None,
        };
        // As many digits as samples, because the distance depends on the number.
        digits.truncate(samples.len());
        let noise = noise(samples.len())?;
        for (name, key, images, asked) in [
            ("samples", "samples", samples, asked.as_deref()),
            ("train images", "train_images", digits, None),
            ("uniform noise", "uniform_noise", noise, None),
        ] {
            let figures = Figures::new(reference, &images, asked, &stop)?;
            self.rows.push((name, figures.row()));
            self.json[key] = json!(figures);
        }
        self.rows.swap(0, 1);
        Ok(())
    }

    /// Writes the file if a path is given, and prints the table.
    pub fn print(&self, path: Option<&Path>) -> Result<ExitCode> {
        if let Some(path) = path {
            files::write(path, format!("{:#}\n", self.json).as_bytes())?;
        }
        out(format_args!(
            "\n{:16}{:>7}{:>10}{:>8}  % of 0 to 9",
            "", "images", "mnist-fd", "> 0.9"
        ));
        for (name, row) in &self.rows {
            out(format_args!("{name:16}{row}"));
        }
        if let Some(path) = path {
            out(format_args!("\n{}", path.display()));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Draws images of independent pixels, with all values equally likely.
fn noise(count: usize) -> Result<Images> {
    let mut random = Random(0);
    let (_, height, width) = DigitClassifier::SHAPE;
    let pixels = (0..count * height * width).map(|_| random.below(256) as u8).collect();
    Ok(Images::new(pixels, DigitClassifier::SHAPE)?)
}
