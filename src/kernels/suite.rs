//! One suite for every implementation of every operation. Each kernel, in each instruction set and dtype, must
//! give the values and gradients of the [reference](mod@super::reference) composition on the same random
//! inputs.
//!
//! A [`Subject`] is an implementation of the operations. [`subjects`] lists all of them, so a new device needs
//! one more line there. The error bounds follow from the inputs, as derived in [`tests`](super::tests).

use candle_core::{DType, Device, Result, Tensor};
use proptest::prelude::*;

use super::op::activation::{Activation, VectorActivation};
use super::op::conv::{ConvShape, Scale};
use super::op::norm::{EPS, NormConfig};
use super::op::pool::{PoolShape, Pooling};
use super::reference;
use super::tests::{
    F32, FUNCTION, Normalization, Normals, Products, Sums, check, roundings, value_and_gradients,
};
use crate::random_inputs::inputs;

/// Returns all implementations of the operations.
fn subjects() -> Vec<Box<dyn Subject>> {
    let mut all = Vec::new();
    all.extend(super::cpu::tests::subjects());
    all.extend(super::autograd::tests::subjects());
    all
}

/// An implementation of the operations. Tensors are f32 on the CPU, and feature maps channels-last. Results
/// that a subject does not compute are absent.
pub(crate) trait Subject {
    fn name(&self) -> String;

    /// The type of feature maps in memory.
    fn maps(&self) -> DType {
        DType::F32
    }

    /// The arithmetic of products.
    fn products(&self) -> Products {
        Products::PLAIN
    }

    /// The arithmetic of a convolution.
    fn convolution_arithmetic(&self, _: &ConvShape) -> ConvArithmetic {
        ConvArithmetic { products: self.products(), operands: self.maps(), winograd: false }
    }

    /// Maximum number of values in an f32 sum of a normalisation, and the relative error of storing its
    /// results.
    fn norm_arithmetic(&self) -> (usize, f64) {
        (usize::MAX, 0.0)
    }

    /// `y`, `dx`, `dweight`, `dbias` and `by_image`: the sums of `dy` over the pixels of each image.
    fn convolution(&self, _: &ConvCase) -> Result<Found> {
        Ok(Found::new())
    }

    /// `y`, `again` (the same, from saved statistics), `dx`, `dweight`, `dbias`.
    fn normalization(&self, _: &NormCase) -> Result<Found> {
        Ok(Found::new())
    }

    /// `y`, `again`, `dx`, `dweight`, `dbias`, and `dby`: the gradient of scales and shifts.
    fn modulated(&self, _: &ModulatedCase) -> Result<Found> {
        Ok(Found::new())
    }

    /// `y`, `dx`, `dweight`, `dbias`.
    fn linear(&self, _: &LinearCase) -> Result<Found> {
        Ok(Found::new())
    }

    /// `y`, `dx`: the gradient of q, k and v.
    fn attention(&self, _: &AttentionCase) -> Result<Found> {
        Ok(Found::new())
    }

    /// `repeated` and `summed`: each pixel four times, and the sums of two by two pixels, times the factor.
    fn pixels(&self, _: &PixelsCase) -> Result<Found> {
        Ok(Found::new())
    }

    /// `max` and `average`, the poolings.
    fn pooling(&self, _: &PoolCase) -> Result<Found> {
        Ok(Found::new())
    }

    /// `concatenated` (a, then b), `first` and `second` (split again), `scaled` (a times the mask).
    fn maps_of(&self, _: &MapsCase) -> Result<Found> {
        Ok(Found::new())
    }
}

