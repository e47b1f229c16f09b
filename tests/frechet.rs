//! The Fréchet distance, compared with closed forms and with numpy.

use ddpm::eval::{Gaussian, Statistics};

fn diagonal(mean: &[f64], variances: &[f64]) -> Gaussian {
    let n = mean.len();
    let mut covariance = vec![0.0; n * n];
    covariance.iter_mut().step_by(n + 1).zip(variances).for_each(|(c, v)| *c = *v);
    Gaussian::new(mean.to_vec(), covariance).unwrap()
}

fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-9 * (1.0 + expected.abs()), "{found}, not {expected}");
}

/// Points of uniform numbers, with a wider range for each further point.
fn points(count: usize, size: usize, seed: u32) -> Vec<f32> {
    let uniform = |i: u32| {
        let x = (i + seed).wrapping_mul(2_654_435_761);
        let x = (x ^ (x >> 16)).wrapping_mul(0x045d_9f3b);
        f64::from(x ^ (x >> 16)) / 2f64.powi(32)
    };
    (0..count * size).map(|i| (uniform(i as u32) * (1 + i % size) as f64) as f32).collect()
}

fn fit(points: &[f32], size: usize) -> Gaussian {
    let mut statistics = Statistics::new(size);
    statistics.add(points).unwrap();
    statistics.gaussian().unwrap()
}

fn distance(a: &Gaussian, b: &Gaussian) -> f64 {
    a.frechet_distance(b).unwrap()
}

#[test]
fn equal_gaussians_are_at_no_distance() {
    for (count, size) in [(50, 5), (200, 64), (3, 8)] {
        let gaussian = fit(&points(count, size, 1), size);
        // The distance is the root of rounding errors, also for a covariance without full rank.
        let distance = distance(&gaussian, &gaussian);
        assert!((0.0..1e-6).contains(&distance), "{distance}: {count} points of {size}");
    }
}

#[test]
fn a_shifted_mean_is_at_its_squared_distance() {
    let a = fit(&points(100, 6, 1), 6);
    let mean = a.mean().iter().enumerate().map(|(i, m)| m + i as f64).collect();
    let b = Gaussian::new(mean, a.covariance().to_vec()).unwrap();
    assert_near(distance(&a, &b), 55.0);
}

#[test]
fn diagonal_covariances_have_the_distance_of_their_deviations() {
    let a = diagonal(&[1.0, 2.0, 3.0, 0.0], &[4.0, 1.0, 0.0, 9.0]);
    let b = diagonal(&[1.0, 0.0, 3.0, 1.0], &[1.0, 1.0, 4.0, 0.25]);
    // Means: 4 + 1. Deviations: (2 - 1)^2, 0, 2^2 and 2.5^2.
    assert_near(distance(&a, &b), 16.25);
    assert_near(distance(&b, &a), 16.25);
}

/// The expected values are computed by numpy 2, with the eigenvalues of the product, which is not
/// symmetric. With the points `a` and `b` as float64, A = np.cov(a, rowvar=False), and B likewise:
/// ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * np.sqrt(np.linalg.eigvals(A @ B)).sum()
#[test]
fn full_covariances_have_the_distance_that_numpy_computes() {
    for (count, size, expected) in [(50, 5, 0.30657505349392977), (300, 16, 2.963219383633515)] {
        let of = |seed| fit(&points(count, size, seed), size);
        let (a, b) = (of(1), of(7_000_000));
        assert_near(distance(&a, &b), expected);
        assert_near(distance(&b, &a), expected);
    }
}

#[test]
fn mean_and_covariance_are_those_of_the_points() {
    let gaussian = fit(&[0.0, 2.0, 2.0, 4.0, 4.0, 0.0], 2);
    assert_eq!(gaussian.mean(), [2.0, 2.0]);
    assert_eq!(gaussian.covariance(), [4.0, -2.0, -2.0, 4.0]);
}

/// The statistics of parts merge to those of the whole, for any division into parts.
#[test]
fn statistics_of_parts_merge_to_those_of_the_whole() {
    let (count, size) = (90, 7);
    let points = points(count, size, 3);
    let mut whole = Statistics::new(size);
    whole.add(&points).unwrap();
    for parts in [vec![90], vec![1, 89], vec![30, 1, 0, 59], vec![45, 45]] {
        let (mut merged, mut start) = (Statistics::new(size), 0);
        for len in parts {
            let mut part = Statistics::new(size);
            part.add(&points[start * size..][..len * size]).unwrap();
            merged.merge(&part).unwrap();
            start += len;
        }
        assert_eq!(merged.count(), count as u64);
        let (merged, whole) = (merged.gaussian().unwrap(), whole.gaussian().unwrap());
        let values = |g: &Gaussian| [g.mean(), g.covariance()].concat();
        for (found, expected) in values(&merged).iter().zip(values(&whole)) {
            assert_near(*found, expected);
        }
    }
}

/// Sums of squares would lose all digits here.
#[test]
fn a_large_mean_does_not_hide_the_variance() {
    let gaussian = fit(&[16_777_214.0, 16_777_215.0, 16_777_216.0], 1);
    assert_eq!((gaussian.mean(), gaussian.covariance()), (&[16_777_215.0][..], &[1.0][..]));
}

#[test]
fn what_has_no_statistics_is_an_error() {
    let mut statistics = Statistics::new(2);
    let message = |result: ddpm::Result<()>| result.unwrap_err().to_string();
    assert!(
        message(statistics.add(&[1.0; 3]))
            .contains("features.len() is 3; it must be a multiple of 2")
    );
    assert!(
        message(statistics.add(&[1.0, f32::NAN])).contains("a feature is NaN; it must be finite")
    );
    assert_eq!(statistics.count(), 0);
    assert!(message(statistics.merge(&Statistics::new(3))).contains("features per image is 3"));
    statistics.add(&[1.0, 2.0]).unwrap();
    assert!(
        message(statistics.gaussian().map(drop))
            .contains("number of images is 1; it must be at least 2")
    );
    assert!(
        message(Gaussian::new(vec![0.0; 2], vec![1.0, 2.0, 3.0, 4.0]).map(drop))
            .contains("symmetric, 2 x 2")
    );
    let (a, b) = (diagonal(&[0.0], &[1.0]), diagonal(&[0.0; 2], &[1.0; 2]));
    assert!(message(a.frechet_distance(&b).map(drop)).contains("features per image is 2"));
}
