use std::sync::Arc;

use crate::error::Result;
use crate::process::learned::LogVariances;

/// A time of the process, and the noise at that time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Level {
    /// The timestep. It may lie between two timesteps of the schedule.
    pub t: f64,
    pub alpha_bar: f64,
}

impl Level {
    /// The image itself, at which every plan ends. No network is evaluated there: the image precedes timestep 0.
    pub const IMAGE: Self = Self { t: -1.0, alpha_bar: 1.0 };
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

/// The stages of one sampling step. The result of the last stage is the sample after the step: the caller receives it,
/// and the next step begins with it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PlannedStep {
    /// The timestep at which the step begins.
    pub t: usize,
    pub stages: Vec<Stage>,
}

/// Everything that a sampler computes besides the network: the steps from noise to the image, with all factors in f64.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    pub steps: Arc<[PlannedStep]>,
    /// The number of predictions that some stage needs at a time.
    pub predictions: usize,
}

impl Plan {
    /// Creates the plan with one step from each of these timesteps (in decreasing order, with their `alpha_bar`) to the
    /// next, and from the last one to the image.
    ///
    /// `stages(levels, i)` returns the stages of the step from `levels[i]` to `levels[i + 1]`. The last of `levels` is
    /// [`Level::IMAGE`].
    pub fn new(
        timesteps: &[(usize, f64)],
        stages: impl Fn(&[Level], usize) -> Result<Vec<Stage>>,
    ) -> Result<Self> {
        let level = |&(t, alpha_bar): &(usize, f64)| Level { t: t as f64, alpha_bar };
        let levels: Vec<Level> = timesteps.iter().map(level).chain([Level::IMAGE]).collect();
        let step = |(i, &(t, _)): (usize, &(usize, f64))| {
            Ok(PlannedStep { t, stages: stages(&levels, i)? })
        };
        let steps: Arc<[PlannedStep]> =
            timesteps.iter().enumerate().map(step).collect::<Result<_>>()?;
        let all = steps.iter().flat_map(|step| &step.stages);
        let predictions = all.map(|stage| stage.x_0.len()).max().unwrap_or(0);
        Ok(Self { steps, predictions })
    }

    /// The number of network evaluations.
    pub fn evaluations(&self) -> usize {
        let stages = self.steps.iter().flat_map(|step| &step.stages);
        stages.filter(|stage| stage.evaluate.is_some()).count()
    }
}
