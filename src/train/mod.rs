//! Training: the loop, the optimiser, the average of the weights, and what is kept on disk.

mod adam;
mod checkpoint;
mod config;
mod ema;
mod observer;
mod run;
mod scaler;
mod trainer;

use adam::by_name;
pub use adam::{AdamConfig, AdamW, WeightDecay, clip_grad_norm, gradients};
pub use checkpoint::{Checkpoint, Saved};
pub use config::TrainConfig;
pub use ema::{Ema, EmaConfig};
pub use observer::{Metrics, Observer, OnMetrics, on_metrics};
pub use run::{Frontend, Outcome, Run};
pub use scaler::{GradScaler, GradScalerConfig};
pub use trainer::{Trainer, Update};
