//! Numbers that look random, and their comparison.

pub fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-9 * (1.0 + expected.abs()), "{found}, not {expected}");
}

/// Points of uniform numbers, with a wider range for each further point.
pub fn points(count: usize, size: usize, seed: u32) -> Vec<f32> {
    let uniform = |i: u32| {
        let x = (i + seed).wrapping_mul(2_654_435_761);
        let x = (x ^ (x >> 16)).wrapping_mul(0x045d_9f3b);
        f64::from(x ^ (x >> 16)) / 2f64.powi(32)
    };
    (0..count * size).map(|i| (uniform(i as u32) * (1 + i % size) as f64) as f32).collect()
}
