use serde::{Deserialize, Serialize};

/// The loss of one value's error, which is the difference between output and target.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Loss {
    /// The square, `e²`. Ho et al. 2020, equation 14, and the default.
    #[default]
    Mse,
    /// The absolute value, `|e|`.
    L1,
    /// `e² / 2` for an absolute error of at most `delta`, and `delta (|e| - delta / 2)` for a larger one. Huber 1964.
    /// Large errors count less than with the square.
    Huber {
        /// The largest error with a square loss; positive.
        delta: f64,
    },
}

impl Loss {
    /// Returns the function that computes loss and derivative of an error.
    pub(crate) fn function(self) -> fn(f32, f32) -> (f32, f32) {
        match self {
            Self::Mse => |e, _| (e * e, 2.0 * e),
            Self::L1 => |e, _| (e.abs(), sign(e)),
            Self::Huber { .. } => |e, delta| {
                // A NaN stays NaN.
                let near = e.clamp(-delta, delta);
                (near * (e - 0.5 * near), near)
            },
        }
    }

    /// The second argument of [`function`](Self::function).
    pub(crate) fn delta(self) -> f64 {
        if let Self::Huber { delta } = self { delta } else { 0.0 }
    }
}

/// Returns -1, 0 or 1, or NaN.
fn sign(e: f32) -> f32 {
    if e == 0.0 { 0.0 } else { e.signum() }
}
