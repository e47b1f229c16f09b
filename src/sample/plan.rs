use std::collections::HashSet;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::process::NoiseSchedule;
use crate::process::learned::LogVariances;

/// A time of the process, and the noise at that time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Level {
    /// The timestep. It may lie between two timesteps of the schedule.
    pub t: f64,
    pub alpha_bar: f64,
}

impl Level {
    /// The image itself, at which every plan of a solver ends. No network is evaluated there: the image precedes
    /// timestep 0.
    pub const IMAGE: Self = Self { t: -1.0, alpha_bar: 1.0 };

    /// # Errors
    /// Returns an error if `t` is not a time of the schedule.
    pub fn new(schedule: &NoiseSchedule, t: f64) -> Result<Self> {
        Ok(Self { t, alpha_bar: schedule.alpha_bar_at(t)? })
    }

    /// The factor of the image in `x_t`.
    pub fn signal(self) -> f64 {
        self.alpha_bar.sqrt()
    }

    /// The factor of the noise in `x_t`.
    pub fn noise(self) -> f64 {
        (1.0 - self.alpha_bar).sqrt()
    }

    /// The standard deviation of the noise in `x_t / sqrt(alpha_bar)`; the `sigma` of Karras et al. 2022.
    pub fn sigma(self) -> f64 {
        ((1.0 - self.alpha_bar) / self.alpha_bar).sqrt()
    }

    /// Half of the log-SNR, the `lambda` of Lu et al. 2022. That of the image is infinite.
    pub fn lambda(self) -> f64 {
        -libm::log(self.sigma())
    }
}

/// A part of a sampling step. Its result is
///
/// ```text
/// x_0[0] x̂_0[0] + x x_t + x_0[1] x̂_0[1] + ... + z noise
/// ```
///
/// where `x_t` is the sample at the beginning of the step, and `x̂_0[k]` are the predicted images, newest first. They
/// include the predictions of earlier steps, so that a multistep solver needs no state of its own. The terms are added
/// in this order. `noise` is drawn once per step: two stages of one step that add noise add the same tensor.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stage {
    /// The level at which the network is evaluated before the sum. Its input is the result of the previous stage, or
    /// `x_t` in the first stage. The new prediction is `x̂_0[0]` from then on. `None` adds no prediction.
    pub evaluate: Option<Level>,
    /// The factors of the predictions, newest first. Their number is at most that of the predictions so far.
    pub x_0: Vec<f64>,
    /// The factor of the sample at the beginning of the step.
    pub x: f64,
    /// The factor of the noise. With 0 no noise is drawn.
    pub z: f64,
    /// The variances between which the newest output of the network chooses, for each value. Its root is another factor
    /// of the noise.
    pub learned: Option<LogVariances>,
}

impl Stage {
    fn is_finite(&self) -> bool {
        self.x_0.iter().chain([&self.x, &self.z]).all(|factor| factor.is_finite())
    }
}

/// The stages of one sampling step. The result of the last stage is the sample after the step: the caller receives it,
/// and the next step begins with it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PlannedStep {
    /// The noisier end of the step. A step of a solver begins there.
    pub at: Level,
    /// The end of the step. It is `at` if the step adds noise.
    pub to: Level,
    /// The index of this step, if an earlier step has the same noisier end. The two steps need different noise.
    pub again: Option<u64>,
    pub stages: Vec<Stage>,
}

impl PlannedStep {
    /// Returns whether the step leads to less noise.
    pub fn denoises(&self) -> bool {
        self.to.t < self.at.t
    }

    /// Returns whether a stage adds noise.
    pub fn adds_noise(&self) -> bool {
        self.stages.iter().any(|stage| stage.z != 0.0)
    }
}

/// Everything that a sampler computes besides the network: the steps from noise to the image, with all factors in f64.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    pub steps: Arc<[PlannedStep]>,
    /// The number of predictions that some stage needs at a time.
    pub predictions: usize,
    /// True if an evaluation of the network adds two predictions: the image before clipping, and the clipped one, which
    /// is the newest.
    pub unclipped: bool,
}

impl Plan {
    /// Creates the plan with one step from each of these levels to the next. One end of the list is [`Level::IMAGE`]:
    /// the last level of the plan of a solver, and the first level of an inversion. A list with resampling returns to
    /// earlier levels.
    ///
    /// `stages(levels, i)` returns the stages of the step from `levels[i]` to `levels[i + 1]`.
    ///
    /// # Errors
    /// Returns the errors of `stages`, and an error if two levels are so close that a factor is not finite.
    pub fn new(
        levels: &[Level],
        stages: impl Fn(&[Level], usize) -> Result<Vec<Stage>>,
    ) -> Result<Self> {
        let mut begun = HashSet::new();
        let step = |i: usize| {
            let at = if levels[i].t > levels[i + 1].t { levels[i] } else { levels[i + 1] };
            let stages = stages(levels, i)?;
            if stages.iter().all(Stage::is_finite) {
                let again = (!begun.insert(at.t.to_bits())).then_some(i as u64);
                return Ok(PlannedStep { at, to: levels[i + 1], again, stages });
            }
            let expected = "far enough from its neighbours that alpha_bar differs in f64";
            Err(Error::config("timesteps", at.t, expected))
        };
        let steps: Arc<[PlannedStep]> = (0..levels.len() - 1).map(step).collect::<Result<_>>()?;
        let all = steps.iter().flat_map(|step| &step.stages);
        let predictions = all.map(|stage| stage.x_0.len()).max().unwrap_or(0);
        Ok(Self { steps, predictions, unclipped: false })
    }

    /// The number of network evaluations.
    pub fn evaluations(&self) -> usize {
        let stages = self.steps.iter().flat_map(|step| &step.stages);
        stages.filter(|stage| stage.evaluate.is_some()).count()
    }
}
