//! One table for all backends: compares each operation with the reference in f64 on the CPU.

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;

use super::reference::Reference;
use super::*;
use crate::error::Result;
use crate::kernels::op::loss::Loss;
use crate::kernels::tests::{F32, Normals, check};
use crate::random::{Noise, Purpose};
use crate::random_inputs::inputs;

/// Returns each device for which this build has kernels.
fn devices() -> Vec<Device> {
    vec![
        Device::Cpu,
        #[cfg(feature = "cuda")]
        Device::new_cuda(0).unwrap(),
    ]
}

/// Returns whether candle's own kernels run on a device. The libraries that stand in for CUDA lack them.
fn has_candle(device: &Device) -> bool {
    device.is_cpu() || std::env::var_os("STAND_IN").is_none()
}

fn exact(t: &Tensor) -> Tensor {
    t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    exact(t).flatten_all().unwrap().to_vec1().unwrap()
}

/// The error of `count` roundings of terms with these magnitudes.
fn roundings(count: f64, size: &Tensor) -> Tensor {
    (size.abs().unwrap() * (count * F32)).unwrap()
}

/// The error bound of `a x + b y`: three roundings, of each term's factor, product and sum.
fn of_combined(x: &Tensor, a: f64, y: &Tensor, b: f64) -> Tensor {
    let (x, y) = (x.abs().unwrap(), y.abs().unwrap());
    roundings(3.001, &Reference.combine(&x, a.abs(), &y, b.abs()).unwrap())
}

proptest! {
    #![proptest_config(inputs(32))]

    #[test]
    fn operations_are_those_of_the_reference(
        batch in 1usize..5,
        len in prop_oneof![1usize..9, 3000usize..9000],
        (a, b) in (-2f64..2.0, -2f64..2.0),
        seed: u64,
    ) {
        let [x32, y32] = [0, 1].map(|k| Normals(seed).tensor(k, &[batch, len]));
        let [x64, y64] = [&x32, &y32].map(exact);
        for device in devices() {
            let [x, y] = [&x32, &y32].map(|t| t.to_device(&device).unwrap());
            let backend = of(&x);

            let found = backend.combine(&x, a, &y, b).unwrap();
            let bound = of_combined(&x64, a, &y64, b);
            let expected = Reference.combine(&x64, a, &y64, b).unwrap();
            check("combined", &found, &expected, &bound);
            if has_candle(&device) {
                let var = Var::from_tensor(&x).unwrap();
                let differentiable = backend.combine(&var, a, &y, b).unwrap();
                prop_assert!(differentiable.track_op());
                check("differentiable", &differentiable, &expected, &bound);
                let finite = backend.finiteness(&differentiable).unwrap();
                prop_assert_eq!(values(&finite), [0.0]);
            }

            let bars: Vec<f64> = (0..batch).map(|k| 0.9 - 0.2 * k as f64).collect();
            let factors = |bar: f64| [bar.sqrt(), -(1.0 - bar).sqrt()];
            let rates = Rates { alpha_bars: &bars, factors: &factors };
            let t = Tensor::from_vec((0..batch as u32).rev().collect(), batch, &Device::Cpu).unwrap();
            let on_device = t.to_device(&device).unwrap();
            let found = backend.mix(&x, &y, &on_device, rates).unwrap();
            let expected = Reference.mix(&x64, &y64, &t, rates).unwrap();
            for k in 0..batch {
                let [a, b] = factors(bars[batch - 1 - k]);
                let [x, y] = [&x64, &y64].map(|t| t.get(k).unwrap());
                let [found, expected] = [&found, &expected].map(|t| t.get(k).unwrap());
                check("mixed", &found, &expected, &of_combined(&x, a, &y, b));
                check("specified", &expected, &Reference.combine(&x, a, &y, b).unwrap(),
                    &roundings(1e-6, &expected));
            }

            let found = backend.clamp(&x, -0.5, 0.7).unwrap();
            prop_assert_eq!(values(&found), values(&x32.clamp(-0.5f32, 0.7f32).unwrap()));

            let scale = Tensor::new(b as f32, &device).unwrap();
            let (loss, gradient) = backend.squared_error(&x, &y, 0.3, Some(&scale)).unwrap();
            let scale = Tensor::new(b as f32, &Device::Cpu).unwrap();
            let (exact_loss, exact_gradient) =
                Reference.squared_error(&x64, &y64, 0.3, Some(&scale)).unwrap();
            check("loss", &loss, &exact_loss, &roundings(3.001, &exact_loss));
            // Four roundings at most: of the difference, of the factor, and of the products with factor and scale.
            check("gradient", &gradient, &exact_gradient, &roundings(4.001, &exact_gradient));

            let weights = Tensor::from_vec(bars.clone(), batch, &Device::Cpu).unwrap();
            let weights32 = weights.to_dtype(DType::F32).unwrap();
            let weights64 = exact(&weights32);
            let on_device = weights32.to_device(&device).unwrap();
            let no_candle = !has_candle(&device);
            for own in [Loss::Mse, Loss::L1, Loss::Huber { delta: 0.5 }] {
                if no_candle {
                    break;
                }
                let (loss, gradient) = backend.loss(own, [&x, &on_device], 0.3, None).unwrap();
                let (exact_loss, exact_gradient) =
                    Reference.loss(own, [&x64, &weights64], 0.3, None).unwrap();
                // Each value is rounded four times, and the sum over a few hundred values once per value at most.
                let near = |found: &Tensor, expected: &Tensor| {
                    let pairs = values(found).into_iter().zip(values(expected));
                    pairs.into_iter().all(|(a, b)| (a - b).abs() <= 2e-5 * b.abs().max(1e-3))
                };
                prop_assert!(near(&loss, &exact_loss), "{own:?}");
                prop_assert!(near(&gradient, &exact_gradient), "{own:?}");
            }

            prop_assert_eq!(values(&backend.finiteness(&x).unwrap()), [0.0]);
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut row = values(&x64);
                row[len / 2] = bad;
                let bad = Tensor::from_vec(row, (batch, len), &Device::Cpu).unwrap();
                let all = [DType::F32, DType::F64, DType::BF16, DType::F16];
                for &dtype in &all[..if has_candle(&device) { 4 } else { 1 }] {
                    let bad = bad.to_dtype(dtype).unwrap().to_device(&device).unwrap();
                    let flag = of(&bad).finiteness(&bad).unwrap();
                    prop_assert!(values(&flag)[0].is_nan(), "{bad:?}");
                }
            }

            let mut sum = x.copy().unwrap();
            let shared = sum.clone();
            backend.add_to(&mut sum, &y).unwrap();
            let mut expected = x64.clone();
            Reference.add_to(&mut expected, &y64).unwrap();
            check("sum in place", &sum, &expected, &roundings(1.0, &expected));
            prop_assert_eq!(values(&sum), values(&shared));
        }
    }
}

