//! Elementwise functions that are part of other operations.

/// The activation that follows a normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// The identity.
    None,
    /// `x / (1 + exp(-x))`.
    Silu,
}

/// The limits of the output of a convolution whose weights are fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Rectifier {
    /// No limits.
    #[default]
    None,
    /// At least 0 (ReLU).
    Relu,
    /// At least 0, at most 6 (ReLU6).
    Relu6,
}

impl Rectifier {
    /// The greatest output, if the least is 0.
    pub(crate) fn highest(self) -> Option<f32> {
        match self {
            Self::None => None,
            Self::Relu => Some(f32::INFINITY),
            Self::Relu6 => Some(6.0),
        }
    }
}

/// The activation that a linear layer applies to its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum VectorActivation {
    /// The identity.
    None,
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `x` times the probability that a standard normal value is less than `x`. The exact form, not the
    /// approximation by tanh.
    Gelu,
}

impl VectorActivation {
    /// Computes the activation of `x`, in f64.
    pub(crate) fn value(self, x: f32) -> f32 {
        let x = f64::from(x);
        let y = match self {
            Self::None => x,
            Self::Silu => x / (1.0 + libm::exp(-x)),
            Self::Gelu => x * normal_below(x),
        };
        y as f32
    }

    /// Computes the derivative of the activation at `x`, in f64.
    pub(crate) fn derivative(self, x: f32) -> f32 {
        let x = f64::from(x);
        let dy = match self {
            Self::None => 1.0,
            Self::Silu => {
                let s = 1.0 / (1.0 + libm::exp(-x));
                s * (1.0 + x * (1.0 - s))
            }
            Self::Gelu => {
                let density = libm::exp(-0.5 * x * x) / (2.0 * std::f64::consts::PI).sqrt();
                normal_below(x) + x * density
            }
        };
        dy as f32
    }
}

/// The probability that a standard normal value is less than `x`.
fn normal_below(x: f64) -> f64 {
    0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))
}
