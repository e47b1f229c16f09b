//! Observers of training: checkpoints, metrics, pictures, progress, signals.
//!
//! [`Trainer::fit`](crate::Trainer::fit) takes one [`Observer`](crate::train::Observer). A tuple of observers is one,
//! so a program chooses what it needs:
//!
//! ```no_run
//! use ddpm::observe::{LossCurve, MetricsFile, Progress, SampleGrid, SaveEvery, StopOnSignal};
//! # use ddpm::data::Images;
//! # use ddpm::{Result, Trainer, UNetConfig};
//!
//! # fn fit(mut trainer: Trainer<UNetConfig>, images: Images) -> Result<()> {
//! let progress = Progress::new();
//! let say = progress.clone();
//! let stop = StopOnSignal::install(move || say.say("stopping after this step"))?;
//! trainer.fit(&images, (
//!     progress,
//!     stop,
//!     MetricsFile::new("out/metrics.jsonl"),
//!     SaveEvery::steps(500, "out/checkpoint"),
//!     LossCurve::steps(500, "out/metrics.jsonl", "out/loss.png"),
//!     SampleGrid::steps(2_500, "out/samples"),
//! ))
//! # }
//! ```
//!
//! | observer | feature | |
//! | --- | --- | --- |
//! | [`SaveEvery`] | | saves checkpoints, also when the run stops or fails |
//! | [`SaveBest`] | | saves a checkpoint whenever a published number is better than all earlier ones |
//! | [`MetricsFile`] | | writes the reports and published numbers as JSON, one per line |
//! | [`HeldOutLoss`] | | publishes the held-out loss, on images that are not used for training |
//! | [`Judge`] | | publishes distances of samples from training images, in a small share of the time |
//! | [`GradientNorms`] | | publishes the gradient norm of each layer |
//! | `TensorBoard` | `tensorboard` | writes reports, published numbers and grids as event files for TensorBoard |
//! | `SampleGrid` | `image` | draws grids of samples as PNG files |
//! | `LossCurve` | `plot` | draws the loss as a PNG file |
//! | `Progress` | `progress` | shows the progress in one line of the terminal |
//! | `StopOnSignal` | `signals` | stops the run at Ctrl-C or if the terminal is closed |
//!
//! Observers affect each other only through [`Run`](crate::train::Run): `Progress` shows the warnings of the others,
//! and after a signal `SampleGrid` ends a grid that is being drawn. An observer [publishes](crate::train::Run::publish)
//! numbers and pictures by name. Every observer receives them, in any order of the tuple. The module `cli` combines all
//! observers in a command-line program.
//!
//! With the feature `plot`, `save_bound_curve` draws the terms of a [`Bound`](crate::eval::Bound), which is computed
//! after training.

#[cfg(feature = "plot")]
mod bound_curve;
mod gradient_norms;
mod held_out_loss;
mod judge;
#[cfg(feature = "plot")]
mod line_chart;
#[cfg(feature = "plot")]
mod loss_curve;
mod metrics_file;
#[cfg(feature = "progress")]
mod progress;
#[cfg(feature = "image")]
mod sample_grid;
mod save_best;
mod save_every;
#[cfg(feature = "signals")]
mod signals;
#[cfg(feature = "tensorboard")]
mod tensorboard;
#[cfg(feature = "progress")]
mod terminal_line;

#[cfg(feature = "plot")]
pub use bound_curve::save_bound_curve;
pub use gradient_norms::GradientNorms;
pub use held_out_loss::HeldOutLoss;
pub use judge::Judge;
#[cfg(feature = "plot")]
pub use loss_curve::LossCurve;
pub use metrics_file::MetricsFile;
#[cfg(feature = "cli")]
pub(crate) use metrics_file::is_removed;
#[cfg(feature = "progress")]
pub use progress::Progress;
#[cfg(feature = "cli")]
pub(crate) use progress::duration;
#[cfg(feature = "image")]
pub use sample_grid::SampleGrid;
pub use save_best::{Best, SaveBest};
pub use save_every::SaveEvery;
#[cfg(feature = "signals")]
pub use signals::StopOnSignal;
#[cfg(feature = "tensorboard")]
pub use tensorboard::TensorBoard;
