//! The choice of timesteps.

use crate::error::{Error, Result};

/// Returns `steps` of the timesteps `0..total` in increasing order, spread evenly with both ends included. One step is
/// the noisiest timestep.
///
/// Ties are rounded to even, as in the respacing of Nichol and Dhariwal's code.
///
/// # Errors
/// Returns an error if `steps` is not in `1..=total`.
pub(super) fn even(total: usize, steps: usize) -> Result<Vec<usize>> {
    if !(1..=total).contains(&steps) {
        let expected = format!("from 1 to {total}, the schedule's number of timesteps");
        return Err(Error::config("sampling steps", steps, expected));
    }
    if steps == 1 {
        return Ok(vec![total - 1]);
    }
    let gap = (total - 1) as f64 / (steps - 1) as f64;
    Ok((0..steps).map(|i| (i as f64 * gap).round_ties_even() as usize).collect())
}

/// # Errors
/// Returns an error if the list is empty, not strictly increasing, or contains a timestep of `total` or more.
pub(super) fn check(timesteps: &[usize], total: usize) -> Result<()> {
    if timesteps.is_empty() {
        let expected = format!("one or more, strictly increasing and less than {total}");
        return Err(Error::config("timesteps", "[]", expected));
    }
    let fits = |i: usize| timesteps[i] < total && (i == 0 || timesteps[i - 1] < timesteps[i]);
    if let Some(i) = (0..timesteps.len()).find(|&i| !fits(i)) {
        let value = format!("{} at index {i}", timesteps[i]);
        let expected = format!("strictly increasing and less than {total}");
        return Err(Error::config("timesteps", value, expected));
    }
    Ok(())
}
