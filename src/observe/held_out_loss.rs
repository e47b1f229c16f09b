use std::fmt;
use std::ops::ControlFlow;

use candle_core::Tensor;

use crate::data::{Dataset, loader};
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::random::{Noise, Purpose};
use crate::train::{Observer, Run};

/// The smallest number of pairs of an image and a timestep. With fewer, a quartile would have too few pairs.
const PAIRS: usize = 64;

/// Publishes the held-out loss, on images that are not used for training, at intervals and when the run is complete.
///
/// It is the loss by the run's objective, with the averaged weights, or with the weights if the run has no average:
///
/// - `held_out/loss`: the mean over all images,
/// - `held_out/loss_q0` to `held_out/loss_q3`: the mean for each quartile of the timesteps. `q0` has the least noise.
///   Nichol and Dhariwal 2021 log the same quartiles.
///
/// Timesteps are spread evenly over the schedule, in a random order, so that the loss has no noise from their choice.
/// Timesteps and noise are the same every time and in every run, so that the losses of one set of images can be
/// compared. A set of fewer than 64 images is used several times, each time with other timesteps and noise. The network
/// receives the classes of the images. Flips, offset noise and paired noise are not used.
///
/// A run that is asked to stop publishes no loss. If the loss of its step was due, the resumed run publishes it before
/// the first update. It cannot know whether this loss was published before, so a loss may be published twice, with the
/// same value.
///
/// ```no_run
/// use ddpm::data::{Split, hold_out, mnist};
/// use ddpm::observe::{HeldOutLoss, SaveBest};
/// # use ddpm::{Result, Trainer, UNetConfig};
///
/// # fn fit(mut trainer: Trainer<UNetConfig>) -> Result<()> {
/// let images = mnist("data/mnist", Split::Train)?;
/// let (images, held_out) = hold_out(&images, 1_000)?;
/// let best = SaveBest::lowest(HeldOutLoss::NAME, "out/best");
/// trainer.fit(&images, (HeldOutLoss::steps(500, &held_out), best))
/// # }
/// ```
#[derive(Clone)]
pub struct HeldOutLoss<'a> {
    every: u64,
    images: &'a dyn Dataset,
    /// The last step whose loss was published.
    published: Option<u64>,
}

// A data set has no `Debug`.
impl fmt::Debug for HeldOutLoss<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (every, images) = (&self.every, self.images.len());
        f.debug_struct("HeldOutLoss").field("every", every).field("images", &images).finish()
    }
}

/// A pair of an image and its noise, at a timestep.
#[derive(Debug, Clone, Copy)]
struct Pair {
    image: usize,
    /// The index of the pair, which determines its noise.
    noise: u32,
    t: u32,
}

impl<'a> HeldOutLoss<'a> {
    /// The name of the mean over all images.
    pub const NAME: &'static str = "held_out/loss";

    /// Publishes the loss on `images` every `every` updates. With 0, the loss is computed only at the end.
    pub fn steps(every: u64, images: &'a dyn Dataset) -> Self {
        Self { every, images, published: None }
    }

    /// Returns the pairs of each quartile of a schedule with this number of timesteps.
    fn pairs(&self, timesteps: usize) -> Result<[Vec<Pair>; 4]> {
        let (images, timesteps) = (self.images.len(), timesteps as u64);
        let count = images * PAIRS.div_ceil(images);
        let order = Noise::new(0).stream(Purpose::HeldOut, 0, 0).permutation(count)?;
        let mut quartiles: [Vec<Pair>; 4] = Default::default();
        for (k, noise) in (0..).zip(order) {
            let t = (2 * k + 1) * timesteps / (2 * count as u64);
            let pair = Pair { image: noise as usize % images, noise, t: t as u32 };
            if let Some(quartile) = quartiles.get_mut((4 * t / timesteps) as usize) {
                quartile.push(pair);
            }
        }
        Ok(quartiles)
    }

    /// Publishes the losses if they are due, unless the run is asked to stop in the meantime.
    fn publish_if_due(&mut self, run: &Run<'_>) -> Result<()> {
        let due = run.step().is_multiple_of(self.every) || run.is_complete();
        if !due || run.is_stopping() || self.published == Some(run.step()) {
            return Ok(());
        }
        run.working("computing the held-out loss");
        let losses = self.losses(run);
        run.working("");
        let Some(losses) = losses? else { return Ok(()) };
        let (sum, count) = losses.iter().fold((0.0, 0), |(sum, count), (of_quartile, pairs)| {
            (sum + of_quartile, count + pairs)
        });
        run.publish(Self::NAME, sum / count as f64);
        for (quartile, (sum, count)) in losses.into_iter().enumerate() {
            // A schedule of fewer than four timesteps has empty quartiles.
            if count > 0 {
                run.publish(format!("{}_q{quartile}", Self::NAME), sum / count as f64);
            }
        }
        self.published = Some(run.step());
        Ok(())
    }

    /// Computes the sum of the losses of each quartile, and the number of its pairs.
    fn losses(&self, run: &Run<'_>) -> Result<Option<Vec<(f64, usize)>>> {
        let model = run.ema()?;
        let batch = run.config().batch_size / run.config().accumulation;
        let mut losses = Vec::new();
        for quartile in self.pairs(run.diffusion().schedule().steps())? {
            let mut sum = 0.0;
            for pairs in quartile.chunks(batch.max(1)) {
                if run.is_stopping() {
                    return Ok(None);
                }
                sum += self.loss(run, &model, pairs)? * pairs.len() as f64;
            }
            losses.push((sum, quartile.len()));
        }
        Ok(Some(losses))
    }

    /// Computes the mean loss of some pairs.
    fn loss(&self, run: &Run<'_>, model: &dyn Denoiser, pairs: &[Pair]) -> Result<f64> {
        let indices: Vec<usize> = pairs.iter().map(|pair| pair.image).collect();
        let batch = loader::read(self.images, &indices)?.upload(run.device())?;
        let dims = batch.images.dims();
        let mut eps = vec![0.0; batch.images.elem_count()];
        for (pair, eps) in pairs.iter().zip(eps.chunks_mut(batch.images.elem_count() / pairs.len()))
        {
            Noise::new(0).stream(Purpose::HeldOut, 1, pair.noise).fill_normal(eps);
        }
        let eps = Tensor::from_vec(eps, dims, run.device())?;
        let t: Vec<u32> = pairs.iter().map(|pair| pair.t).collect();
        let t = Tensor::from_vec(t, pairs.len(), run.device())?;
        run.loss(model, &batch, &t, &eps)
    }
}

impl Observer for HeldOutLoss<'_> {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        loader::check(self.images)?;
        let (found, expected) = (self.images.shape(), run.image_shape().into());
        if found != expected {
            let (found, expected) = (format!("{found:?}"), format!("{expected:?}, as in training"));
            return Err(Error::config("shape of the held-out images", found, expected));
        }
        let classes = self.images.classes();
        match run.model().classes() {
            Some(expected) if expected as usize != classes => {
                let expected = format!("{expected}, the number of classes of the network");
                return Err(Error::config("classes of the held-out images", classes, expected));
            }
            _ => {}
        }
        match run.step() {
            0 => Ok(()),
            _ => self.publish_if_due(run),
        }
    }

    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        self.publish_if_due(run)?;
        Ok(ControlFlow::Continue(()))
    }
}
