use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::published::Published;
use super::run::{Frontend, Outcome, Run};
use crate::error::Result;

/// A report on training, made every [`log_every`](crate::TrainConfig::log_every) updates.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Metrics {
    /// Number of updates so far.
    pub step: u64,
    /// Mean loss of the updates since the last report, or since [`fit`](crate::Trainer::fit) began. Updates made
    /// outside of `fit` are not included.
    pub loss: f32,
    /// Mean loss of each quartile of the timesteps, in the same updates. Serialised as `loss_q0` to `loss_q3`, the
    /// names of Nichol and Dhariwal's code. `None` without
    /// [`TrainConfig::loss_quartiles`](crate::TrainConfig::loss_quartiles), or if no timestep was in the quartile.
    ///
    /// With [importance sampling](crate::train::TimestepSampling::Importance), the losses are weighted, so that the
    /// means are comparable with those of uniform timesteps.
    #[serde(flatten, serialize_with = "by_name")]
    pub loss_quartiles: [Option<f32>; 4],
    /// Learning rate of the last update.
    pub lr: f64,
    /// Global norm of the gradient of the last update that was not skipped, before clipping.
    pub grad_norm: f32,
    /// Scale of the gradients in the next update, with [`Precision::F16`](crate::Precision::F16).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Images per second in the same updates. The time includes reading the data set, but not the observers.
    pub images_per_second: f64,
    /// Share of this time, from 0 to 1, in which the training loop waited for the data set to read the next batch. If
    /// it is more than a few hundredths, reading is slower than training.
    pub waiting: f64,
}

/// Writes the quartiles that have a loss as fields.
fn by_name<S: Serializer>(
    quartiles: &[Option<f32>; 4],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let named = ["loss_q0", "loss_q1", "loss_q2", "loss_q3"].into_iter().zip(quartiles);
    serializer.collect_map(named.filter_map(|(name, loss)| Some((name, (*loss)?))))
}

impl fmt::Display for Metrics {
    /// Formats a line for a log: `step 500: loss 0.0432, lr 1.0e-4, 612 images/s`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, loss, lr, images_per_second, .. } = self;
        write!(f, "step {step}: loss {loss:.4}, lr {lr:.1e}, {images_per_second:.0} images/s")
    }
}

/// Observes training, to show progress, draw samples, save checkpoints or stop the run.
///
/// Every method has a default that does nothing. `()` observes nothing, [`on_metrics`] makes an observer of a closure,
/// and the module [`observe`](crate::observe) contains ready-made ones. Observers compose: a tuple of up to eight, a
/// `Vec`, an `Option`, a `Box` or a mutable reference of observers is an observer. The parts of a tuple or a `Vec` are
/// called in their order.
///
/// An error of a method ends [`Trainer::fit`](crate::Trainer::fit), which returns it.
/// [`Error::external`](crate::Error::external) wraps errors of other libraries.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use ddpm::train::{Metrics, Observer, Run, on_metrics};
/// use ddpm::Result;
///
/// /// Stops once the loss is low enough.
/// struct Until {
///     enough: f32,
///     loss: f32,
/// }
///
/// impl Observer for Until {
///     fn on_metrics(&mut self, _: &Run<'_>, metrics: &Metrics) -> Result<()> {
///         self.loss = metrics.loss;
///         Ok(())
///     }
///
///     fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
///         let done = run.step() > 1_000 && self.loss <= self.enough;
///         Ok(if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
///     }
/// }
///
/// # use ddpm::data::Images;
/// # use ddpm::{Trainer, UNetConfig};
/// # fn fit(mut trainer: Trainer<UNetConfig>, images: Images) -> Result<()> {
/// let print = on_metrics(|metrics| {
///     println!("{metrics}");
///     Ok(())
/// });
/// trainer.fit(&images, (print, Until { enough: 0.02, loss: f32::INFINITY }))
/// # }
/// ```
pub trait Observer {
    /// Called before the first update of a [`fit`](crate::Trainer::fit). An error ends `fit` immediately.
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        let _ = run;
        Ok(())
    }

    /// Called when the loss has been read, before `on_step`.
    fn on_metrics(&mut self, run: &Run<'_>, metrics: &Metrics) -> Result<()> {
        let _ = (run, metrics);
        Ok(())
    }

    /// Called after every update. `Break` stops the run; the other observers are still called for this update.
    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        let _ = run;
        Ok(ControlFlow::Continue(()))
    }

    /// Called with the values that observers [published](Run::publish), in the order of publishing. The call comes
    /// after `on_step` of all observers, and also after `on_start` and `on_end`. Values that are published during this
    /// call are passed in a further call.
    fn on_published(&mut self, run: &Run<'_>, published: &[Published]) -> Result<()> {
        let _ = (run, published);
        Ok(())
    }

    /// Called after an update whose published values every observer has received. What is saved here includes them: a
    /// run that is killed before, and resumes from an earlier checkpoint, publishes them again.
    fn after_step(&mut self, run: &Run<'_>) -> Result<()> {
        let _ = run;
        Ok(())
    }

    /// Called after the last update, and also if an error ended training. Every observer is called, even if another one
    /// returns an error; the first error is returned. After [`Outcome::Failed`] it replaces the error that `fit` would
    /// have returned, so it should contain the original error.
    fn on_end(&mut self, run: &Run<'_>, outcome: Outcome<'_>) -> Result<()> {
        let _ = (run, outcome);
        Ok(())
    }

    /// Returns whether the gradient norm of each layer in the update `step`, counted from 1, should be published as
    /// `grad_norm/LAYER`. Such an update takes twice as long; see
    /// [`Trainer::gradient_norms`](crate::Trainer::gradient_norms).
    fn wants_gradient_norms(&self, step: u64) -> bool {
        let _ = step;
        false
    }

    /// Returns the [`Frontend`]s that this observer adds to the run. Called once, before `on_start`.
    fn frontends(&self) -> Vec<Arc<dyn Frontend>> {
        Vec::new()
    }
}

