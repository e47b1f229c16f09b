use std::error::Error as _;
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::DType;

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// The errors of this crate, which name the place, the value and the allowed values.
///
/// `Display` prints one line. `Debug` prints the same line and its causes, so that a program whose `main` returns
/// this crate's [`Result`] ends with a readable message.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The value of a configuration's field or of an argument is not allowed.
    #[error("{field} is {value}; it must be {expected}")]
    Config {
        /// The field's name, such as `hidden_dims`.
        field: &'static str,
        /// Its value.
        value: String,
        /// The allowed values.
        expected: String,
    },

    /// The shape of a tensor is not allowed.
    #[error("{what} has shape {found:?}; it must be {expected}")]
    Shape {
        /// The name of the tensor.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The allowed shapes.
        expected: String,
    },

    /// The training loss, the norm of its gradient, or a weight became infinite or NaN.
    #[error("{what} is {value} at step {step}; nothing was saved since the last checkpoint")]
    NonFinite {
        /// `loss`, `gradient norm`, or `weight` and its name.
        what: String,
        /// The value.
        value: f32,
        /// The training step (counted from 1) that computed it.
        step: u64,
    },

    /// A weight has no gradient in the first update, so training would never change it.
    #[error(
        "weight {name} has no gradient in the first update ({missing} of {total} weights have none); either the network \
         does not use it, or an operation without a gradient, such as candle_nn::LayerNorm, lies between it and the \
         loss; Denoiser::may_lack_gradient can allow this"
    )]
    NoGradient {
        /// The first such weight's name.
        name: String,
        /// Number of weights without a gradient.
        missing: usize,
        /// Number of all weights.
        total: usize,
    },

    /// The start of a sampler, a prediction, or a sample is infinite or NaN.
    #[error("{what} is not finite at timestep {t}")]
    NonFiniteSample {
        /// `the denoiser's output`, `the sample` computed from it, or `the start`.
        what: &'static str,
        /// The first timestep where it is not finite, or a time between two.
        t: f64,
    },

    /// The content of a data file does not follow its format.
    #[error("{}: {reason}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The problem, and what was expected.
        reason: String,
    },

    /// Pictures of a folder do not fit the value of a field of its configuration.
    #[error("{}: {reason}; {remedy}", path.display())]
    Pictures {
        /// The folder, or a picture in it.
        path: PathBuf,
        /// The problem.
        reason: String,
        /// The field of `FolderConfig`: `unreadable` or `classes`.
        field: &'static str,
        /// The advice at the end of the message.
        remedy: &'static str,
    },

    /// There is no complete checkpoint in a directory.
    #[error("{}: no checkpoint here: {reason}", path.display())]
    NoCheckpoint {
        /// The directory.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },

    /// A weights file, or a file of a checkpoint, is truncated, malformed, or inconsistent with other files.
    #[error("{}: damaged file: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The problem.
        reason: String,
    },

    /// Another checkpoint replaced an open one, for example because its run continued. It can be opened again.
    #[error("{}: replaced since the checkpoint was opened; open it again", path.display())]
    Replaced {
        /// The checkpoint's directory.
        path: PathBuf,
    },

    /// A newer version of this crate wrote the checkpoint.
    #[error(
        "{}: checkpoint format {found} is newer than {supported}, the newest that this version reads; \
         use a newer version of ddpm",
        path.display()
    )]
    NewerFormat {
        /// The file with the format version.
        path: PathBuf,
        /// The version in the file.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },

    /// A checkpoint belongs to a different run than the one that would continue from it or replace it.
    #[error("{field} is {found} in the checkpoint, but {expected} was requested; {remedy}")]
    ConfigMismatch {
        /// The field's path, such as `train.batch_size`.
        field: String,
        /// The checkpoint's value.
        found: String,
        /// The requested value.
        expected: String,
        /// The advice at the end of the message.
        remedy: &'static str,
    },

    /// The path of a checkpoint is taken by something other than a checkpoint of this run.
    #[error("{}: no checkpoint can be saved here: {found}", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
        /// A description of the object at the path.
        found: String,
    },

    /// Another trainer holds the right to save at a directory.
    #[error("{}: {holder} saves here; only one run at a time may", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The holder of the right, such as `process 1234`.
        holder: String,
    },

    /// An old checkpoint, or a part of one, could not be removed. The next save tries again.
    #[error("{}: cannot be removed: {source}", path.display())]
    NotRemoved {
        /// The directory that remains.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },

    /// The parent directory of a checkpoint was removed during the run, and was created again.
    #[error("{}: removed during the run, and created again", path.display())]
    Vanished {
        /// The directory.
        path: PathBuf,
    },

    /// A file lacks a weight of the network.
    #[error(
        "{}: weight {name} is missing{}",
        path.display(),
        under_another_prefix(similar.as_deref())
    )]
    MissingWeight {
        /// The file.
        path: PathBuf,
        /// The weight's name.
        name: String,
        /// A weight in the file whose name differs only by a prefix.
        similar: Option<String>,
    },

    /// A file contains a weight that the network does not have.
    #[error("{}: weight {} is not one of the network's", path.display(), in_short(name))]
    UnknownWeight {
        /// The file.
        path: PathBuf,
        /// The weight's name.
        name: String,
    },

    /// The shape of a weight in a file differs from the network's.
    #[error(
        "{}: weight {name} has shape {}; the network's has {expected:?}",
        path.display(),
        list_in_short(found)
    )]
    WeightShape {
        /// The file.
        path: PathBuf,
        /// The weight's name.
        name: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape in the network.
        expected: Vec<usize>,
    },

    /// The reading of a folder of pictures was stopped on request.
    #[error("{}: stopped before all pictures were read", path.display())]
    Stopped {
        /// The folder.
        path: PathBuf,
    },

    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },

    /// The system has not enough memory for a feature map of a network on the CPU.
    #[error("not enough memory for a feature map of {bytes} bytes; use fewer images at a time")]
    OutOfMemory {
        /// The requested number of bytes.
        bytes: usize,
    },

    /// A tensor operation failed. The message is one line; the source contains candle's backtrace, if there is one.
    #[error("{}", one_line(.0))]
    Tensor(#[from] candle_core::Error),

    /// An error of the user's [`Observer`](crate::train::Observer), [`Dataset`](crate::data::Dataset) or network.
    #[error(transparent)]
    External(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Wraps an error of a user's observer, image source or network.
    pub fn external(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::External(error.into())
    }

    pub(crate) fn config(
        field: &'static str,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Config { field, value: value.to_string(), expected: expected.into() }
    }

    pub(crate) fn shape(
        what: &'static str,
        found: impl Into<Vec<usize>>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Shape { what, found: found.into(), expected: expected.into() }
    }

    pub(crate) fn damaged(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.as_ref().to_owned(), reason: reason.into() }
    }

    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn data(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Data { path: path.as_ref().to_owned(), reason: reason.into() }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let more = error.to_string();
            // Further lines are a backtrace. Some errors include the text of their causes.
            let more = more.lines().next().unwrap_or_default();
            if !text.contains(more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        // Errors of other libraries may have several lines.
        f.write_str(&text.split_whitespace().collect::<Vec<_>>().join(" "))
    }
}

/// # Errors
/// Returns an error if the dimensions of `what` are not the expected ones, which have this meaning.
pub(crate) fn check_dims(
    what: &'static str,
    found: &[usize],
    expected: &[usize],
    meaning: &str,
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::shape(what, found, format!("{expected:?}, {meaning}")))
}

