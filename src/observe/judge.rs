use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::data::{Dataset, hold_out, loader};
use crate::denoiser::{Condition, Denoiser};
use crate::error::{Error, Result};
use crate::eval::{Extractor, Features, Gaussian, Generator, SlicedDistance, Statistics, extract};
use crate::process::{Diffusion, Prediction};
use crate::sample::{Sampler, SamplerConfig};
use crate::train::{Observer, Run};

/// The largest number of training images that samples are compared with.
const REFERENCE: usize = 10_000;
/// The number of images whose features are computed together.
const BATCH: usize = 100;
/// The largest number of sampling steps, unless the user sets the sampler.
const STEPS: usize = 20;
/// The part of the time of a training step that the forward pass takes.
const FORWARD: f64 = 1.0 / 3.0;

/// Judges samples while a network is trained: publishes the distance between their features and those of training
/// images.
///
/// - `judge/sliced`: the [sliced Wasserstein distance](SlicedDistance), which is usable with few samples,
/// - `judge/frechet`: the [Fréchet distance](Gaussian::frechet_distance), which falls with the number of samples.
///
/// The samples are drawn from the averaged weights, always from the same seed, one class after the other if the network
/// has classes. The sampler is fast: that of [`SamplerConfig::recommended`] for a network that predicts velocity, with
/// the guidance of the run, and otherwise that of the [run](Run::sampling) with at most 20 steps. The features are
/// those of an [`Extractor`]. The training images are at most 10,000, chosen at random. Values can be compared only
/// with the same extractor, sampler, images and number of samples.
///
/// Judging takes at most a share of the time since training began, by default 5%. Samples are judged after an update if
/// the time spent so far and the expected time are within this share. The expected time is that of the judgement
/// before. For the first one it is estimated from the time of a training step, of which a third is the forward pass.
/// A judgement that takes longer delays the next one. The time spent includes that of computing the features of the
/// training images, once, at the start. The steps that are judged thus depend on the speed of the machine, but the
/// weights do not. A resumed run begins to measure anew.
///
/// A run that is asked to stop stops judging, and publishes nothing. A failure, such as samples that are not finite, is
/// a warning.
///
/// ```no_run
/// use ddpm::data::{Split, mnist};
/// use ddpm::eval::DigitClassifier;
/// use ddpm::observe::{Judge, SaveBest};
/// # use ddpm::candle_core::Device;
/// # use ddpm::{Result, Trainer, UNetConfig};
///
/// # fn fit(mut trainer: Trainer<UNetConfig>) -> Result<()> {
/// let images = mnist("data/mnist", Split::Train)?;
/// let digits = DigitClassifier::load("out/mnist-fd/classifier.safetensors", &Device::Cpu)?;
/// let judge = Judge::new(&digits, &images).count(500);
/// trainer.fit(&images, (judge, SaveBest::lowest(Judge::SLICED, "out/best")))
/// # }
/// ```
#[derive(Clone)]
pub struct Judge<'a> {
    extractor: &'a dyn Extractor,
    images: &'a dyn Dataset,
    count: usize,
    share: f64,
    sampling: Option<SamplerConfig>,
    seed: u64,
    /// `None` before the run begins.
    reference: Option<Look>,
    clock: Clock,
}

/// The features of images, and their normal distribution.
#[derive(Clone)]
struct Look {
    features: Features,
    gaussian: Gaussian,
}

/// The times since training began.
#[derive(Debug, Clone)]
struct Clock {
    start: Instant,
    /// The time spent on judging.
    spent: Duration,
    /// The time of the features of the training images, per image.
    per_image: Duration,
    /// The expected time of the next judgement, after the first one.
    expected: Option<Duration>,
    /// The number of updates.
    updates: u32,
}

impl Clock {
    fn started() -> Self {
        let (start, expected, updates) = (Instant::now(), None, 0);
        Self { start, spent: Duration::ZERO, per_image: Duration::ZERO, expected, updates }
    }
}

// An extractor and a data set have no `Debug`.
impl fmt::Debug for Judge<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Judge")
            .field("extractor", &self.extractor.identity())
            .field("images", &self.images.len())
            .field("count", &self.count)
            .field("share", &self.share)
            .finish_non_exhaustive()
    }
}

impl<'a> Judge<'a> {
    /// The name of the sliced Wasserstein distance.
    pub const SLICED: &'static str = "judge/sliced";
    /// The name of the Fréchet distance.
    pub const FRECHET: &'static str = "judge/frechet";
    /// The default share of the time.
    pub const SHARE: f64 = 0.05;

    /// Judges 1,000 samples in at most 5% of the time, in comparison with `images`.
    pub fn new(extractor: &'a dyn Extractor, images: &'a dyn Dataset) -> Self {
        let clock = Clock::started();
        let (count, share, sampling, seed, reference) = (1000, Self::SHARE, None, 0, None);
        Self { extractor, images, count, share, sampling, seed, reference, clock }
    }

    /// Sets the number of samples, at least 2.
    #[must_use]
    pub fn count(self, count: usize) -> Self {
        Self { count, ..self }
    }

    /// Sets the largest share of the time, above 0 and up to 1.
    #[must_use]
    pub fn share(self, share: f64) -> Self {
        Self { share, ..self }
    }

    /// Sets the sampler.
    #[must_use]
    pub fn sampling(self, sampling: SamplerConfig) -> Self {
        Self { sampling: Some(sampling), ..self }
    }

