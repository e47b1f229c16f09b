//! Training: the loop, the optimiser, the average of the weights, and checkpoints.

mod builder;
mod checkpoint;
mod config;
mod executor;
mod fit;
mod gradients;
mod history;
mod loss;
mod meter;
mod noise;
mod objective;
mod observer;
mod optim;
mod run;
mod state;
mod stateful;
mod timesteps;
mod trainer;
mod update;
mod variational_bound;
mod weighting;

pub use builder::TrainerBuilder;
pub use checkpoint::open::Checkpoint;
pub use checkpoint::store::Saved;
pub use checkpoint::weights::WeightsFile;
pub use config::TrainConfig;
pub use gradients::gradients;
pub use history::Change;
pub use loss::ObjectiveConfig;
pub use meter::Update;
pub use noise::NoiseConfig;
pub use objective::{Noised, Objective};
pub use observer::{Metrics, Observer, OnMetrics, on_metrics};
pub use optim::adam::{AdamConfig, AdamW, WeightDecay};
pub use optim::average::{AverageConfig, Length, WeightAverage};
pub use optim::clip::clip_grad_norm;
pub use optim::ema::{Ema, EmaConfig};
pub use optim::muon::{Muon, MuonConfig};
pub use optim::scaler::{GradScaler, GradScalerConfig};
pub use optim::schedule::{LearningRate, LearningRateSchedule};
pub use run::{Frontend, Outcome, Run};
pub use timesteps::TimestepSampling;
pub use trainer::Trainer;
pub use weighting::Weighting;

pub use crate::kernels::op::loss::Loss;
