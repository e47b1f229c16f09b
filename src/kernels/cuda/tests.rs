//! Each kernel, in each type of map, against its reference composition in f64, on random shapes.

use std::rc::Rc;

use candle_core::{DType, Device, Result, Tensor, Var};
use proptest::prelude::*;

use super::*;
use crate::kernels::{Activation, Scale};
use crate::noise::{Noise, Purpose};

/// What maps of a precision may be off by: a rounding or two, and what sums add to it.
fn precisions() -> Vec<(Precision, f64)> {
    let mut all = vec![(Precision::Highest, 3e-6), (Precision::High, 2e-3)];
    if cfg!(feature = "f16") {
        all.extend([(Precision::BF16, 1.5e-2), (Precision::F16, 2e-3)]);
    }
    all
}

fn gpu() -> Rc<Gpu> {
    thread_local! {
        static DEVICE: Device = Device::new_cuda(0).unwrap();
    }
    DEVICE.with(|device| Gpu::of(device).unwrap())
}

fn device(gpu: &Gpu) -> Device {
    Device::Cuda(gpu.device.clone())
}

/// Normals that a map of this precision holds exactly, so that only what is computed is off.
fn normal(k: u64, shape: &[usize], precision: Precision) -> Tensor {
    let dtype = match precision {
        Precision::BF16 => DType::BF16,
        Precision::F16 => DType::F16,
        _ => DType::F32,
    };
    let values = Noise::new(9).normal(Purpose::Prior, k, shape, &Device::Cpu).unwrap();
    values.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
}

/// A map (batch, height, width, channels) on the device.
fn map(gpu: &Rc<Gpu>, x: &Tensor, precision: Precision) -> Result<Memory> {
    let images = x.permute((0, 3, 1, 2))?.contiguous()?.to_device(&device(gpu))?;
    gpu.images_to_map(&images, Element::of(precision))
}

fn unmap(gpu: &Gpu, x: &Memory, dims: [usize; 4], precision: Precision) -> Result<Tensor> {
    let images = gpu.map_to_images(x, dims, Element::of(precision))?;
    images.to_device(&Device::Cpu)?.permute((0, 2, 3, 1))?.contiguous()
}

/// The value of `f` in f64, and its gradients for `dy`.
fn reference(
    inputs: &[&Tensor],
    dy: &Tensor,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let vars: Vec<Var> =
        inputs.iter().map(|x| Var::from_tensor(&x.to_dtype(DType::F64)?)).collect::<Result<_>>()?;
    let inputs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = f(&inputs)?;
    let gradients = (&y * dy.to_dtype(DType::F64)?)?.sum_all()?.backward()?;
    let mut all = vec![y.detach()];
    for var in &vars {
        all.push(gradients.get(var).expect("a gradient").clone());
    }
    Ok(all)
}

fn agree(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.elem_count(), expected.elem_count(), "{what}");
    let flat = |t: &Tensor| -> Vec<f64> {
        let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        t.flatten_all().unwrap().to_vec1().unwrap()
    };
    let (found, expected) = (flat(found), flat(expected));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
    let limit = tolerance * (1.0 + norm(&mut expected.iter().copied()));
    assert!(error <= limit, "{what}: off by {error:e}, more than {limit:e}");
}

#[test]
fn devices_lack_precisions() {
    for precision in [Precision::Highest, Precision::High, Precision::F16] {
        check_precision(precision, (7, 0)).unwrap();
    }
    check_precision(Precision::BF16, (8, 0)).unwrap();
    let message = check_precision(Precision::BF16, (7, 5)).unwrap_err().to_string();
    assert!(message.contains("capability 7.5: bf16 is for 8.0"), "{message}");
}