/// The results of an operation, by name.
pub(crate) type Found = Vec<(&'static str, Tensor)>;

/// The exact results by name, and their error bounds.
type Expected = Vec<(&'static str, Tensor, Tensor)>;

/// The arithmetic of a convolution.
#[derive(Clone, Copy)]
pub(crate) struct ConvArithmetic {
    pub products: Products,
    /// The type to which operands of products are rounded first.
    pub operands: DType,
    /// Whether the products are those of Winograd's method.
    pub winograd: bool,
}

fn compare(subject: &dyn Subject, case: &str, found: Found, expected: &Expected) {
    for (name, found) in found {
        let (_, exact, bound) =
            expected.iter().find(|(other, ..)| *other == name).expect("a result of this name");
        assert_eq!(found.dims(), exact.dims(), "{}, {case}, {name}", subject.name());
        check(&format!("{}, {case}, {name}", subject.name()), &found, exact, bound);
    }
}

/// Rounds values to this dtype, as a map or a product does.
fn rounded(x: &Tensor, dtype: DType) -> Tensor {
    x.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
}

fn sum_of<const N: usize>(bounds: [Tensor; N]) -> Tensor {
    bounds.into_iter().reduce(|a, b| a.broadcast_add(&b).unwrap()).unwrap()
}

fn size_of(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F64)?.abs()
}

/// A convolution, and the values that are added to its output and its gradient.
#[derive(Debug)]
pub(crate) struct ConvCase {
    pub shape: ConvShape,
    pub x: Tensor,
    pub weight: Tensor,
    pub dy: Tensor,
    /// (out)
    pub bias: Option<Tensor>,
    /// (batch, 1, 1, out)
    pub per_image: Option<Tensor>,
    pub residual: Option<Tensor>,
    /// The values to which the output and the gradient of `x` are added.
    pub before: Option<[Tensor; 2]>,
}

/// The sums of a convolution whose operands are rounded to one type.
#[derive(Clone)]
struct ConvSums {
    y: Sums,
    dx: Sums,
    dweight: Sums,
}

impl ConvCase {
    fn new(
        [batch, h, w]: [usize; 3],
        [c_in, c_out]: [usize; 2],
        (kernel, scale): ([usize; 2], Scale),
        [bias, per_image, residual, before]: [bool; 4],
        normals: Normals,
    ) -> Self {
        let (x, weight) = ([batch, h, w, c_in], [c_out, c_in, kernel[0], kernel[1]]);
        let shape = ConvShape::new(x, &weight, scale).unwrap();
        let y = shape.output();
        let normal = |k, shape: &[usize]| normals.tensor(k, shape);
        Self {
            shape,
            x: normal(0, &x),
            weight: normal(1, &weight),
            dy: normal(2, &y),
            bias: bias.then(|| normal(3, &[c_out])),
            per_image: per_image.then(|| normal(4, &[batch, 1, 1, c_out])),
            residual: residual.then(|| normal(5, &y)),
            before: before.then(|| [normal(6, &y), normal(7, &x)]),
        }
    }

    /// Computes the sums of products. `dtype` is the type of the operands.
    fn sums(&self, dtype: DType, winograd: bool) -> Result<ConvSums> {
        let [x, weight, dy] = [&self.x, &self.weight, &self.dy].map(|t| rounded(t, dtype));
        let scale = self.shape.scale;
        let nothing = Tensor::zeros(self.shape.c_out, DType::F64, &Device::Cpu)?;
        let composed = |v: &[Tensor]| reference::conv::conv2d(&v[0], &v[1], &nothing, scale);
        let sums = Sums::of(
            &[x, weight],
            |_| dy.clone(),
            composed,
            |v| if winograd { composed(&[v[0].clone(), spread(&v[1])?]) } else { composed(v) },
        )?;
        let [y, dx, dweight] = sums.try_into().ok().expect("a value and two gradients");
        Ok(ConvSums { y, dx, dweight })
    }

    fn expected(
        &self,
        arithmetic: ConvArithmetic,
        maps: DType,
        sums: &ConvSums,
    ) -> Result<Expected> {
        let ConvArithmetic { products, winograd, .. } = arithmetic;
        let ConvSums { mut y, mut dx, dweight } = sums.clone();
        let products = if winograd {
            Products { more: products.more + TRANSFORMS, ..products }
        } else {
            products
        };
        let map = |t: &Tensor| rounded(t, maps);
        // The products may be stored before anything is added.
        let mut added = y.exact.zeros_like()?;
        let terms =
            [self.bias.clone(), self.per_image.as_ref().map(map), self.residual.as_ref().map(map)];
        for term in terms.iter().flatten() {
            y = y.plus(term)?;
            added = added.broadcast_add(&size_of(term)?)?;
        }
        let stored_dx = products.storing(&(&dx.magnitude * 2.0)?);
        if let Some([y_before, dx_before]) = &self.before {
            (y, dx) = (y.plus(&map(y_before))?, dx.plus(&map(dx_before))?);
        }
        let stored = products.storing(&((y.exact.abs()? * 2.0)? + added)?);
        // Sums of `dy`, whose terms are not products.
        let plain = Products { operands: 0.0, ..arithmetic.products };
        let (dy, [batch, _, _, c_out]) = (map(&self.dy), self.shape.output());
        let sum = |dims: &[usize], over: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Sums> {
            let ones = Tensor::ones(dims, DType::F64, &Device::Cpu)?;
            let sum = |v: &[Tensor]| over(&v[0]);
            Ok(Sums::of(std::slice::from_ref(&dy), |_| ones.clone(), sum, sum)?.swap_remove(0))
        };
        let dbias = sum(&[c_out], &|t| t.sum((0, 1, 2)))?;
        let by_image = sum(&[batch, c_out], &|t| t.sum((1, 2)))?;
        let bounds = [
            sum_of([products.of(&y), stored]),
            sum_of([products.of(&dx), stored_dx, products.storing(&dx.exact)]),
            sum_of([products.of(&dweight), products.storing(&dweight.exact)]),
            plain.of(&dbias),
            sum_of([plain.of(&by_image), products.storing(&by_image.exact)]),
        ];
        let exact = [y.exact, dx.exact, dweight.exact, dbias.exact, by_image.exact];
        let names = ["y", "dx", "dweight", "dbias", "by_image"];
        Ok(names.into_iter().zip(exact).zip(bounds).map(|((n, e), b)| (n, e, b)).collect())
    }

    fn check(&self) {
        let case = format!(
            "{:?}, added: {:?}",
            self.shape,
            [&self.bias, &self.per_image, &self.residual].map(Option::is_some)
        );
        let mut known: Vec<((DType, bool), ConvSums)> = Vec::new();
        for subject in subjects() {
            let arithmetic = subject.convolution_arithmetic(&self.shape);
            let key = (arithmetic.operands, arithmetic.winograd);
            if !known.iter().any(|(other, _)| *other == key) {
                known.push((key, self.sums(key.0, key.1).unwrap()));
            }
            let (_, sums) = known.iter().find(|(other, _)| *other == key).unwrap();
            let expected = self.expected(arithmetic, subject.maps(), sums).unwrap();
            compare(&*subject, &case, subject.convolution(self).unwrap(), &expected);
        }
    }
}

/// Roundings of Winograd's transforms: at most four, of 2 roundings in each direction, and the sum of at most
/// 16 parts.
const TRANSFORMS: f64 = 4.0 * 4.0 + 16.0;

/// Weights that give the magnitudes of the terms of Winograd's method, from the magnitudes of the weights.
///
/// The method multiplies sums: in each direction the tap a meets the pixel under the tap i by
/// sum_k |A_kp| |G_ka| |B_ki|, for either pixel p of a tile at most the entry (a, i) below. So its magnitudes
/// are those of a convolution with the kernels P^T |w| P, and so are those of its gradients.
fn spread(weight: &Tensor) -> Result<Tensor> {
    let spread =
        Tensor::new(&[[1f64, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0]], weight.device())?;
    let lines = |t: Tensor| t.reshape(((), 3))?.matmul(&spread)?.reshape(weight.shape());
    let transposed = lines(weight.clone())?.transpose(2, 3)?.contiguous()?;
    lines(transposed)?.transpose(2, 3)
}

/// A normalisation, with `more` that is added to the gradient of `x`.
pub(crate) struct NormCase {
    pub config: NormConfig,
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    pub dy: Tensor,
    pub more: Option<Tensor>,
}

impl NormCase {
    fn new(
        [batch, h, w]: [usize; 3],
        ([groups, group], eps): ([usize; 2], f64),
        (activation, more): (Activation, bool),
        mean: f64,
        normals: Normals,
    ) -> Self {
        let dims = [batch, h, w, groups * group];
        Self {
            config: NormConfig { groups, eps, activation },
            x: (normals.tensor(0, &dims) + mean).unwrap(),
            weight: normals.tensor(1, &dims[3..]),
            bias: normals.tensor(2, &dims[3..]),
            dy: normals.gradient(&dims),
            more: more.then(|| normals.tensor(4, &dims)),
        }
    }

    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let Self { config, weight, bias, .. } = self;
        let map = |t: &Tensor| rounded(t, subject.maps());
        let (x, dy) = (map(&self.x), map(&self.dy));
        let inputs = [x.clone(), weight.clone(), bias.clone()];
        let mut exact = value_and_gradients(
            DType::F64,
            &inputs,
            |_| dy.clone(),
            |v| reference::norm::group_norm(&v[0], &v[1], &v[2], *config),
        )?;
        let (run, stored) = subject.norm_arithmetic();
        let NormConfig { groups, eps, activation } = *config;
        let norm = Normalization { groups, weight, bias, eps, activation, run };
        let mut bounds = norm.bounds(&x, &dy)?;
        let mut store = [stored; 2];
        if let Some(more) = &self.more {
            exact[1] = (&exact[1] + map(more).to_dtype(DType::F64)?)?;
            store[1] += F32;
        }
        for ((bound, exact), stored) in bounds.iter_mut().zip(&exact).zip(store) {
            if stored > 0.0 {
                let stored = Products { stored, ..subject.products() };
                // One percent covers products of errors.
                *bound = ((bound.clone() + stored.storing(exact))? * 1.01)?;
            }
        }
        let [y, dx, dweight, dbias] = exact.try_into().expect("a value and three gradients");
        let [of_y, of_dx, of_dweight, of_dbias] = bounds;
        Ok(vec![
            ("y", y.clone(), of_y.clone()),
            ("again", y, of_y),
            ("dx", dx, of_dx),
            ("dweight", dweight, of_dweight),
            ("dbias", dbias, of_dbias),
        ])
    }

    fn check(&self) {
        let case = format!("{:?} of {:?}", self.config, self.x.dims());
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.normalization(self).unwrap(), &expected);
        }
    }
}

