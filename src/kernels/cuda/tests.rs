//! Compares each kernel, in each type of map, with its reference composition in f64, on random shapes.

use std::rc::Rc;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use proptest::prelude::*;

use super::*;
use crate::kernels::op::activation::Activation;
use crate::kernels::op::conv::{ConvShape, Scale};
use crate::kernels::op::norm::{EPS, NormConfig};
use crate::kernels::suite::{ModulatedCase, NormCase};
use crate::kernels::tests::{
    self as rounding, BF16, F16, FUNCTION, Normals, Products, Sums, TF32, check,
    value_and_gradients,
};
use crate::precision::Precision;
use crate::random_inputs::inputs;

/// The arithmetic of each precision. The tensor cores of a GPU truncate f32 sums instead of rounding them:
/// an error of up to two units.
pub(super) fn precisions() -> Vec<(Precision, Products)> {
    // The same operations write sums of one term or of none.
    let plain = Products { sums: 2.0 * rounding::F32, more: 4.0, ..Products::PLAIN };
    let mut all = vec![
        (Precision::Highest, plain),
        (Precision::High, Products { operands: 2.01 * TF32, ..plain }),
    ];
    if cfg!(feature = "f16") {
        all.push((Precision::BF16, Products { stored: BF16, ..plain }));
        all.push((Precision::F16, Products { stored: F16, ..plain }));
    }
    all
}

fn plus<const N: usize>(bounds: [Tensor; N]) -> Tensor {
    bounds.into_iter().reduce(|a, b| a.broadcast_add(&b).unwrap()).unwrap()
}

pub(super) fn gpu() -> Rc<Gpu> {
    thread_local! {
        static DEVICE: Device = Device::new_cuda(0).unwrap();
    }
    DEVICE.with(|device| Gpu::of(device).unwrap())
}

fn device(gpu: &Gpu) -> Device {
    Device::Cuda(gpu.device.clone())
}

/// Normals that a map of this precision holds exactly, so that only the computation has errors.
pub(super) fn normal(normals: Normals, k: u32, shape: &[usize], precision: Precision) -> Tensor {
    held(&normals.tensor(k, shape), precision)
}

/// The nearest values that a map of this precision holds.
pub(super) fn held(values: &Tensor, precision: Precision) -> Tensor {
    let dtype = match precision {
        Precision::BF16 => DType::BF16,
        Precision::F16 => DType::F16,
        _ => DType::F32,
    };
    values.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
}

/// Copies a map (batch, height, width, channels) to the device.
pub(super) fn map(gpu: &Rc<Gpu>, x: &Tensor, precision: Precision) -> Result<Memory> {
    let images = x.permute((0, 3, 1, 2))?.contiguous()?.to_device(&device(gpu))?;
    images_to_map(gpu, &images, Element::of(precision))
}

pub(super) fn unmap(
    gpu: &Gpu,
    x: &Memory,
    dims: [usize; 4],
    precision: Precision,
) -> Result<Tensor> {
    let images = map_to_images(gpu, x, dims, Element::of(precision))?;
    images.to_device(&Device::Cpu)?.permute((0, 2, 3, 1))?.contiguous()
}

/// Compiling or loading a kernel during a capture would not be captured, and might wait.
#[test]
fn kernels_are_there_before_they_are_captured() {
    let test = || -> Result<()> {
        let device = Device::new_cuda(0)?;
        let gpu = Gpu::of(&device)?;
        let x = Tensor::new(&[1f32; 6], &Device::Cpu)?.to_device(&device)?;
        let mut clamped = None;
        let mut capture = || {
            let clamp = || {
                clamped = Some(clamp(&x, 0.0, 0.5)?);
                Ok(())
            };
            gpu.capture.of(&gpu.device, clamp).map(|(graph, ())| graph)
        };
        let message = capture().err().expect("an error").to_string();
        assert!(message.contains("kernel clamp is used for the first time"), "{message}");
        // A loaded module is not enough: the kernel itself must have been used.
        combine(&x, 1.0, &x, 1.0)?;
        assert!(capture().is_err());
        // The device works as before after the error.
        assert_eq!(clamp(&x, 0.0, 0.25)?.to_vec1::<f32>()?, [0.25; 6]);
        let graph = capture().unwrap();
        graph.launch().unwrap();
        assert_eq!(clamped.expect("a tensor").to_vec1::<f32>()?, [0.5; 6]);
        Ok(())
    };
    // Each thread has its own view of the device. On this thread, no kernel has been used.
    std::thread::spawn(test).join().expect("no panic").unwrap();
}

