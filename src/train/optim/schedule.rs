/// The learning-rate schedule of a run: a linear rise to `peak`, a constant part, and a linear fall to zero.
///
/// ```
/// use ddpm::train::LearningRate;
///
/// let rate = LearningRate { peak: 1.0, warmup_steps: 4, cooldown: 0.5, steps: 8 };
/// let rates: Vec<f64> = (0..9).map(|step| rate.at(step)).collect();
/// assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    /// The learning rate between the rise and the fall.
    pub peak: f64,
    /// Number of updates of the rise; 0 for none.
    pub warmup_steps: u64,
    /// Fraction of `steps` that the fall takes, at the end of the run; from 0 (no fall) to 1. Hägele et al. 2024.
    pub cooldown: f64,
    /// Number of updates of the run.
    pub steps: u64,
}

impl LearningRate {
    /// The learning rate of an update; `step` counts from 0.
    pub fn at(&self, step: u64) -> f64 {
        let rise = match self.warmup_steps {
            0 => 1.0,
            warmup => (step.saturating_add(1) as f64 / warmup as f64).min(1.0),
        };
        let left = self.steps.saturating_sub(step) as f64;
        let fall = match self.cooldown * self.steps as f64 {
            0.0 => 1.0,
            cooldown => (left / cooldown).min(1.0),
        };
        self.peak * rise.min(fall)
    }
}
