//! Heun's method for the probability-flow ODE. Karras et al. 2022, algorithm 1, with `sigma(t) = t` and `s(t) = 1`.

use super::ddim;
use super::plan::{Level, Stage};

/// For `y = x / sqrt(abar)` and `sigma = sqrt((1 - abar) / abar)`, the ODE is `dy/dsigma = (y - x_0) / sigma`. One step
/// goes from `sigma` to `sigma'`.
///
/// The first stage is Euler's step `y' = r y + (1 - r) x_0` with `r = sigma' / sigma`, which is deterministic DDIM. The
/// second stage evaluates the network at the result, and repeats the step with the mean of the two slopes. Written out,
/// this replaces `x_0` by `x_0 + (x_0' - x_0) / (2 r)`, where `x_0'` is the second prediction. The image has no slope,
/// so the last step is Euler's. A first step without signal is Euler's, too, because its `sigma` is infinite.
pub(super) fn stages(from: Level, to: Level) -> Vec<Stage> {
    let euler = ddim::stage(0.0, from, to);
    if to == Level::IMAGE || from.alpha_bar == 0.0 {
        return vec![euler];
    }
    let weight = 0.5 * from.sigma() / to.sigma();
    let x_0 = [weight, 1.0 - weight].map(|weight| weight * euler.x_0[0]).to_vec();
    let corrected = Stage { evaluate: Some(to), x_0, ..euler };
    vec![euler, corrected]
}
