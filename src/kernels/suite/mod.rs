//! One suite for every implementation of every operation. Each kernel, in each instruction set and dtype, must
//! give the values and gradients of the [reference](mod@super::reference) composition on the same random
//! inputs.
//!
//! A [`Subject`] is an implementation of the operations. [`subjects`] lists all of them, so a new device needs
//! one more line there. The error bounds follow from the inputs, as derived in [`tests`](super::tests).
//! Each operation has a file with its cases.

mod attention;
mod conv;
mod depthwise;
mod linear;
mod maps;
mod modulated;
mod norm;
mod pool;

use candle_core::{DType, Result, Tensor};

pub(crate) use attention::AttentionCase;
pub(crate) use conv::{ConvArithmetic, ConvCase};
pub(crate) use depthwise::DepthwiseCase;
pub(crate) use linear::LinearCase;
pub(crate) use maps::{MapsCase, PixelsCase};
pub(crate) use modulated::ModulatedCase;
pub(crate) use norm::NormCase;
pub(crate) use pool::PoolCase;

use super::op::conv::ConvShape;
use super::tests::{Products, check};

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
        ConvArithmetic { products: self.products(), operands: self.maps(), winograd: None }
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

    /// `y`, and `relu` and `relu6`: the same with limits.
    fn depthwise(&self, _: &DepthwiseCase) -> Result<Found> {
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
