//! Command-line programs that train and sample. Requires the feature `cli`.
//!
//! A program declares its [`Recipe`]: a network, a process, a training configuration. [`TrainArgs`] are its options,
//! and [`train()`] runs it. The program begins or resumes the run in a directory, trains, saves, draws grids and the loss
//! curve, and stops at Ctrl-C without loss. It continues a run only with the images it began with.
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use clap::Parser;
//! use ddpm::cli::{self, DataSet, Recipe, TrainArgs};
//! use ddpm::{Diffusion, TrainConfig, UNetConfig, data};
//!
//! #[derive(Parser)]
//! struct Cli {
//!     #[command(flatten)]
//!     train: TrainArgs,
//! }
//!
//! fn main() -> ExitCode {
//!     cli::main(|cli: Cli| {
//!         let recipe = Recipe::new(UNetConfig::mnist(), Diffusion::ddpm(), TrainConfig::mnist());
//!         cli::train(&recipe, &cli.train, || {
//!             Ok(DataSet::new("MNIST", data::mnist("data/mnist", data::Split::Train)?))
//!         })
//!     })
//! }
//! ```
//!
//! The program needs clap of the same version, 4. The rest of the library prints nothing; these programs write to
//! standard output and standard error. If nobody reads what they write, they continue.

mod arguments;
pub mod datasets;
pub mod device;
mod identity;
mod print;
mod recipe;
mod sampling;
mod train;

use std::error::Error as StdError;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

pub use arguments::whole;
pub use datasets::DataSet;
pub use identity::Identity;
pub use print::{err, grouped, out};
pub use recipe::{Recipe, TrainArgs};
pub use sampling::{SamplingArgs, Weights};
pub use train::train;

use crate::error::Error;
use crate::files;
use crate::observe::StopOnSignal;

/// The result of a program, with any error.
pub type Result<T> = std::result::Result<T, Box<dyn StdError + Send + Sync>>;

/// The error of work that the user stopped. [`main`] returns the exit code of a program that a signal stopped.
#[derive(Debug, thiserror::Error)]
#[error("stopped")]
pub struct Interrupted;

/// Parses the arguments and calls `run`. Every error is one line on standard error. Wrong arguments exit with 2, other
/// errors with 1, and [`Interrupted`] with 130.
pub fn main<C: Parser>(run: impl FnOnce(C) -> Result<ExitCode>) -> ExitCode {
    let arguments = match C::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if error.use_stderr() => {
            err(format_args!("{} (see --help)", arguments::usage_error(&error.to_string())));
            return ExitCode::from(2);
        }
        // --help and --version
        Err(answer) => {
            let _ = answer.print();
            return ExitCode::SUCCESS;
        }
    };
    run(arguments).unwrap_or_else(|error| {
        if error.is::<Interrupted>() {
            err(&error);
            return ExitCode::from(StopOnSignal::EXIT_CODE);
        }
        err(format_args!("error: {:?}", Error::external(error)));
        ExitCode::FAILURE
    })
}

/// Checks before long work that a program can write its result to `path`, the value of `option`. Creates the directory
/// if necessary.
///
/// # Errors
/// Returns an error if the path does not have the extension, is a directory, or cannot be written.
pub fn check_output(option: &str, path: &Path, extension: &str) -> Result<()> {
    let shown = path.display();
    if !path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension)) {
        return Err(format!("{option} is {shown}; it must end in .{extension}").into());
    }
    if path.is_dir() {
        return Err(format!("{option} is {shown}, a directory; it must be a file").into());
    }
    let name = path.file_name().unwrap_or_default();
    files::clear_leftovers(path.parent().unwrap_or(Path::new("")), |leftover| name == leftover);
    Ok(files::check_writable(path)?)
}
