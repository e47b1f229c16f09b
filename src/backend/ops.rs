use std::fmt;

use candle_core::{Device, Tensor};

use super::update::{Factors, Updater, WeightState};
use crate::error::Result;
use crate::kernels::op::loss::Loss;
use crate::memory::zeros;
use crate::random::Address;

/// The factors of two tensors at each timestep of a schedule, computed from its `alpha_bar`.
#[derive(Clone, Copy)]
pub(crate) struct Rates<'a> {
    pub alpha_bars: &'a [f64],
    /// Maps `alpha_bar` to the two factors.
    pub factors: &'a dyn Fn(f64) -> [f64; 2],
}

impl Rates<'_> {
    /// The factors at every timestep.
    pub fn table(&self) -> Vec<[f64; 2]> {
        self.alpha_bars.iter().map(|&bar| (self.factors)(bar)).collect()
    }
}

/// The operations of training and sampling outside of networks, on tensors.
///
/// A backend with kernels uses them for plain tensors: f32 on its device, contiguous, of one shape, not empty, and not
/// tracked for gradients. Two tensors of one operation have the same shape.
pub(crate) trait Backend: fmt::Debug + Send + Sync {
    /// Copies values to the device, in the shape `dims`. Does not wait for the device.
    fn upload(&self, values: Vec<f32>, dims: &[usize], device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(values, dims, device)?)
    }

    /// Copies one integer per image to the device, as [`upload`](Self::upload) does.
    fn upload_integers(&self, values: Vec<u32>, device: &Device) -> Result<Tensor> {
        let batch = values.len();
        Ok(Tensor::from_vec(values, batch, device)?)
    }

    /// Draws standard normals of shape `dims` = (batch, ...). The numbers of an image depend on its index but not on
    /// the batch. The first image has index `first`. The default draws them on the host.
    fn normal(&self, at: Address, first: u32, dims: &[usize], device: &Device) -> Result<Tensor> {
        let mut values = zeros("noise", dims)?;
        let count = values.len() / dims.first().copied().unwrap_or(1).max(1);
        for (k, image) in values.chunks_mut(count.max(1)).enumerate() {
            at.stream(first.wrapping_add(k as u32)).fill_normal(image);
        }
        Ok(Tensor::from_vec(values, dims, device)?)
    }

    /// Computes `a x + b y`, with the two factors of each image's timestep `t` (batch), which has been checked.
    fn mix(&self, x: &Tensor, y: &Tensor, t: &Tensor, rates: Rates<'_>) -> Result<Tensor>;

    /// Computes `a x + b y`.
    fn combine(&self, x: &Tensor, a: f64, y: &Tensor, b: f64) -> Result<Tensor>;

    /// Replaces values below `low` by `low`, and values above `high` by `high`.
    fn clamp(&self, x: &Tensor, low: f32, high: f32) -> Result<Tensor>;

    /// Computes `scale` times the sum of `(output - target)²`, a scalar, and its gradient with respect to `output`. The
    /// gradient is multiplied by `gradient_scale`, a scalar of f32, if there is one.
    fn squared_error(
        &self,
        output: &Tensor,
        target: &Tensor,
        scale: f64,
        gradient_scale: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)>;

    /// Computes `scale` times the weighted sum of the losses of all errors, a scalar, and its gradient with respect to
    /// `error`. `weights` (batch) has the dtype of `error`. The gradient is multiplied by `gradient_scale`, a scalar of
    /// f32, if there is one.
    fn loss(
        &self,
        loss: Loss,
        error_and_weights: [&Tensor; 2],
        scale: f64,
        gradient_scale: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)>;

    /// Computes a scalar on the device: 0 if every value is finite, and NaN otherwise.
    fn finiteness(&self, x: &Tensor) -> Result<Tensor> {
        // Subtracting a value that is not finite from itself gives NaN.
        Ok(self.squared_error(x, x, 1.0, None)?.0)
    }

    /// Adds `more` to `sum`. Plain tensors are changed in place, with all tensors that share their values.
    fn add_to(&self, sum: &mut Tensor, more: &Tensor) -> Result<()>;

    /// Moves an average towards a weight: `decay` times the average, plus `1 - decay` times the weight.
    fn follow(&self, average: &mut Tensor, weight: &Tensor, decay: f64) -> Result<()> {
        *average = self.combine(average, decay, weight, 1.0 - decay)?.detach();
        Ok(())
    }

    /// Makes an update of Adam and of the averages with these factors.
    fn adam(&self, weights: Vec<WeightState<'_>>, factors: &Factors) -> Result<()>;

    /// Creates the updater of a run.
    fn updater(&self, device: &Device) -> Box<dyn Updater>;

    /// Returns the interface to record and repeat updates, if the device supports it.
    fn capture(&self, device: &Device) -> Option<Box<dyn Capture>> {
        let _ = device;
        None
    }

    /// Waits for the work that all threads have submitted to the device.
    fn synchronize(&self, device: &Device) -> Result<()> {
        let _ = device;
        Ok(())
    }
}

/// The results of an update: the loss, the norm of the gradient, and the gradients.
pub(crate) type Computed = (Tensor, Tensor, Vec<Tensor>);

/// The tensors that differ from one update to the next.
#[derive(Debug, Clone)]
pub(crate) struct Inputs {
    pub x_0: Tensor,
    pub t: Tensor,
    pub classes: Option<Tensor>,
}

impl Inputs {
    #[cfg(feature = "cuda")]
    pub fn tensors(&self) -> Vec<Tensor> {
        [&self.x_0, &self.t].into_iter().chain(&self.classes).cloned().collect()
    }
}

/// The update that [`Capture::record`] records.
pub(crate) type Recordable<'a> = dyn FnMut(&Inputs) -> Result<Computed> + 'a;

/// Records the work of an update, which can then be repeated by one launch.
pub(crate) trait Capture {
    /// Returns whether an update of this batch can be recorded or repeated now.
    fn is_possible(&self, x_0: &Tensor) -> Result<bool>;

    /// Returns the number of blocks of memory that this thread has allocated for passes so far.
    fn allocated(&self) -> Result<u64>;

    /// Sets the step for which a repeated update draws its random numbers.
    fn set_step(&self, step: u64) -> Result<()>;

    /// Records the work that `update` launches for inputs like these, without running it.
    fn record(&self, inputs: &Inputs, update: &mut Recordable<'_>) -> Result<Box<dyn Recorded>>;
}

/// A recorded update.
pub(crate) trait Recorded: fmt::Debug + Send + Sync {
    /// Returns whether this thread can repeat the update for these inputs.
    fn fits(&self, inputs: &Inputs) -> bool;

    /// Repeats the update for other inputs of the same shapes. Returns the loss and the norm of the gradient.
    fn repeat(&self, inputs: &Inputs) -> Result<(Tensor, Tensor)>;
}