/// A normalisation modulated by scales and shifts (batch, 2 channels). The weights and biases of the images are exact
/// in f32, so each image has the error of a plain normalisation.
pub(crate) struct ModulatedCase {
    pub norm: NormCase,
    pub by: Tensor,
}

impl ModulatedCase {
    fn new(mut norm: NormCase, normals: Normals) -> Result<Self> {
        // Weights, biases and shifts have 8 binary digits after the point. Factors are powers of two.
        let few_digits = |t: &Tensor| (t * 256.0)?.round()? / 256.0;
        norm.weight = few_digits(&norm.weight)?;
        norm.bias = few_digits(&norm.bias)?;
        let dims = (norm.x.dim(0)?, norm.x.dim(3)?);
        let factors = normals.tensor(5, &[dims.0, dims.1]).clamp(-2f32, 2f32)?.round()?;
        let scale = ((factors * std::f64::consts::LN_2)?.exp()?.affine(16.0, 0.0)?.round()?
            / 16.0)?
            .affine(1.0, -1.0)?;
        let shift = few_digits(&normals.tensor(6, &[dims.0, dims.1]))?;
        Ok(Self { norm, by: Tensor::cat(&[scale, shift], 1)? })
    }

    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let NormCase { config, x, weight, bias, dy, more } = &self.norm;
        let (batch, channels) = (x.dim(0)?, x.dim(3)?);
        let inputs = [x.clone(), weight.clone(), bias.clone(), self.by.clone()];
        let plain = NormConfig { activation: Activation::None, ..*config };
        let mut exact = value_and_gradients(
            DType::F64,
            &inputs,
            |_| dy.clone(),
            |v| {
                let n = reference::norm::group_norm(&v[0], &v[1], &v[2], plain)?;
                let by = v[3].unsqueeze(1)?.unsqueeze(1)?;
                reference::norm::modulated(&n, &by, config.activation)
            },
        )?;
        let [weight, bias] = [weight, bias].map(|t| t.to_dtype(DType::F64).unwrap());
        let (mut of_y, mut of_dx, mut of_by) = (vec![], vec![], vec![]);
        let zeros = weight.zeros_like()?;
        let (mut of_weight, mut of_bias) = (zeros.clone(), zeros);
        for k in 0..batch {
            let by = self.by.get(k)?.to_dtype(DType::F64)?;
            let factor = (by.narrow(0, 0, channels)? + 1.0)?;
            let own_weight = (&weight * &factor)?;
            let own_bias = ((&bias * &factor)? + by.narrow(0, channels, channels)?)?;
            let image = |t: &Tensor| t.narrow(0, k, 1);
            let (NormConfig { groups, eps, activation }, run) =
                (*config, subject.norm_arithmetic().0);
            let (own_weight, own_bias) = (&own_weight, &own_bias);
            let norm =
                Normalization { groups, weight: own_weight, bias: own_bias, eps, activation, run };
            let [y, dx, dweight, dbias] = norm.bounds(&image(x)?, &image(dy)?)?;
            of_y.push(y);
            of_dx.push(dx);
            let scale = ((&dweight * weight.abs()?)? + (&dbias * bias.abs()?)?)?;
            of_by.push(Tensor::cat(&[scale, dbias.clone()], 0)?);
            of_weight = (of_weight + (dweight * &factor)?)?;
            of_bias = (of_bias + (dbias * &factor)?)?;
        }
        if let Some(more) = more {
            exact[1] = (&exact[1] + more.to_dtype(DType::F64)?)?;
        }
        let bounds = [
            Tensor::cat(&of_y, 0)?,
            Tensor::cat(&of_dx, 0)?,
            of_weight,
            of_bias,
            Tensor::stack(&of_by, 0)?,
        ];
        let names = ["y", "dx", "dweight", "dbias", "dby"];
        let all = names.into_iter().zip(exact).zip(bounds);
        // The sums of products round a few times more.
        let roundings = |exact: &Tensor| (exact.abs()? + 1.0)? * (8.0 * F32);
        let mut all: Expected = all
            .map(|((name, exact), bound)| {
                Ok((name, exact.clone(), ((bound * 1.05)? + roundings(&exact)?)?))
            })
            .collect::<Result<_>>()?;
        all.push(("again", all[0].1.clone(), all[0].2.clone()));
        Ok(all)
    }

    fn check(&self) {
        let case = format!("{:?} of {:?}, modulated", self.norm.config, self.norm.x.dims());
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.modulated(self).unwrap(), &expected);
        }
    }
}