/// Only the first and the last convolution of a network, which have few channels, may run without cuDNN.
/// For the others, a silent failure would be slow.
#[cfg(feature = "cudnn")]
#[test]
fn cudnn_has_a_plan_for_each_convolution() {
    let gpu = gpu();
    let Some(dnn) = &gpu.dnn else { return };
    if std::env::var_os("STAND_IN_WITHOUT_CUDNN").is_some() {
        return;
    }
    for (precision, _) in precisions() {
        for (size, c_in, c_out, scale) in [
            (32, 128, 256, Scale::Stride(1)),
            (16, 512, 256, Scale::Stride(1)),
            (32, 256, 256, Scale::Stride(2)),
            (8, 256, 256, Scale::Upsample),
            (28, 32, 32, Scale::Stride(1)),
            (14, 64, 64, Scale::Stride(2)),
        ] {
            let weight = Tensor::zeros((c_out, c_in, 3, 3), DType::F32, &device(&gpu)).unwrap();
            let x = [128, size, size, c_in];
            let shape = ConvShape::new(x, weight.dims(), scale).unwrap();
            let convolution = Convolution::new(precision, shape);
            assert!(dnn.plan(&convolution.shape()).is_some(), "{precision}: {convolution:?}");
        }
    }
}

fn bits(x: &Tensor) -> Result<Vec<u32>> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// Tests a convolution of (batch, height, width), with values added to its output and its gradient.
fn convolution_agrees(
    (batch, h, w): (usize, usize, usize),
    (c_in, c_out): (usize, usize),
    kernel: usize,
    scale: Scale,
    (per_image, residual, accumulate): (bool, bool, bool),
    normals: Normals,
) -> Result<()> {
    let gpu = gpu();
    for (precision, products) in precisions() {
        let normal = |k, shape: &[usize]| normal(normals, k, shape, precision);
        let name = |what: &str| format!("{precision}, {what}");
        let dims = [batch, h, w, c_in];
        let (x, weight) = (normal(0, &dims), normal(1, &[c_out, c_in, kernel, kernel]));
        let gpu_weight = weight.to_device(&device(&gpu))?;
        let bias = normal(2, &[c_out]);
        let shape = ConvShape::new(dims, gpu_weight.dims(), scale).unwrap();
        let convolution = Convolution::new(precision, shape);
        let out = convolution.output();
        let per = per_image.then(|| normal(3, &[batch, 1, 1, c_out]));
        let more = residual.then(|| normal(4, &out));
        let dy = normal(5, &out);
        let f = |v: &[Tensor]| crate::kernels::conv2d(&v[0], &v[1], &v[2], scale, None);
        let sums = Sums::of(&[x.clone(), weight, bias.clone()], |_| dy.clone(), f, f)?;
        let Ok([mut y, mut dx, dweight, dbias]) = <[Sums; 4]>::try_from(sums) else {
            unreachable!()
        };
        let mut added = y.exact.zeros_like()?.broadcast_add(&bias.to_dtype(DType::F64)?.abs()?)?;
        for term in [&per, &more].into_iter().flatten() {
            y = y.plus(term)?;
            added = added.broadcast_add(&term.to_dtype(DType::F64)?.abs()?)?;
        }

        let (gx, gdy) = (map(&gpu, &x, precision)?, map(&gpu, &dy, precision)?);
        let on_gpu = |t: &Option<Tensor>| t.as_ref().map(|t| map(&gpu, t, precision)).transpose();
        let (per, more) = (on_gpu(&per)?, on_gpu(&more)?);
        // The second pass packs the weights, and unpacks their gradient, by one launch for all weights.
        let network = Arc::default();
        let pass = || PassWeights::begin(gpu.clone(), &network, Element::of(precision), false);
        let (first, first_gradient) = (pass()?, gpu_weight.zeros_like()?);
        let first_packed = first.of_convolution(&convolution, &gpu_weight)?;
        first.gradient(&convolution, [&gx, &gdy], (&gpu_weight, &first_gradient))?;
        first.finish()?;
        let weights = pass()?;
        let packed = weights.of_convolution(&convolution, &gpu_weight)?;
        assert!(packed != first_packed || kernel == 1);
        let added_there = Added {
            bias: Some(&bias.to_device(&device(&gpu))?),
            per_image: per.as_ref(),
            residual: more.as_ref(),
            mask: None,
        };
        let found = convolution.forward(&gpu, &gx, packed)?;
        let sizes = [batch, out[1] * out[2], c_out];
        added_there.add_to(&gpu, [&found, &found], sizes, Element::of(precision))?;
        // The products are rounded to the maps' type before anything is added.
        let stored = products.storing(&((y.exact.abs()? * 2.0)? + added)?);
        let bound = plus([products.of(&y), stored]);
        check(&name("y"), &unmap(&gpu, &found, out, precision)?, &y.exact, &bound);

        let gradient = gpu_weight.zeros_like()?;
        weights.gradient(&convolution, [&gx, &gdy], (&gpu_weight, &gradient))?;
        weights.finish()?;
        assert_eq!(bits(&gradient)?, bits(&first_gradient)?);
        let bound = plus([products.of(&dweight), products.storing(&dweight.exact)]);
        check(&name("gradient of the weight"), &gradient, &dweight.exact, &bound);

        let plain = Products { operands: 0.0, ..products };
        // The same bits each time.
        let mut of_few = None;
        for _ in 0..2 {
            let (all, own) = (ColumnSums::default(), gpu_weight.zeros_like()?);
            let few = convolution.weight_gradient_of_few(&gpu, [&gx, &gdy], &all, &own)?;
            assert_eq!(few, c_in < 8 && !convolution.is_pointwise());
            if few {
                all.compute(&gpu)?;
                let what = name("gradient of the weight, few channels");
                check(&what, &own, &dweight.exact, &plain.of(&dweight));
                let own = bits(&own)?;
                assert_eq!(*of_few.get_or_insert_with(|| own.clone()), own, "{what}");
            }
        }
        let gradient = bias.to_device(&device(&gpu))?.zeros_like()?;
        let found = ImageSums::of(&gpu, &gdy, None, sizes, Element::of(precision))?;
        let all = ColumnSums::default();
        all.add(&gpu, found.sums.clone(), batch, &gradient)?;
        all.compute(&gpu)?;
        let found = found.of_maps;
        check(&name("gradient of the bias"), &gradient, &dbias.exact, &plain.of(&dbias));
        let by_image =
            |_: &[usize]| Tensor::ones((batch, c_out), DType::F64, &Device::Cpu).unwrap();
        let sum = |v: &[Tensor]| v[0].sum((1, 2));
        let by_image = Sums::of(std::slice::from_ref(&dy), by_image, sum, sum)?.swap_remove(0);
        let bound = plus([plain.of(&by_image), products.storing(&by_image.exact)]);
        let found = unmap(&gpu, &found, [batch, 1, 1, c_out], precision)?;
        check(&name("sums by image"), &found.reshape((batch, c_out))?, &by_image.exact, &bound);

        let there = normal(6, &dims);
        let found = map(&gpu, &there, precision)?;
        convolution.input_gradient(&gpu, &gdy, packed, &found, accumulate)?;
        // The gradients of patches, or of doubled pixels, are rounded to the maps' type, and so are their
        // sums.
        let stored = products.storing(&(&dx.magnitude * 2.0)?);
        if accumulate {
            dx = dx.plus(&there)?;
        }
        let bound = plus([products.of(&dx), stored, products.storing(&dx.exact)]);
        check(&name("gradient of x"), &unmap(&gpu, &found, dims, precision)?, &dx.exact, &bound);
    }
    Ok(())
}

