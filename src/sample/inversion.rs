//! DDIM inversion: the noise of an image, computed without random numbers. Dhariwal and Nichol 2021, appendix F; Song
//! et al. 2021, section 4.3.

use super::plan::{Level, Stage};

/// The step of deterministic DDIM from `from` to the noisier level `to`, with the noise that the network predicts for
/// the sample as if it were already at `to`:
///
/// ```text
/// x' = sqrt(abar') (x - sqrt(1 - abar) eps) / sqrt(abar) + sqrt(1 - abar') eps
/// ```
///
/// The sampling step from `to` back to `from` uses the noise predicted at `to`, so the only error of the inversion is
/// that of the sample. The network knows no time of the image, where the first step begins.
pub(super) fn stages(from: Level, to: Level) -> Vec<Stage> {
    let signal = to.signal() / from.signal();
    // The factor of `eps`, divided by its factor in `eps = (x - sqrt(abar') x_0) / sqrt(1 - abar')`.
    let eps = 1.0 - signal * from.noise() / to.noise();
    vec![Stage {
        evaluate: Some(to),
        x_0: vec![-eps * to.signal()],
        x: signal + eps,
        z: 0.0,
        learned: None,
    }]
}