/// # Errors
/// Returns an error if this is not a floating-point dtype. Some functions of candle panic for other dtypes.
pub(crate) fn check_float(field: &'static str, dtype: DType) -> Result<()> {
    if dtype.is_float() {
        return Ok(());
    }
    Err(Error::config(field, dtype.as_str(), "a floating-point dtype"))
}

/// # Errors
/// Returns an error if a probability, or a factor of a decay, is not at least 0 and less than 1.
pub(crate) fn check_fraction(field: &'static str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::config(field, value, "at least 0 and less than 1"))
}

/// Shortens a text from a file or another library for a message: to one line, and to its beginning if it is long.
pub(crate) fn in_short(text: &str) -> String {
    const LONG: usize = 80;
    const TOO_LONG: usize = 160;
    let end = text.floor_char_boundary(TOO_LONG);
    let line = text[..end].split_whitespace().collect::<Vec<_>>().join(" ");
    if end == text.len() {
        return line;
    }
    format!("{}... ({} bytes)", &line[..line.floor_char_boundary(LONG)], text.len())
}

/// Formats a list for a message, or only its length if it is long.
pub(crate) fn list_in_short(list: &[usize]) -> String {
    match list.len() {
        ..=16 => format!("{list:?}"),
        len => format!("a list of {len}"),
    }
}

fn under_another_prefix(similar: Option<&str>) -> String {
    similar.map_or(String::new(), |name| {
        format!("; the file has {}, under another prefix", in_short(name))
    })
}

/// The message of a candle error without backtraces, which can have hundreds of lines.
fn one_line(error: &candle_core::Error) -> String {
    use candle_core::Error::{Context, WithBacktrace, WithPath, WrappedContext};

    let text = match error {
        WithBacktrace { inner, .. } => return one_line(inner),
        WithPath { inner, path } => return format!("{}: {}", path.display(), one_line(inner)),
        Context { inner, context } => format!("{context}: {}", one_line(inner)),
        WrappedContext { wrapped, context } => format!("{context}: {wrapped}"),
        other => other.to_string(),
    };
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_is_the_sentence_with_its_causes() {
        let denied = || std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let error = Error::io("out/run")(denied());
        assert_eq!(format!("{error:?}"), error.to_string());
        assert_eq!(error.to_string(), "out/run: permission denied");

        #[derive(Debug, thiserror::Error)]
        #[error("the picture of a cat")]
        struct Picture(#[source] std::io::Error);
        let error = Error::external(Picture(denied()));
        assert_eq!(format!("{error:?}"), "the picture of a cat: permission denied");
    }

    #[test]
    fn long_texts_are_quoted_in_short_and_in_one_line() {
        assert_eq!(in_short("a\nb"), "a b");
        let long = "ä".repeat(1 << 20);
        let quoted = in_short(&long);
        assert!(quoted.len() < 120 && quoted.ends_with("... (2097152 bytes)"), "{quoted}");
    }

    #[test]
    fn an_error_of_candle_is_one_line_with_its_cause() {
        // The form of errors with RUST_BACKTRACE set.
        let traced = |error| candle_core::Error::WithBacktrace {
            inner: Box::new(error),
            backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
        };
        let plain = || candle_core::Error::Msg("no such thing".into());
        for (error, expected) in [
            (plain(), "no such thing"),
            (traced(plain()), "no such thing"),
            (traced(traced(plain()).with_path("a/b")), "a/b: no such thing"),
            (traced(plain()).context("while asking"), "while asking: no such thing"),
            (candle_core::Error::Msg(traced(plain()).to_string()), "no such thing"),
        ] {
            let text = error.to_string();
            let error = Error::from(error);
            assert_eq!(error.to_string(), expected);
            assert_eq!(error.source().map(ToString::to_string), Some(text));
        }
    }
}
