//! Bounds of the rounding errors of kernels, for all tests of random inputs.
//!
//! Each bound follows from the input. A sum of n products, in any order, rounds each of its terms at most n
//! times, and each rounding changes a value by at most the unit u of itself. So the error of the sum is at most
//! n u times the sum of the magnitudes of its terms (Higham 2002, section 3.1), even if the terms cancel and
//! the sum is nearly 0.

use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::op::activation::Activation;
use crate::random::{Noise, Purpose};

/// The units of rounding to the nearest.
pub(crate) const F32: f64 = 1.0 / (1u64 << 24) as f64;
pub(super) const BF16: f64 = 1.0 / 256.0;
#[cfg(feature = "cuda")]
pub(super) const F16: f64 = 1.0 / 2048.0;
/// The unit of f32 operands whose last 13 bits are truncated.
#[cfg(feature = "cuda")]
pub(super) const TF32: f64 = 1.0 / 1024.0;

/// The smallest value whose error in f16 is relative.
pub(super) const SMALL: f64 = 1.0 / (1u64 << 14) as f64;

/// The largest error of a value after up to `n` roundings, in units of rounding. More than 64 roundings are
/// assumed to be random in sign: the probability that their sum exceeds 8 sqrt(n) is at most 2 exp(-32) (Higham
/// and Mary 2019). The factor of 1.001 covers products of errors.
pub(crate) fn roundings(n: f64) -> f64 {
    1.001 * n.min(8.0 * n.sqrt())
}

/// Computes [`roundings`] for each value of a tensor.
fn roundings_each(n: &Tensor) -> Result<Tensor> {
    n.minimum(&(n.sqrt()? * 8.0)?)? * 1.001
}

/// Asserts that the error of each value is within its bound. A NaN never is.
pub(crate) fn check(what: &str, found: &Tensor, expected: &Tensor, bound: &Tensor) {
    let values = |t: &Tensor| -> Vec<f64> {
        let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        t.flatten_all().unwrap().to_vec1().unwrap()
    };
    assert_eq!(found.elem_count(), expected.elem_count(), "{what}");
    assert_eq!(bound.dims(), expected.dims(), "{what}");
    let (found, expected, bound) = (values(found), values(expected), values(bound));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let (off, bound) = ((found - expected).abs(), bound[i]);
        assert!(
            off <= bound,
            "{what}, value {i}: {found}, not {expected}: off by {off:e}, more than {bound:e}"
        );
    }
}

/// Standard normals from a seed, for a test's inputs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normals(pub u64);

impl Normals {
    /// The `k`-th input.
    pub fn values(self, k: u32, len: usize) -> Vec<f32> {
        let mut values = vec![0f32; len];
        Noise::new(self.0).stream(Purpose::Prior, 0, k).fill_normal(&mut values);
        values
    }

