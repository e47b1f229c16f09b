//! Command-line programs that train, sample and evaluate. Requires the feature `cli`.
//!
//! A program declares its [`Recipe`]: a network, a process, a training configuration. [`TrainArgs`] are its options,
//! and [`train()`] runs it. The program begins or resumes the run in a directory, trains, saves, draws grids and the
//! loss curve, and stops at Ctrl-C without loss. It continues a run only with the images it began with. [`FolderArgs`] are
//! the options of a program that trains on a folder of pictures.
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
//! The program needs clap of the same version, 4. The rest of the library prints nothing. These programs write to
//! standard output and standard error, and continue if the output is closed.

mod arguments;
mod bits;
mod choices;
mod compared;
mod convert;
pub mod datasets;
pub mod device;
mod editing;
mod evaluate;
mod figures;
mod folder_args;
mod identity;
mod network;
mod objective_args;
mod output;
mod plan;
mod print;
mod program;
mod recipe;
mod result;
mod run_config;
mod run_files;
mod sampling;
mod sets;
mod sized;
mod train;
mod trained;
mod watching;
mod work;

pub use arguments::whole;
pub use choices::{DataChoice, ExtractorChoice};
pub use convert::{ConvertArgs, convert};
pub use datasets::DataSet;
pub use editing::EditingArgs;
pub use evaluate::{EvaluateArgs, evaluate};
pub use folder_args::FolderArgs;
pub use identity::Identity;
pub use network::{Network, NetworkConfig, NetworkName};
pub use output::{Output, OutputArgs};
pub use plan::{RunDir, RunPlan};
pub use print::{err, grouped, out};
pub use program::{check_output, main};
pub use recipe::{Recipe, RecipeName, TrainArgs};
pub use result::{Interrupted, Result};
pub use sampling::SamplingArgs;
pub use train::train;
pub use trained::{NetworkSettings, Trained, Weights};