#[test]
fn uploads_and_normals_are_those_of_the_reference() -> Result<()> {
    for device in devices() {
        let backend = on(&device, DType::F32);
        let pixels: Vec<f32> = (0..24).map(|i| i as f32 - 7.5).collect();
        let found = backend.upload(pixels.clone(), &[2, 3, 4], &device)?;
        assert_eq!((found.dims(), found.dtype()), (&[2, 3, 4][..], DType::F32));
        assert_eq!(values(&found), pixels.into_iter().map(f64::from).collect::<Vec<_>>());
        let found = backend.upload_integers(vec![3, 999], &device)?;
        assert_eq!((found.dims(), found.dtype()), (&[2][..], DType::U32));
        assert_eq!(values(&found), [3.0, 999.0]);

        let at = Noise::new(3).address(Purpose::Prior, 0, 9);
        let [four, last] =
            [(0, 4), (3, 1)].map(|(first, n)| backend.normal(at, first, &[n, 3, 5], &device));
        let (four, last) = (values(&four?), values(&last?));
        // The numbers of an image do not depend on its batch.
        assert_eq!(four[45..], last);
        assert_ne!(four[..15], four[15..30]);
        let expected = values(&Reference.normal(at, 0, &[4, 3, 5], &Device::Cpu)?);
        let near = four.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near, "{device:?}: {four:?}, not {expected:?}");
    }
    Ok(())
}

const RULE: UpdateRule = UpdateRule {
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    l2: 0.0,
    decoupled: 0.0,
    max_norm: f64::INFINITY,
    average: None,
    scale: None,
    muon: None,
};

/// Every setting of an update, alone and in combination.
fn rules() -> Vec<UpdateRule> {
    let average = |warmup| Some(AverageRule { decay: 0.75, warmup });
    let scale = Some(ScaleRule {
        growth_factor: 2.0,
        growth_interval: 2,
        backoff_factor: 0.5,
        min_scale: 4.0,
    });
    vec![
        RULE,
        UpdateRule { l2: 0.1, ..RULE },
        UpdateRule { decoupled: 0.1, eps: 1e-3, ..RULE },
        UpdateRule { max_norm: 0.5, average: average(true), ..RULE },
        UpdateRule { max_norm: 1e9, average: average(false), beta1: 0.5, ..RULE },
        UpdateRule { scale, ..RULE },
        UpdateRule { scale, max_norm: 0.5, average: average(true), l2: 0.1, ..RULE },
    ]
}