fn normalisation_agrees(
    (batch, h, w): (usize, usize, usize),
    (groups, group): (usize, usize),
    (silu, add, eps): (bool, bool, f64),
    normals: Normals,
) -> Result<()> {
    let gpu = gpu();
    let dims = [batch, h, w, groups * group];
    let activation = if silu { Activation::Silu } else { Activation::None };
    for (precision, products) in precisions() {
        let normal = |k, shape: &[usize]| normal(normals, k, shape, precision);
        let name = |what: &str| format!("{precision}, {what}");
        let x = normal(0, &dims);
        let [weight, bias] = [1, 2].map(|k| normal(k, &dims[3..]));
        let (dy, more) = (normal(3, &dims), normal(4, &dims));
        let inputs = [x.clone(), weight.clone(), bias.clone()];
        let config = NormConfig { groups, eps, activation };
        let f = |v: &[Tensor]| crate::kernels::group_norm(&v[0], &v[1], &v[2], config);
        let mut exact = value_and_gradients(DType::F64, &inputs, |_| dy.clone(), f)?;
        if add {
            exact[1] = (&exact[1] + more.to_dtype(DType::F64)?)?;
        }
        let run = usize::MAX;
        let norm =
            rounding::Normalization { groups, weight: &weight, bias: &bias, eps, activation, run };
        let mut bounds = norm.bounds(&x, &dy)?;
        for (bound, exact) in bounds[..2].iter_mut().zip(&exact) {
            let stored = Products { stored: products.stored + rounding::F32, ..products };
            *bound = ((bound.clone() + stored.storing(exact))? * 1.01)?;
        }
        let check = |what: &str, found: &Tensor, i: usize| {
            check(&name(what), found, &exact[i], &bounds[i]);
        };

        let (weight, bias) = (weight.to_device(&device(&gpu))?, bias.to_device(&device(&gpu))?);
        let norm = Norm {
            element: Element::of(precision),
            dims,
            config,
            weight: &weight,
            bias: &bias,
            by: None,
        };
        let gx = map(&gpu, &x, precision)?;
        let (y, statistics) = norm.forward(&gpu, &gx, None)?;
        check("y", &unmap(&gpu, &y, dims, precision)?, 0);
        let again = norm.again(&gpu, &gx, &statistics)?;
        check("y again", &unmap(&gpu, &again, dims, precision)?, 0);

        let d = map(&gpu, &dy, precision)?;
        let more = add.then(|| map(&gpu, &more, precision)).transpose()?;
        let NormGradients { of_vectors, sums, .. } =
            norm.backward(&gpu, (&gx, &statistics), &d, more.as_ref())?;
        let [for_weight, for_bias] = summed(&gpu, of_vectors, batch, &weight)?;
        let dx = unmap(&gpu, &d, dims, precision)?;
        check("gradient of x", &dx, 1);
        check("gradient of the weight", &for_weight, 2);
        check("gradient of the bias", &for_bias, 3);
        check_sums(&gpu, &sums, &dx, precision)?;
    }
    Ok(())
}

