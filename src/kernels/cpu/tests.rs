//! The kernels for CPUs in the [`suite`](crate::kernels::suite), for each instruction set and each bf16 unit.

use candle_core::{DType, Device, Result, Tensor};

use super::attention::Attention;
use super::bf16::unit::Unit;
use super::conv::algorithm::{Math, Packed, Workspace};
use super::conv::epilogue::Epilogue;
use super::conv::plan::{PackedOnce, Plan};
use super::depthwise::{self, Depthwise};
use super::isa::Isa;
use super::linear::{linear_forward, linear_input_gradient, linear_weight_gradient};
use super::maps::{concatenate, repeat_pixels, scale_maps, split, sum_pixels};
use super::norm::modulated::Modulated;
use super::norm::{Normalization, RUN};
use super::pool::pool;
use super::reduce::{sum_over_batch, sums_by_image};
use crate::kernels::op::activation::Rectifier;
use crate::kernels::op::attention::AttentionShape;
use crate::kernels::op::conv::{Addends, ConvShape, Scale};
use crate::kernels::op::place::Place;
use crate::kernels::op::pool::Pooling;
use crate::kernels::suite::{
    AttentionCase, ConvArithmetic, ConvCase, DepthwiseCase, Found, LinearCase, MapsCase,
    ModulatedCase, NormCase, PixelsCase, PoolCase, Subject,
};
use crate::kernels::tests::{BF16, F32, Normals, Products};

