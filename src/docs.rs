//! The documentation in chapters. Their Rust code is compiled and run with the tests.
//!
//! Each chapter is also a file in `docs/`. Only here it ends with links to its items.

/// The forward and the reverse process, schedules, predictions.
///
#[doc = include_str!("../docs/process.md")]
///
/// ---
/// Items: [`NoiseSchedule`](crate::NoiseSchedule), [`Diffusion`](crate::Diffusion),
/// [`Prediction`](crate::process::Prediction). Next: [network].
pub mod process {}

/// The U-Net, the names of its weights, PyTorch, custom networks.
///
#[doc = include_str!("../docs/network.md")]
///
/// ---
/// Items: [`UNet`](crate::UNet), [`UNetConfig`](crate::UNetConfig),
/// [`ResBlock`](crate::ResBlock), [`TimeEmbedding`](crate::TimeEmbedding),
/// [`Denoiser`](crate::Denoiser), [`Architecture`](crate::nn::Architecture), [`Parameters`](crate::nn::Parameters),
/// [`Dropout`](crate::nn::Dropout). Next: [training].
pub mod network {}

/// Recipes, images, sizes, observers, loops, checkpoints, resuming.
///
#[doc = include_str!("../docs/training.md")]
///
/// ---
/// Items: [`Trainer`](crate::Trainer), [`TrainConfig`](crate::TrainConfig),
/// [`Observer`](crate::train::Observer), [`Metrics`](crate::train::Metrics), [`Update`](crate::train::Update),
/// [`Checkpoint`](crate::Checkpoint), [`AdamConfig`](crate::train::AdamConfig), [`AdamW`](crate::train::AdamW),
/// [`MuonConfig`](crate::train::MuonConfig), [`Muon`](crate::train::Muon),
/// [`LearningRateSchedule`](crate::train::LearningRateSchedule), [`EmaConfig`](crate::train::EmaConfig),
/// [`Ema`](crate::train::Ema), [`AverageConfig`](crate::train::AverageConfig),
/// [`clip_grad_norm`](crate::train::clip_grad_norm), [`data`](crate::data). Next: [sampling].
pub mod training {}

/// Solvers, variances, spacings, inversion, guidance, variations, interpolation, inpainting, quality.
///
#[doc = include_str!("../docs/sampling.md")]
///
/// ---
/// Items: [`Sampler`](crate::Sampler), [`Solver`](crate::Solver), [`Spacing`](crate::sample::Spacing),
/// [`Variance`](crate::sample::Variance), [`Churn`](crate::sample::Churn), [`BFunction`](crate::sample::BFunction),
/// [`DynamicThreshold`](crate::sample::DynamicThreshold), [`SamplerConfig`](crate::sample::SamplerConfig),
/// [`Steps`](crate::sample::Steps), [`Step`](crate::sample::Step), [`from_fn`](crate::nn::from_fn). Next:
/// [evaluation].
pub mod sampling {}

/// Features of images, metrics of sets of images, memorisation, statistics files.
///
#[doc = include_str!("../docs/evaluation.md")]
///
/// ---
/// Items: [`Generator`](crate::eval::Generator), [`Extractor`](crate::eval::Extractor),
/// [`Features`](crate::eval::Features), [`Statistics`](crate::eval::Statistics), [`Gaussian`](crate::eval::Gaussian),
/// [`KernelDistance`](crate::eval::KernelDistance), [`SlicedDistance`](crate::eval::SlicedDistance),
/// [`inception_score`](crate::eval::inception_score), [`Prdc`](crate::eval::Prdc), [`Nearest`](crate::eval::Nearest),
/// [`Balance`](crate::eval::Balance), [`Inception`](crate::eval::Inception),
/// [`EfficientNet`](crate::eval::EfficientNet), [`DigitClassifier`](crate::eval::DigitClassifier). Next:
/// [reproducibility].
pub mod evaluation {}

/// Results that are identical in each bit, and results that are not.
///
#[doc = include_str!("../docs/reproducibility.md")]
pub mod reproducibility {}

/// The modules of the source, the decisions behind them, extending the crate.
///
#[doc = include_str!("../docs/architecture.md")]
pub mod architecture {}

/// Instructions for benchmarks, and measurements on CPUs and a GPU.
///
#[doc = include_str!("../docs/benchmarks.md")]
pub mod benchmarks {}
