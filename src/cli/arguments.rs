use std::error::Error as StdError;
use std::ops::RangeInclusive;

use crate::backend::accelerator;
use crate::error::Error;
use crate::precision::Precision;

/// The message of clap before the usage, in one line. It begins with `error: `.
pub(super) fn usage_error(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty() && !line.contains("as a value, use"))
        .collect();
    lines.join(" ").replace(" tip: ", "; tip: ")
}

/// A parser of clap for whole numbers within a range.
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

/// Parses a number from 0 to 1.
pub(super) fn fraction(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse().ok().filter(|n| (0.0..=1.0).contains(n));
    number.ok_or_else(|| "expected a number from 0 to 1".into())
}

/// Parses a number above 0, up to 1.
pub(super) fn positive_fraction(text: &str) -> std::result::Result<f64, String> {
    let number = fraction(text).ok().filter(|&n| n > 0.0);
    number.ok_or_else(|| "expected a number above 0, up to 1".into())
}

/// Parses the scale of guidance.
pub(super) fn scale(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse().ok().filter(|n| (0.0..=100.0).contains(n));
    number.ok_or_else(|| "expected a number from 0 to 100".into())
}

/// Parses a precision that this build has.
pub(super) fn precision(text: &str) -> std::result::Result<Precision, String> {
    text.parse().map_err(|error: Error| error.to_string())
}

/// The command that continues this run: the present one with `--resume`. `cargo_target` selects the program for
/// `cargo run`, such as `--example mnist`.
pub(super) fn resume_command(cargo_target: &str) -> String {
    let arguments: Vec<String> =
        std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    let (program, arguments) = arguments.split_first().map_or(("", &[][..]), |(p, a)| (p, a));
    let mut command = match std::env::var_os("CARGO") {
        Some(_) => format!("cargo run{} {cargo_target} --", cargo_options()),
        None => quoted(program),
    };
    // The checkpoint has the configuration, and the changes were made.
    let (mut of_config, left_out) = (false, ["--resume", "--change", "--config"]);
    for argument in arguments {
        let keep = !of_config && !argument.starts_with("--config=");
        of_config = argument == "--config";
        if keep && !left_out.contains(&argument.as_str()) {
            command = format!("{command} {}", quoted(argument));
        }
    }
    format!("{command} --resume")
}

fn cargo_options() -> String {
    let others = [
        ("cudnn", cfg!(feature = "cudnn")),
        ("accelerate", cfg!(feature = "accelerate")),
        ("mkl", cfg!(feature = "mkl")),
        ("f16", cfg!(feature = "f16")),
        ("hub", cfg!(feature = "hub")),
    ];
    let others = others.into_iter().filter_map(|(name, on)| on.then_some(name));
    let features: Vec<&str> = accelerator::features().chain(others).collect();
    let release = if cfg!(debug_assertions) { "" } else { " --release" };
    match features.is_empty() {
        true => release.into(),
        false => format!("{release} --features {}", features.join(",")),
    }
}

/// The options that `--change` can change. The library lists their fields in
/// [`resume_with_changes`](crate::train::TrainerBuilder::resume_with_changes).
const CHANGEABLE: [&str; 8] = [
    "--batch-size",
    "--learning-rate",
    "--warmup-steps",
    "--schedule",
    "--reference-steps",
    "--cooldown",
    "--accumulation",
    "--precision",
];

/// Adds to an error the options with which the user can solve it.
pub(super) fn with_options(error: Error) -> Box<dyn StdError + Send + Sync> {
    let remedy = match &error {
        Error::ConfigMismatch { field, found, expected, .. } if field != "network.kind" => {
            let option = match field.as_str() {
                "train.batch_size" => "--batch-size",
                "train.optimizer.learning_rate" => "--learning-rate",
                "train.accumulation" => "--accumulation",
                "train.precision" => "--precision",
                "train.warmup_steps" => "--warmup-steps",
                "train.cooldown" => "--cooldown",
                "train.schedule" => "--schedule",
                "train.schedule.inverse_sqrt.reference_steps" => "--reference-steps",
                "train.muon" => "--optimizer",
                "train.seed" => "--seed",
                "train.timesteps" => "--timesteps",
                "train.objective.loss" => "--loss",
                "train.objective.weighting" => "--weighting",
                "train.noise.offset" => "--offset-noise",
                "train.noise.immiscible" => "--immiscible",
                _ => return error.into(),
            };
            let (change, allowed) = match CHANGEABLE.contains(&option) {
                true => (", add --change to change it", String::new()),
                false => {
                    let options = CHANGEABLE.join(", ");
                    ("", format!("; --change can change only {options} and the images"))
                }
            };
            return format!(
                "{field} is {found} in the checkpoint, but {expected} was requested; omit {option} \
                 to continue the run{change}, or begin a new run with another --out{allowed}"
            )
            .into();
        }
        Error::Pictures { path, reason, field, .. } => {
            let remedy = match *field {
                "classes" => "move it into one, or begin a new run without classes",
                _ => "--skip-unreadable leaves them out",
            };
            return format!("{}: {reason}; {remedy}", path.display()).into();
        }
        Error::ConfigMismatch { .. } => {
            "select the network by --network (unet, or ho for unet2d), if this program has the option"
        }
        Error::Occupied { .. } => "move it away, or choose another --out",
        Error::Locked { .. } => "wait until it ends, or choose another --out",
        _ => return error.into(),
    };
    format!("{error}; {remedy}").into()
}

/// Quotes an argument for a shell.
pub(super) fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:+@".contains(c);
    match !argument.is_empty() && argument.chars().all(plain) {
        true => argument.into(),
        false => format!("'{}'", argument.replace('\'', r"'\''")),
    }
}
