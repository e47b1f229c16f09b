//! The comparison of a set of images with real images in the features of a network.

use std::path::Path;

use serde_json::{Value, json};

use super::choices::{ExtractorChoice, Names};
use super::figures::{Figures, LEAST, Measured, Reference, warnings};
use super::print::{err, grouped, out};
use super::result::Result;
use super::sets::{Part, Sets};
use super::work::Work;
use crate::data::Dataset;
use crate::eval::{Extractor, Features, Gaussian, extract};
use crate::observe::Progress;

/// The number of images whose features are computed together.
const BATCH: usize = 100;

/// The network whose features are compared.
pub(super) struct Chosen<'a> {
    pub choice: &'a ExtractorChoice,
    pub extractor: Box<dyn Extractor>,
}

impl Chosen<'_> {
    /// Prints warnings that there are too few images. `data` is the number of images to compare with, if they are not
    /// in a statistics file.
    pub fn warn(&self, samples: usize, data: Option<usize>) {
        let which = (self.choice.names(), data.is_some());
        let sets = [Some(("samples", samples)), data.map(|data| ("data", data))];
        for (name, count) in sets.into_iter().flatten() {
            for warning in warnings(name, count, self.extractor.size(), which) {
                err(format_args!("warning: {warning}"));
            }
        }
    }

    /// The identity of the network, for the report.
    pub fn record(&self) -> Value {
        let identity = self.extractor.identity();
        json!({
            "kind": self.choice.kind(),
            "file": self.choice.file().to_string_lossy(),
            "name": identity.name,
            "weights_sha256": identity.weights_sha256,
            "resizing": identity.resizing,
            "features": self.extractor.size(),
        })
    }

    /// Computes the features of a set.
    pub fn features(&self, of: &str, images: &dyn Dataset, work: &Work<'_>) -> Result<Measured> {
        let total = images.len();
        out(format_args!("features    of {of}, {} images", grouped(total)));
        let progress = Progress::started(total as u64);
        let mut all: Option<Features> = None;
        let _ = extract(&*self.extractor, images, BATCH, |features| {
            let done = match &mut all {
                Some(all) => all.append(features).map(|()| all.count())?,
                None => all.insert(features.clone()).count(),
            };
            progress.advance(done as u64);
            Ok(work.flow())
        })?;
        progress.finish();
        work.check()?;
        let features = all.unwrap_or_else(|| Features::new(self.extractor.size()));
        Ok(Measured { features, numbers: None })
    }
}

/// The content of a statistics file, and its record in the report.
pub(super) struct SavedStatistics {
    pub gaussian: Gaussian,
    pub json: Value,
}

impl SavedStatistics {
    /// Reads statistics of the extractor's features.
    ///
    /// # Errors
    /// Returns the errors of [`Gaussian::read`], and an error if the number of features differs.
    pub fn read(path: &Path, extractor: &dyn Extractor) -> Result<Self> {
        let (gaussian, sha256) = Gaussian::read_with_sha256(path)?;
        let json = json!({ "file": path.to_string_lossy(), "sha256": sha256 });
        let (found, expected) = (gaussian.mean().len(), extractor.size());
        if found != expected {
            let path = path.display();
            return Err(format!("{path}: {found} features; the extractor has {expected}").into());
        }
        Ok(Self { gaussian, json })
    }
}

/// The real images with which others are compared.
pub(super) struct Real {
    pub reference: Reference,
    /// The other part of a published set.
    other: Option<Measured>,
    /// The part that is the reference.
    split: Part,
}

impl Real {
    /// Computes the features of the real images, or takes the saved statistics.
    ///
    /// # Errors
    /// Returns the errors of the extractor and of the data.
    pub fn of(
        chosen: &Chosen<'_>,
        (sets, split): (&Sets, Part),
        saved: Option<SavedStatistics>,
        work: &Work<'_>,
    ) -> Result<Self> {
        let reference = match (&sets.data, saved) {
            (Some(data), _) => Reference::of(chosen.features("the data", &*data.images, work)?)?,
            (None, Some(saved)) => Reference { gaussian: saved.gaussian, images: None },
            (None, None) => return Err("--data or --statistics is needed".into()),
        };
        let other = match &sets.other {
            Some(set) => {
                let of = format!("the {}", split.other().name());
                Some(chosen.features(&of, &*set.images, work)?)
            }
            None => None,
        };
        Ok(Self { reference, other, split })
    }

    /// Computes the figures of images, and those of real images beside them. Prints a table, and returns both for the
    /// report.
    ///
    /// # Errors
    /// Returns the errors of the metrics.
    pub fn compare(
        &self,
        images: &Measured,
        chosen: &Chosen<'_>,
        seed: u64,
        work: &Work<'_>,
    ) -> Result<Value> {
        out("figures     of all images");
        let check = || work.check();
        // The images among which copies are searched. A folder of pictures has no other part.
        let training = match (&self.other, self.split) {
            (Some(other), Part::Test) => Some(other),
            _ => self.reference.images.as_ref(),
        };
        let figures = Figures::measure(&self.reference, images, training, seed, check)?;
        let mut json = json!({ "samples": figures.json() });
        // Figures depend on the number of images, so the real images are at most as many.
        let first = |real: &Measured| {
            let count = images.features.count().min(real.features.count());
            real.select(&(0..count as u32).collect::<Vec<_>>())
        };
        let floor = match (&self.other, &self.reference.images) {
            (Some(other), _) => {
                // Training images are their own nearest ones.
                let training = training.filter(|_| self.split == Part::Train);
                let floor = first(other)?;
                let floor = Figures::measure(&self.reference, &floor, training, seed, check)?;
                json["other_part"] = floor.json();
                Some((self.split.other().name(), floor))
            }
            (None, Some(data)) if data.features.count() >= 2 * LEAST => {
                let [one, other] = data.halves(seed)?;
                let compared_with = one.features.count();
                let (one, other) = (Reference::of(one)?, first(&other)?);
                let floor = Figures::measure(&one, &other, one.images.as_ref(), seed, check)?;
                json["half_of_data"] = floor.json();
                json["half_of_data"]["compared_with"] = json!(compared_with);
                Some(("half of the data", floor))
            }
            _ => None,
        };
        print(&figures, floor.as_ref().map(|(name, floor)| (*name, floor)), chosen.choice.names());
        Ok(json)
    }
}

/// Prints a table of the figures of the samples, and of real images with their name.
fn print(figures: &Figures, floor: Option<(&str, &Figures)>, names: Names) {
    let real = floor.map_or("", |(real, _)| real);
    out(format_args!("\n{:28}{:>20}{real:>20}", "", "samples"));
    let floor = floor.map_or_else(Vec::new, |(_, figures)| figures.rows(names));
    for (name, value) in figures.rows(names) {
        let real = floor.iter().find(|(row, _)| *row == name).map_or("", |(_, value)| value);
        out(format_args!("{name:28}{value:>20}{real:>20}"));
    }
}
