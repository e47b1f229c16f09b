//! Values of options as `KIND:PATH`: the extractor, and the images with which others are compared.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::datasets::{self, DataSet};
use super::result::Result;
use crate::data::Split;
use crate::eval::{CifarClassifier, DigitClassifier, EfficientNet, Extractor, Inception, Resizing};

/// The extractor of a program, as `KIND:FILE`, such as `digits:out/mnist-fd/classifier.safetensors`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ExtractorChoice {
    kind: &'static ExtractorKind,
    /// The file of the weights.
    file: PathBuf,
}

/// A kind of extractors.
#[derive(Debug)]
struct ExtractorKind {
    /// The name in `KIND:FILE`.
    name: &'static str,
    /// The names of the figures in the space of its features.
    names: Names,
    /// The shape of its images (channels, height, width), if it takes only one.
    shape: Option<(usize, usize, usize)>,
    open: fn(&Path, &Device) -> Result<Box<dyn Extractor>>,
}

/// The names of the figures that depend on the features. Only those of Inception are called FID, KID, MIND and
/// Inception Score.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    /// The Fréchet distance.
    pub frechet: &'static str,
    /// The kernel distance.
    pub kernel: &'static str,
    /// The sliced distance.
    pub sliced: &'static str,
    /// The score of the classes, by the formula of the Inception Score.
    pub score: &'static str,
}

/// The names of the figures of a network other than Inception.
macro_rules! names_of {
    ($network:literal) => {
        Names {
            frechet: concat!("Fréchet distance (", $network, ")"),
            kernel: concat!("kernel distance (", $network, ")"),
            sliced: concat!("sliced distance (", $network, ")"),
            score: concat!("class score (", $network, ")"),
        }
    };
}

/// The names of Inception's figures, as in papers. The resizing is a part of the extractor's identity.
const INCEPTION: Names =
    Names { frechet: "FID", kernel: "KID", sliced: "MIND", score: "Inception Score" };

/// The kinds of extractors, for the help of an option.
pub(super) const KINDS: &str = "inception:FILE, the network of FID; inception-tf1:FILE, with the resizing of \
    TensorFlow 1; efficientnet:FILE, for colour pictures without those weights; digits:FILE or cifar10:FILE, a classifier \
    that mnist-fd or cifar10-classifier wrote";

/// All kinds of extractors.
static EXTRACTORS: &[ExtractorKind] = &[
    ExtractorKind {
        name: "digits",
        names: names_of!("digits"),
        shape: Some(DigitClassifier::SHAPE),
        open: |file, device| Ok(Box::new(DigitClassifier::load(file, device)?)),
    },
    ExtractorKind {
        name: "cifar10",
        names: names_of!("CIFAR-10"),
        shape: Some(CifarClassifier::SHAPE),
        open: |file, device| Ok(Box::new(CifarClassifier::load(file, device)?)),
    },
    ExtractorKind {
        name: "efficientnet",
        names: names_of!("EfficientNet-lite0"),
        shape: None,
        open: |file, _| Ok(Box::new(EfficientNet::load(file)?)),
    },
    ExtractorKind {
        name: "inception",
        names: INCEPTION,
        shape: None,
        open: |file, _| Ok(Box::new(Inception::load(file)?)),
    },
    ExtractorKind {
        name: "inception-tf1",
        names: INCEPTION,
        shape: None,
        open: |file, _| Ok(Box::new(Inception::load(file)?.with_resizing(Resizing::TensorFlow1))),
    },
];

impl ExtractorChoice {
    /// The name of the kind.
    pub fn kind(&self) -> &'static str {
        self.kind.name
    }

    /// The file of the weights.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Loads the extractor.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if it is not a file of this kind.
    pub fn open(&self, device: &Device) -> Result<Box<dyn Extractor>> {
        (self.kind.open)(&self.file, device)
    }

    /// The names of the figures in the space of the features.
    pub(super) fn names(&self) -> Names {
        self.kind.names
    }

    /// The shape of the images (channels, height, width), if the extractor takes only one.
    pub(super) fn image_shape(&self) -> Option<(usize, usize, usize)> {
        self.kind.shape
    }
}

impl FromStr for ExtractorChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (kind, file) = parse(text, EXTRACTORS, |kind| kind.name, "FILE")?;
        Ok(Self { kind, file })
    }
}

impl TryFrom<String> for ExtractorChoice {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<ExtractorChoice> for String {
    fn from(choice: ExtractorChoice) -> Self {
        choice.to_string()
    }
}

impl fmt::Display for ExtractorChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.name, self.file.display())
    }
}

/// The images with which others are compared, as `KIND:DIR`, such as `mnist:data`.
#[derive(Debug, Clone)]
pub struct DataChoice {
    kind: &'static DataKind,
    dir: PathBuf,
}

/// A kind of data.
#[derive(Debug)]
struct DataKind {
    name: &'static str,
    /// Reads a part of a published set. `None` for a folder of pictures, which has no parts.
    read: Option<fn(&Path, Split) -> Result<DataSet>>,
}

/// All kinds of data.
static DATA: &[DataKind] = &[
    DataKind { name: "mnist", read: Some(|dir, split| datasets::mnist_part(dir, false, split)) },
    DataKind {
        name: "fashion-mnist",
        read: Some(|dir, split| datasets::mnist_part(dir, true, split)),
    },
    DataKind { name: "cifar10", read: Some(datasets::cifar10_part) },
    DataKind { name: "pictures", read: None },
];

impl DataChoice {
    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads a part of a published set. Returns `None` for a folder of pictures.
    pub(super) fn published(&self, split: Split) -> Result<Option<DataSet>> {
        self.kind.read.map(|read| read(&self.dir, split)).transpose()
    }
}

impl FromStr for DataChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (kind, dir) = parse(text, DATA, |kind| kind.name, "DIR")?;
        Ok(Self { kind, dir })
    }
}

/// Divides `KIND:PATH` at the first colon.
fn parse<K>(
    text: &str,
    kinds: &'static [K],
    name: impl Fn(&K) -> &'static str,
    path_name: &str,
) -> std::result::Result<(&'static K, PathBuf), String> {
    let (kind, path) = text.split_once(':').unwrap_or((text, ""));
    match kinds.iter().find(|found| name(found) == kind) {
        Some(kind) if !path.is_empty() => Ok((kind, path.into())),
        _ => {
            let names: Vec<String> =
                kinds.iter().map(|kind| format!("{}:{path_name}", name(kind))).collect();
            Err(format!("expected {}", names.join(", ")))
        }
    }
}
