//! Memory whose size a user or a file chose. If there is not enough of it, `vec!` would end the process.

use crate::error::{Error, Result};

/// Allocates a vector without values, for as many as the product of `sizes`. Returns `None` if there is not enough
/// memory.
pub(crate) fn reserved<T>(sizes: &[usize]) -> Option<Vec<T>> {
    let len = sizes.iter().try_fold(1usize, |len, &size| len.checked_mul(size))?;
    let mut values = Vec::new();
    values.try_reserve_exact(len).ok()?;
    Some(values)
}

/// Allocates a vector like [`reserved`], full of this value.
pub(crate) fn filled<T: Copy>(sizes: &[usize], value: T) -> Option<Vec<T>> {
    let mut values = reserved(sizes)?;
    values.resize(sizes.iter().product(), value);
    Some(values)
}

/// Allocates the values of a tensor of this shape, all 0.
///
/// # Errors
/// Returns an error that names `what` if there is not enough memory.
pub(crate) fn zeros(what: &'static str, shape: &[usize]) -> Result<Vec<f32>> {
    let expected = "small enough for the available memory";
    filled(shape, 0.0).ok_or_else(|| Error::shape(what, shape, expected))
}
