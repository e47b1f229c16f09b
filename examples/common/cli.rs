//! Arguments and exit codes. Every error is one line.

use std::error::Error;
use std::ops::RangeInclusive;
use std::process::ExitCode;

use clap::Parser;
use ddpm::Precision;

use super::interrupt::{EXIT_CODE, Interrupted};
use super::tell::err;

pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Parses the arguments and calls `run`. Wrong arguments exit with 2, other errors with 1, except for [`Interrupted`].
pub fn main<C: Parser>(run: impl FnOnce(C) -> Result<ExitCode>) -> ExitCode {
    let arguments = match C::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if error.use_stderr() => {
            err!("{} (see --help)", usage_error(&error.to_string()));
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
            err!("{error}");
            return ExitCode::from(EXIT_CODE);
        }
        err!("error: {}", one_line(error));
        ExitCode::FAILURE
    })
}

/// The message of clap before the usage, in one line. It begins with `error: `.
fn usage_error(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty() && !line.contains("as a value, use"))
        .collect();
    lines.join(" ").replace(" tip: ", "; tip: ")
}

/// Formats an error with its causes in one line, as the library does for its own.
pub fn one_line(error: impl Into<Box<dyn Error + Send + Sync>>) -> String {
    format!("{:?}", ddpm::Error::external(error))
}

/// Reads a whole number within a range.
pub fn whole<T: TryFrom<u64>>(
    range: RangeInclusive<u64>,
) -> impl Fn(&str) -> std::result::Result<T, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|n| range.contains(n));
        number.and_then(|n| n.try_into().ok()).ok_or_else(|| {
            format!("expected a whole number from {} to {}", range.start(), range.end())
        })
    }
}

/// Reads a number from 0 to 1.
pub fn fraction(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse().ok().filter(|n| (0.0..=1.0).contains(n));
    number.ok_or_else(|| "expected a number from 0 to 1".into())
}

/// Reads a number above 0, up to 1.
pub fn positive_fraction(text: &str) -> std::result::Result<f64, String> {
    let number = fraction(text).ok().filter(|&n| n > 0.0);
    number.ok_or_else(|| "expected a number above 0, up to 1".into())
}

/// Reads a precision that this build has.
pub fn precision(text: &str) -> std::result::Result<Precision, String> {
    text.parse().map_err(|error: ddpm::Error| error.to_string())
}

/// The command that continues this run: this one with `--resume`.
pub fn resume_command(example: &str) -> String {
    let arguments: Vec<String> =
        std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    let (program, arguments) = arguments.split_first().map_or(("", &[][..]), |(p, a)| (p, a));
    let mut command = match std::env::var_os("CARGO") {
        Some(_) => format!("cargo run{} --example {example} --", cargo_options()),
        None => quoted(program),
    };
    for argument in arguments.iter().filter(|a| *a != "--resume") {
        command = format!("{command} {}", quoted(argument));
    }
    format!("{command} --resume")
}

fn cargo_options() -> String {
    let features: Vec<&str> = [
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("metal", cfg!(feature = "metal")),
        ("accelerate", cfg!(feature = "accelerate")),
        ("mkl", cfg!(feature = "mkl")),
        ("f16", cfg!(feature = "f16")),
        ("hub", cfg!(feature = "hub")),
    ]
    .into_iter()
    .filter_map(|(name, on)| on.then_some(name))
    .collect();
    let release = if cfg!(debug_assertions) { "" } else { " --release" };
    match features.is_empty() {
        true => release.into(),
        false => format!("{release} --features {}", features.join(",")),
    }
}

/// Quotes an argument for a shell.
pub fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:+@".contains(c);
    match !argument.is_empty() && argument.chars().all(plain) {
        true => argument.into(),
        false => format!("'{}'", argument.replace('\'', r"'\''")),
    }
}