    /// The `k`-th input, of this shape.
    pub fn tensor(self, k: u32, shape: &[usize]) -> Tensor {
        let values = self.values(k, shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Returns the gradient of an output of this shape. Its values differ, so that mixed-up values are
    /// detected.
    pub fn gradient(self, y: &[usize]) -> Tensor {
        self.tensor(99, y)
    }
}

/// Computes the value of `f` in this dtype, and its gradients with respect to the inputs if the gradient of the
/// value is `dy`.
pub(super) fn value_and_gradients(
    dtype: DType,
    inputs: &[Tensor],
    dy: impl Fn(&[usize]) -> Tensor,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let vars: Vec<Var> =
        inputs.iter().map(|x| Var::from_tensor(&x.to_dtype(dtype)?)).collect::<Result<_>>()?;
    let inputs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = f(&inputs)?;
    let dy = dy(y.dims()).to_dtype(dtype)?;
    let gradients = (&y * dy)?.sum_all()?.backward()?;
    let mut all = vec![y.detach()];
    for var in &vars {
        all.push(gradients.get(var).expect("a gradient").clone());
    }
    Ok(all)
}

/// A tensor of sums of products.
#[derive(Clone)]
pub(crate) struct Sums {
    pub exact: Tensor,
    /// The sum of the terms' magnitudes.
    pub magnitude: Tensor,
    /// The number of terms of each element.
    terms: Tensor,
}

impl Sums {
    /// Computes the value and the gradients of `f`, a sum of products of one value of each input. `magnitudes`
    /// computes the magnitudes of the terms from those of the inputs. It is `f` itself, unless the kernel
    /// computes products of sums. Applied to ones, `f` counts the terms.
    pub fn of(
        inputs: &[Tensor],
        dy: impl Fn(&[usize]) -> Tensor,
        f: impl Fn(&[Tensor]) -> Result<Tensor>,
        magnitudes: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Vec<Self>> {
        let of_each = |change: fn(&Tensor) -> Result<Tensor>| -> Result<Vec<Tensor>> {
            inputs.iter().map(change).collect()
        };
        let exact = value_and_gradients(DType::F64, inputs, &dy, &f)?;
        let magnitude = value_and_gradients(
            DType::F64,
            &of_each(Tensor::abs)?,
            |y| dy(y).abs().unwrap(),
            magnitudes,
        )?;
        let ones = of_each(Tensor::ones_like)?;
        let terms = value_and_gradients(DType::F64, &ones, |y| dy(y).ones_like().unwrap(), f)?;
        let all = exact.into_iter().zip(magnitude).zip(terms);
        Ok(all.map(|((exact, magnitude), terms)| Self { exact, magnitude, terms }).collect())
    }

    /// Adds a term to the sums.
    pub fn plus(self, term: &Tensor) -> Result<Self> {
        let term = term.to_dtype(DType::F64)?;
        Ok(Self {
            exact: self.exact.broadcast_add(&term)?,
            magnitude: self.magnitude.broadcast_add(&term.abs()?)?,
            terms: (self.terms + 1.0)?,
        })
    }

    /// Computes the bounds of the sums in arithmetic of this unit of rounding. Terms first have the relative
    /// error `operands`, and `more` roundings in addition to those of the sum.
    pub fn bound(&self, unit: f64, more: f64, operands: f64) -> Result<Tensor> {
        let relative = roundings_each(&(&self.terms + more)?)?;
        self.magnitude.clone() * ((relative * unit)? + operands)?
    }
}

/// The number of roundings that an exponential, a sigmoid or an error function adds to those of its argument:
/// two units in the last place, and a few operations.
pub(super) const FUNCTION: f64 = 12.0;

/// The size below which f32 loses its last bits.
const LEAST: f64 = 1e-30;

/// A normalisation of groups. Its sums over pixels are taken in f32, in runs of at most `run`.
pub(super) struct Normalization<'a> {
    pub groups: usize,
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    pub eps: f64,
    pub activation: Activation,
    pub run: usize,
}

impl Normalization<'_> {
    /// Computes the error bounds of the value, and of the gradients of `x` (batch, height, width, channels),
    /// weight and bias, in f32.
    pub fn bounds(&self, x: &Tensor, dy: &Tensor) -> Result<[Tensor; 4]> {
        let (batch, h, w, channels) = x.dims4()?;
        let (groups, pixels) = (self.groups, h * w);
        let group = channels / groups;
        let apart = |t: &Tensor| t.to_dtype(DType::F64)?.reshape((batch, pixels, groups, group));
        let of_channel = |t: &Tensor| t.to_dtype(DType::F64)?.reshape((1, 1, groups, group));
        // Means over a group's values, and sums over those of a channel.
        let mean = |t: &Tensor| t.mean_keepdim((1, 3));
        let sum = |t: &Tensor| t.sum((0, 1))?.flatten_all();
        let (x, dy) = (apart(x)?, apart(dy)?.abs()?);
        let (weight, bias) = (of_channel(self.weight)?.abs()?, of_channel(self.bias)?.abs()?);
        let silu = self.activation == Activation::Silu;
        let run = |terms: usize| roundings(terms.min(self.run) as f64);
        let (in_group, in_channel) = (run(pixels * group) + 10.0, run(pixels) + 10.0);

        // The error of the mean is relative to the magnitudes, even if the mean is nearly 0. All differences
        // from it have the same error.
        let mean_off = (mean(&x.abs()?)? * ((in_group + 1.0) * F32))?;
        let distance = x.broadcast_sub(&mean(&x)?)?;
        let variance = mean(&distance.sqr()?)?;
        let distance = distance.abs()?.broadcast_add(&mean_off)?;
        // The mean of the squares about a wrong mean is greater by the square of its error.
        let squares_off = ((&variance + mean_off.sqr()?)? * ((in_group + 4.0) * F32))?;
        let squares_off = (squares_off + mean_off.sqr()?)?;
        let variance = (variance + self.eps)?;
        let part = ((squares_off / &variance)? + F32)?;
        // (1 - part)^-1/2
        let rstd_part = (((&part * 0.5)? / (1.0 - &part)?)? + 4.0 * F32)?;
        let rstd = variance.sqrt()?.recip()?;
        // The error of a difference with this many roundings, and that of the deviation.
        let off = |units: f64| {
            let part = (&rstd_part + units * F32)?;
            distance.broadcast_mul(&part)?.broadcast_add(&mean_off)
        };
        let scaled = |t: Tensor| t.broadcast_mul(&rstd);

        let size = scaled(distance.clone())?.broadcast_mul(&weight)?.broadcast_add(&bias)?;
        let mut z_off = scaled(off(4.0)?)?.broadcast_mul(&weight)?;
        z_off = (z_off + (&size * (1.01 * F32))?)?;
        // The derivatives of SiLU are at most 1.1 and 0.5.
        let (y, d, d_off) = if silu {
            let y = ((&z_off * 1.1)? + (&size * (FUNCTION * F32))?)?;
            let slope_off = ((&z_off * 0.5)? + ((size + 1.0)? * (FUNCTION * F32))?)?;
            (y, (&dy * 1.1)?, (&dy * slope_off)?)
        } else {
            (z_off, dy.clone(), dy.zeros_like()?)
        };

        let d_bias = sum(&(&d_off + (&d * (in_channel * F32))?)?)?;
        let times_n = |roundings: f64| scaled(((&d_off * &distance)? + (&d * off(roundings)?)?)?);
        let d_weight = sum(&times_n(in_channel)?)?;

        let weighted = |t: &Tensor| t.broadcast_mul(&weight);
        let (d, d_off) = (weighted(&d)?, weighted(&d_off)?);
        let of_d = mean(&d)?;
        let of_d_off = mean(&(&d_off + (&d * (in_group * F32))?)?)?;
        let of_n = mean(&scaled((&d * &distance)?)?)?;
        let of_n_off = mean(&weighted(&times_n(in_group)?)?)?;
        let n = scaled(distance.clone())?;
        let sizes = (d + n.broadcast_mul(&of_n)?)?.broadcast_add(&of_d)?;
        let parts = ((&rstd_part * 2.0)? + 6.0 * F32)?;
        let dx = (d_off + n.broadcast_mul(&of_n_off)?)?.broadcast_add(&of_d_off)?;
        let dx =
            ((dx + scaled(off(2.0)?)?.broadcast_mul(&of_n)?)? + sizes.broadcast_mul(&parts)?)?;
        let dx = scaled(dx)?;
        // One percent covers products of errors.
        let whole = |t: Tensor| (t.reshape((batch, h, w, channels))? * 1.01)? + LEAST;
        let columns = |t: Tensor| (t * 1.01)? + LEAST;
        Ok([whole(y)?, whole(dx)?, columns(d_weight)?, columns(d_bias)?])
    }
}

/// The arithmetic of products.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Products {
    /// The relative error of a product before it is rounded.
    pub operands: f64,
    /// The unit of rounding of sums.
    pub sums: f64,
    /// Roundings of a term in addition to those of the sum.
    pub more: f64,
    /// The relative error of storing a value.
    pub stored: f64,
}