/// A linear layer of activated vectors.
pub(crate) struct LinearCase {
    pub activation: VectorActivation,
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    pub dy: Tensor,
}

impl LinearCase {
    fn new(
        [batch, input, output]: [usize; 3],
        activation: VectorActivation,
        normals: Normals,
    ) -> Self {
        Self {
            activation,
            x: normals.tensor(0, &[batch, input]),
            weight: normals.tensor(1, &[output, input]),
            bias: normals.tensor(2, &[output]),
            dy: normals.tensor(3, &[batch, output]),
        }
    }

    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let products = subject.products();
        let [x, weight, dy] = [&self.x, &self.weight, &self.dy].map(|t| rounded(t, subject.maps()));
        let bias = &self.bias;
        let linear = |v: &[Tensor]| reference::linear::linear(&v[0], &v[1], &v[2]);
        let activated = |x: &Tensor| reference::linear::activated(self.activation, x);
        let exact = value_and_gradients(
            DType::F64,
            &[x.clone(), weight.clone(), bias.clone()],
            |_| dy.clone(),
            |v| linear(&[activated(&v[0])?, v[1].clone(), v[2].clone()]),
        )?;
        // The activated vectors are rounded to the maps' type.
        let x = x.to_dtype(DType::F64)?;
        let activated = activated(&x)?;
        let none = self.activation == VectorActivation::None;
        let function = if none { 0.0 } else { FUNCTION * F32 };
        let x_off = sum_of([(x.abs()? * function)?, products.storing(&activated)]);
        let inputs = [activated, weight.to_dtype(DType::F64)?, bias.to_dtype(DType::F64)?];
        let sums = Sums::of(&inputs, |_| dy.clone(), linear, linear)?;
        let (weight, d) = (size_of(&weight)?, size_of(&dy)?);
        let stored = (sums[0].exact.abs()? * 2.0)?.broadcast_add(&inputs[2].abs()?)?;
        // The derivatives of SiLU and GELU are at most 1.13.
        let slope = if none { 1.0 } else { 1.13 };
        let dx = sum_of([products.of(&sums[1]), products.storing(&sums[1].magnitude)]);
        let through = (&sums[1].magnitude * ((x.abs()? + 1.0)? * function)?)?;
        // Covers products of errors.
        let both = if none && products.stored == 0.0 { 1.0 } else { 1.05 };
        let bounds = [
            sum_of([products.of(&sums[0]), x_off.matmul(&weight.t()?)?, products.storing(&stored)]),
            sum_of([(dx * slope)?, through, products.storing(&exact[1])]),
            sum_of([products.of(&sums[2]), d.t()?.matmul(&x_off)?]),
            products.of(&sums[3]),
        ];
        let names = ["y", "dx", "dweight", "dbias"];
        let all = names.into_iter().zip(exact).zip(bounds);
        all.map(|((name, exact), bound)| Ok((name, exact, (bound * both)?))).collect()
    }

    fn check(&self) {
        let case =
            format!("{:?} of {:?}, {:?}", self.activation, self.x.dims(), self.weight.dims());
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.linear(self).unwrap(), &expected);
        }
    }
}

