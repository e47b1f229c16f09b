//! The Fréchet distance of the example `mnist-fd`, against closed forms and against numpy.

#[path = "../examples/mnist-fd/frechet.rs"]
mod frechet;

use frechet::{Gaussian, eigen};

fn diagonal(mean: &[f64], variances: &[f64]) -> Gaussian {
    let n = mean.len();
    let mut covariance = vec![0.0; n * n];
    covariance.iter_mut().step_by(n + 1).zip(variances).for_each(|(c, v)| *c = *v);
    Gaussian { mean: mean.to_vec(), covariance }
}

fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-9 * (1.0 + expected.abs()), "{found}, not {expected}");
}

/// Points of uniform numbers, the further ones in wider ranges.
fn points(count: usize, size: usize, seed: u32) -> Vec<f32> {
    let uniform = |i: u32| {
        let x = (i + seed).wrapping_mul(2_654_435_761);
        let x = (x ^ (x >> 16)).wrapping_mul(0x045d_9f3b);
        f64::from(x ^ (x >> 16)) / 2f64.powi(32)
    };
    (0..count * size).map(|i| (uniform(i as u32) * (1 + i % size) as f64) as f32).collect()
}

#[test]
fn equal_gaussians_are_at_no_distance() {
    for (count, size) in [(50, 5), (200, 64), (3, 8)] {
        let gaussian = Gaussian::fit(&points(count, size, 1), size);
        // Of a root of rounding errors; without full rank as well.
        assert!(gaussian.distance(&gaussian) < 1e-6, "{count} points of {size}");
    }
}

#[test]
fn a_shifted_mean_is_at_its_squared_distance() {
    let a = Gaussian::fit(&points(100, 6, 1), 6);
    let mean = a.mean.iter().enumerate().map(|(i, m)| m + i as f64).collect();
    let b = Gaussian { mean, covariance: a.covariance.clone() };
    assert_near(a.distance(&b), 55.0);
}

#[test]
fn diagonal_covariances_have_the_distance_of_their_deviations() {
    let a = diagonal(&[1.0, 2.0, 3.0, 0.0], &[4.0, 1.0, 0.0, 9.0]);
    let b = diagonal(&[1.0, 0.0, 3.0, 1.0], &[1.0, 1.0, 4.0, 0.25]);
    // 4 + 1 of the means; (2 - 1)^2, 0, 2^2 and 2.5^2 of the deviations.
    assert_near(a.distance(&b), 16.25);
    assert_near(b.distance(&a), 16.25);
}

/// The numbers are numpy 2's, with the eigenvalues of the product that is not symmetric: of `a` and
/// `b`, the points as float64, A = np.cov(a, rowvar=False), B likewise,
/// ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * np.sqrt(np.linalg.eigvals(A @ B)).sum()
#[test]
fn full_covariances_have_the_distance_that_numpy_computes() {
    for (count, size, expected) in [(50, 5, 0.30657505349392977), (300, 16, 2.963219383633515)] {
        let fit = |seed| Gaussian::fit(&points(count, size, seed), size);
        let (a, b) = (fit(1), fit(7_000_000));
        assert_near(a.distance(&b), expected);
        assert_near(b.distance(&a), expected);
    }
}

#[test]
fn mean_and_covariance_are_those_of_the_points() {
    let gaussian = Gaussian::fit(&[0.0, 2.0, 2.0, 4.0, 4.0, 0.0], 2);
    assert_eq!(gaussian.mean, [2.0, 2.0]);
    assert_eq!(gaussian.covariance, [4.0, -2.0, -2.0, 4.0]);
}

#[test]
fn eigenvectors_are_orthonormal_and_give_the_matrix_back() {
    for n in [1, 2, 7, 64] {
        let a: Vec<f64> = (0..n * n)
            .map(|i| ((i / n * (i % n)) as f64 * 0.9).sin() + (i / n + i % n) as f64)
            .collect();
        let (values, vectors) = eigen(a.clone(), n);
        let row = |k: usize| &vectors[k * n..][..n];
        for i in 0..n {
            for j in 0..n {
                let dot: f64 = row(i).iter().zip(row(j)).map(|(x, y)| x * y).sum();
                assert_near(dot, f64::from(u8::from(i == j)));
                assert_near((0..n).map(|k| values[k] * row(k)[i] * row(k)[j]).sum(), a[i * n + j]);
            }
        }
    }
}