/// Weights, moments and averages. One of the weights has no gradient.
struct Run {
    weights: Vec<Var>,
    means: Vec<Tensor>,
    squares: Vec<Tensor>,
    averages: Vec<Tensor>,
    counters: Counters,
    updater: Box<dyn Updater>,
}

/// One weight is larger than the share of a thread, and than a block of the device.
const SIZES: [usize; 3] = [3, 40_000, 5];

impl Run {
    fn new(device: &Device, dtype: DType) -> Result<Self> {
        let of_each = |f: &dyn Fn(u32, usize) -> Result<Tensor>| -> Result<Vec<Tensor>> {
            (0..).zip(SIZES).map(|(k, size)| f(k, size)).collect()
        };
        let place = |t: Tensor| -> Result<Tensor> { Ok(t.to_dtype(dtype)?.to_device(device)?) };
        let normal = |k, size| place(Normals(1).tensor(k, &[size]));
        let zero = |_, size| place(Tensor::zeros(size, dtype, &Device::Cpu)?);
        let weights = of_each(&normal)?;
        Ok(Self {
            averages: weights.iter().map(Tensor::copy).collect::<candle_core::Result<_>>()?,
            weights: weights.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?,
            means: of_each(&zero)?,
            squares: of_each(&zero)?,
            counters: Counters { scale: 64.0, ..Counters::default() },
            updater: on(device, dtype).updater(device),
        })
    }

    /// Makes an update with gradients of this scale and a learning rate of 0.01. Returns the norm.
    fn update(&mut self, rule: &UpdateRule, step: u32, size: f64) -> Result<f64> {
        let like = |var: &Var, t: Tensor| -> Result<Tensor> {
            Ok(t.to_dtype(var.dtype())?.to_device(var.device())?)
        };
        let scale = if rule.scale.is_some() { self.counters.scale } else { 1.0 };
        let mut gradients = Vec::new();
        for (k, var) in (0..).zip(&self.weights[..2]) {
            let gradient = Normals(2 + u64::from(step)).tensor(k, var.dims()).affine(size, 0.0)?;
            gradients.push(like(var, (gradient * scale)?)?);
        }
        let mut gradients = gradients.iter_mut();
        let states = self.means.iter_mut().zip(&mut self.squares).zip(&mut self.averages);
        let states = self.weights.iter().zip(states).map(|(weight, ((mean, square), average))| {
            let average = rule.average.map(|_| average);
            let square = Some(square);
            WeightState { weight, mean, square, gradient: gradients.next(), average }
        });
        let norm = self.updater.update(states.collect(), rule, 1e-2, &mut self.counters)?;
        self.counters = self.updater.read(&self.counters)?;
        self.updater.assume(&self.counters);
        Ok(values(&norm)[0])
    }
}

#[test]
fn updates_are_those_of_the_reference() -> Result<()> {
    for (case, rule) in rules().into_iter().enumerate() {
        // The two infinite ones overflow. Only a run with a scaler can skip them.
        let sizes = [0.1, 3.0, 0.1, 1e-3, f64::INFINITY, f64::INFINITY, 0.2, 0.1];
        let sizes = if rule.scale.is_some() { &sizes[..] } else { &sizes[..4] };
        for device in devices() {
            let mut expected = Run::new(&Device::Cpu, DType::F64)?;
            let mut found = Run::new(&device, DType::F32)?;
            for (step, &size) in (0..).zip(sizes) {
                let [norm, theirs] =
                    [&mut expected, &mut found].map(|run| run.update(&rule, step, size));
                let (norm, theirs) = (norm?, theirs?);
                let same = (theirs / norm - 1.0).abs() < 1e-6;
                assert!(same || !norm.is_finite() && !theirs.is_finite(), "{norm}, {theirs}");
                assert_eq!(found.counters, expected.counters, "{device:?}, {rule:?}");
            }
            for k in 0..SIZES.len() {
                for (what, ours, theirs) in [
                    ("weight", expected.weights[k].as_tensor(), found.weights[k].as_tensor()),
                    ("mean", &expected.means[k], &found.means[k]),
                    ("square", &expected.squares[k], &found.squares[k]),
                    ("average", &expected.averages[k], &found.averages[k]),
                ] {
                    for (ours, theirs) in values(ours).into_iter().zip(values(theirs)) {
                        let off = (ours - theirs).abs();
                        assert!(
                            off < 2e-6 * ours.abs().max(1.0),
                            "{device:?}, case {case}: {what} {k}"
                        );
                    }
                }
            }
            let counted = found.counters;
            assert_eq!(counted.skipped, if rule.scale.is_some() { 2 } else { 0 }, "case {case}");
            assert_eq!(counted.updates + counted.skipped, sizes.len() as u64);
            assert_eq!(
                counted.average_updates,
                if rule.average.is_some() { counted.updates } else { 0 }
            );
        }
    }
    Ok(())
}