/// Attention.
pub(crate) struct AttentionCase {
    /// (batch, positions, 3 channels)
    pub qkv: Tensor,
    pub heads: usize,
    pub dy: Tensor,
}

impl AttentionCase {
    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let [qkv, dy] = [&self.qkv, &self.dy].map(|t| rounded(t, subject.maps()));
        let exact = value_and_gradients(
            DType::F64,
            std::slice::from_ref(&qkv),
            |_| dy.clone(),
            |v| reference::attention::attention(&v[0], self.heads),
        )?;
        let bounds = subject.products().attention_bounds(&qkv, &dy, self.heads)?;
        Ok(["y", "dx"].into_iter().zip(exact).zip(bounds).map(|((n, e), b)| (n, e, b)).collect())
    }

    fn check(&self) {
        let case = format!("attention of {:?} in {} heads", self.qkv.dims(), self.heads);
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.attention(self).unwrap(), &expected);
        }
    }
}

/// Two maps with a mask for the first: (batch, 1, 1, channels).
pub(crate) struct MapsCase {
    pub a: Tensor,
    pub b: Tensor,
    pub mask: Tensor,
}

impl MapsCase {
    fn check(&self) {
        for subject in subjects() {
            let [a, b, mask] = [&self.a, &self.b, &self.mask].map(|t| rounded(t, subject.maps()));
            let scaled = a.broadcast_mul(&mask).unwrap();
            let stored = subject.products().storing(&scaled.to_dtype(DType::F64).unwrap());
            let copied = |name, t: Tensor| (name, t.clone(), t.zeros_like().unwrap());
            let expected = vec![
                copied("concatenated", Tensor::cat(&[&a, &b], 3).unwrap()),
                copied("first", a),
                copied("second", b),
                ("scaled", scaled, stored),
            ];
            let case = format!("{:?} and {:?}", self.a.dims(), self.b.dims());
            compare(&*subject, &case, subject.maps_of(self).unwrap(), &expected);
        }
    }
}

