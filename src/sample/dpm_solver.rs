//! DPM-Solver++ in its multistep forms. Lu et al. 2022, [DPM-Solver++](https://arxiv.org/abs/2211.01095).

use super::exponential::Step;
use super::plan::{Level, Stage};
use crate::error::{Error, Result};

/// With fewer steps, third order ends in second order, as in diffusers.
const FEW_STEPS: usize = 15;

/// The orders of the first steps are 1 and 2, because they have fewer predictions. The step to the image has order 1:
/// its `h` is infinite, and its result is the newest prediction.
///
/// Order 2 is algorithm 2 of the paper, the midpoint form. Order 3 integrates the polynomial through the last three
/// predictions exactly.
///
/// # Errors
/// Returns an error if `order` is not 2 or 3. Order 1 would be deterministic DDIM.
pub(super) fn stages(order: usize, levels: &[Level], i: usize) -> Result<Vec<Stage>> {
    if !(2..=3).contains(&order) {
        return Err(Error::config("order of DPM-Solver++", order, "2 or 3"));
    }
    let steps = levels.len() - 1;
    let limit = match steps - i {
        1 => 1,
        2 if steps < FEW_STEPS => 2,
        _ => order,
    };
    let step = Step::new(levels[i], levels[i + 1]);
    Ok(vec![Stage { x_0: factors(step, order.min(limit), levels, i), ..stage(step, levels, i) }])
}

/// The second-order solver of the reverse SDE, from the paper's section on diffusion SDEs. It is the algorithm
/// `sde-dpmsolver++` of diffusers in the midpoint form.
///
/// For the same `x_0` along the path, the SDE replaces `e^(d - h)` by `2 e^(2 (d - h))`, and the sample decays by
/// `e^-h` more. The noise restores its variance.
pub(super) fn sde_stages(levels: &[Level], i: usize) -> Vec<Stage> {
    let order = if i + 2 == levels.len() { 1 } else { 2 };
    let mut step = Step::new(levels[i], levels[i + 1]);
    step.x *= libm::exp(step.z);
    step.z *= 2.0;
    let z = levels[i + 1].noise() * (-libm::expm1(step.z)).sqrt();
    vec![Stage { x_0: factors(step, order, levels, i), z, ..stage(step, levels, i) }]
}

fn stage(step: Step, levels: &[Level], i: usize) -> Stage {
    Stage { evaluate: Some(levels[i]), x_0: vec![], x: step.x, z: 0.0, learned: None }
}

/// The factors of the predictions for the step from `levels[i]`, of at most this order.
fn factors(step: Step, order: usize, levels: &[Level], i: usize) -> Vec<f64> {
    let positions = step.positions(levels, i, order.min(i + 1));
    step.factors(&positions, 0.5 * step.constant())
}
