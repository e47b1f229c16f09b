use std::error::Error as _;
use std::fmt;
use std::path::{Path, PathBuf};

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, each with the place, the value and what is allowed.
///
/// `Display` is one sentence. `Debug` is the same sentence with its causes, so that a program whose `main`
/// returns this crate's [`Result`] ends with a message that people can read.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration's field has a value that it may not have.
    #[error("{field} is {value}; it must be {expected}")]
    Config {
        /// The field's name, such as `hidden_dims`.
        field: &'static str,
        /// The value it has.
        value: String,
        /// What is allowed.
        expected: String,
    },

    /// A tensor has a shape that it may not have.
    #[error("{what} has shape {found:?}; it must be {expected}")]
    Shape {
        /// What the tensor is.
        what: &'static str,
        /// The shape it has.
        found: Vec<usize>,
        /// What is allowed.
        expected: String,
    },

    /// The training loss, or the norm of its gradient, became infinite or NaN.
    #[error("{what} is {value} at step {step}; nothing was saved since the last checkpoint")]
    NonFinite {
        /// `loss`, `gradient norm`, or a weight by its name.
        what: String,
        /// The value it has.
        value: f32,
        /// The training step (counted from 1) that computed it.
        step: u64,
    },

    /// A weight of a network that trains has no gradient: nothing would ever change it.
    #[error(
        "weight {name} has no gradient in the first update, as {missing} of {total} weights; an operation without a \
         gradient lies between them and the loss, such as candle_nn::LayerNorm, or the network does not use them; \
         Denoiser::may_lack_gradient allows it"
    )]
    NoGradient {
        /// The first such weight's name.
        name: String,
        /// How many weights have none.
        missing: usize,
        /// How many weights there are.
        total: usize,
    },

    /// What a sampler was given, or what came of it, is infinite or NaN.
    #[error("{what} is not finite at timestep {t}")]
    NonFiniteSample {
        /// `the denoiser's output`, `the sample` that followed from it, or `the start`.
        what: &'static str,
        /// The first timestep where it is not finite.
        t: usize,
    },

    /// A data file's content is not what its format demands.
    #[error("{}: {reason}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        reason: String,
    },

    /// There is no complete checkpoint in a directory.
    #[error("{}: no checkpoint here: {reason}", path.display())]
    NoCheckpoint {
        /// The directory.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },

    /// A file of weights, or of a checkpoint, is truncated, malformed, or not consistent with the others.
    #[error("{}: damaged file: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A checkpoint was written by a newer version of this crate.
    #[error(
        "{}: checkpoint format {found} is newer than {supported}, the newest that this version reads; \
         use a newer version of ddpm",
        path.display()
    )]
    NewerFormat {
        /// The file that states the version.
        path: PathBuf,
        /// The version it states.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },

    /// A checkpoint belongs to another run than the one that would continue from it or replace it.
    #[error("{field} is {found} in the checkpoint, but {expected} is asked for; {remedy}")]
    ConfigMismatch {
        /// The field's path, such as `train.batch_size`.
        field: String,
        /// The checkpoint's value.
        found: String,
        /// The value asked for.
        expected: String,
        /// What can be done.
        remedy: &'static str,
    },

    /// Something is where a checkpoint would be saved that is none, or none of this run.
    #[error("{}: no checkpoint can be saved here: {found}", path.display())]
    Occupied {
        /// The place.
        path: PathBuf,
        /// What is there.
        found: String,
    },

    /// Somebody else holds the right to save to a directory.
    #[error("{}: {holder} saves here; only one run at a time may", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Who holds it, such as `process 1234`.
        holder: String,
    },

    /// An old checkpoint, or the rest of one, could not be removed. The next save tries again.
    #[error("{}: cannot be removed: {source}", path.display())]
    NotRemoved {
        /// The directory that stays.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },

    /// The directory around a run's checkpoint was removed while the run went on, and was made again.
    #[error("{}: removed while the run went on, and made again", path.display())]
    Vanished {
        /// The directory.
        path: PathBuf,
    },

    /// A network needs a weight that a file does not hold.
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
        /// A weight that the file does hold, whose name differs by a prefix.
        similar: Option<String>,
    },

    /// A file holds a weight that a network does not have.
    #[error("{}: weight {} is not one of the network's", path.display(), in_short(name))]
    UnknownWeight {
        /// The file.
        path: PathBuf,
        /// The weight's name.
        name: String,
    },

    /// A file holds a weight in another shape than the network's.
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

    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },

    /// The system has no memory for a feature map of a network on the CPU.
    #[error("no memory for {bytes} bytes, a feature map's; fewer images at a time need less")]
    OutOfMemory {
        /// How many bytes were asked for.
        bytes: usize,
    },

    /// A tensor operation failed. In one line; the source has candle's backtrace, where it took one.
    #[error("{}", one_line(.0))]
    Tensor(#[from] candle_core::Error),

    /// A user's [`Observer`](crate::Observer) or [`ImageSource`](crate::ImageSource) failed.
    #[error(transparent)]
    External(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Wraps an error of a user's own observer, image source or network.
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
            // Further lines are a backtrace. Some errors quote their causes themselves.
            let more = more.lines().next().unwrap_or_default();
            if !text.contains(more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        f.write_str(&text)
    }
}

/// A text from a file or another library as a message quotes it: one line, and of a long text the beginning.
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

/// A list of the user's or from a file, in short: of a long one its length.
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

/// What candle says without its backtraces, which would make hundreds of lines of it.
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
        // As with RUST_BACKTRACE.
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
