use candle_core::{Tensor, Var};

use super::request::{Request, Use, host};
use crate::error::{Error, Result};

/// The computation of the trace of the network's Jacobian, a sum of `v . J v` over vectors `v`.
///
/// The random vectors of an image are the same at every evaluation of the network, as in Song et al. 2021 (section 4.3)
/// and FFJORD (Grathwohl et al. 2019), so that the ODE is smooth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trace {
    /// The mean over this number of vectors of random signs, which has no bias. Hutchinson 1989.
    Rademacher(usize),
    /// The mean over this number of vectors of standard normals, which has no bias. Skilling 1989.
    Normal(usize),
    /// The exact trace, which takes a backward pass for each value of an image.
    Exact,
}

impl Trace {
    /// # Errors
    /// Returns an error for a mean over no vectors.
    pub(super) fn check(self) -> Result<Self> {
        match self {
            Self::Rademacher(0) | Self::Normal(0) => {
                Err(Error::config("vectors of the trace", 0, "at least 1"))
            }
            _ => Ok(self),
        }
    }

    /// Computes the trace of the Jacobian of `output` with respect to `x`, for each image.
    ///
    /// # Errors
    /// Returns an error if candle cannot differentiate `output` with respect to `x`.
    pub(super) fn of(self, output: &Tensor, x: &Var, request: &Request) -> Result<Vec<f64>> {
        let (count, weight) = match self {
            Self::Rademacher(count) | Self::Normal(count) => (count, 1.0 / count as f64),
            Self::Exact => (request.values, 1.0),
        };
        let mut traces = vec![0.0; request.count];
        for number in 0..count {
            let vector = self.vector(number, request)?;
            let product = (output * &vector)?.sum_all()?;
            let gradient = match product.track_op() {
                true => product.backward()?.remove(x),
                false => None,
            };
            let Some(gradient) = gradient else {
                let expected = "computed from x_t by operations that candle differentiates, as the \
                                divergence needs";
                let found = "without a gradient with respect to x_t";
                return Err(Error::config("the denoiser's output", found, expected));
            };
            let products = host(&(gradient.detach() * &vector)?)?;
            for (trace, products) in traces.iter_mut().zip(products.chunks(request.values)) {
                *trace += weight * products.iter().sum::<f64>();
            }
        }
        Ok(traces)
    }

    fn vector(self, number: usize, request: &Request) -> Result<Tensor> {
        request.filled(|k, values| {
            let mut stream = request.stream(Use::Probe, number as u64, k);
            match self {
                Self::Rademacher(_) => values
                    .iter_mut()
                    .for_each(|v| *v = if stream.uniform() < 0.5 { -1.0 } else { 1.0 }),
                Self::Normal(_) => stream.fill_normal(values),
                Self::Exact => values[number] = 1.0,
            }
        })
    }
}