#[test]
fn kernels_refuse_other_arguments() {
    let gpu = gpu();
    let launch =
        gpu.launch(Element::F32, "cast", each(1).unwrap(), (Pointer::NONE, Pointer::NONE, 1u64));
    let message = launch.unwrap_err().to_string();
    assert!(message.contains(r#"cast takes ["*", "*", "u32"]"#), "{message}");
}

/// Of the networks' convolutions only the first and the last may go without cuDNN, whose channels are few:
/// to refuse others would be slow, and silent.
#[cfg(feature = "cudnn")]
#[test]
fn cudnn_has_a_plan_for_each_convolution() {
    let gpu = gpu();
    let Some(cudnn) = &gpu.cudnn else { return };
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
            let convolution = Convolution::new(precision, x, &weight, scale).unwrap();
            assert!(cudnn.plan(&convolution.shape()).is_some(), "{precision}: {convolution:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn convolutions_are_their_compositions(
        (batch, h, w) in (1usize..4, 1usize..7, 1usize..7),
        (c_in, c_out) in prop_oneof![(1usize..10, 1usize..10), Just((8, 16)), Just((24, 8)), Just((3, 264))],
        kernel in prop_oneof![Just(1usize), Just(3)],
        scale in prop_oneof![Just(Scale::Stride(1)), Just(Scale::Stride(2)), Just(Scale::Upsample)],
        (per_image, residual, accumulate) in any::<(bool, bool, bool)>(),
    ) {
        let gpu = gpu();
        for (precision, tolerance) in precisions() {
            let dims = [batch, h, w, c_in];
            let x = normal(0, &dims, precision);
            let weight = normal(1, &[c_out, c_in, kernel, kernel], precision);
            let on_gpu = |t: &Tensor| t.to_device(&device(&gpu)).unwrap();
            let gpu_weight = on_gpu(&weight);
            let bias = normal(2, &[c_out], precision);
            let convolution = Convolution::new(precision, dims, &gpu_weight, scale).unwrap();
            let out = convolution.output();
            let per = per_image.then(|| normal(3, &[batch, 1, 1, c_out], precision));
            let more = residual.then(|| normal(4, &out, precision));
            let dy = normal(5, &out, precision);
            let expected = reference(&[&x, &weight, &bias], &dy, |inputs| {
                let [x, weight, bias] = inputs else { unreachable!() };
                let mut y = crate::kernels::conv2d(x, weight, bias, scale)?;
                if let Some(per) = &per {
                    y = y.broadcast_add(&per.to_dtype(DType::F64)?)?;
                }
                if let Some(more) = &more {
                    y = (y + more.to_dtype(DType::F64)?)?;
                }
                Ok(y)
            }).unwrap();

            let (gx, gdy) = (map(&gpu, &x, precision).unwrap(), map(&gpu, &dy, precision).unwrap());
            let [per, more] = [&per, &more].map(|t| t.as_ref().map(|t| map(&gpu, t, precision).unwrap()));
            let packed = convolution.pack(&gpu, &gpu_weight).unwrap();
            let added = Added {
                bias: &on_gpu(&bias),
                per_image: per.as_ref(),
                residual: more.as_ref(),
            };
            let y = convolution.forward(&gpu, &gx, &packed, &added).unwrap();
            let name = |what: &str| format!("{precision}, {what}");
            agree(&name("y"), &unmap(&gpu, &y, out, precision).unwrap(), &expected[0], tolerance);

            let gradient = on_gpu(&weight.zeros_like().unwrap());
            convolution.weight_gradient(&gpu, &gx, &gdy, &gradient).unwrap();
            agree(&name("gradient of the weight"), &gradient, &expected[2], tolerance);

            let gradient = on_gpu(&bias.zeros_like().unwrap());
            let sums = convolution.bias_gradient(&gpu, &gdy, &gradient, true).unwrap().unwrap();
            agree(&name("gradient of the bias"), &gradient, &expected[3], tolerance);
            let sums = unmap(&gpu, &sums, [batch, 1, 1, c_out], precision).unwrap();
            let by_image = dy.to_dtype(DType::F64).unwrap().sum((1, 2)).unwrap();
            agree(&name("sums by image"), &sums, &by_image, tolerance);

            let there = normal(6, &dims, precision);
            let dx = map(&gpu, &there, precision).unwrap();
            convolution.input_gradient(&gpu, &gdy, &packed, &dx, accumulate).unwrap();
            let mut sum = expected[1].clone();
            if accumulate {
                sum = (sum + there.to_dtype(DType::F64).unwrap()).unwrap();
            }
            let dx = unmap(&gpu, &dx, dims, precision).unwrap();
            agree(&name("gradient of x"), &dx, &sum, tolerance);
        }
    }

    #[test]
    fn normalisations_are_their_compositions(
        (batch, h, w) in (1usize..4, 1usize..7, 1usize..7),
        // Of values a thread one, four or eight; of threads less than a block, or more than one has.
        (groups, group) in prop_oneof![
            5 => (1usize..9, prop_oneof![1usize..5, Just(8), Just(16), Just(37), Just(300)]),
            1 => Just((1, 259)),
            1 => Just((1, 2056)),
        ],
        (silu, add) in any::<(bool, bool)>(),
    ) {
        let gpu = gpu();
        let dims = [batch, h, w, groups * group];
        let activation = if silu { Activation::Silu } else { Activation::None };
        for (precision, tolerance) in precisions() {
            let x = normal(0, &dims, precision);
            let [weight, bias] = [1, 2].map(|k| normal(k, &dims[3..], precision));
            let (dy, more) = (normal(3, &dims, precision), normal(4, &dims, precision));
            let mut expected = reference(&[&x, &weight, &bias], &dy, |inputs| {
                let [x, weight, bias] = inputs else { unreachable!() };
                crate::kernels::group_norm(x, groups, weight, bias, activation)
            }).unwrap();
            if add {
                expected[1] = (&expected[1] + more.to_dtype(DType::F64).unwrap()).unwrap();
            }

            let [gpu_weight, gpu_bias] = [&weight, &bias].map(|t| t.to_device(&device(&gpu)).unwrap());
            let norm = Norm { dims, groups, weight: &gpu_weight, bias: &gpu_bias, activation };
            let element = Element::of(precision);
            let gx = map(&gpu, &x, precision).unwrap();
            let (y, statistics) = gpu.normalize(&norm, &gx, element).unwrap();
            let name = |what: &str| format!("{precision}, {what}");
            agree(&name("y"), &unmap(&gpu, &y, dims, precision).unwrap(), &expected[0], tolerance);
            let again = gpu.normalize_again(&norm, &gx, &statistics, element).unwrap();
            let again = unmap(&gpu, &again, dims, precision).unwrap();
            agree(&name("y again"), &again, &expected[0], tolerance);

            let d = map(&gpu, &dy, precision).unwrap();
            let more = add.then(|| map(&gpu, &more, precision).unwrap());
            let gradients = [&gpu_weight, &gpu_bias].map(|t| t.zeros_like().unwrap());
            let [for_weight, for_bias] = &gradients;
            gpu.normalize_backward(
                &norm, &gx, &statistics, &d, more.as_ref(), [for_weight, for_bias], element,
            ).unwrap();
            let dx = unmap(&gpu, &d, dims, precision).unwrap();
            // One value alone has no deviation: what is left of x is rounding, times up to 300.
            let tolerance = if h * w * group == 1 { 1e-2_f64.max(tolerance) } else { tolerance };
            agree(&name("gradient of x"), &dx, &expected[1], tolerance);
            agree(&name("gradient of the weight"), for_weight, &expected[2], tolerance);
            agree(&name("gradient of the bias"), for_bias, &expected[3], tolerance);
        }
    }

    #[test]
    fn linear_layers_and_attention_are_their_compositions(
        (batch, positions, channels) in (1usize..4, 1usize..20, 1usize..12),
        (input, output) in prop_oneof![5 => (1usize..20, 1usize..20), 1 => Just((8, 272))],
        activation in 0i32..3,
    ) {
        let gpu = gpu();
        for (precision, tolerance) in precisions() {
            let name = |what: &str| format!("{precision}, {what}");
            // An intermediate is rounded, too.
            let tolerance = 2.0 * tolerance;
            let x = normal(0, &[batch, input], precision);
            let (weight, bias) = (normal(1, &[output, input], precision), normal(2, &[output], precision));
            let dy = normal(3, &[batch, output], precision);
            let expected = reference(&[&x, &weight, &bias], &dy, |inputs| {
                let [x, weight, bias] = inputs else { unreachable!() };
                let x = match activation {
                    0 => x.clone(),
                    1 => x.silu()?,
                    _ => x.gelu_erf()?,
                };
                crate::kernels::linear(&x, weight, bias)
            }).unwrap();
            let vector = |t: &Tensor| map(&gpu, &t.unsqueeze(1).unwrap().unsqueeze(1).unwrap(), precision).unwrap();
            let [gpu_weight, gpu_bias] = [&weight, &bias].map(|t| t.to_device(&device(&gpu)).unwrap());
            let layer =
                LinearLayer { precision, batch, weight: &gpu_weight, bias: &gpu_bias, activation };
            let gx = vector(&x);
            let y = layer.forward(&gpu, &gx).unwrap();
            let y = unmap(&gpu, &y, [batch, 1, 1, output], precision).unwrap();
            agree(&name("linear"), &y, &expected[0], tolerance);
            let gradients = [&gpu_weight, &gpu_bias].map(|t| t.zeros_like().unwrap());
            let dx = layer.backward(&gpu, &gx, &vector(&dy), [&gradients[0], &gradients[1]]).unwrap();
            let dx = unmap(&gpu, &dx, [batch, 1, 1, input], precision).unwrap();
            agree(&name("linear's gradient of x"), &dx, &expected[1], tolerance);
            agree(&name("linear's gradient of the weight"), &gradients[0], &expected[2], tolerance);
            agree(&name("linear's gradient of the bias"), &gradients[1], &expected[3], tolerance);

            let qkv = normal(4, &[batch, 1, positions, 3 * channels], precision);
            let dy = normal(5, &[batch, 1, positions, channels], precision);
            let expected = reference(&[&qkv], &dy, |inputs| {
                let part = |i: usize| inputs[0].squeeze(1)?.narrow(2, i * channels, channels)?.contiguous();
                crate::kernels::attention(&part(0)?, &part(1)?, &part(2)?)?.unsqueeze(1)
            }).unwrap();
            let attention = Attention { precision, batch, positions, channels };
            let gqkv = map(&gpu, &qkv, precision).unwrap();
            let y = attention.forward(&gpu, &gqkv).unwrap();
            let y = unmap(&gpu, &y, [batch, 1, positions, channels], precision).unwrap();
            agree(&name("attention"), &y, &expected[0], tolerance);
            let d = attention.backward(&gpu, &gqkv, &map(&gpu, &dy, precision).unwrap()).unwrap();
            let d = unmap(&gpu, &d, [batch, 1, positions, 3 * channels], precision).unwrap();
            agree(&name("attention's gradient"), &d, &expected[1], tolerance);
        }
    }
}
