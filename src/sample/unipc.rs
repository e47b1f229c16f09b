//! UniPC, a predictor and a corrector of exponential integrators. Zhao et al. 2023,
//! [UniPC](https://arxiv.org/abs/2302.04867), section 3, for the prediction of data.

use serde::{Deserialize, Serialize};

use super::exponential::Step;
use super::plan::{Level, Stage};
use crate::error::{Error, Result};

/// The function `B(h)` of UniPC. It scales the coefficients that are set to 1/2 instead of being solved for: that of
/// the predictor of order 2, and that of the corrector of order 1. All other coefficients do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BFunction {
    /// `B_1(h) = h`.
    Bh1,
    /// `B_2(h) = e^h - 1`, and the default.
    #[default]
    Bh2,
}

impl BFunction {
    /// `sqrt(abar') B(h)`.
    fn of(self, step: &Step) -> f64 {
        match self {
            Self::Bh1 => -step.scale * step.z,
            Self::Bh2 => step.constant(),
        }
    }
}

/// The predictor goes to the next level. There the network is evaluated, and the corrector repeats the step with this
/// prediction. The next step uses the same prediction, so that a step has one evaluation.
///
/// The orders of the first steps are lower, because they have fewer predictions, and the orders of the last steps
/// decrease to 1, as in diffusers. The step to the image has no corrector: the network is not evaluated there.
///
/// # Errors
/// Returns an error if `order` is not from 1 to 3.
pub(super) fn stages(order: usize, b: BFunction, levels: &[Level], i: usize) -> Result<Vec<Stage>> {
    if !(1..=3).contains(&order) {
        return Err(Error::config("order of UniPC", order, "from 1 to 3"));
    }
    let order = order.min(i + 1).min(levels.len() - 1 - i);
    let step = Step::new(levels[i], levels[i + 1]);
    let positions = step.positions(levels, i, order);
    // A step from a level without signal has no corrector: the prediction there says nothing about the step's end.
    let is_corrected = |i: usize| levels[i].alpha_bar > 0.0;
    let predictor = Stage {
        // Later steps have the prediction of the corrector before them.
        evaluate: (i == 0 || !is_corrected(i - 1)).then_some(levels[i]),
        x_0: step.factors(&positions, 0.5 * b.of(&step)),
        x: step.x,
        z: 0.0,
        learned: None,
    };
    if levels[i + 1] == Level::IMAGE || !is_corrected(i) {
        return Ok(vec![predictor]);
    }
    let positions: Vec<f64> = positions.into_iter().chain([1.0]).collect();
    let mut x_0 = step.factors(&positions, 0.5 * b.of(&step));
    // The newest prediction is that at the end of the step.
    x_0.rotate_right(1);
    let corrector = Stage { evaluate: Some(levels[i + 1]), x_0, ..predictor.clone() };
    Ok(vec![predictor, corrector])
}