/// Sums the contributions of images to the gradients of vectors of the shape of `like`.
fn summed(gpu: &Gpu, of_images: [Memory; 2], batch: usize, like: &Tensor) -> Result<[Tensor; 2]> {
    let (all, sums) = (ColumnSums::default(), [like.zeros_like()?, like.zeros_like()?]);
    for (of_images, sum) in of_images.into_iter().zip(&sums) {
        all.add(gpu, Rc::new(of_images), batch, sum)?;
    }
    all.compute(gpu)?;
    Ok(sums)
}

/// Compares sums over the pixels of each image with those of the map `x`, which was rounded after they were computed.
fn check_sums(gpu: &Gpu, sums: &ImageSums, x: &Tensor, precision: Precision) -> Result<()> {
    let (batch, h, w, channels) = x.dims4()?;
    let x = x.to_dtype(DType::F64)?;
    let (exact, magnitude) = (x.sum((1, 2))?, x.abs()?.sum((1, 2))?);
    let stored = match precision {
        Precision::BF16 => BF16,
        Precision::F16 => F16,
        _ => 0.0,
    };
    let bound =
        ((magnitude * (stored + (h * w + 8) as f64 * rounding::F32))? + 1e-7 * (h * w) as f64)?;
    let found = unmap(gpu, &sums.sums, [batch, 1, 1, channels], Precision::Highest)?;
    check("sums by image", &found.reshape((batch, channels))?, &exact, &bound);
    let found = unmap(gpu, &sums.of_maps, [batch, 1, 1, channels], precision)?;
    let bound = (bound + (exact.abs()? * (1.01 * stored))?)?;
    check("sums by image in the maps' type", &found.reshape((batch, channels))?, &exact, &bound);
    Ok(())
}