/// A map of even height and width, whose pixels are repeated and summed.
pub(crate) struct PixelsCase {
    pub x: Tensor,
    pub factor: f32,
}

impl PixelsCase {
    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let x = rounded(&self.x, subject.maps());
        let factor = f64::from(self.factor);
        let products = subject.products();
        let repeat = |v: &[Tensor]| reference::pixels::upsample_nearest_2x(&v[0]);
        let sum = |v: &[Tensor]| reference::pixels::average_pixels(&v[0])? * 4.0;
        let one = std::slice::from_ref(&x);
        let ones = |dims: &[usize]| Tensor::ones(dims, DType::F64, &Device::Cpu).unwrap();
        let repeated = Sums::of(one, ones, repeat, repeat)?.swap_remove(0);
        let summed = Sums::of(one, ones, sum, sum)?.swap_remove(0);
        // The factor is a power of two.
        let times = |name, sums: &Sums| -> Result<(&'static str, Tensor, Tensor)> {
            let (exact, bound) = ((&sums.exact * factor)?, (products.of(sums) * factor)?);
            let bound = sum_of([bound, products.storing(&exact)]);
            Ok((name, exact, bound))
        };
        Ok(vec![times("repeated", &repeated)?, times("summed", &summed)?])
    }

    fn check(&self) {
        let case = format!("{:?} times {}", self.x.dims(), self.factor);
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.pixels(self).unwrap(), &expected);
        }
    }
}

/// A map whose pixels are pooled.
pub(crate) struct PoolCase {
    pub shape: PoolShape,
    pub x: Tensor,
}

impl PoolCase {
    fn expected(&self, subject: &dyn Subject) -> Result<Expected> {
        let x = rounded(&self.x, subject.maps());
        let max = reference::pool::pool(&x, Pooling::Max, &self.shape)?;
        let mean = |x: &Tensor| {
            reference::pool::pool(&x.to_dtype(DType::F64)?, Pooling::Average, &self.shape)
        };
        // The sum of the pixels of a window, the inverse of their number, and the product.
        let relative = roundings((self.shape.window.pow(2) + 2) as f64) * F32;
        let bound = (mean(&x.abs()?)? * relative)?;
        Ok(vec![("max", max.clone(), max.zeros_like()?), ("average", mean(&x)?, bound)])
    }

    fn check(&self) {
        let case = format!("{:?}", self.shape);
        for subject in subjects() {
            let expected = self.expected(&*subject).unwrap();
            compare(&*subject, &case, subject.pooling(self).unwrap(), &expected);
        }
    }
}

