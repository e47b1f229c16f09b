//! Averages of any width, computed from stored ones after training. Karras et al. 2024 (EDM2), section 3.2 and
//! appendix C.
//!
//! The average of a run of length `t` by a power function weights the weights at time `τ` by the profile
//! `(γ + 1) τ^γ / t^(γ + 1)`. Several stored averages are added with factors that bring the sum of their profiles as
//! close as possible to the wanted profile, in the sense of least squares.

use crate::error::{Error, Result};

/// The profile of an average.
#[derive(Debug, Clone, Copy)]
pub(in crate::train) struct Profile {
    /// The end of the training that the average followed; positive.
    pub end: f64,
    /// The exponent `γ`.
    pub exponent: f64,
}

impl Profile {
    /// The integral of the product of two profiles.
    fn dot(self, other: Self) -> f64 {
        let (first, last) = if self.end < other.end { (self, other) } else { (other, self) };
        let (a, b) = (first.exponent, last.exponent);
        (a + 1.0) * (b + 1.0) * (first.end / last.end).powf(b) / ((a + b + 1.0) * last.end)
    }
}

/// Returns the exponent `γ` of the profile with a relative standard deviation, from
/// `σ² = (γ + 1) / ((γ + 2)² (γ + 3))`.
///
/// # Errors
/// Returns an error if `sigma_rel` is not positive or not less than that of a uniform average.
pub(in crate::train) fn exponent(sigma_rel: f64) -> Result<f64> {
    let deviation = |gamma: f64| ((gamma + 1.0) / (gamma + 3.0)).sqrt() / (gamma + 2.0);
    if !(sigma_rel > 0.0 && sigma_rel < deviation(0.0) && (1.0 / sigma_rel).is_finite()) {
        return Err(Error::config("sigma_rel", sigma_rel, "positive and less than 0.2886"));
    }
    // The deviation falls with the exponent, and is less than 1 / (γ + 2).
    let (mut low, mut high) = (0.0, 1.0 / sigma_rel);
    loop {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            return Ok(middle);
        }
        if deviation(middle) > sigma_rel { low = middle } else { high = middle }
    }
}

/// Returns the factors of stored averages whose sum is closest to the average with the profile `wanted`.
///
/// # Errors
/// Returns an error if two profiles are equal, because the factors are then not determined. Returns an error if the
/// magnitudes of the factors add up to more than [`MAX_MAGNITUDE`].
pub(in crate::train) fn factors(stored: &[Profile], wanted: Profile) -> Result<Vec<f64>> {
    let row = |a: &Profile| stored.iter().map(|b| a.dot(*b)).chain([a.dot(wanted)]).collect();
    let factors = solve(stored.iter().map(row).collect())?;
    let magnitude: f64 = factors.iter().map(|factor| factor.abs()).sum();
    if magnitude.is_nan() || magnitude > MAX_MAGNITUDE {
        let expected = format!(
            "at most {MAX_MAGNITUDE}; the stored averages are too similar for this sigma_rel: store widths that differ \
             more, such as AverageConfig::POST_HOC, or choose a sigma_rel nearer to a stored one"
        );
        return Err(Error::config("sum of the factors' magnitudes", magnitude, expected));
    }
    Ok(factors)
}

/// The largest sum of the magnitudes of factors. Stored averages are f32, with relative errors of 6e-8. With this
/// limit, the error of the result is at most 6e-5 of the weights. With the widths 0.05 and 0.10, as in EDM2, the sum is
/// at most 240, even for a width of 0.01 from 300 checkpoints. The sum is inversely proportional to the difference of
/// two widths. With the widths 0.05 and 0.0505, it is 87 for a width of 0.10. The condition number of the equations is
/// no measure of this error: it grows with the number of checkpoints, while the factors stay small.
const MAX_MAGNITUDE: f64 = 1000.0;