/// Values are added, and a mask applied, with the same bits by the normalisation, by its own pass, and by the sums of a
/// gradient.
#[test]
fn addends_have_the_same_bits_in_each_kernel() -> Result<()> {
    let gpu = gpu();
    // Lines of several groups and of one, and lines whose size is not a power of two. Images of one part and of
    // several.
    for (h, w, groups, group) in [
        (6, 7, 4, 8),
        (6, 7, 2, 64),
        (6, 7, 3, 5),
        (6, 7, 8, 2),
        (6, 7, 1, 96),
        (33, 34, 4, 16),
        (33, 34, 1, 37),
    ] {
        for (precision, _) in precisions() {
            let (element, dims) = (Element::of(precision), [3, h, w, groups * group]);
            let normal = |k: u32, shape: &[usize]| normal(Normals(9), k, shape, precision);
            let [batch, h, w, channels] = dims;
            let vectors = [batch, 1, 1, channels];
            let [bias, weight] = [1, 2].map(|k| normal(k, &[channels]).to_device(&device(&gpu)));
            let (bias, weight) = (bias?, weight?);
            let (x, residual) = (normal(3, &dims), map(&gpu, &normal(4, &dims), precision)?);
            let [per_image, mask] = [5, 6].map(|k| map(&gpu, &normal(k, &vectors), precision));
            let (per_image, mask) = (per_image?, mask?);
            let config = NormConfig { groups, eps: EPS, activation: Activation::Silu };
            let norm = Norm { element, dims, config, weight: &weight, bias: &bias, by: None };
            let sizes = [batch, h * w, channels];
            let added = Added {
                bias: Some(&bias),
                per_image: Some(&per_image),
                residual: Some(&residual),
                mask: Some(&mask),
            };
            let values = |m: &Memory| -> Result<Vec<f32>> {
                unmap(&gpu, m, dims, precision)?.flatten_all()?.to_vec1()
            };
            let apart = map(&gpu, &x, precision)?;
            added.add_to(&gpu, [&apart, &apart], sizes, element)?;
            let (y, _) = norm.forward(&gpu, &apart, None)?;
            let together = map(&gpu, &x, precision)?;
            let to = gpu.take_for(x.elem_count(), element)?;
            for to in [&to, &together] {
                let (found, _) = norm.forward(&gpu, &together, Some((&added, to)))?;
                assert_eq!(values(to)?, values(&apart)?, "{precision}, {groups} of {group}");
                assert_eq!(values(&found)?, values(&y)?, "{precision}, {groups} of {group}");
            }
            let masked = map(&gpu, &x, precision)?;
            let only = Added { mask: Some(&mask), ..Added::default() };
            only.add_to(&gpu, [&masked, &masked], sizes, element)?;
            let found = map(&gpu, &x, precision)?;
            let sums = ImageSums::of(&gpu, &found, Some(&mask), sizes, element)?;
            assert_eq!(values(&found)?, values(&masked)?);
            check_sums(&gpu, &sums, &unmap(&gpu, &found, dims, precision)?, precision)?;
        }
    }
    Ok(())
}

/// The parts of an image do not depend on the batch.
#[test]
fn normalised_images_have_the_same_bits_in_each_batch() -> Result<()> {
    let gpu = gpu();
    for (h, w, groups, group) in [(5, 6, 4, 16), (34, 33, 4, 16), (34, 33, 2, 15)] {
        for (precision, _) in precisions() {
            let normal = |k: u32, shape: &[usize]| normal(Normals(4), k, shape, precision);
            let (element, channels) = (Element::of(precision), groups * group);
            let [weight, bias] = [1, 2].map(|k| normal(k, &[channels]).to_device(&device(&gpu)));
            let (weight, bias) = (weight?, bias?);
            let [x, dy] = [3, 4].map(|k| normal(k, &[3, h, w, channels]));
            let of_images = |first: usize, batch: usize| -> Result<[Vec<f32>; 3]> {
                let dims = [batch, h, w, channels];
                let config = NormConfig { groups, eps: EPS, activation: Activation::Silu };
                let norm = Norm { element, dims, config, weight: &weight, bias: &bias, by: None };
                let values = |m: &Memory, dims: [usize; 4]| -> Result<Vec<f32>> {
                    unmap(&gpu, m, dims, precision)?.flatten_all()?.to_vec1()
                };
                let x = map(&gpu, &x.narrow(0, first, batch)?, precision)?;
                let d = map(&gpu, &dy.narrow(0, first, batch)?, precision)?;
                let (y, statistics) = norm.forward(&gpu, &x, None)?;
                let gradients = norm.backward(&gpu, (&x, &statistics), &d, None)?;
                let sums = values(&gradients.sums.of_maps, [batch, 1, 1, channels])?;
                Ok([values(&y, dims)?, values(&d, dims)?, sums])
            };
            let all = of_images(0, 3)?;
            for image in 0..3 {
                for (of_all, own) in all.iter().zip(of_images(image, 1)?) {
                    let of_all = &of_all[image * own.len()..][..own.len()];
                    assert_eq!(of_all, own, "{precision}, {h} x {w}, {groups} of {group}");
                }
            }
        }
    }
    Ok(())
}

