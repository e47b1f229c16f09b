//! Training: the loop, the optimiser, the average of the weights, and checkpoints.

mod builder;
mod checkpoint;
mod config;
mod executor;
mod fit;
mod gradients;
mod history;
mod meter;
mod objective;
mod observer;
mod optim;
mod run;
mod state;
mod stateful;
mod trainer;
mod update;

pub use builder::TrainerBuilder;
pub use checkpoint::open::Checkpoint;
pub use checkpoint::store::Saved;
pub use config::TrainConfig;
pub use gradients::gradients;
pub use history::Change;
pub use meter::Update;
pub use objective::{Mse, Noised, Objective};
pub use observer::{Metrics, Observer, OnMetrics, on_metrics};
pub use optim::adam::{AdamConfig, AdamW, WeightDecay};
pub use optim::average::{AverageConfig, Length, WeightAverage};
pub use optim::clip::clip_grad_norm;
pub use optim::ema::{Ema, EmaConfig};
pub use optim::muon::{Muon, MuonConfig};
pub use optim::scaler::{GradScaler, GradScalerConfig};
pub use optim::schedule::{LearningRate, LearningRateSchedule};
pub use run::{Frontend, Outcome, Run};
pub use trainer::Trainer;
