//! The terms of the variational bound for one value. Ho et al. 2020, equations 5 and 13.

/// Half of the width of a pixel's bin, with 256 values from -1 to 1.
pub(crate) const HALF_BIN: f64 = 1.0 / 255.0;

/// Images at or beyond these values belong to the first and last bin, which are infinite.
const EDGE: f64 = 0.999;

/// Computes the divergence of the model's normal distribution from the posterior in nats, and its derivative with
/// respect to the model's logarithm of the variance. `distance` is that of their means.
pub(crate) fn divergence(distance: f64, log_posterior: f64, log_variance: f64) -> (f64, f64) {
    let ratio = libm::exp(log_posterior - log_variance);
    let square = distance * distance * libm::exp(-log_variance);
    let value = 0.5 * (log_variance - log_posterior - 1.0 + ratio + square);
    (value, 0.5 * (1.0 - ratio - square))
}

/// Computes the negative logarithm of the probability of a pixel's bin in nats, and its derivative with respect to the
/// logarithm of the variance. The mean is `x - error`. Ho et al. 2020, equation 13.
pub(crate) fn decoder(x: f64, error: f64, log_variance: f64) -> (f64, f64) {
    let inverse = libm::exp(-0.5 * log_variance);
    let a = if x < -EDGE { f64::NEG_INFINITY } else { (error - HALF_BIN) * inverse };
    let b = if x > EDGE { f64::INFINITY } else { (error + HALF_BIN) * inverse };
    // The distribution is symmetric. The tail on the left has small numbers instead of a difference from 1.
    let (a, b) = if a + b > 0.0 { (-b, -a) } else { (a, b) };
    let root = std::f64::consts::FRAC_1_SQRT_2;
    // The derivative of the bin's probability with respect to the logarithm is (a phi(a) - b phi(b)) / 2.
    let density = |z: f64, exponent: f64| {
        if z.is_infinite() {
            0.0
        } else {
            z * libm::exp(exponent) * root / std::f64::consts::PI.sqrt()
        }
    };
    if b >= 0.0 {
        let probability = 0.5 * (libm::erf(b * root) - libm::erf(a * root));
        let slope = 0.5 * (density(b, -0.5 * b * b) - density(a, -0.5 * a * a)) / probability;
        return (-libm::log(probability), slope);
    }
    // Both values without their common factor exp(-b² / 2), which may be 0 in f64.
    let fall = 0.5 * (b * b - a * a);
    let far = if a.is_infinite() { 0.0 } else { libm::exp(fall) * scaled_erfc(-a * root) };
    let probability = 0.5 * (scaled_erfc(-b * root) - far);
    let slope = 0.5 * (density(b, 0.0) - density(a, fall)) / probability;
    (0.5 * b * b - libm::log(probability), slope)
}

/// Computes `exp(x²) erfc(x)` for `x >= 0`.
fn scaled_erfc(x: f64) -> f64 {
    if x < 20.0 {
        return libm::exp(x * x) * libm::erfc(x);
    }
    // The asymptotic series, whose next term is less than 1e-12.
    let y = 1.0 / (2.0 * x * x);
    (1.0 - y * (1.0 - y * (3.0 - y * (15.0 - y * 105.0)))) / (x * std::f64::consts::PI.sqrt())
}
