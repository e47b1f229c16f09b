//! Convolutions.

use candle_core::{DType, Device, Result, Tensor};
use proptest::prelude::*;

use super::{Expected, compare, rounded, size_of, subjects, sum_of};
use crate::kernels::op::conv::{ConvShape, Scale};
use crate::kernels::reference;
use crate::kernels::tests::{Normals, Products, Sums};
use crate::random_inputs::inputs;

/// The arithmetic of a convolution.
#[derive(Clone, Copy)]
pub(crate) struct ConvArithmetic {
    pub products: Products,
    /// The type to which operands of products are rounded first.
    pub operands: DType,
    /// Height and width of the output of a tile, if the products are those of Winograd's method.
    pub winograd: Option<[usize; 2]>,
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

/// The type of the operands, and the height and width of the output of Winograd's tiles.
type Operands = (DType, Option<[usize; 2]>);

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
    fn sums(&self, dtype: DType, winograd: Option<[usize; 2]>) -> Result<ConvSums> {
        let [x, weight, dy] = [&self.x, &self.weight, &self.dy].map(|t| rounded(t, dtype));
        let scale = self.shape.scale;
        let nothing = Tensor::zeros(self.shape.c_out, DType::F64, &Device::Cpu)?;
        let composed = |v: &[Tensor]| reference::conv::conv2d(&v[0], &v[1], &nothing, scale);
        let inputs = [x, weight];
        let small = winograd == Some([2, 2]);
        let mut sums = Sums::of(
            &inputs,
            |_| dy.clone(),
            composed,
            |v| if small { composed(&[v[0].clone(), spread(&v[1])?]) } else { composed(v) },
        )?;
        if let Some(tile @ [_, 4]) = winograd {
            let of_tiles = |v: &[Tensor]| of_tiles(v, tile, scale);
            let dy = dy.to_dtype(DType::F64)?.sqr()?;
            let [x, weight] = inputs.map(|t| t.to_dtype(DType::F64).and_then(|t| t.sqr()));
            let squares = Sums::of(&[x?, weight?], |_| dy.clone(), of_tiles, of_tiles)?;
            for (sum, squares) in sums.iter_mut().zip(squares) {
                sum.magnitude = squares.exact.sqrt()?;
            }
        }
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
        let products = if winograd.is_some() {
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
        let mut known: Vec<(Operands, ConvSums)> = Vec::new();
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

/// The sum, over most pixels of every tile that holds an output pixel, and over the taps, of the squares of pixel and tap,
/// from the squares of each. The output of a tile has this height and width. The stride is 1.
///
/// The terms of F(2x4, 3x3) and F(4x4, 3x3) are so large, and cancel so well, that a bound from their magnitudes would be
/// a few percent of the result. Their errors are random in sign. The limit is a multiple of the root of this sum, and the
/// measured error of F(4x4, 3x3) is 3 times the root. The suite therefore finds wrong coefficients and pixels, which
/// change a result by a part of its size. `larger_tiles_have_the_documented_errors` finds lost accuracy.
fn of_tiles(squares: &[Tensor], [height, width]: [usize; 2], scale: Scale) -> Result<Tensor> {
    let (x, weight) = (&squares[0], &squares[1]);
    let (batch, h, w, channels) = x.dims4()?;
    let nothing = |channels| Tensor::zeros(channels, DType::F64, &Device::Cpu);
    let window = Tensor::ones((1, 1, height + 3, width + 3), DType::F64, &Device::Cpu)?;
    let planes = x.permute((0, 3, 1, 2))?.reshape((batch * channels, h, w, 1))?;
    let planes = reference::conv::conv2d(&planes, &window, &nothing(1)?, Scale::Stride(1))?;
    let x = planes.reshape((batch, channels, h, w))?.permute((0, 2, 3, 1))?.contiguous()?;
    let x = match scale {
        Scale::StrideWithin(_) => x.narrow(1, 1, h - 2)?.narrow(2, 1, w - 2)?.contiguous()?,
        _ => x,
    };
    let weight = weight.sum((2, 3))?;
    let nothing = nothing(weight.dim(0)?)?;
    reference::conv::conv2d(&x, &weight, &nothing, Scale::Stride(1))
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
    let channels =
        prop_oneof![[1usize..71, 1usize..71], [8usize..71, 8usize..71], [1usize..71, 1usize..5],];
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

/// With this many tiles and channels, the sums of the weight gradient are divided by input channels, into unequal
/// numbers.
#[test]
fn a_convolution_of_many_channels_and_tiles_agrees() {
    for (map, channels) in [([3, 20, 22], [150, 66]), ([8, 14, 14], [200, 40])] {
        let how = ([3; 2], Scale::Stride(1));
        ConvCase::new(map, channels, how, [true, false, true, false], Normals(4)).check();
    }
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

    /// Maps from the least size of Winograd's wide tiles on, which need not be multiples of the tiles.
    #[test]
    fn convolutions_of_medium_maps_agree(
        map in [1usize..3, 14usize..20, 14usize..28],
        channels in [8usize..40, 8usize..40],
        within: bool, added: [bool; 4], seed: u64,
    ) {
        let scale = if within { Scale::StrideWithin(1) } else { Scale::Stride(1) };
        ConvCase::new(map, channels, ([3; 2], scale), added, Normals(seed)).check();
    }

    #[test]
    fn convolutions_at_edges_agree(
        (map, channels, how) in convolutions_at_edges(), added: [bool; 4], seed: u64,
    ) {
        ConvCase::new(map, channels, how, added, Normals(seed)).check();
    }
}