fn modulated_normalisation_agrees(
    maps: [usize; 3],
    groups: [usize; 2],
    (silu, add): (bool, bool),
    normals: Normals,
) -> Result<()> {
    let gpu = gpu();
    let activation = if silu { Activation::Silu } else { Activation::None };
    for (precision, products) in precisions() {
        let norm = NormCase::new(maps, (groups, EPS), (activation, add), 0.0, normals);
        let mut case = ModulatedCase::new(norm, normals)?;
        let ModulatedCase { norm: NormCase { x, dy, more, .. }, by } = &mut case;
        for values in [x, dy, by].into_iter().chain(more) {
            *values = held(values, precision);
        }
        let expected = case.expected(usize::MAX)?;
        let stored = Products { stored: products.stored + rounding::F32, ..products };
        let check = |name: &str, found: &Tensor| {
            let of_name = |(other, ..): &&(&str, Tensor, Tensor)| *other == name;
            let (_, exact, bound) = expected.iter().find(of_name).expect("a result of this name");
            let bound = match name {
                "dweight" | "dbias" => bound.clone(),
                _ => (plus([bound.clone(), stored.storing(exact)]) * 1.01).unwrap(),
            };
            check(&format!("{precision}, modulated, {name}"), found, exact, &bound);
        };

        let ModulatedCase { norm: NormCase { config, x, weight, bias, dy, more }, by } = &case;
        let (batch, h, w, channels) = x.dims4()?;
        let dims = [batch, h, w, channels];
        let (weight, bias) = (weight.to_device(&device(&gpu))?, bias.to_device(&device(&gpu))?);
        let by = map(&gpu, &by.unsqueeze(1)?.unsqueeze(1)?, precision)?;
        let norm = Norm {
            element: Element::of(precision),
            dims,
            config: *config,
            weight: &weight,
            bias: &bias,
            by: Some(&by),
        };
        let gx = map(&gpu, x, precision)?;
        let (y, statistics) = norm.forward(&gpu, &gx, None)?;
        check("y", &unmap(&gpu, &y, dims, precision)?);
        let again = norm.again(&gpu, &gx, &statistics)?;
        check("again", &unmap(&gpu, &again, dims, precision)?);

        let d = map(&gpu, dy, precision)?;
        let more = more.as_ref().map(|more| map(&gpu, more, precision)).transpose()?;
        let NormGradients { of_vectors, by: d_by, .. } =
            norm.backward(&gpu, (&gx, &statistics), &d, more.as_ref())?;
        let [for_weight, for_bias] = summed(&gpu, of_vectors, batch, &weight)?;
        let d_by = d_by.expect("the gradient of scales and shifts");
        let d_by = unmap(&gpu, &d_by, [batch, 1, 1, 2 * channels], precision)?;
        check("dx", &unmap(&gpu, &d, dims, precision)?);
        check("dweight", &for_weight);
        check("dbias", &for_bias);
        check("dby", &d_by.reshape((batch, 2 * channels))?);
    }
    Ok(())
}