fn scales() -> impl Strategy<Value = Scale> {
    prop_oneof![
        (1usize..4).prop_map(Scale::Stride),
        Just(Scale::Stride(1)),
        (1usize..4).prop_map(Scale::StrideFromEdge),
        (1usize..4).prop_map(Scale::StrideWithin),
        Just(Scale::Upsample),
    ]
}

/// Size (batch, height, width) of maps before they are upsampled, channels, and kernel and scale of a
/// convolution.
type ConvSizes = ([usize; 3], [usize; 2], ([usize; 2], Scale));

/// Halves maps that are upsampled, so that the kernel moves over maps of the same size as without upsampling. Enlarges
/// maps within which the kernel has to stay.
fn fitted(([batch, h, w], channels, (kernel, scale)): ConvSizes) -> ConvSizes {
    let [h, w] = match scale {
        Scale::Upsample => [h.div_ceil(2), w.div_ceil(2)],
        Scale::StrideWithin(_) => [h + kernel[0] - 1, w + kernel[1] - 1],
        _ => [h, w],
    };
    ([batch, h, w], channels, (kernel, scale))
}

fn kernels() -> impl Strategy<Value = ([usize; 2], Scale)> {
    let square = prop_oneof![Just([1usize; 2]), Just([3; 2]), Just([3; 2]), Just([5; 2])];
    let lines =
        prop_oneof![Just([1usize, 7]), Just([7, 1]), Just([1, 3]), Just([3, 1]), Just([3, 5])];
    (prop_oneof![3 => square, 1 => lines], scales())
}

fn convolutions() -> impl Strategy<Value = ConvSizes> {
    ([1usize..20, 1usize..12, 1usize..25], [1usize..40, 1usize..40], kernels()).prop_map(fitted)
}

/// Convolutions of images so small that a chunk holds several.
fn convolutions_of_small_images() -> impl Strategy<Value = ConvSizes> {
    ([6usize..24, 1usize..4, 1usize..4], [1usize..40, 1usize..40], kernels()).prop_map(fitted)
}

fn convolutions_at_edges() -> impl Strategy<Value = ConvSizes> {
    let maps = prop_oneof![
        // Tiles and patches that lie mostly beyond the edge.
        [1usize..2, 1usize..4, 1usize..4],
        [1usize..4, 1usize..12, 1usize..12],
        // Enough tiles for sums in several parts.
        [2usize..4, 24usize..34, 24usize..34],
    ];
    // Panels that are full, nearly full, and nearly empty.
    let channels = prop_oneof![[1usize..71, 1usize..71], [8usize..71, 8usize..71]];
    let kernels = prop_oneof![
        Just(([3usize; 2], Scale::Stride(1))),
        Just(([3; 2], Scale::Stride(1))),
        Just(([3; 2], Scale::StrideWithin(1))),
        Just(([3; 2], Scale::Upsample)),
        Just(([5; 2], Scale::Upsample)),
        Just(([3; 2], Scale::Stride(2))),
        Just(([3; 2], Scale::StrideFromEdge(2))),
        Just(([3; 2], Scale::StrideWithin(2))),
        Just(([1; 2], Scale::Stride(1))),
        Just(([5; 2], Scale::Stride(3))),
        Just(([1, 7], Scale::Stride(1))),
        Just(([7, 1], Scale::Stride(1))),
    ];
    (maps, channels, kernels).prop_map(fitted)
}

/// The gradient of the weight is one sum of 13 products that nearly cancel: with operands of 8 bits, its error
/// is more than 1% of it.
#[test]
fn a_convolution_whose_gradient_nearly_cancels_agrees() {
    for before in [false, true] {
        let added = [true, true, true, before];
        ConvCase::new([13, 2, 1], [1, 1], ([1; 2], Scale::Stride(2)), added, Normals(3)).check();
    }
}

/// Such groups have a deviation of 0, and gradients that consist of rounding errors.
#[test]
fn normalisations_of_one_value_agree() {
    for activation in [Activation::None, Activation::Silu] {
        for mean in [0.0, 30.0] {
            NormCase::new([3, 1, 1], ([5, 1], EPS), (activation, false), mean, Normals(5)).check();
        }
    }
}

/// The gradient of the weight nearly cancels. The error of the mean, times the sum of the gradients of all
/// outputs, is more than 4e-5 of it.
#[test]
fn a_normalisation_whose_gradient_nearly_cancels_agrees() {
    NormCase::new([3, 3, 6], ([1, 1], EPS), (Activation::None, false), 30.0, Normals(34153))
        .check();
}

