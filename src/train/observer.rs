use std::fmt;
use std::ops::ControlFlow;

use serde::Serialize;

use super::Trainer;
use crate::{Network, Result};

/// The report on training every [`log_every`](crate::TrainConfig::log_every) updates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metrics {
    /// Number of updates so far.
    pub step: u64,
    /// Mean loss of the updates since the last report, or since [`fit`](Trainer::fit) began. Updates made outside
    /// of `fit` are not included.
    pub loss: f32,
    /// Learning rate of the last update.
    pub lr: f64,
    /// Global norm of the gradient of the last update that was not skipped, before clipping.
    pub grad_norm: f32,
    /// Scale of the gradients in the next update, with [`Precision::F16`](crate::Precision::F16).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Images per second in the same updates. The time includes that of the source, but not that of the observer.
    pub images_per_second: f64,
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
/// `()` does nothing. [`on_metrics`] makes an observer of a closure. An error of either method ends [`Trainer::fit`], which returns it.
/// [`Error::external`](crate::Error::external) wraps errors of other libraries.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use ddpm::{Metrics, Network, Observer, Result, Trainer};
///
/// /// Prints the loss, saves every 500 updates, and stops once the loss is low enough.
/// struct Watch {
///     enough: f32,
///     loss: f32,
/// }
///
/// impl<N: Network> Observer<N> for Watch {
///     fn on_metrics(&mut self, _: &Trainer<N>, metrics: &Metrics) -> Result<()> {
///         println!("{metrics}");
///         self.loss = metrics.loss;
///         Ok(())
///     }
///
///     fn on_step(&mut self, trainer: &Trainer<N>) -> Result<ControlFlow<()>> {
///         let done = self.loss <= self.enough;
///         if done || trainer.steps().is_multiple_of(500) {
///             trainer.save("out/checkpoint")?;
///         }
///         Ok(if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
///     }
/// }
///
/// # use ddpm::{Images, UNetConfig};
/// # fn fit(mut trainer: Trainer<UNetConfig>, images: Images) -> Result<()> {
/// trainer.fit(&images, &mut Watch { enough: 0.02, loss: f32::INFINITY })
/// # }
/// ```
pub trait Observer<N: Network> {
    /// Called after every update. `Break` ends [`Trainer::fit`] without an error.
    fn on_step(&mut self, trainer: &Trainer<N>) -> Result<ControlFlow<()>> {
        let _ = trainer;
        Ok(ControlFlow::Continue(()))
    }

    /// Called when the loss has been read, before `on_step`.
    fn on_metrics(&mut self, trainer: &Trainer<N>, metrics: &Metrics) -> Result<()> {
        let _ = (trainer, metrics);
        Ok(())
    }
}

impl<N: Network> Observer<N> for () {}

/// An [`Observer`] that calls a closure with each report.
///
/// ```
/// # use ddpm::{Images, Network, Result, Trainer, on_metrics};
/// # fn fit<N: Network>(mut trainer: Trainer<N>, images: Images) -> Result<()> {
/// trainer.fit(&images, &mut on_metrics(|metrics| {
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

impl<N: Network, F: FnMut(&Metrics) -> Result<()>> Observer<N> for OnMetrics<F> {
    fn on_metrics(&mut self, _: &Trainer<N>, metrics: &Metrics) -> Result<()> {
        self.0(metrics)
    }
}