    /// Sets the seed of the samples. The default is 0.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// The sampler for a run with this process and these sampler settings, if the user sets no other.
    pub(crate) fn usual(diffusion: &Diffusion, own: SamplerConfig) -> SamplerConfig {
        let fast = match diffusion.prediction() {
            Prediction::Velocity => SamplerConfig::recommended().guidance(own.guidance),
            _ => own,
        };
        let most = STEPS.min(diffusion.schedule().steps());
        SamplerConfig { steps: fast.steps.min(most), ..fast }
    }

    fn config(&self, run: &Run<'_>) -> SamplerConfig {
        self.sampling.unwrap_or_else(|| Self::usual(run.diffusion(), run.sampling()))
    }

    fn sampler(&self, run: &Run<'_>) -> Result<Sampler> {
        self.config(run).sampler(run.diffusion())
    }

    /// Computes the features of images, unless the run is asked to stop in the meantime.
    fn look(&self, run: &Run<'_>, images: &dyn Dataset, of: &str) -> Result<Option<Look>> {
        let mut features: Option<Features> = None;
        let flow = extract(self.extractor, images, BATCH, |batch| {
            match &mut features {
                Some(features) => features.append(batch)?,
                None => features = Some(batch.clone()),
            }
            let done = features.as_ref().map_or(0, Features::count);
            run.working(&format!("features of {of}, {done} of {}", images.len()));
            Ok(flow(run))
        })?;
        let Some(features) = features.filter(|_| flow.is_continue()) else { return Ok(None) };
        let gaussian = Statistics::of(&features)?.gaussian()?;
        Ok(Some(Look { features, gaussian }))
    }

    /// The time that the next judgement is expected to take.
    fn expected(&self, run: &Run<'_>) -> Result<Duration> {
        if let Some(expected) = self.clock.expected {
            return Ok(expected);
        }
        let training = self.clock.start.elapsed().saturating_sub(self.clock.spent);
        let update = training.as_secs_f64() / f64::from(self.clock.updates.max(1));
        let forward = FORWARD * update / run.config().batch_size.max(1) as f64;
        // Guidance evaluates the network twice.
        let networks = if self.config(run).guidance.is_some() { 2.0 } else { 1.0 };
        let drawn = forward * networks * self.sampler(run)?.evaluations() as f64;
        let seconds = (drawn + self.clock.per_image.as_secs_f64()) * self.count as f64;
        Ok(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }

    /// Draws samples, and returns their distances. Returns `None` if the run is asked to stop in the meantime.
    fn judge(&self, run: &Run<'_>, reference: &Look) -> Result<Option<(f64, f64)>> {
        let (mut sampler, model) = (self.sampler(run)?, run.ema()?);
        if let Some(classes) = model.classes() {
            sampler = sampler.condition(Condition::each_class(classes, self.count)?);
        }
        let generator = Generator::new(&sampler, run.image_shape(), self.seed, run.device());
        let total = generator.steps(self.count);
        let drawn = generator.draw(&model, self.count, |drawn| {
            run.working(&format!("judging, step {} of {total}", drawn.done));
            Ok(flow(run))
        })?;
        let Some(images) = drawn else { return Ok(None) };
        let Some(samples) = self.look(run, &images, "samples")? else { return Ok(None) };
        let sliced = SlicedDistance::default().measure(&reference.features, &samples.features)?;
        Ok(Some((sliced, reference.gaussian.frechet_distance(&samples.gaussian)?)))
    }
}

/// Whether the work of an observer continues.
fn flow(run: &Run<'_>) -> ControlFlow<()> {
    if run.is_stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

impl Observer for Judge<'_> {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        if self.count < 2 {
            return Err(Error::config("number of samples to judge", self.count, "at least 2"));
        }
        if !(self.share > 0.0 && self.share <= 1.0) {
            return Err(Error::config("share of the time", self.share, "above 0, up to 1"));
        }
        loader::check(self.images)?;
        self.sampler(run)?;
        self.clock = Clock::started();
        let parts = match self.images.len() > REFERENCE {
            true => Some(hold_out(self.images, REFERENCE)?),
            false => None,
        };
        let images = parts.as_ref().map_or(self.images, |(_, chosen)| chosen as &dyn Dataset);
        let reference = self.look(run, images, "training images");
        run.working("");
        self.reference = reference?;
        self.clock.spent = self.clock.start.elapsed();
        self.clock.per_image = self.clock.spent / images.len().max(1) as u32;
        Ok(())
    }

    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        self.clock.updates += 1;
        let Some(reference) = &self.reference else { return Ok(ControlFlow::Continue(())) };
        let (expected, elapsed) = (self.expected(run)?, self.clock.start.elapsed());
        let allowed = Duration::try_from_secs_f64(elapsed.as_secs_f64() * self.share);
        let needed = self.clock.spent.saturating_add(expected);
        if run.is_stopping() || needed > allowed.unwrap_or(Duration::MAX) {
            return Ok(ControlFlow::Continue(()));
        }
        let start = Instant::now();
        let judged = self.judge(run, reference);
        run.working("");
        let took = start.elapsed();
        match judged {
            Ok(Some((sliced, frechet))) => {
                run.publish(Self::SLICED, sliced);
                run.publish(Self::FRECHET, frechet);
                self.clock.expected = Some(took);
                self.clock.spent += took;
            }
            Ok(None) => self.clock.spent += took,
            Err(error) => {
                run.warn(&format!("{error:?}"));
                // A failure at once must not be repeated at each update.
                self.clock.spent = self.clock.spent.saturating_add(took.max(expected));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}