/// Solves linear equations, given as the rows of their matrix with the right-hand side at the end. Gaussian elimination
/// with the largest pivot of each column.
fn solve(mut rows: Vec<Vec<f64>>) -> Result<Vec<f64>> {
    let size = rows.len();
    for k in 0..size {
        let largest = (k..size).max_by(|&i, &j| rows[i][k].abs().total_cmp(&rows[j][k].abs()));
        rows.swap(k, largest.unwrap_or(k));
        let (above, below) = rows.split_at_mut(k + 1);
        let pivot = &above[k];
        if !(pivot[k] != 0.0 && pivot[k].is_finite()) {
            return Err(Error::config("stored averages", size, "ones with different profiles"));
        }
        for row in below {
            let factor = row[k] / pivot[k];
            row.iter_mut().zip(pivot).for_each(|(x, pivot)| *x -= factor * pivot);
        }
    }
    let mut solution = vec![0.0; size];
    for k in (0..size).rev() {
        let known: f64 = (k + 1..size).map(|j| rows[k][j] * solution[j]).sum();
        solution[k] = (rows[k][size] - known) / rows[k][k];
    }
    Ok(solution)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected numbers come from the published algorithm, written with NumPy: `np.roots` and `np.linalg.solve`.
    #[test]
    fn exponents_and_factors_are_those_of_the_published_algorithm() -> Result<()> {
        let file: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/data/post-hoc.json")).unwrap();
        let list = |value: &serde_json::Value| -> Vec<f64> {
            serde_json::from_value(value.clone()).unwrap()
        };
        let mut cases = 0;
        for case in file["cases"].as_array().unwrap() {
            let (ends, sigmas) = (list(&case["ends"]), list(&case["sigma_rel"]));
            let mut stored = Vec::new();
            for (end, sigma) in ends.iter().zip(&sigmas) {
                stored.push(Profile { end: *end, exponent: exponent(*sigma)? });
            }
            for (profile, expected) in stored.iter().zip(list(&case["exponents"])) {
                assert!(
                    (profile.exponent / expected - 1.0).abs() < 1e-12,
                    "{profile:?}, {expected}"
                );
            }
            let wanted = Profile {
                end: case["end"].as_f64().unwrap(),
                exponent: exponent(case["wanted"].as_f64().unwrap())?,
            };
            let found = factors(&stored, wanted)?;
            // The condition number of the equations is in the file.
            let limit = 1e-15 * case["condition"].as_f64().unwrap();
            for (found, expected) in found.iter().zip(list(&case["factors"])) {
                assert!((found - expected).abs() <= limit, "{found}, not {expected}, by {limit:e}");
            }
            cases += 1;
        }
        assert_eq!(cases, 4);
        Ok(())
    }

    #[test]
    fn a_stored_average_is_found_again() -> Result<()> {
        let stored: Vec<Profile> = [(100.0, 0.05), (100.0, 0.1), (300.0, 0.05), (300.0, 0.1)]
            .into_iter()
            .map(|(end, sigma)| Ok(Profile { end, exponent: exponent(sigma)? }))
            .collect::<Result<_>>()?;
        for (k, wanted) in stored.iter().enumerate() {
            for (i, factor) in factors(&stored, *wanted)?.into_iter().enumerate() {
                let expected = if i == k { 1.0 } else { 0.0 };
                assert!((factor - expected).abs() < 1e-9, "{k}, {i}: {factor}");
            }
        }
        assert!(factors(&[stored[0], stored[0]], stored[1]).is_err());
        Ok(())
    }

    #[test]
    fn averages_that_are_too_similar_are_refused() -> Result<()> {
        let profile =
            |sigma| -> Result<Profile> { Ok(Profile { end: 1000.0, exponent: exponent(sigma)? }) };
        let magnitude = |other, wanted| -> Result<f64> {
            let found = factors(&[profile(0.05)?, profile(other)?], profile(wanted)?)?;
            Ok(found.iter().map(|factor| factor.abs()).sum())
        };
        // The sums come from NumPy: `np.linalg.solve`.
        assert!((magnitude(0.0505, 0.1)? / 87.2712470678832 - 1.0).abs() < 1e-9);
        assert!((magnitude(0.05 * 1.001, 0.1)? / 871.0316503643876 - 1.0).abs() < 1e-7);
        assert!(magnitude(0.05 * 1.0001, 0.05)? < 1.001);
        let message = magnitude(0.05 * 1.0001, 0.1).unwrap_err().to_string();
        assert!(message.starts_with("sum of the factors' magnitudes is 870"), "{message}");
        assert!(message.contains("at most 1000; the stored averages are too similar"), "{message}");
        Ok(())
    }

    #[test]
    fn widths_out_of_range_are_refused() {
        for sigma in [0.0, -0.1, 0.2887, f64::NAN, f64::INFINITY] {
            let message = exponent(sigma).unwrap_err().to_string();
            assert_eq!(
                message,
                format!("sigma_rel is {sigma}; it must be positive and less than 0.2886")
            );
        }
    }
}
