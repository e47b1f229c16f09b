//! Denoising diffusion implicit models. Song et al. 2021, equation 12.

use super::ancestral::posterior_std;
use super::plan::{Level, Stage};
use crate::error::{Error, Result};

/// # Errors
/// Returns an error if `eta` is not in [0, 1].
pub(super) fn stages(eta: f64, from: Level, to: Level) -> Result<Vec<Stage>> {
    check(eta)?;
    Ok(vec![stage(eta, from, to)])
}

/// The same sum, with the `eps` of the prediction before clipping, which is the second one.
///
/// # Errors
/// Returns an error if `eta` is not in [0, 1].
pub(super) fn unclipped_stages(eta: f64, from: Level, to: Level) -> Result<Vec<Stage>> {
    check(eta)?;
    let stage = stage(eta, from, to);
    let x_0 = vec![to.signal(), -stage.x * from.signal()];
    Ok(vec![Stage { x_0, ..stage }])
}

fn check(eta: f64) -> Result<()> {
    match (0.0..=1.0).contains(&eta) {
        true => Ok(()),
        false => Err(Error::config("eta", eta, "from 0 to 1")),
    }
}

/// `sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z`, with `eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)`
/// written out, so that a clipped `x_0` changes `eps` as well.
pub(super) fn stage(eta: f64, from: Level, to: Level) -> Stage {
    let (noise, noise_prev) = (1.0 - from.alpha_bar, 1.0 - to.alpha_bar);
    let sigma = eta * posterior_std(from, to);
    let eps = (noise_prev - sigma * sigma).max(0.0).sqrt() / noise.sqrt();
    Stage {
        evaluate: Some(from),
        x_0: vec![to.alpha_bar.sqrt() - eps * from.alpha_bar.sqrt()],
        x: eps,
        z: sigma,
        learned: None,
    }
}