proptest! {
    #![proptest_config(inputs(32))]

    #[test]
    fn convolutions_agree(
        (map, channels, how) in convolutions(), added: [bool; 4], seed: u64,
    ) {
        ConvCase::new(map, channels, how, added, Normals(seed)).check();
    }

    #[test]
    fn convolutions_of_small_images_agree(
        (map, channels, how) in convolutions_of_small_images(), added: [bool; 4], seed: u64,
    ) {
        ConvCase::new(map, channels, how, added, Normals(seed)).check();
    }

    #[test]
    fn convolutions_at_edges_agree(
        (map, channels, how) in convolutions_at_edges(), added: [bool; 4], seed: u64,
    ) {
        ConvCase::new(map, channels, how, added, Normals(seed)).check();
    }
}

proptest! {
    #![proptest_config(inputs(96))]

    #[test]
    fn normalisations_agree(
        map in [1usize..6, 1usize..12, 1usize..12],
        groups in [1usize..9, 1usize..5],
        eps in prop_oneof![Just(EPS), Just(1e-6), Just(1e-3)],
        silu: bool,
        more: bool,
        mean in prop_oneof![Just(0f64), Just(30.0)],
        seed: u64,
    ) {
        let activation = if silu { Activation::Silu } else { Activation::None };
        NormCase::new(map, (groups, eps), (activation, more), mean, Normals(seed)).check();
    }

    #[test]
    fn modulated_normalisations_agree(
        map in [1usize..6, 1usize..12, 1usize..12],
        groups in [1usize..9, 1usize..5],
        silu: bool,
        more: bool,
        seed: u64,
    ) {
        let activation = if silu { Activation::Silu } else { Activation::None };
        let norm = NormCase::new(map, (groups, EPS), (activation, more), 0.0, Normals(seed));
        ModulatedCase::new(norm, Normals(seed)).unwrap().check();
    }

    #[test]
    fn linear_layers_agree(
        sizes in [1usize..9, 1usize..40, 1usize..40],
        activation in prop_oneof![
            Just(VectorActivation::None), Just(VectorActivation::Silu), Just(VectorActivation::Gelu),
        ],
        seed: u64,
    ) {
        LinearCase::new(sizes, activation, Normals(seed)).check();
    }

    #[test]
    fn attention_agrees(
        (batch, positions) in (1usize..4, prop_oneof![Just(1usize), 1usize..40]),
        (head, heads) in prop_oneof![(1usize..70, Just(1usize)), (1usize..20, 1usize..5)],
        seed: u64,
    ) {
        let (normals, channels) = (Normals(seed), head * heads);
        let qkv = normals.tensor(0, &[batch, positions, 3 * channels]);
        let dy = normals.gradient(&[batch, positions, channels]);
        AttentionCase { qkv, heads, dy }.check();
    }

    #[test]
    fn repeated_and_summed_pixels_agree(
        [batch, h, w, channels] in [1usize..4, 1usize..5, 1usize..5, 1usize..40],
        factor in prop_oneof![Just(1f32), Just(0.25)],
        seed: u64,
    ) {
        PixelsCase { x: Normals(seed).tensor(0, &[batch, 2 * h, 2 * w, channels]), factor }.check();
    }

    #[test]
    fn poolings_agree(
        [batch, h, w, channels] in [1usize..4, 0usize..6, 0usize..6, 1usize..40],
        (window, scale) in prop_oneof![
            (prop_oneof![Just(1usize), Just(3)], (1usize..4).prop_map(Scale::Stride)),
            (1usize..5, (1usize..4).prop_map(Scale::StrideWithin)),
        ],
        seed: u64,
    ) {
        let dims = [batch, window + h, window + w, channels];
        let shape = PoolShape::new(dims, window, scale).unwrap();
        PoolCase { shape, x: Normals(seed).tensor(0, &dims) }.check();
    }

    #[test]
    fn concatenation_and_masks_agree(
        [batch, h, w] in [1usize..4, 1usize..9, 1usize..9],
        [first, second] in [1usize..40, 1usize..40],
        seed: u64,
    ) {
        let normal = |k, shape: &[usize]| Normals(seed).tensor(k, shape);
        MapsCase {
            a: normal(0, &[batch, h, w, first]),
            b: normal(1, &[batch, h, w, second]),
            mask: normal(2, &[batch, 1, 1, first]),
        }.check();
    }
}
