use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

use super::arguments::usage_error;
use super::print::err;
use super::result::{Interrupted, Result};
use crate::error::Error;
use crate::files;
use crate::observe::StopOnSignal;

/// Parses the arguments and calls `run`. Every error is one line on standard error. Wrong arguments exit with 2, other
/// errors with 1, and [`Interrupted`] with 130.
pub fn main<C: Parser>(run: impl FnOnce(C) -> Result<ExitCode>) -> ExitCode {
    let arguments = match C::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if error.use_stderr() => {
            err(format_args!("{} (see --help)", usage_error(&error.to_string())));
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