impl Products {
    /// The arithmetic of f32.
    pub const PLAIN: Self = Self { operands: 0.0, sums: F32, more: 0.0, stored: 0.0 };

    /// Computes the error bounds of sums of products before they are stored.
    pub fn of(self, sums: &Sums) -> Tensor {
        sums.bound(self.sums, self.more, self.operands).unwrap()
    }

    /// Computes the errors of storing values of this size. Up to 64 of them, in patches or doubled pixels, may
    /// be so small that f16 stores them only as multiples of 2^-24.
    pub fn storing(self, size: &Tensor) -> Tensor {
        ((size.abs().unwrap() + 64.0 * SMALL).unwrap() * self.stored).unwrap()
    }

    /// Returns the relative error of sums of this many terms.
    fn off(self, terms: usize) -> f64 {
        self.operands + roundings(terms as f64) * self.sums + self.stored
    }

    /// Computes the error bounds of the attention's value, and of the gradient of `qkv` (batch, positions, 3
    /// channels).
    pub fn attention_bounds(self, qkv: &Tensor, dy: &Tensor, heads: usize) -> Result<[Tensor; 2]> {
        let channels = qkv.dim(2)? / 3;
        let head = channels / heads;
        let (mut of_y, mut of_parts) = (vec![], [vec![], vec![], vec![]]);
        for first in (0..channels).step_by(head) {
            let part = |i: usize| qkv.narrow(2, i * channels + first, head);
            let qkv = Tensor::cat(&[part(0)?, part(1)?, part(2)?], 2)?;
            let [y, d] = self.head_bounds(&qkv, &dy.narrow(2, first, head)?)?;
            of_y.push(y);
            for (i, of_part) in of_parts.iter_mut().enumerate() {
                of_part.push(d.narrow(2, i * head, head)?);
            }
        }
        Ok([Tensor::cat(&of_y, 2)?, Tensor::cat(&of_parts.concat(), 2)?])
    }

