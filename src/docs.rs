//! The documentation in chapters; their Rust code is compiled and run with the tests.
//!
//! Each is a file in `docs/`, to be read there as well: links to items stand here.

#[doc = include_str!("../docs/process.md")]
///
/// ---
/// Items: [`NoiseSchedule`](crate::NoiseSchedule), [`Diffusion`](crate::Diffusion),
/// [`Prediction`](crate::Prediction). Next: [network].
pub mod process {}

#[doc = include_str!("../docs/network.md")]
///
/// ---
/// Items: [`UNet`](crate::UNet), [`UNetConfig`](crate::UNetConfig),
/// [`ResBlock`](crate::ResBlock), [`TimeEmbedding`](crate::TimeEmbedding),
/// [`Denoiser`](crate::Denoiser), [`Network`](crate::Network), [`Parameters`](crate::Parameters),
/// [`Dropout`](crate::Dropout). Next: [training].
pub mod network {}

#[doc = include_str!("../docs/training.md")]
///
/// ---
/// Items: [`Trainer`](crate::Trainer), [`TrainConfig`](crate::TrainConfig),
/// [`Observer`](crate::Observer), [`Metrics`](crate::Metrics), [`Update`](crate::Update),
/// [`Checkpoint`](crate::Checkpoint), [`AdamConfig`](crate::AdamConfig), [`AdamW`](crate::AdamW),
/// [`EmaConfig`](crate::EmaConfig), [`Ema`](crate::Ema),
/// [`clip_grad_norm`](crate::clip_grad_norm), [`data`](crate::data). Next: [sampling].
pub mod training {}

#[doc = include_str!("../docs/sampling.md")]
///
/// ---
/// Items: [`Sampler`](crate::Sampler), [`Solver`](crate::Solver), [`Variance`](crate::Variance),
/// [`Steps`](crate::Steps), [`Step`](crate::Step), [`from_fn`](crate::from_fn). Next:
/// [reproducibility].
pub mod sampling {}

#[doc = include_str!("../docs/reproducibility.md")]
pub mod reproducibility {}

#[doc = include_str!("../docs/architecture.md")]
pub mod architecture {}

#[doc = include_str!("../docs/benchmarks.md")]
pub mod benchmarks {}
