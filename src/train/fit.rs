use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use super::checkpoint::store::Saved;
use super::objective::Noised;
use super::observer::{Metrics, Observer};
use super::optim::scaler::GradScaler;
use super::published::Published;
use super::run::{Outcome, Run, Scene, View};
use super::trainer::Trainer;
use crate::data::dataset::Dataset;
use crate::data::loader::Batch;
use crate::data::prefetch::prefetch;
use crate::denoiser::{Condition, Denoiser};
use crate::error::{Result, check_dims};
use crate::model::Architecture;

impl<N: Architecture> Trainer<N> {
    /// Updates the weights until the run has made [`steps`](crate::TrainConfig::steps) updates in total, or until the
    /// observer stops it. The observer `()` does nothing. A second thread reads the next batch during an update.
    ///
    /// # Errors
    /// Returns an error if the data set is empty, or if its images do not have the shape that the network takes.
    /// Returns an error if a loss or a gradient is not finite, and the errors of the data set and of the observer.
    pub fn fit(&mut self, dataset: &dyn Dataset, mut observer: impl Observer) -> Result<()> {
        let (image_shape, frontends) = (dataset.shape().into(), observer.frontends());
        let scene = Scene { image_shape, frontends, published: RefCell::default() };
        let fitted = self.observed(dataset, &mut observer, &scene);
        scene.frontends.iter().for_each(|frontend| frontend.finish());
        fitted
    }

    /// Runs the [loop](Self::train), and reports its beginning and end to the observer.
    fn observed(
        &mut self,
        dataset: &dyn Dataset,
        observer: &mut dyn Observer,
        scene: &Scene,
    ) -> Result<()> {
        observer.on_start(&self.run(scene))?;
        self.deliver(observer, scene)?;
        let trained = self.train(dataset, observer, scene);
        let run = self.run(scene);
        let outcome = match &trained {
            Err(error) => Outcome::Failed(error),
            Ok(()) if run.is_complete() => Outcome::Complete,
            Ok(()) => Outcome::Stopped,
        };
        observer.on_end(&run, outcome)?;
        self.deliver(observer, scene)?;
        trained
    }

    /// Passes the published values to all observers.
    fn deliver(&self, observer: &mut dyn Observer, scene: &Scene) -> Result<()> {
        loop {
            let published = scene.published.take();
            if published.is_empty() {
                return Ok(());
            }
            published.iter().try_for_each(Published::check)?;
            observer.on_published(&self.run(scene), &published)?;
        }
    }

    /// The loop of [`fit`](Self::fit).
    fn train(
        &mut self,
        dataset: &dyn Dataset,
        observer: &mut dyn Observer,
        scene: &Scene,
    ) -> Result<()> {
        // Updates made outside of `fit` are checked, but are not part of the reports.
        self.report()?;
        let updates = self.config.steps.saturating_sub(self.steps());
        if updates == 0 {
            return Ok(());
        }
        self.use_images(dataset)?;
        let (loader, at) = (self.loader.clone(), self.state.progress.position());
        prefetch(loader, dataset, at, updates, |next| {
            let (mut elapsed, mut images_before) = (Duration::ZERO, self.images_seen());
            let mut waited = Duration::ZERO;
            while self.steps() < self.config.steps {
                let start = Instant::now();
                let batch = next()?;
                waited += start.elapsed();
                let batch = batch.upload(&self.device)?;
                elapsed += start.elapsed();
                let norms = match observer.wants_gradient_norms(self.steps() + 1) {
                    true => self.gradient_norms(&batch)?,
                    false => BTreeMap::new(),
                };
                let start = Instant::now();
                self.step(batch)?;
                for (layer, norm) in norms {
                    scene.publish(self.steps(), format!("grad_norm/{layer}"), norm.into());
                }
                let last = self.steps() == self.config.steps;
                if self.steps().is_multiple_of(self.config.log_every) || last {
                    let mut metrics = self.report()?;
                    elapsed += start.elapsed();
                    let images = self.images_seen() - images_before;
                    metrics.images_per_second = images as f64 / elapsed.as_secs_f64();
                    metrics.waiting = waited.as_secs_f64() / elapsed.as_secs_f64();
                    observer.on_metrics(&self.run(scene), &metrics)?;
                    (elapsed, images_before) = (Duration::ZERO, self.images_seen());
                    waited = Duration::ZERO;
                } else {
                    elapsed += start.elapsed();
                }
                let stops = observer.on_step(&self.run(scene))?.is_break();
                self.deliver(observer, scene)?;
                observer.after_step(&self.run(scene))?;
                self.deliver(observer, scene)?;
                if stops || self.run(scene).is_stopping() {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Returns the report on the updates since the last report. `images_per_second` and `waiting` are not set.
    fn report(&mut self) -> Result<Metrics> {
        self.read_losses()?;
        let lr = self.config.learning_rate(self.steps().saturating_sub(1));
        let loss_scale = self.state.optimizer.scaler.as_ref().map(GradScaler::scale);
        Ok(self.meter.report(self.steps(), lr, loss_scale))
    }

    /// Returns the view that observers have of this trainer.
    fn run<'a>(&'a self, scene: &'a Scene) -> Run<'a> {
        Run {
            progress: &self.state.progress,
            config: &self.config,
            diffusion: &self.diffusion,
            device: &self.device,
            model: &self.model,
            trainer: self,
            scene,
        }
    }
}

impl<N: Architecture> View for Trainer<N> {
    fn averaged_model(&self) -> Result<Box<dyn Denoiser + '_>> {
        Ok(Box::new(self.ema_model()?))
    }

    fn loss(&self, model: &dyn Denoiser, batch: &Batch, t: &Tensor, eps: &Tensor) -> Result<f64> {
        self.executor.wait_for_other_thread()?;
        batch.check()?;
        self.diffusion.check(&batch.images, t, eps)?;
        let noised = Noised::new(&self.diffusion, batch, t, eps)?;
        let condition = match (model.classes(), &batch.classes) {
            (None, _) => Condition::None,
            (Some(_), Some(classes)) => Condition::Classes(classes.clone()),
            (Some(_), None) => match model.no_class() {
                Some(none) => Condition::classes(vec![none; batch.images.dim(0)?])?,
                None => Condition::None,
            },
        };
        let output = model.denoise(&noised.x_t, t, &condition)?;
        let (found, expected) = (output.prediction.dims(), noised.x_t.dims());
        check_dims("the network's output", found, expected, "that of its input")?;
        let (loss, _) = self.objective.loss(&noised, &output)?;
        Ok(loss.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_scalar()?)
    }

    fn save(&self, dir: &Path, keep: usize) -> Result<Saved> {
        self.save_keeping(dir, keep)
    }

    fn check_save(&self, dir: &Path) -> Result<()> {
        self.rehearse(dir).map(drop)
    }
}