    /// Computes the error bounds of one head.
    fn head_bounds(self, qkv: &Tensor, dy: &Tensor) -> Result<[Tensor; 2]> {
        let (_, positions, channels) = qkv.dims3()?;
        let channels = channels / 3;
        let scale = 1.0 / (channels as f64).sqrt();
        let qkv = qkv.to_dtype(DType::F64)?;
        let part = |i: usize| qkv.narrow(2, i * channels, channels)?.contiguous();
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let turned = |t: &Tensor| t.transpose(1, 2)?.contiguous();
        let shares = candle_nn::ops::softmax(&(q.matmul(&turned(&k)?)? * scale)?, D::Minus1)?;
        let (q, k, v, dy) = (q.abs()?, k.abs()?, v.abs()?, dy.to_dtype(DType::F64)?.abs()?);

        // By row: the error of a score is a relative error of its exponential.
        let scores = (q.matmul(&turned(&k)?)? * scale)?.max_keepdim(D::Minus1)?;
        let small = self.stored * SMALL;
        let score_off = ((scores * (self.off(channels) + 8.0 * self.sums))? + small)?;
        let total = roundings(positions as f64) + FUNCTION;
        let share_off = (((score_off * 2.0)?.exp()? - 1.0)? + (total * self.sums + self.stored))?;
        let through = |off: Tensor| off + self.off(positions);

        let found = (shares.broadcast_mul(&through(share_off.clone())?)? + small)?;
        let y = found.matmul(&v)?;
        let dv = turned(&found)?.matmul(&dy)?;
        let d_shares = dy.matmul(&turned(&v)?)?;
        let mean = (&shares * &d_shares)?.sum_keepdim(D::Minus1)?;
        let either = d_shares.broadcast_add(&mean)?;
        let d_scores = (shares * &either)?;
        let more = self.off(channels) + (total + 4.0) * self.sums + self.stored;
        let d_scores = d_scores.broadcast_mul(&through(((share_off * 2.0)? + more)?)?)?;
        let d_scores = (d_scores + ((either + 3.0)? * small)?)?;
        let dq = (d_scores.matmul(&k)? * scale)?;
        let dk = (turned(&d_scores)?.matmul(&q)? * scale)?;
        // Ten percent covers products of errors.
        let whole = |t: Tensor| ((t * 1.1)? + small)? + LEAST;
        Ok([whole(y)?, whole(Tensor::cat(&[dq, dk, dv], 2)?)?])
    }
}
