use candle_core::{DType, Tensor};

use super::image_losses::{ImageLosses, Quartiles};
use super::observer::Metrics;
use crate::error::{Error, Result};

/// Maximum number of unread updates. A loop that calls neither `fit` nor `save` has its losses read and checked after
/// this many.
const MAX_UNREAD: usize = 10_000;

/// The results of an update. The numbers are still on the device: reading them waits for the device.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Update {
    /// The update's number, from 1.
    pub step: u64,
    /// The loss over the whole batch, a scalar.
    pub loss: Tensor,
    /// The global norm of the gradient before clipping, a scalar. With [`Precision::F16`](crate::Precision::F16) it is
    /// not finite if the update was skipped.
    pub grad_norm: Tensor,
    /// The losses of the images, if they are needed.
    pub(super) images: Option<ImageLosses>,
}

impl Update {
    /// Reads the loss and the norm. Waits for the device.
    ///
    /// # Errors
    /// Returns an error if the loss or the norm is not finite. With `may_skip` the norm may be infinite or NaN,
    /// because a smaller scale can fix it.
    fn read(&self, may_skip: bool) -> Result<(f32, f32)> {
        let scalar = |t: &Tensor| -> Result<f32> { Ok(t.to_dtype(DType::F32)?.to_scalar()?) };
        let (loss, grad_norm) = (scalar(&self.loss)?, scalar(&self.grad_norm)?);
        for (what, value, fatal) in [("loss", loss, true), ("gradient norm", grad_norm, !may_skip)]
        {
            if fatal && !value.is_finite() {
                return Err(Error::NonFinite { what: what.into(), value, step: self.step });
            }
        }
        Ok((loss, grad_norm))
    }
}

/// The losses since the last report.
#[derive(Debug, Default)]
pub(super) struct Meter {
    unread: Vec<Update>,
    /// Sum and number of the losses that were read.
    sum: f64,
    count: u64,
    /// The last finite norm that was read.
    grad_norm: f32,
    quartiles: Quartiles,
}

impl Meter {
    /// Returns whether the number of unread updates has reached its maximum.
    pub fn is_full(&self) -> bool {
        self.unread.len() >= MAX_UNREAD
    }

    pub fn record(&mut self, update: Update) {
        self.unread.push(update);
    }

    /// Checks the updates that have not been read.
    ///
    /// # Errors
    /// Returns an error that names the first update whose loss or norm is not finite. With `may_skip`, norms are not
    /// checked.
    pub fn check(&self, may_skip: bool) -> Result<()> {
        self.unread.iter().try_for_each(|update| update.read(may_skip).map(drop))
    }

    /// Reads the updates that have not been read.
    ///
    /// # Errors
    /// Returns the errors of [`check`](Self::check).
    pub fn read(&mut self, may_skip: bool) -> Result<()> {
        let read: Vec<_> =
            self.unread.iter().map(|update| update.read(may_skip)).collect::<Result<_>>()?;
        for images in self.unread.iter().filter_map(|update| update.images.as_ref()) {
            self.quartiles.add(images)?;
        }
        self.unread.clear();
        self.sum += read.iter().map(|(loss, _)| f64::from(*loss)).sum::<f64>();
        self.count += read.len() as u64;
        if let Some(last) = read.iter().map(|(_, norm)| *norm).rfind(|norm| norm.is_finite()) {
            self.grad_norm = last;
        }
        Ok(())
    }

    /// Returns the report on the updates that were read since the last report, and starts the next one.
    pub fn report(&mut self, step: u64, lr: f64, loss_scale: Option<f64>) -> Metrics {
        let loss = (self.sum / self.count.max(1) as f64) as f32;
        (self.sum, self.count) = (0.0, 0);
        let loss_quartiles = std::mem::take(&mut self.quartiles).means();
        let (grad_norm, images_per_second, waiting) = (self.grad_norm, 0.0, 0.0);
        Metrics {
            step,
            loss,
            loss_quartiles,
            lr,
            grad_norm,
            loss_scale,
            images_per_second,
            waiting,
        }
    }
}
