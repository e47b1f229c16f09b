/// A figure computed for several parts of the images: subsets or splits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The mean over the parts.
    pub mean: f64,
    /// The standard deviation over the parts, with the number of parts as the divisor.
    pub deviation: f64,
    /// The number of parts.
    pub parts: usize,
}

impl Estimate {
    pub(super) fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        Self { mean, deviation: variance.sqrt(), parts: values.len() }
    }

    /// The standard error of the mean if the parts are independent: the unbiased deviation over the root of the number
    /// of parts. It is NaN for one part.
    pub fn standard_error(&self) -> f64 {
        self.deviation / (self.parts as f64 - 1.0).sqrt()
    }
}