/// Matrices of one shape are orthogonalised together, wherever they are among the other weights. The largest ones are
/// divided among blocks of the device.
#[test]
fn matrices_are_updated_by_muon_as_by_the_reference() -> Result<()> {
    /// The shapes of the weights, and whether Muon updates them.
    const WEIGHTS: [(&[usize], bool); 9] = [
        (&[72, 64], true),
        (&[5000], false),
        (&[40, 24], true),
        (&[24, 8, 3, 3], true),
        (&[72, 64], true),
        (&[16, 3], false),
        (&[40, 24], true),
        (&[7], false),
        (&[16, 16], true),
    ];
    /// A matrix and another weight that have no gradient in the first update.
    const LATE: [usize; 2] = [4, 5];
    let scale =
        ScaleRule { growth_factor: 2.0, growth_interval: 9, backoff_factor: 0.5, min_scale: 1.0 };
    let muon = Some(MuonRule { momentum: 0.9, nesterov: true, decoupled: 0.1 });
    let average = Some(AverageRule { decay: 0.75, warmup: false });
    let rule = UpdateRule { muon, average, max_norm: 0.5, scale: Some(scale), ..RULE };
    let run = |device: &Device, dtype: DType| -> Result<(Vec<Vec<f64>>, Counters)> {
        let of_each = |f: &dyn Fn(u32, &[usize]) -> Result<Tensor>| -> Result<Vec<Tensor>> {
            (0..).zip(WEIGHTS).map(|(k, (dims, _))| f(k, dims)).collect()
        };
        let place = |t: Tensor| -> Result<Tensor> { Ok(t.to_dtype(dtype)?.to_device(device)?) };
        let weights: Vec<Var> = of_each(&|k, dims| place(Normals(1).tensor(k, dims)))?
            .iter()
            .map(Var::from_tensor)
            .collect::<candle_core::Result<_>>()?;
        let zeros = || of_each(&|_, dims| place(Tensor::zeros(dims, dtype, device)?));
        let (mut means, mut squares, mut averages) = (zeros()?, zeros()?, zeros()?);
        let mut counters = Counters { scale: 64.0, ..Counters::default() };
        let mut updater = on(device, dtype).updater(device);
        // The infinite one is skipped.
        for (step, size) in (0..).zip([0.1, f64::INFINITY, 3.0]) {
            let mut gradients = of_each(&|k, dims| {
                let gradient = Normals(2 + step).tensor(k, dims).affine(size, 0.0)?;
                place((gradient * counters.scale)?)
            })?;
            let states = means.iter_mut().zip(&mut squares).zip(&mut averages);
            let states = weights.iter().zip(&mut gradients).zip(states).enumerate();
            let states = states.map(|(k, ((weight, gradient), ((mean, square), average)))| {
                let gradient = (step > 0 || !LATE.contains(&k)).then_some(gradient);
                let square = (!WEIGHTS[k].1).then_some(square);
                WeightState { weight, mean, square, gradient, average: Some(average) }
            });
            updater.update(states.collect(), &rule, 1e-2, &mut counters)?;
            counters = updater.read(&counters)?;
            updater.assume(&counters);
        }
        let weights = weights.iter().map(|var| values(var));
        let states = means.iter().chain(&squares).chain(&averages).map(values);
        Ok((weights.chain(states).collect(), counters))
    };
    let (expected, counters) = run(&Device::Cpu, DType::F64)?;
    assert_eq!((counters.updates, counters.skipped), (2, 1));
    for device in devices() {
        let (found, theirs) = run(&device, DType::F32)?;
        assert_eq!(theirs, counters, "{device:?}");
        for (k, (expected, found)) in expected.iter().zip(&found).enumerate() {
            for (ours, theirs) in expected.iter().zip(found) {
                // The matrices are far from rank 1.
                assert!((ours - theirs).abs() < 2e-5, "{device:?}, {k}: {ours}, {theirs}");
            }
        }
    }
    Ok(())
}
