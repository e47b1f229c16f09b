//! One update of the weights: Ho et al. 2020, algorithm 1.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

use super::config::TrainConfig;
use super::gradients::by_name;
use super::image_losses::{self, ImageLosses};
use super::importance::LossHistory;
use super::noise::{self, NoiseConfig};
use super::objective::{Noised, Objective};
use super::state::TrainState;
use super::timesteps::{Distribution, Timesteps};
use crate::backend::{self, Backend, Computed};
use crate::data::loader::Batch;
use crate::denoiser::{Condition, Trainable};
use crate::error::{Error, Result, check_dims};
use crate::process::diffusion::Diffusion;
use crate::random::{Dropout, Noise, Purpose};

/// The parts of a run that an update uses.
#[derive(Debug)]
pub(super) struct UpdateContext<'a, D> {
    pub model: &'a D,
    pub config: &'a TrainConfig,
    pub diffusion: &'a Diffusion,
    pub objective: &'a dyn Objective,
    pub state: &'a mut TrainState,
}

/// The loss and the gradients of a batch.
pub(super) struct Summed {
    pub loss: Tensor,
    pub gradients: BTreeMap<String, Tensor>,
    /// The losses of the images, if they are needed.
    pub images: Option<ImageLosses>,
}

/// The loss of a part of a batch, and the weighted loss of each of its images (images) if they are needed.
struct PartLoss {
    loss: Tensor,
    images: Option<Tensor>,
}