impl Observer for () {}

macro_rules! by_pointer {
    ($($pointer:ty),+) => {$(
        impl<O: Observer + ?Sized> Observer for $pointer {
            fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
                (**self).on_start(run)
            }

            fn on_metrics(&mut self, run: &Run<'_>, metrics: &Metrics) -> Result<()> {
                (**self).on_metrics(run, metrics)
            }

            fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
                (**self).on_step(run)
            }

            fn on_published(&mut self, run: &Run<'_>, published: &[Published]) -> Result<()> {
                (**self).on_published(run, published)
            }

            fn after_step(&mut self, run: &Run<'_>) -> Result<()> {
                (**self).after_step(run)
            }

            fn on_end(&mut self, run: &Run<'_>, outcome: Outcome<'_>) -> Result<()> {
                (**self).on_end(run, outcome)
            }

            fn wants_gradient_norms(&self, step: u64) -> bool {
                (**self).wants_gradient_norms(step)
            }

            fn frontends(&self) -> Vec<Arc<dyn Frontend>> {
                (**self).frontends()
            }
        }
    )+};
}

by_pointer!(&mut O, Box<O>);

/// Implements `Observer` for a type that consists of observers. Takes the generic parameters, the type, and the
/// iterator over the observers.
macro_rules! composed {
    ([$($part:ident),+] $whole:ty, $self:ident => $parts:expr, $shared:expr) => {
        impl<$($part: Observer),+> Observer for $whole {
            fn on_start(&mut $self, run: &Run<'_>) -> Result<()> {
                for part in $parts {
                    part.on_start(run)?;
                }
                Ok(())
            }

            fn on_metrics(&mut $self, run: &Run<'_>, metrics: &Metrics) -> Result<()> {
                for part in $parts {
                    part.on_metrics(run, metrics)?;
                }
                Ok(())
            }

            fn on_step(&mut $self, run: &Run<'_>) -> Result<ControlFlow<()>> {
                let mut flow = ControlFlow::Continue(());
                for part in $parts {
                    if part.on_step(run)?.is_break() {
                        flow = ControlFlow::Break(());
                    }
                }
                Ok(flow)
            }

            fn on_published(&mut $self, run: &Run<'_>, published: &[Published]) -> Result<()> {
                for part in $parts {
                    part.on_published(run, published)?;
                }
                Ok(())
            }

            fn after_step(&mut $self, run: &Run<'_>) -> Result<()> {
                for part in $parts {
                    part.after_step(run)?;
                }
                Ok(())
            }

            fn on_end(&mut $self, run: &Run<'_>, outcome: Outcome<'_>) -> Result<()> {
                let mut first = Ok(());
                for part in $parts {
                    first = first.and(part.on_end(run, outcome));
                }
                first
            }

            fn wants_gradient_norms(&$self, step: u64) -> bool {
                let mut wanted = false;
                for part in $shared {
                    wanted |= part.wants_gradient_norms(step);
                }
                wanted
            }

            fn frontends(&$self) -> Vec<Arc<dyn Frontend>> {
                let mut all = Vec::new();
                for part in $shared {
                    all.extend(part.frontends());
                }
                all
            }
        }
    };
}

/// Implements `Observer` for a tuple.
macro_rules! tuple {
    ($($part:ident $index:tt),+) => {
        composed!([$($part),+] ($($part,)+), self =>
            [$(&mut self.$index as &mut dyn Observer),+], [$(&self.$index as &dyn Observer),+]);
    };
}

tuple!(A 0);
tuple!(A 0, B 1);
tuple!(A 0, B 1, C 2);
tuple!(A 0, B 1, C 2, D 3);
tuple!(A 0, B 1, C 2, D 3, E 4);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5, G 6);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7);
composed!([O] Vec<O>, self => self.iter_mut(), self.iter());
composed!([O] Option<O>, self => self.iter_mut(), self.iter());

/// An [`Observer`] that calls a closure with each report.
///
/// ```
/// # use ddpm::data::Images;
/// # use ddpm::nn::Architecture;
/// # use ddpm::train::on_metrics;
/// # use ddpm::{Result, Trainer};
/// # fn fit<N: Architecture>(mut trainer: Trainer<N>, images: Images) -> Result<()> {
/// trainer.fit(&images, on_metrics(|metrics| {
///     println!("{metrics}");
///     Ok(())
/// }))
/// # }
/// ```
pub fn on_metrics<F: FnMut(&Metrics) -> Result<()>>(f: F) -> OnMetrics<F> {
    OnMetrics(f)
}

/// The observer that [`on_metrics`] returns.
#[derive(Debug)]
pub struct OnMetrics<F>(F);

impl<F: FnMut(&Metrics) -> Result<()>> Observer for OnMetrics<F> {
    fn on_metrics(&mut self, _: &Run<'_>, metrics: &Metrics) -> Result<()> {
        self.0(metrics)
    }
}