fn linear_layer_agrees(
    (batch, input, output): (usize, usize, usize),
    activation: i32,
    normals: Normals,
) -> Result<()> {
    let gpu = gpu();
    for (precision, products) in precisions() {
        // The products are those of f32 operands. The output is stored in the type of maps.
        let products = Products { operands: 0.0, ..products };
        let normal = |k, shape: &[usize]| normal(normals, k, shape, precision);
        let name = |what: &str| format!("{precision}, {what}");
        let x = normal(0, &[batch, input]);
        let (weight, bias) = (normal(1, &[output, input]), normal(2, &[output]));
        let dy = normal(3, &[batch, output]);
        let activated = |x: &Tensor| match activation {
            0 => Ok(x.clone()),
            1 => x.silu(),
            _ => x.gelu_erf(),
        };
        let linear = |v: &[Tensor]| crate::kernels::linear(&v[0], &v[1], &v[2]);
        let inputs = [x.clone(), weight.clone(), bias.clone()];
        let exact = value_and_gradients(
            DType::F64,
            &inputs,
            |_| dy.clone(),
            |v| linear(&[activated(&v[0])?, v[1].clone(), v[2].clone()]),
        )?;
        let x_64 = x.to_dtype(DType::F64)?;
        let activated = activated(&x_64)?;
        let function = if activation == 0 { 0.0 } else { FUNCTION * rounding::F32 };
        let x_off = (x_64.abs()? * function)?;
        let inputs = [activated, weight.to_dtype(DType::F64)?, bias.to_dtype(DType::F64)?];
        let sums = Sums::of(&inputs, |_| dy.clone(), linear, linear)?;
        let [weights, d] = [&weight, &dy].map(|t| t.to_dtype(DType::F64).unwrap().abs().unwrap());
        let stored = (sums[0].exact.abs()? * 2.0)?.broadcast_add(&inputs[2].abs()?)?;
        // The derivatives of SiLU and GELU are at most 1.13.
        let slope = if activation == 0 { 1.0 } else { 1.13 };
        let dx = plus([products.of(&sums[1]), products.storing(&sums[1].magnitude)]);
        let through = (&sums[1].magnitude * ((x_64.abs()? + 1.0)? * function)?)?;
        let bounds = [
            plus([products.of(&sums[0]), x_off.matmul(&weights.t()?)?, products.storing(&stored)]),
            plus([(dx * slope)?, through, products.storing(&exact[1])]),
            plus([products.of(&sums[2]), d.t()?.matmul(&x_off)?]),
            products.of(&sums[3]),
        ]
        .map(|bound| (bound * 1.05).unwrap());
        let check = |what: &str, found: &Tensor, i: usize| {
            check(&name(what), found, &exact[i], &bounds[i]);
        };

        let vector = |t: &Tensor| map(&gpu, &t.unsqueeze(1)?.unsqueeze(1)?, precision);
        let (weight, bias) = (weight.to_device(&device(&gpu))?, bias.to_device(&device(&gpu))?);
        let element = Element::of(precision);
        let layer = LinearLayer { element, batch, weight: &weight, bias: &bias, activation };
        let gx = Rc::new(vector(&x)?);
        let y = layer.forward(&gpu, &gx)?;
        check("linear", &unmap(&gpu, &y, [batch, 1, 1, output], precision)?, 0);
        let dy = Rc::new(vector(&dy)?);
        let of_layer = |dy: &Rc<Memory>| -> Result<_> {
            let (weight, bias) = (weight.zeros_like()?, bias.zeros_like()?);
            Ok(WeightGradient { x: gx.clone(), dy: dy.clone(), activation, weight, bias })
        };
        // More layers than one launch handles.
        let all = (0..66).map(|_| of_layer(&dy)).collect::<Result<Vec<_>>>()?;
        weight_gradients(&gpu, batch, &all, element)?;
        for own in [&all[0], &all[65]] {
            check("linear's gradient of the weight", &own.weight, 2);
            check("linear's gradient of the bias", &own.bias, 3);
        }
        let layers = vec![(dy, weight.clone())];
        let mut dx = InputGradient { x: gx, batch, input, activation, layers };
        let of_one = unmap(&gpu, &dx.compute(&gpu, element)?, [batch, 1, 1, input], precision)?;
        check("linear's gradient of x", &of_one, 1);
        // Twice the same layer: each result doubles, exactly.
        let same = dx.clone();
        assert!(dx.join(&same));
        let of_two = unmap(&gpu, &dx.compute(&gpu, element)?, [batch, 1, 1, input], precision)?;
        let twice = held(&(&of_one * 2.0)?, precision);
        // Of numbers below the normal ones of f16, the double may have a digit more.
        let more = (of_two - twice)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(more <= 6e-8, "{precision}: {more}");
    }
    Ok(())
}

/// Blocks compute smaller tiles of the output if there are few vectors.
#[test]
fn vectors_have_the_same_bits_in_each_batch() -> Result<()> {
    let gpu = gpu();
    for (input, output) in [(300, 260), (131, 258)] {
        for (precision, _) in precisions() {
            let normal = |k: u32, shape: &[usize]| normal(Normals(3), k, shape, precision);
            let there = |t: Tensor| t.to_device(&device(&gpu));
            let (weight, bias) =
                (there(normal(1, &[output, input]))?, there(normal(2, &[output]))?);
            let x = normal(0, &[70, input]);
            let of_first = |batch: usize| -> Result<Vec<f32>> {
                let x = map(&gpu, &x.narrow(0, 0, batch)?.unsqueeze(1)?.unsqueeze(1)?, precision)?;
                let (element, activation) = (Element::of(precision), 1);
                let layer =
                    LinearLayer { element, batch, weight: &weight, bias: &bias, activation };
                let y = layer.forward(&gpu, &x)?;
                unmap(&gpu, &y, [batch, 1, 1, output], precision)?.flatten_all()?.to_vec1()
            };
            let all = of_first(70)?;
            for batch in [1, 16, 40] {
                assert_eq!(of_first(batch)?, all[..batch * output], "{precision}, {batch}");
            }
        }
    }
    Ok(())
}