pub(crate) fn subjects() -> Vec<Box<dyn Subject>> {
    let mut all: Vec<Box<dyn Subject>> = Vec::new();
    for isa in Isa::available() {
        all.push(Box::new(Kernels(isa)));
        all.push(Box::new(LargeTiles(isa)));
    }
    for unit in Unit::available() {
        for math in [Math::Bf16, Math::Bf16x3] {
            all.push(Box::new(Bf16Convolutions { unit, math }));
        }
    }
    all
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn tensor(values: Vec<f32>, dims: &[usize]) -> Tensor {
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// Memory for a result. Its values are not zero, so that a kernel that wrongly adds to them fails.
fn room(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

/// Computes a convolution and its gradients with this plan.
fn convolve(plan: Plan, case: &ConvCase) -> Found {
    let ConvCase { x, weight, dy, .. } = case;
    let [xs, weights, dys] = [x, weight, dy].map(values);
    let added = [&case.bias, &case.per_image, &case.residual];
    let added = added.map(|t| t.as_ref().map(values));
    let epilogue = Epilogue {
        bias: added[0].as_deref(),
        add: Addends { per_image: added[1].as_deref(), residual: added[2].as_deref() },
        accumulate: case.before.is_some(),
        ..Epilogue::default()
    };
    let before = case.before.as_ref();
    let [mut y, mut dx] = [0, 1].map(|i| match before {
        Some(before) => values(&before[i]),
        None => room([dys.len(), xs.len()][i]),
    });
    // The convolutions need more of some memory than it has, and less of other.
    let mut workspace = Workspace::dirty(case.shape.c_in * case.shape.c_out * 20);
    let packed = plan.pack(&weights, &mut workspace);
    plan.forward(&xs, &packed, epilogue, &mut y);
    if case.residual.is_none() {
        rectified_in_place(plan, case, &packed, epilogue, &y);
    }
    workspace.unpack(packed);
    plan.input_gradient(&dys, &weights, &mut dx, before.is_some(), &mut workspace);
    let mut dweight = room(weights.len());
    plan.weight_gradient(&xs, &dys, &mut dweight, &mut workspace);
    let [batch, _, _, channels] = plan.output();
    let by_image = sums_by_image(&dys, batch, channels);
    let mut dbias = room(channels);
    sum_over_batch(&by_image, &mut dbias);
    let by_image = by_image.iter().map(|sum| *sum as f32).collect();
    vec![
        ("y", tensor(y, &plan.output())),
        ("dx", tensor(dx, x.dims())),
        ("dweight", tensor(dweight, weight.dims())),
        ("dbias", tensor(dbias, &[channels])),
        ("by_image", tensor(by_image, &[batch, channels])),
    ]
}

/// Tests that a convolution with limits writes the values of `y` within them, exactly, to some channels of a wider map.
fn rectified_in_place(
    plan: Plan,
    case: &ConvCase,
    packed: &Packed,
    epilogue: Epilogue<'_>,
    y: &[f32],
) {
    let channels = case.shape.c_out;
    let place = Place { first: 3, of: channels + 5 };
    for (rectifier, highest) in [(Rectifier::Relu, f32::INFINITY), (Rectifier::Relu6, 6.0)] {
        let mut wide = vec![-7.0; y.len() / channels * place.of];
        if let Some([before, _]) = &case.before {
            let before = values(before);
            let pixels = wide.chunks_exact_mut(place.of).zip(before.chunks_exact(channels));
            pixels.for_each(|(to, pixel)| to[place.first..][..channels].copy_from_slice(pixel));
        }
        let epilogue = Epilogue { rectifier, place: Some(place), ..epilogue };
        plan.forward(&values(&case.x), packed, epilogue, &mut wide);
        for (pixel, y) in wide.chunks_exact(place.of).zip(y.chunks_exact(channels)) {
            let (left, pixel) = pixel.split_at(place.first);
            let (pixel, right) = pixel.split_at(channels);
            assert!(left.iter().chain(right).all(|&value| value == -7.0));
            for (found, y) in pixel.iter().zip(y) {
                assert_eq!(*found, y.max(0.0).min(highest), "{:?}", case.shape);
            }
        }
    }
}

/// Returns the output of these dimensions that `write` writes to some channels of a wider map. Tests that it writes
/// nothing else.
fn in_place(dims: [usize; 4], write: impl FnOnce(Place, &mut [f32])) -> Tensor {
    let place = Place { first: 2, of: dims[3] + 3 };
    let mut wide = room(dims[..3].iter().product::<usize>() * place.of);
    write(place, &mut wide);
    let own = place.first..place.first + dims[3];
    let pixels = wide.chunks_exact(place.of);
    assert!(pixels.clone().all(|pixel| {
        let others = pixel.iter().enumerate().filter(|(c, _)| !own.contains(c));
        others.into_iter().all(|(_, value)| value.is_nan())
    }));
    tensor(pixels.flat_map(|pixel| pixel[own.clone()].to_vec()).collect(), &dims)
}

/// The kernels of all operations, in f32.
struct Kernels(Isa);

impl Subject for Kernels {
    fn name(&self) -> String {
        format!("kernels in {}", self.0.name())
    }

    fn convolution_arithmetic(&self, shape: &ConvShape) -> ConvArithmetic {
        let winograd = Plan::new(self.0, *shape, Math::F32).winograd();
        ConvArithmetic { products: Products::PLAIN, operands: DType::F32, winograd }
    }

    fn norm_arithmetic(&self) -> (usize, f64) {
        (RUN, 0.0)
    }

    fn convolution(&self, case: &ConvCase) -> Result<Found> {
        Ok(convolve(Plan::new(self.0, case.shape, Math::F32), case))
    }

    fn normalization(&self, case: &NormCase) -> Result<Found> {
        let NormCase { config, x, weight, bias, dy, more } = case;
        let [xs, weights, biases, mut dx] = [x, weight, bias, dy].map(values);
        let norm = Normalization { isa: self.0, config: *config, weight: &weights, bias: &biases };
        let (mut y, mut again) = (room(xs.len()), room(xs.len()));
        let statistics = norm.forward(x.dim(0)?, &xs, &mut y);
        norm.known(&statistics).write(&xs, &mut again);
        let more = more.as_ref().map(values);
        let (dweight, dbias) = norm.backward(&xs, &statistics, &mut dx, more.as_deref());
        Ok(vec![
            ("y", tensor(y, x.dims())),
            ("again", tensor(again, x.dims())),
            ("dx", tensor(dx, x.dims())),
            ("dweight", tensor(dweight, weight.dims())),
            ("dbias", tensor(dbias, bias.dims())),
        ])
    }

    fn modulated(&self, ModulatedCase { norm, by }: &ModulatedCase) -> Result<Found> {
        let NormCase { config, x, weight, bias, dy, more } = norm;
        let [xs, weights, biases, bys, mut dx] = [x, weight, bias, by, dy].map(values);
        let norm = Normalization { isa: self.0, config: *config, weight: &weights, bias: &biases };
        let norm = Modulated { norm, by: &bys };
        let [mut y, mut again, mut dby] = [xs.len(), xs.len(), bys.len()].map(room);
        let statistics = norm.forward(&xs, &mut y);
        norm.known(&statistics).write(&xs, &mut again);
        let more = more.as_ref().map(values);
        let (dweight, dbias) = norm.backward(&xs, &statistics, &mut dx, more.as_deref(), &mut dby);
        Ok(vec![
            ("y", tensor(y, x.dims())),
            ("again", tensor(again, x.dims())),
            ("dx", tensor(dx, x.dims())),
            ("dweight", tensor(dweight, weight.dims())),
            ("dbias", tensor(dbias, bias.dims())),
            ("dby", tensor(dby, by.dims())),
        ])
    }

    fn linear(&self, case: &LinearCase) -> Result<Found> {
        let LinearCase { activation, x, weight, bias, dy } = case;
        let [xs, weights, biases, dys] = [x, weight, bias, dy].map(values);
        let activated: Vec<f32> = xs.iter().map(|&x| activation.value(x)).collect();
        let (mut y, mut dx) = (room(dys.len()), room(xs.len()));
        linear_forward(self.0, &activated, &weights, &biases, &mut y);
        linear_input_gradient(self.0, &weights, biases.len(), &dys, &mut dx);
        dx.iter_mut().zip(&xs).for_each(|(dx, &x)| *dx *= activation.derivative(x));
        let (mut dweight, mut dbias) = (room(weights.len()), room(biases.len()));
        linear_weight_gradient(self.0, &activated, biases.len(), &dys, &mut dweight);
        sum_over_batch(&dys, &mut dbias);
        Ok(vec![
            ("y", tensor(y, dy.dims())),
            ("dx", tensor(dx, x.dims())),
            ("dweight", tensor(dweight, weight.dims())),
            ("dbias", tensor(dbias, bias.dims())),
        ])
    }

    fn attention(&self, AttentionCase { qkv, heads, dy }: &AttentionCase) -> Result<Found> {
        let (_, positions, channels) = dy.dims3()?;
        let shape = AttentionShape { positions, channels, heads: *heads };
        let attention = Attention { isa: self.0, shape };
        let (mut y, mut dx) = (room(dy.elem_count()), room(qkv.elem_count()));
        attention.forward(&values(qkv), &mut y);
        attention.backward(&values(qkv), &values(dy), &mut dx);
        Ok(vec![("y", tensor(y, dy.dims())), ("dx", tensor(dx, qkv.dims()))])
    }

    fn pixels(&self, PixelsCase { x, factor }: &PixelsCase) -> Result<Found> {
        let (batch, h, w, c) = x.dims4()?;
        let [mut repeated, mut summed] = [4 * x.elem_count(), x.elem_count() / 4].map(room);
        repeat_pixels(&values(x), (w, c), *factor, &mut repeated);
        sum_pixels(&values(x), (w, c), *factor, &mut summed);
        Ok(vec![
            ("repeated", tensor(repeated, &[batch, 2 * h, 2 * w, c])),
            ("summed", tensor(summed, &[batch, h / 2, w / 2, c])),
        ])
    }

    fn pooling(&self, PoolCase { shape, x }: &PoolCase) -> Result<Found> {
        let dims = shape.output();
        let x = values(x);
        let found =
            |pooling| in_place(dims, |place, wide| pool(self.0, pooling, shape, &x, place, wide));
        Ok(vec![("max", found(Pooling::Max)), ("average", found(Pooling::Average))])
    }

    fn depthwise(&self, case: &DepthwiseCase) -> Result<Found> {
        let shape = case.shape;
        let [x, weight, bias] = [&case.x, &case.weight, &case.bias].map(values);
        let weight = depthwise::pack(&weight, shape.channels);
        let found = |rectifier| {
            let of = Depthwise { isa: self.0, shape, weight: &weight, bias: &bias, rectifier };
            in_place(shape.output(), |place, wide| of.forward(&x, place, wide))
        };
        let kinds =
            [("y", Rectifier::None), ("relu", Rectifier::Relu), ("relu6", Rectifier::Relu6)];
        Ok(kinds.into_iter().map(|(name, rectifier)| (name, found(rectifier))).collect())
    }

    fn maps_of(&self, MapsCase { a, b, mask }: &MapsCase) -> Result<Found> {
        let (batch, h, w, first) = a.dims4()?;
        let channels = [first, b.dim(3)?];
        let mut both = room(a.elem_count() + b.elem_count());
        concatenate([&values(a), &values(b)], channels, &mut both);
        let (mut parts, mut scaled) = ([a, b].map(|t| room(t.elem_count())), room(a.elem_count()));
        split(&both, channels, parts.each_mut().map(|part| &mut part[..]));
        scale_maps(&values(a), &values(mask), first, &mut scaled);
        let [part_of_a, part_of_b] = parts;
        Ok(vec![
            ("concatenated", tensor(both, &[batch, h, w, channels[0] + channels[1]])),
            ("first", tensor(part_of_a, a.dims())),
            ("second", tensor(part_of_b, b.dims())),
            ("scaled", tensor(scaled, a.dims())),
        ])
    }
}

/// Convolutions in f32, with Winograd's larger tiles.
struct LargeTiles(Isa);

impl Subject for LargeTiles {
    fn name(&self) -> String {
        format!("convolutions with larger tiles in {}", self.0.name())
    }

    fn convolution_arithmetic(&self, shape: &ConvShape) -> ConvArithmetic {
        let winograd = Plan::new(self.0, *shape, Math::F32Large).winograd();
        ConvArithmetic { products: Products::PLAIN, operands: DType::F32, winograd }
    }

    fn convolution(&self, case: &ConvCase) -> Result<Found> {
        Ok(convolve(Plan::new(self.0, case.shape, Math::F32Large), case))
    }
}

/// At shapes of the networks, of standard normals. The reference is the definition in f64.
#[test]
fn larger_tiles_have_the_documented_errors() {
    for (batch, size, c_in, c_out) in [(4, 28, 64, 64), (8, 14, 128, 128), (16, 7, 128, 128)] {
        let shape = [batch, size, size, c_in];
        let shape = ConvShape::new(shape, &[c_out, c_in, 3, 3], Scale::Stride(1)).unwrap();
        let normals = Normals(7);
        let [x, weight, dy] = [
            normals.values(0, batch * shape.input_len()),
            normals.values(1, c_out * shape.patch()),
            normals.values(2, batch * shape.output_len()),
        ];
        let exact = in_f64(&shape, [&x, &weight, &dy]);
        for isa in Isa::available() {
            for (math, least, most) in [(Math::F32, 1e-7, 1e-6), (Math::F32Large, 5e-7, 2e-6)] {
                let plan = Plan::new(isa, shape, math);
                let mut workspace = Workspace::default();
                let packed = plan.pack(&weight, &mut workspace);
                let [mut y, mut dx, mut dweight] = [&dy, &x, &weight].map(|v| room(v.len()));
                plan.forward(&x, &packed, Epilogue::default(), &mut y);
                plan.input_gradient(&dy, &weight, &mut dx, false, &mut workspace);
                plan.weight_gradient(&x, &dy, &mut dweight, &mut workspace);
                for (name, found, exact) in
                    [("y", y, &exact[0]), ("dx", dx, &exact[1]), ("dweight", dweight, &exact[2])]
                {
                    let off = found.iter().zip(exact).map(|(f, e)| (f64::from(*f) - e).powi(2));
                    let off = off.sum::<f64>() / exact.iter().map(|e| e * e).sum::<f64>();
                    let off = off.sqrt();
                    assert!((least..most).contains(&off), "{isa:?}, {math:?}, {name}: {off}");
                }
            }
        }
    }
}

/// The output and the gradients of a 3x3 convolution of `x`, `weight` and the gradient of the output, by the definition.
fn in_f64(shape: &ConvShape, inputs: [&[f32]; 3]) -> [Vec<f64>; 3] {
    let [x, weight, dy] = inputs.map(|v| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    let ConvShape { batch, h, w, c_in, c_out, .. } = *shape;
    let [mut y, mut dx, mut dweight] = [&dy, &x, &weight].map(|v| vec![0.0; v.len()]);
    for (ky, kx) in (0..3).flat_map(|ky| (0..3).map(move |kx| (ky, kx))) {
        let tap = |o: usize, i: usize| (o * c_in + i) * 9 + 3 * ky + kx;
        let kernel: Vec<f64> =
            (0..c_in * c_out).map(|k| weight[tap(k % c_out, k / c_out)]).collect();
        let mut of_kernel = vec![0.0; kernel.len()];
        for pixel in 0..batch * h * w {
            let (row, column) = (pixel / w % h + ky, pixel % w + kx);
            if !(1..=h).contains(&row) || !(1..=w).contains(&column) {
                continue;
            }
            let from = pixel / (h * w) * h * w + (row - 1) * w + column - 1;
            let (out, dout) = (&mut y[pixel * c_out..][..c_out], &dy[pixel * c_out..][..c_out]);
            for i in 0..c_in {
                let (x, dx) = (x[from * c_in + i], &mut dx[from * c_in + i]);
                let kernel = &kernel[i * c_out..][..c_out];
                let of_kernel = &mut of_kernel[i * c_out..][..c_out];
                for o in 0..c_out {
                    out[o] += x * kernel[o];
                    *dx += dout[o] * kernel[o];
                    of_kernel[o] += x * dout[o];
                }
            }
        }
        (0..kernel.len()).for_each(|k| dweight[tap(k % c_out, k / c_out)] = of_kernel[k]);
    }
    [y, dx, dweight]
}

/// Networks may be trained with one size of tiles and evaluated with the other, so weights packed for one must not be
/// used for the other.
#[test]
fn weights_packed_once_fit_maps_of_every_size() {
    let weight = Normals(3).values(0, 16 * 24 * 9);
    let once = PackedOnce::default();
    for math in [Math::F32, Math::F32Large, Math::F32, Math::F32Large] {
        for size in [4, 28, 6, 14] {
            let shape = ConvShape::new([2, size, size, 16], &[24, 16, 3, 3], Scale::Stride(1));
            let plan = Plan::new(Isa::detect(), shape.unwrap(), math);
            let x = Normals(3).values(1, 2 * size * size * 16);
            let [mut found, mut expected] = [0, 1].map(|_| room(2 * size * size * 24));
            plan.forward(&x, once.get(&plan, &weight), Epilogue::default(), &mut found);
            let packed = plan.pack(&weight, &mut Workspace::default());
            plan.forward(&x, &packed, Epilogue::default(), &mut expected);
            assert_eq!(found, expected, "{math:?}, {size}");
        }
    }
}

/// Sums do not depend on how blocks of tiles are shared by threads.
#[test]
fn larger_tiles_have_the_same_bits_for_any_number_of_threads() {
    let shape = ConvShape::new([3, 22, 17, 40], &[72, 40, 3, 3], Scale::Stride(1)).unwrap();
    let normals = Normals(11);
    let [x, weight, dy] = [
        normals.values(0, 3 * shape.input_len()),
        normals.values(1, 72 * shape.patch()),
        normals.values(2, 3 * shape.output_len()),
    ];
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let plan = Plan::new(Isa::detect(), shape, Math::F32Large);
            let mut workspace = Workspace::default();
            let packed = plan.pack(&weight, &mut workspace);
            let [mut y, mut dx, mut dweight] = [&dy, &x, &weight].map(|v| room(v.len()));
            plan.forward(&x, &packed, Epilogue::default(), &mut y);
            plan.input_gradient(&dy, &weight, &mut dx, false, &mut workspace);
            plan.weight_gradient(&x, &dy, &mut dweight, &mut workspace);
            [y, dx, dweight]
        })
    };
    let expected = run(1);
    for threads in [2, 3, 5] {
        assert_eq!(run(threads), expected, "{threads} threads");
    }
}

/// Convolutions with bf16 products on one unit.
struct Bf16Convolutions {
    unit: Unit,
    math: Math,
}

impl Subject for Bf16Convolutions {
    fn name(&self) -> String {
        format!("{:?} by {:?}", self.math, self.unit)
    }

    /// One product is exact for rounded operands. Three products omit the product of the errors, and the
    /// rounding errors of either error: in all, three times 2^-16 of the product of the exact operands.
    fn convolution_arithmetic(&self, _: &ConvShape) -> ConvArithmetic {
        let (operands, products) = match self.math {
            Math::Bf16x3 => (
                DType::F32,
                Products { sums: 3.0 * F32, operands: 3.0 * BF16 * BF16, ..Products::PLAIN },
            ),
            _ => (DType::BF16, Products::PLAIN),
        };
        ConvArithmetic { products, operands, winograd: None }
    }

    fn convolution(&self, case: &ConvCase) -> Result<Found> {
        let isa = self.unit.isa().unwrap_or(Isa::detect());
        Ok(convolve(Plan::new(isa, case.shape, self.math).with_unit(self.unit), case))
    }
}
