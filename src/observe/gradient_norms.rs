use crate::train::Observer;

/// Publishes the gradient norm of each layer at intervals, as `grad_norm/LAYER`.
///
/// The norms are those of the update's gradient before clipping; see
/// [`Trainer::gradient_norms`](crate::Trainer::gradient_norms). An update with norms takes twice as long.
#[derive(Debug, Clone, Copy)]
pub struct GradientNorms {
    every: u64,
}

impl GradientNorms {
    /// Publishes the norms every `every` updates. With 0, none are published.
    pub fn steps(every: u64) -> Self {
        Self { every }
    }
}

impl Observer for GradientNorms {
    fn wants_gradient_norms(&self, step: u64) -> bool {
        step.is_multiple_of(self.every)
    }
}
