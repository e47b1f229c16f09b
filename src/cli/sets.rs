//! The sets of images of an evaluation.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};

use super::arguments::whole;
use super::choices::DataChoice;
use super::datasets::DataSet;
use super::figures::LEAST;
use super::print::{err, grouped};
use super::result::{Interrupted, Result};
use crate::data::folder::{Channels, Folder, FolderConfig};
use crate::data::{Dataset, Images, Split};
use crate::error::Error;
use crate::eval::Extractor;
use crate::observe::StopOnSignal;

/// A shape of images: channels, height, width.
pub(super) type Shape = (usize, usize, usize);

/// The options that select the images that are compared.
#[derive(Debug, Args)]
pub(super) struct SetsArgs {
    /// Folder of pictures to measure, instead of samples of a checkpoint
    #[arg(long, value_name = "DIR", conflicts_with = "SamplingArgs")]
    samples: Option<PathBuf>,
    /// Images to compare with: mnist:DIR, fashion-mnist:DIR or cifar10:DIR with the files of the set,
    /// or pictures:DIR, a folder of pictures
    #[arg(
        long,
        value_name = "KIND:DIR",
        required_unless_present = "statistics",
        conflicts_with = "statistics"
    )]
    data: Option<DataChoice>,
    /// Part of a published set to compare with. The first images of the other part show the figures of real images. For
    /// a folder, its halves show them
    #[arg(long, value_name = "PART", value_enum, default_value = "test")]
    pub split: Part,
    /// Height and width to which pictures are cropped and scaled; the default is the size of the samples or of
    /// the published set, or that of the extractor
    #[arg(long, value_name = "N", conflicts_with = "SamplingArgs",
          value_parser = whole::<u32>(2..=4096))]
    image_size: Option<u32>,
}

/// A part of a published set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Part {
    Train,
    Test,
}

impl Part {
    pub fn other(self) -> Self {
        match self {
            Self::Train => Self::Test,
            Self::Test => Self::Train,
        }
    }

    /// The name for the user.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "training images",
            Self::Test => "test images",
        }
    }
}

/// A set of images, its description for the user, and its record in the report.
pub(super) struct Set {
    pub images: Box<dyn Dataset>,
    pub about: String,
    pub json: Value,
}

/// The sets of images of an evaluation.
pub(super) struct Sets {
    /// The pictures to measure, if they are not drawn.
    pub samples: Option<Set>,
    /// The images to compare with, if there are no statistics.
    pub data: Option<Set>,
    /// The other part of a published set.
    pub other: Option<Set>,
}

impl SetsArgs {
    /// Reads the sets, and checks that their shapes fit each other, the samples that will be `drawn`, and the
    /// extractor if there is one. `usual` is the shape of pictures for which no other shape is known.
    pub fn open(
        &self,
        drawn: Option<Shape>,
        usual: Option<Shape>,
        extractor: Option<&dyn Extractor>,
        stop: &StopOnSignal,
    ) -> Result<Sets> {
        let try_out = |shape| extractor.map_or(Ok(()), |extractor| try_out(extractor, shape));
        let part = |part: Part| match &self.data {
            Some(choice) => choice.read(part),
            None => Ok(None),
        };
        let (mut data, other) = (part(self.split)?, part(self.split.other())?);
        let known = drawn.or(data.as_ref().map(Set::shape));
        let (channels, height, width) = match (known, self.image_size) {
            (Some(_), Some(_)) => {
                return Err("--image-size is for pictures that are compared with pictures".into());
            }
            (None, Some(size)) => (Channels::Auto, size, size),
            (Some(shape), None) => of_shape(shape)?,
            (None, None) => of_shape(usual.ok_or("--image-size is needed for pictures")?)?,
        };
        if let Some(shape) = known {
            try_out(shape)?;
        }
        let config = FolderConfig { height, width, channels, ..FolderConfig::default() };
        if let (Some(choice), None) = (&self.data, &data) {
            data = Some(Set::pictures(choice.dir(), config.clone(), stop)?);
        }
        // The channels of the samples are those of the data.
        let known = known.or(data.as_ref().map(Set::shape));
        let channels = match known {
            Some(shape) if self.samples.is_some() => of_shape(shape)?.0,
            _ => channels,
        };
        let config = FolderConfig { channels, ..config };
        let samples = match &self.samples {
            Some(dir) => Some(Set::pictures(dir, config, stop)?),
            None => None,
        };
        let sets = Sets { samples, data, other };
        let expected = known.or(sets.samples.as_ref().map(Set::shape));
        for set in [&sets.samples, &sets.data, &sets.other].into_iter().flatten() {
            let (about, found) = (&set.about, set.shape());
            if let Some(expected) = expected.filter(|expected| *expected != found) {
                let shapes = format!("have shape {found:?}; the others have {expected:?}");
                return Err(format!("the images of {about} {shapes}").into());
            }
            if set.images.len() < LEAST {
                return Err(format!("{about}; at least {LEAST} are needed").into());
            }
        }
        expected.map_or(Ok(()), try_out)?;
        Ok(sets)
    }
}

impl DataChoice {
    /// Reads a part of a published set. Returns `None` for a folder of pictures, which has no parts.
    fn read(&self, part: Part) -> Result<Option<Set>> {
        let split = if part == Part::Train { Split::Train } else { Split::Test };
        Ok(self.published(split)?.map(|set| Set::published(set, part)))
    }
}

impl Set {
    fn published(set: DataSet, part: Part) -> Self {
        let DataSet { name, images, about, checksum, .. } = set;
        let count = images.len();
        let json = json!({ "name": name, "part": part, "images": count, "crc32": checksum });
        let about = format!("{about}, {} {}", grouped(count), part.name());
        Self { images: Box::new(images), about, json }
    }

    fn pictures(dir: &Path, config: FolderConfig, stop: &StopOnSignal) -> Result<Self> {
        let builder = Folder::builder(dir, config).on_progress(|progress| {
            if progress.done > 0 && progress.done.is_multiple_of(1000) {
                err(progress);
            }
            if stop.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let folder = match builder.open() {
            Err(Error::Stopped { .. }) => return Err(Interrupted.into()),
            // The program has no option for the remedy.
            Err(Error::Pictures { path, reason, .. }) => {
                return Err(format!("{}: {reason}", path.display()).into());
            }
            folder => folder?,
        };
        let (count, resizing) = (folder.len(), folder.config());
        let sha256 = folder.fingerprint();
        let json = json!({ "name": dir.to_string_lossy(), "images": count, "sha256": sha256, "resizing": resizing });
        let about = format!("{}, {} pictures", dir.display(), grouped(count));
        Ok(Self { images: Box::new(folder), about, json })
    }

    fn shape(&self) -> Shape {
        self.images.shape().into()
    }
}

/// Computes the features of one image, because an extractor refuses shapes that it cannot process.
pub(super) fn try_out(extractor: &dyn Extractor, shape: Shape) -> Result<()> {
    let (channels, height, width) = shape;
    extractor.extract(&Images::new(vec![0; channels * height * width], shape)?)?;
    Ok(())
}

/// The settings of pictures that become images of this shape.
fn of_shape((channels, height, width): Shape) -> Result<(Channels, u32, u32)> {
    let kind = match channels {
        1 => Channels::Grey,
        3 => Channels::Rgb,
        4 => Channels::Rgba,
        _ => {
            let expected = "pictures have 1, 3 or 4";
            return Err(format!("the images have {channels} channels; {expected}").into());
        }
    };
    Ok((kind, u32::try_from(height)?, u32::try_from(width)?))
}
