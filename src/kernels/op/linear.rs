//! Linear layers: `y = x W^T + b`.

use crate::error::{Error, Result};

/// The sizes of a linear layer: `x` (batch, input), `weight` (output, input), `y` (batch, output).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinearShape {
    pub batch: usize,
    pub input: usize,
    pub output: usize,
}

impl LinearShape {
    /// The sizes of a layer with a weight of these dimensions, applied to an `x` of these.
    ///
    /// # Errors
    /// Returns an error if `x` or the weight is not a matrix, or if they do not fit together.
    pub(crate) fn new(x: &[usize], weight: &[usize]) -> Result<Self> {
        match (x, weight) {
            (&[batch, columns], &[output, input]) if columns == input => {
                Ok(Self { batch, input, output })
            }
            _ => Err(Error::Shape {
                what: "the input of a linear layer",
                found: x.to_vec(),
                expected: format!("(batch, in) for a weight (out, in) of {weight:?}"),
            }),
        }
    }
}