impl<D: Trainable> UpdateContext<'_, D> {
    pub fn learning_rate(&self) -> f64 {
        self.config.learning_rate(self.state.progress.step)
    }

    fn noise(&self) -> Noise {
        Noise::new(self.config.seed)
    }

    /// Draws timesteps for a batch.
    pub fn timesteps(&self, batch: &Batch) -> Result<Timesteps> {
        let (step, first) = (self.state.progress.step, batch.first as u32);
        let (schedule, size) = (self.diffusion.schedule(), self.config.batch_size);
        let history = self.state.losses.as_ref();
        let found = history.map_or(Ok(None), LossHistory::probabilities)?.map(Distribution::new);
        let draw = |k| {
            let (at, position) = ((self.noise(), step), first.wrapping_add(k));
            match &found {
                Some(distribution) => Ok(distribution.draw(at, position)),
                None => self.config.timesteps.draw(schedule, at, (position, size)),
            }
        };
        let t: Vec<u32> = (0..batch.images.dim(0)? as u32).map(draw).collect::<Result<_>>()?;
        let weights = found.map(|found| t.iter().map(|&t| found.weight(t)).collect());
        let device = batch.images.device();
        Ok(Timesteps { t: backend::on(device, DType::F32).upload_integers(t, device)?, weights })
    }

    /// Returns the batch with the classes that the network sees, on the device of the images. Some of the classes are
    /// replaced at random by no class.
    ///
    /// # Errors
    /// Returns an error if the network does not have a class.
    pub fn conditioned(&self, batch: &Batch) -> Result<Batch> {
        let (device, none) = (batch.images.device(), self.model.no_class());
        let mut classes = match (&batch.classes, none) {
            (Some(classes), _) => classes.to_device(&Device::Cpu)?.to_vec1::<u32>()?,
            (None, Some(none)) => vec![none; batch.images.dim(0)?],
            (None, None) => return Ok(batch.clone()),
        };
        if let Some(count) = self.model.classes() {
            let outside = |class: &&u32| **class >= count && Some(**class) != none;
            if let Some(class) = classes.iter().find(outside) {
                let expected = format!("less than {count}, the network's number of classes");
                return Err(Error::config("class", class, expected));
            }
        }
        if let Some(none) = none {
            let (step, first) = (self.state.progress.step, batch.first as u32);
            for (k, class) in (0..).zip(&mut classes) {
                let sample = first.wrapping_add(k);
                let mut stream = self.noise().stream(Purpose::ClassDropout, step, sample);
                if stream.uniform() < self.config.class_dropout {
                    *class = none;
                }
            }
        }
        let classes = backend::on(device, DType::F32).upload_integers(classes, device)?;
        Ok(Batch { classes: Some(classes), ..batch.clone() })
    }

    /// Draws the noise of a batch.
    pub fn eps(&self, batch: &Batch) -> Result<Tensor> {
        let (x_0, first) = (&batch.images, batch.first as u32);
        let normal = |purpose, dims: &[usize]| {
            let at = self.noise().address(purpose, 0, self.state.progress.step);
            backend::of(x_0).normal(at, first, dims, x_0.device())
        };
        let NoiseConfig { offset, immiscible } = self.config.noise;
        let mut eps = normal(Purpose::Training, x_0.dims())?;
        if immiscible {
            eps = noise::paired(x_0, &eps)?;
        }
        if offset != 0.0 {
            let (batch, channels, _, _) = x_0.dims4()?;
            let offsets = normal(Purpose::Offset, &[batch, channels, 1, 1])?;
            eps = eps.broadcast_add(&(offsets * offset)?)?;
        }
        Ok(eps)
    }

    /// Updates the weights. Returns the loss, the gradient norm, gradients whose memory can be reused, and the losses
    /// of the images if they are needed. With `check`, returns an error if a weight has no gradient.
    pub fn update(
        &mut self,
        batch: &Batch,
        timesteps: &Timesteps,
        eps: &Tensor,
        check: bool,
    ) -> Result<(Computed, Option<ImageLosses>)> {
        let Summed { loss, mut gradients, images } = self.summed(batch, timesteps, eps, check)?;
        let (learning_rate, count) = (self.learning_rate(), batch.images.dim(0)?);
        let grad_norm = self.state.optimizer.update(&mut gradients, learning_rate, count as u64)?;
        if let (Some(history), Some(images)) = (&mut self.state.losses, &images) {
            history.record(&images.read()?)?;
        }
        // If the batch is divided, the sums are not buffers of the network.
        let reusable = self.config.accumulation == 1;
        let gradients = if reusable { gradients.into_values().collect() } else { Vec::new() };
        Ok(((loss, grad_norm, gradients), images))
    }

    /// Returns the memory of [`summed`](Self::summed) gradients to the network.
    pub fn recycle(&self, sums: BTreeMap<String, Tensor>) {
        if self.config.accumulation == 1 {
            self.model.recycle(sums.into_values().collect());
        }
    }

    /// Computes the loss of a batch, and the gradients, which are multiplied by the loss scale if there is one.
    pub fn summed(
        &mut self,
        batch: &Batch,
        timesteps: &Timesteps,
        eps: &Tensor,
        check: bool,
    ) -> Result<Summed> {
        let t = &timesteps.t;
        let (x_0, parts) = (&batch.images, self.config.accumulation);
        let count = x_0.dims().first().copied().unwrap_or(0);
        if count == 0 || !count.is_multiple_of(parts) {
            let expected = format!("(batch, ...), the batch a multiple of accumulation = {parts}");
            return Err(Error::shape("x_0", x_0.dims(), expected));
        }
        self.diffusion.check(x_0, t, eps)?;
        let backend = backend::of(x_0);
        let gradient_scale = self.state.optimizer.loss_scale()?;
        let part = count / parts;
        let weights = self
            .config
            .needs_image_losses()
            .then(|| timesteps.weights.clone().unwrap_or_else(|| vec![1.0; count]));
        let mut sums = BTreeMap::new();
        let (mut loss, mut losses) = (None, Vec::new());
        for first in (0..count).step_by(part) {
            let of_part = |tensor: &Tensor| tensor.narrow(0, first, part);
            let classes = batch.classes.as_ref().map(of_part).transpose()?;
            let images = Batch { images: of_part(x_0)?, classes, first: batch.first };
            let noised = Noised {
                share: 1.0 / parts as f64,
                gradient_scale: gradient_scale.clone(),
                ..Noised::new(self.diffusion, &images, &of_part(t)?, &of_part(eps)?)?
            };
            let weights = weights.as_ref().map(|weights| &weights[first..first + part]);
            let (PartLoss { loss: of_part, images }, found) =
                self.gradients(&noised, weights, batch.first as usize + first)?;
            losses.extend(images);
            loss = Some(match loss {
                Some(sum) => backend.combine(&sum, 1.0, &of_part, 1.0)?,
                None => of_part,
            });
            if check && first == 0 {
                self.check_gradients(&found)?;
            }
            if parts == 1 {
                sums = found;
            } else {
                self.accumulate(backend, &mut sums, found)?;
            }
        }
        let Some(loss) = loss else {
            return Err(Error::config("accumulation", parts, "at least 1"));
        };
        let images = match weights {
            Some(weights) => Some(ImageLosses {
                t: t.clone(),
                losses: Tensor::cat(&losses, 0)?,
                weights,
                timesteps: self.diffusion.schedule().steps(),
            }),
            None => None,
        };
        Ok(Summed { loss, gradients: sums, images })
    }

    /// Computes the loss, and the gradients of the weights, for the part of the batch that begins at image `first`. With
    /// the `weights` of the images, also computes the loss of each image.
    fn gradients(
        &self,
        noised: &Noised<'_>,
        weights: Option<&[f64]>,
        first: usize,
    ) -> Result<(PartLoss, BTreeMap<String, Tensor>)> {
        let step = self.state.progress.step;
        let dropout = Dropout { noise: self.noise(), step, first_sample: first };
        let (objective, x_t) = (self.objective, &noised.x_t);
        let mut losses = Vec::new();
        let (t, condition) = (&noised.t, Condition::from(noised.classes.clone()));
        let found = self.model.gradients(x_t, t, &condition, &dropout, &mut |output| {
            let found = output.prediction.dims();
            check_dims("the network's output", found, x_t.dims(), "that of its input")?;
            let images = weights
                .map(|weights| image_losses::evaluate(objective, noised, output, weights))
                .transpose()?;
            let (loss, gradient) = match images {
                // Only by importance do images have different weights.
                Some((images, gradient)) if self.config.weights_images() => {
                    (PartLoss { loss: images.sum_all()?, images: Some(images) }, gradient)
                }
                // Losses that are only reported must not change the bits of the update.
                images => {
                    let (loss, gradient) = objective.loss(noised, output)?;
                    (PartLoss { loss, images: images.map(|(images, _)| images) }, gradient)
                }
            };
            losses.push(loss);
            Ok(gradient)
        })?;
        match (losses.pop(), losses.is_empty()) {
            (Some(loss), true) => Ok((loss, by_name(found, &self.state.weights.0))),
            _ => {
                let expected = "called once by Trainable::gradients";
                Err(Error::config("d_output", "called more often, or never", expected))
            }
        }
    }

    /// # Errors
    /// Returns an error if a weight has no gradient and the network does not allow it to lack one.
    fn check_gradients(&self, found: &BTreeMap<String, Tensor>) -> Result<()> {
        let vars: &BTreeMap<String, Var> = &self.state.weights.0;
        let lacks =
            |name: &&String| !found.contains_key(*name) && !self.model.may_lack_gradient(name);
        let mut lacking = vars.keys().filter(lacks);
        match lacking.next() {
            None => Ok(()),
            Some(name) => Err(Error::NoGradient {
                name: name.clone(),
                missing: 1 + lacking.count(),
                total: vars.len(),
            }),
        }
    }

    /// Adds gradients to their sums, and returns their memory to the network.
    fn accumulate(
        &self,
        backend: &dyn Backend,
        sums: &mut BTreeMap<String, Tensor>,
        gradients: BTreeMap<String, Tensor>,
    ) -> Result<()> {
        for (name, gradient) in &gradients {
            match sums.get_mut(name) {
                Some(sum) => backend.add_to(sum, gradient)?,
                // Copied, because the gradient may use memory of the network.
                None => {
                    sums.insert(name.clone(), gradient.copy()?);
                }
            }
        }
        self.model.recycle(gradients.into_values().collect());
        Ok(())
    }
}