/// Such groups have a deviation of 0, and gradients that consist of rounding errors.
#[test]
fn normalisations_of_one_value_are_their_compositions() {
    for how in [(false, false, EPS), (true, true, EPS)] {
        normalisation_agrees((2, 1, 1), (3, 1), how, Normals(9)).unwrap();
    }
}

#[test]
fn a_normalisation_of_one_pixel_is_its_composition() {
    normalisation_agrees((1, 1, 1), (1, 37), (false, false, EPS), Normals(9)).unwrap();
}

/// Images of several parts, whose lines have several groups or one. A group of 1,039 channels has more packs than a
/// block has threads, and a map of 32x32 pixels has one part although its lines do not fit into registers.
#[test]
fn normalisations_of_large_maps_are_their_compositions() {
    for ((h, w), groups) in
        [((33, 33), (16, 4)), ((33, 33), (64, 1)), ((33, 33), (2, 36)), ((32, 32), (1, 80))]
    {
        for how in [(false, false, EPS), (true, true, EPS)] {
            normalisation_agrees((2, h, w), groups, how, Normals(5)).unwrap();
        }
    }
    normalisation_agrees((1, 33, 33), (1, 1039), (true, false, EPS), Normals(5)).unwrap();
}

#[test]
fn modulated_normalisations_of_large_maps_are_their_compositions() {
    modulated_normalisation_agrees([2, 33, 33], [16, 4], (true, true), Normals(5)).unwrap();
}

/// The first and the last convolution of networks, in parts of the output's pixels and with several tiles.
#[test]
fn convolutions_of_images_are_their_compositions() {
    for (c_in, c_out) in [(1, 32), (3, 40), (5, 7), (7, 66), (40, 3), (66, 1), (4, 4)] {
        for scale in [Scale::Stride(1), Scale::Stride(2), Scale::Upsample] {
            let added = (false, false, c_in > 4);
            convolution_agrees((2, 9, 10), (c_in, c_out), 3, scale, added, Normals(7)).unwrap();
        }
    }
    let added = (true, true, true);
    convolution_agrees((1, 11, 8), (3, 6), 7, Scale::Stride(2), added, Normals(8)).unwrap();
}

proptest! {
    #![proptest_config(inputs(24))]

    #[test]
    fn convolutions_are_their_compositions(
        maps in (1usize..4, 1usize..7, 1usize..7),
        channels in prop_oneof![(1usize..10, 1usize..10), Just((8, 16)), Just((24, 8)), Just((3, 264))],
        kernel in prop_oneof![Just(1usize), Just(3)],
        scale in prop_oneof![
            Just(Scale::Stride(1)), Just(Scale::Stride(2)), Just(Scale::StrideFromEdge(2)), Just(Scale::Upsample),
        ],
        added in any::<(bool, bool, bool)>(),
        seed: u64,
    ) {
        convolution_agrees(maps, channels, kernel, scale, added, Normals(seed)).unwrap();
    }

    #[test]
    fn normalisations_are_their_compositions(
        maps in (1usize..4, 1usize..7, 1usize..7),
        // One, four or eight values per thread; fewer values than the threads of a block, and more.
        groups in prop_oneof![
            5 => (1usize..9, prop_oneof![1usize..5, Just(8), Just(16), Just(37), Just(300)]),
            1 => Just((1, 259)),
            1 => Just((1, 2056)),
        ],
        how in (any::<bool>(), any::<bool>(), prop_oneof![Just(EPS), Just(1e-6)]),
        seed: u64,
    ) {
        normalisation_agrees(maps, groups, how, Normals(seed)).unwrap();
    }

    #[test]
    fn modulated_normalisations_are_their_compositions(
        maps in [1usize..4, 1usize..7, 1usize..7],
        groups in (1usize..9, prop_oneof![1usize..5, Just(8), Just(16), Just(37)]),
        how: (bool, bool),
        seed: u64,
    ) {
        let groups = [groups.0, groups.1];
        modulated_normalisation_agrees(maps, groups, how, Normals(seed)).unwrap();
    }

    #[test]
    fn linear_layers_are_their_compositions(
        // Sums and tiles of one part, and of several.
        batch in prop_oneof![4 => 1usize..4, 1 => Just(33), 1 => Just(70)],
        (input, output) in prop_oneof![
            4 => (1usize..20, 1usize..20), 1 => Just((8, 272)), 2 => Just((40, 70)), 1 => Just((262, 12)),
        ],
        activation in 0i32..3,
        seed: u64,
    ) {
        linear_layer_agrees((batch, input, output), activation, Normals(seed)).unwrap();
    }
}
