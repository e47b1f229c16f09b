//! Samplers, compared with closed forms and with diffusers.
//!
//! For data that is normal with mean `m` and standard deviation `s` in every pixel, the best denoiser is known: `E[x_0
//! | x_t]` is linear in `x_t`. Every step of a solver is then linear, and the mean and variance of its result follow
//! exactly from its coefficients.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use ddpm::nn::from_fn;
use ddpm::process::Prediction;
use ddpm::sample::{DynamicThreshold, Ends, Resampling, Variance};
use ddpm::{Denoiser, Diffusion, Error, NoiseSchedule, Sampler, Solver};

/// Data that is normal in every pixel.
#[derive(Clone, Copy)]
struct Normal {
    mean: f64,
    std: f64,
}

const DATA: Normal = Normal { mean: 0.3, std: 0.5 };

/// Returns the best denoiser for such data.
fn gaussian(diffusion: &Diffusion, Normal { mean, std }: Normal) -> impl Denoiser + use<> {
    let (bars, prediction) = (diffusion.schedule().alpha_bars().to_vec(), diffusion.prediction());
    from_fn(move |x_t: &Tensor, t: &Tensor| {
        let bar = bars[t.to_vec1::<u32>()?[0] as usize];
        let (signal, noise) = (bar.sqrt(), (1.0 - bar).sqrt());
        let gain = std * std * signal / (bar * std * std + 1.0 - bar);
        let x_0 = x_t.affine(gain, mean * (1.0 - gain * signal))?;
        let eps = ((x_t - (&x_0 * signal)?)? / noise)?;
        Ok(match prediction {
            Prediction::Epsilon => eps,
            Prediction::Sample => x_0,
            Prediction::Velocity => ((eps * signal)? - (x_0 * noise)?)?,
            other => panic!("{other:?} is not known here"),
        })
    })
}

/// Computes the mean and variance of the result with the published formulae, in f64 for one pixel.
fn expected(
    data: Normal,
    schedule: &NoiseSchedule,
    timesteps: &[usize],
    solver: Solver,
) -> (f64, f64) {
    expected_from((0.0, 1.0), data, schedule, timesteps, solver)
}

/// Like [`expected`], for a start of this mean and variance.
fn expected_from(
    (mut mean, mut variance): (f64, f64),
    data: Normal,
    schedule: &NoiseSchedule,
    timesteps: &[usize],
    solver: Solver,
) -> (f64, f64) {
    for (i, &t) in timesteps.iter().enumerate() {
        let bar = schedule.alpha_bars()[t];
        let prev = timesteps.get(i + 1).map_or(1.0, |&t| schedule.alpha_bars()[t]);
        let (slope, offset, sigma2) = step(data, bar, prev, solver);
        (mean, variance) = (slope * mean + offset, slope * slope * variance + sigma2);
    }
    (mean, variance)
}

/// A step from the level `bar` to the level `prev`: the slope and the offset of its result, which is linear in x, and
/// the variance of its noise.
fn step(data: Normal, bar: f64, prev: f64, solver: Solver) -> (f64, f64, f64) {
    // x_0 = g x + h
    let g = data.std * data.std * bar.sqrt() / (bar * data.std * data.std + 1.0 - bar);
    let h = data.mean * (1.0 - g * bar.sqrt());
    // eps = e x + f
    let (e, f) =
        ((1.0 - bar.sqrt() * g) / (1.0 - bar).sqrt(), -bar.sqrt() * h / (1.0 - bar).sqrt());
    let beta = 1.0 - bar / prev;
    let posterior = beta * (1.0 - prev) / (1.0 - bar);
    match solver {
        Solver::Ddpm { variance } => {
            // Ho et al. 2020, equation 11: (x - beta / sqrt(1 - abar) eps) / sqrt(alpha)
            let scale = beta / (1.0 - bar).sqrt();
            let root = (1.0 - beta).sqrt();
            let sigma2 = match variance {
                _ if prev == 1.0 => 0.0,
                Variance::Beta => beta,
                Variance::Posterior => posterior,
                other => panic!("no formula of {other:?}"),
            };
            ((1.0 - scale * e) / root, -scale * f / root, sigma2)
        }
        Solver::Ddim { eta } => {
            // Song et al. 2021, equation 12
            let sigma2 = eta * eta * posterior;
            let direction = (1.0 - prev - sigma2).sqrt();
            (prev.sqrt() * g + direction * e, prev.sqrt() * h + direction * f, sigma2)
        }
        Solver::Heun => {
            let (slope, offset) = heun(data, bar, prev);
            (slope, offset, 0.0)
        }
        other => panic!("no formula of {other:?}"),
    }
}

/// Karras et al. 2022, algorithm 1, in its own variable, x / sqrt(abar), from the level `bar` to the level `prev`.
/// Every quantity is linear in x: a slope and an offset.
fn heun(data: Normal, bar: f64, prev: f64) -> (f64, f64) {
    let sigma = |bar: f64| ((1.0 - bar) / bar).sqrt();
    // The slope of the ODE, (y - E[x_0 | y]) / sigma, for y = slope x + offset.
    let derivative = |(slope, offset): (f64, f64), sigma: f64| {
        let noise_share = sigma / (data.std * data.std + sigma * sigma);
        (noise_share * slope, noise_share * (offset - data.mean))
    };
    let along = |y: (f64, f64), step: f64, d: (f64, f64)| (y.0 + step * d.0, y.1 + step * d.1);
    let (from, to) = (sigma(bar), sigma(prev));
    let start = (1.0 / bar.sqrt(), 0.0);
    let d = derivative(start, from);
    let mut y = along(start, to - from, d);
    if to > 0.0 {
        let d_to = derivative(y, to);
        y = along(start, to - from, (0.5 * (d.0 + d_to.0), 0.5 * (d.1 + d_to.1)));
    }
    (y.0 * prev.sqrt(), y.1 * prev.sqrt())
}

fn solvers() -> Vec<Solver> {
    let posterior = Solver::Ddpm { variance: Variance::Posterior };
    let mut solvers = vec![Solver::ddpm(), posterior];
    solvers.extend([0.0, 0.5, 1.0].map(|eta| Solver::Ddim { eta }));
    solvers.push(Solver::Heun);
    solvers
}

#[test]
fn gaussian_data_is_reproduced() {
    for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity] {
        let schedule = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
        let diffusion = Diffusion::new(schedule, prediction);
        for solver in solvers() {
            for steps in [10, 50, 1000] {
                agrees(DATA, &diffusion, solver, steps);
            }
        }
    }
}

/// Asserts that samples of the best denoiser have the mean and variance of the closed form. Returns them.
fn agrees(data: Normal, diffusion: &Diffusion, solver: Solver, steps: usize) -> (f64, f64) {
    let sampler = Sampler::new(diffusion, solver, steps).unwrap();
    let timesteps: Vec<usize> = sampler.timesteps().map(|t| t as usize).collect();
    let (mean, variance) = expected(data, diffusion.schedule(), &timesteps, solver);

    let denoiser = gaussian(diffusion, data);
    let x = sampler.steps(&denoiser, (16, 1, 32, 32), 1, &Device::Cpu).unwrap();
    let x = x.map(|step| step.unwrap().x).last().unwrap();
    let what = format!("{:?}, {solver:?}, {steps} steps", diffusion.prediction());
    assert_moments(&x, (mean, variance), &what);
    (mean, variance)
}

/// Asserts that independent values have this mean and variance, up to four standard errors of those of normal values.
fn assert_moments(x: &Tensor, (mean, variance): (f64, f64), what: &str) {
    let x = values(x);
    let n = x.len() as f64;
    let m = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let v = x.iter().map(|&v| (f64::from(v) - m).powi(2)).sum::<f64>() / (n - 1.0);

    let mean_error = 4.0 * (variance / n).sqrt();
    assert!((m - mean).abs() < mean_error, "{what}: mean {m}, expected {mean}");
    let variance_error = 4.0 * variance * (2.0 / n).sqrt();
    assert!((v - variance).abs() < variance_error, "{what}: variance {v}, expected {variance}");
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Even the best denoiser cannot correct a schedule that ends with signal. The scaled schedule ends without.
#[test]
fn what_a_schedule_leaves_of_the_image_is_missing_from_samples() {
    let data = Normal { mean: 0.8, std: 0.1 };
    let run = |schedule: NoiseSchedule, solver| {
        let steps = schedule.steps();
        agrees(data, &Diffusion::new(schedule, Prediction::Epsilon), solver, steps)
    };
    let unscaled = |steps| NoiseSchedule::linear(steps, 1e-4, 0.02).unwrap();
    let (mean, variance) = run(unscaled(10), Solver::ddim());
    assert_eq!(((mean * 1e3).round(), (variance.sqrt() * 1e3).round()), (594.0, 271.0));
    assert!(!unscaled(10).reaches_noise());
    for steps in [21, 100] {
        let scaled = NoiseSchedule::linear_scaled(steps).unwrap();
        assert!(scaled.reaches_noise() && !unscaled(steps).reaches_noise());
        for solver in solvers() {
            let off = |schedule| (run(schedule, solver).0 - data.mean).abs();
            assert!(off(scaled.clone()) < 4e-4, "{solver:?}, {steps} steps");
            assert!(off(unscaled(steps)) > 4e-3, "{solver:?}, {steps} steps");
        }
    }
}

/// With many steps, the closed form itself converges to the mean and variance of the data, so that agreement with it is
/// meaningful. With few steps, its error is that of the solver.
#[test]
fn closed_form_converges_to_the_data() {
    let error = |solver, steps: usize| {
        let schedule = NoiseSchedule::cosine(steps).unwrap();
        let timesteps: Vec<usize> = (0..steps).rev().collect();
        let (mean, variance) = expected(DATA, &schedule, &timesteps, solver);
        (mean - DATA.mean).abs() + (variance - DATA.std * DATA.std).abs()
    };
    for solver in solvers() {
        let [coarse, fine] = [100, 4000].map(|steps| error(solver, steps));
        assert!(fine < 2e-3, "{solver:?}: {fine}");
        assert!(fine < 0.2 * coarse, "{solver:?}: {coarse} with 100 steps, {fine} with 4000");
    }
}

/// For normal data the probability-flow ODE has an exact solution: the distance from the mean shrinks with the standard
/// deviation of `x_t / sqrt(abar)`. With twice the steps, a quarter of Heun's error remains, and half of DDIM's.
#[test]
fn heun_is_of_second_order_and_ddim_of_first() {
    let schedule = NoiseSchedule::linear_scaled(961).unwrap();
    let diffusion = Diffusion::new(schedule, Prediction::Epsilon);
    let bars = diffusion.schedule().alpha_bars();
    let std = |bar: f64| (DATA.std * DATA.std + (1.0 - bar) / bar).sqrt();
    let denoiser = gaussian(&diffusion, DATA);
    let start = Tensor::new(&[[1.3f64, -0.4], [0.2, 2.0]], &Device::Cpu).unwrap();
    let [first, last] = [bars[960], bars[0]];
    let from_mean = start.affine(1.0 / first.sqrt(), -DATA.mean).unwrap();
    let exact = from_mean.affine(std(last) / std(first), DATA.mean).unwrap();
    let exact = (exact * last.sqrt()).unwrap();
    // The last step goes from timestep 0 to the image, however many steps precede it.
    let error = |solver, gap| {
        let timesteps: Vec<usize> = (0..=960).step_by(gap).collect();
        let sampler = Sampler::with_timesteps(&diffusion, solver, &timesteps).unwrap();
        let steps = sampler.steps_from(&denoiser, start.clone(), |_| unreachable!()).unwrap();
        let x = steps.map(|step| step.unwrap().x).nth(timesteps.len() - 2).unwrap();
        max_abs(&(x - &exact).unwrap())
    };
    for (solver, expected) in [(Solver::ddim(), 2.0), (Solver::Heun, 4.0)] {
        let errors = [48, 24, 12, 6].map(|gap| error(solver, gap));
        for pair in errors.windows(2) {
            let ratio = pair[0] / pair[1];
            assert!((0.96..1.01).contains(&(ratio / expected)), "{solver}: {errors:?}");
        }
    }
}

/// Checks the table in the chapter on sampling.
#[test]
fn heun_needs_a_start_that_is_not_too_noisy() {
    let std = |schedule: &NoiseSchedule, from: usize, solver, steps: usize| {
        let gap = from as f64 / (steps - 1) as f64;
        let timesteps: Vec<usize> =
            (0..steps).rev().map(|i| (i as f64 * gap).round() as usize).collect();
        let variance = expected(DATA, schedule, &timesteps, solver).1;
        (variance.sqrt() * 1e3).round() / 1e3
    };
    let linear = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
    let cosine = NoiseSchedule::cosine(1000).unwrap();
    for (schedule, from, stds) in [
        (&linear, 999, [0.510, 0.500, 0.464]),
        (&cosine, 999, [1.225, 0.505, 0.480]),
        (&cosine, 990, [0.506, 0.500, 0.480]),
    ] {
        let settings = [(Solver::Heun, 20), (Solver::Heun, 100), (Solver::ddim(), 39)];
        assert_eq!(settings.map(|(solver, steps)| std(schedule, from, solver, steps)), stds);
    }
}

/// A step with two evaluations is one item of the iterator.
#[test]
fn a_step_of_heun_is_one_step_with_two_evaluations() {
    let diffusion = Diffusion::ddpm();
    let evaluated = std::cell::RefCell::new(vec![]);
    let denoiser = from_fn(|x: &Tensor, t: &Tensor| {
        evaluated.borrow_mut().push(t.to_vec1::<u32>()?[0]);
        Ok((x * 0.5)?)
    });
    let sampler = Sampler::new(&diffusion, Solver::Heun, 4).unwrap();
    let mut steps = sampler.steps(&denoiser, (1, 1, 2, 2), 0, &Device::Cpu).unwrap();
    assert_eq!((steps.len(), sampler.evaluations()), (4, 7));
    let mut before = Sampler::prior((1, 1, 2, 2), 0, &Device::Cpu).unwrap();
    for (index, t) in [999, 666, 333, 0].into_iter().enumerate() {
        let step = steps.next().unwrap().unwrap();
        assert_eq!((step.index, step.t), (index, t as f64));
        // `x_0` is the prediction from the sample before the step.
        let ddim = Sampler::with_timesteps(&diffusion, Solver::ddim(), &[t]).unwrap();
        let half = from_fn(|x: &Tensor, _: &Tensor| Ok((x * 0.5)?));
        let mut single = ddim.steps_from(&half, before, |_| unreachable!()).unwrap();
        let expected = single.next().unwrap().unwrap().x_0;
        assert_eq!(max_abs(&(&step.x_0 - expected).unwrap().to_dtype(DType::F64).unwrap()), 0.0);
        before = step.x;
    }
    assert_eq!(*evaluated.borrow(), [999, 666, 666, 333, 333, 0, 0]);
    // The format in the file of a checkpoint.
    assert_eq!(serde_json::to_string(&Solver::Heun).unwrap(), r#""heun""#);
    assert_eq!(serde_json::from_str::<Solver>(r#""heun""#).unwrap(), Solver::Heun);
}

#[test]
fn a_sample_does_not_depend_on_the_batch() {
    let diffusion = Diffusion::ddpm();
    let denoiser = gaussian(&diffusion, DATA);
    for solver in [Solver::ddpm(), Solver::Ddim { eta: 0.5 }] {
        let sampler = Sampler::new(&diffusion, solver, 20).unwrap();
        let [four, two] = [4, 2].map(|batch| {
            let x = sampler.sample(&denoiser, (batch, 1, 4, 4), 7, &Device::Cpu).unwrap();
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        });
        assert_eq!(four[..32], two);
        let last = sampler.clone().first_image(2);
        let last = last.sample(&denoiser, (2, 1, 4, 4), 7, &Device::Cpu).unwrap();
        assert_eq!(four[32..], last.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let other = sampler.sample(&denoiser, (2, 1, 4, 4), 8, &Device::Cpu).unwrap();
        assert_ne!(two, other.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
}

#[test]
fn samples_are_clamped_and_steps_are_counted() {
    let diffusion = Diffusion::ddpm();
    // Predicts an image that is far too bright everywhere.
    let bright = Diffusion::new(diffusion.schedule().clone(), Prediction::Sample);
    let denoiser = from_fn(|x_t: &Tensor, _: &Tensor| Ok((x_t.zeros_like()? + 3.0)?));
    let sampler = Sampler::new(&bright, Solver::ddim(), 5).unwrap();
    let steps = sampler.steps(&denoiser, (1, 1, 2, 2), 0, &Device::Cpu).unwrap();
    assert_eq!(steps.len(), 5);
    let steps: Vec<_> = steps.map(|step| step.unwrap()).collect();
    assert_eq!(steps.iter().map(|s| s.t).collect::<Vec<_>>(), [999.0, 749.0, 500.0, 250.0, 0.0]);
    assert_eq!(steps.iter().map(|s| s.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    let first = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
    assert_eq!(first(&steps[4].x), 3.0);
    let image = sampler.sample(&denoiser, (1, 1, 2, 2), 0, &Device::Cpu).unwrap();
    assert_eq!(first(&image), 1.0);
    let clipped = sampler.clip_denoised(true);
    let step = clipped.steps(&denoiser, (1, 1, 2, 2), 0, &Device::Cpu).unwrap().next();
    assert_eq!(first(&step.unwrap().unwrap().x_0), 1.0);
}

#[test]
fn a_failing_denoiser_ends_the_loop() {
    let denoiser = from_fn(|x_t: &Tensor, _: &Tensor| Ok(x_t.narrow(0, 0, 1)?));
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 10).unwrap();
    let mut steps = sampler.steps(&denoiser, (2, 1, 4, 4), 0, &Device::Cpu).unwrap();
    let error = steps.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("the denoiser's output has shape [1, 1, 4, 4]"), "{error}");
    assert!(steps.next().is_none());
}

/// A network whose output contains a number that is not finite at one timestep.
fn failing_at(timestep: u32, value: f64) -> impl Denoiser {
    from_fn(move |x_t: &Tensor, t: &Tensor| {
        let mut output = (x_t * 0.5)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        if t.to_vec1::<u32>()?[0] == timestep {
            output[3] = value;
        }
        Ok(Tensor::from_vec(output, x_t.shape(), &Device::Cpu)?.to_dtype(x_t.dtype())?)
    })
}

#[test]
fn a_prediction_that_is_not_finite_is_an_error_at_its_timestep() {
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 5).unwrap();
    let shape = (1, 1, 2, 2);
    for clip in [false, true] {
        let sampler = sampler.clone().clip_denoised(clip);
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for (index, timestep) in sampler.timesteps().enumerate() {
                let denoiser = failing_at(timestep as u32, value);
                let expected =
                    format!("the denoiser's output is not finite at timestep {timestep}");
                for dtype in [DType::F32, DType::F64] {
                    let start = Sampler::prior(shape, 0, &Device::Cpu).unwrap();
                    let start = start.to_dtype(dtype).unwrap();
                    let z = |t| Sampler::noise(t, shape, 0, &Device::Cpu);
                    let mut steps = sampler.steps_from(&denoiser, start, z).unwrap();
                    // Earlier steps return no error.
                    for step in steps.by_ref().take(index) {
                        let largest = max_abs(&step.unwrap().x.to_dtype(DType::F64).unwrap());
                        assert!(largest.is_finite());
                    }
                    let error = steps.next().unwrap().unwrap_err();
                    assert_eq!(error.to_string(), expected, "{value} in {dtype:?}");
                    assert!(matches!(error, Error::NonFiniteSample { t, .. } if t == timestep));
                    assert!(steps.next().is_none());
                }
                let sampled = sampler.sample(&denoiser, shape, 0, &Device::Cpu);
                assert_eq!(sampled.unwrap_err().to_string(), expected);
            }
            // A timestep that the sampler does not visit.
            let denoiser = failing_at(1, value);
            sampler.sample(&denoiser, shape, 0, &Device::Cpu).unwrap();
        }
    }
}

#[test]
fn a_network_that_overflows_half_precision_is_an_error() {
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 3).unwrap();
    for (dtype, scale) in [(DType::F16, 1e5), (DType::BF16, 1e39), (DType::F64, 1e39)] {
        let denoiser = from_fn(move |x_t: &Tensor, _: &Tensor| {
            let output = (x_t.abs()?.to_dtype(DType::F64)? + 1.0)?;
            Ok((output * scale)?.to_dtype(dtype)?)
        });
        let error = sampler.sample(&denoiser, (2, 1, 4, 4), 0, &Device::Cpu).unwrap_err();
        let expected = "the denoiser's output is not finite at timestep 999";
        assert_eq!(error.to_string(), expected, "{dtype:?}");
    }
}

/// Finite predictions can also lead to this: here `x_0` is beyond f32.
#[test]
fn a_sample_that_is_not_finite_is_an_error() {
    let denoiser = from_fn(|x_t: &Tensor, _: &Tensor| Ok((x_t.ones_like()? * 3e38)?));
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddim(), 4).unwrap();
    let error = sampler.sample(&denoiser, (1, 1, 2, 2), 0, &Device::Cpu).unwrap_err();
    assert_eq!(error.to_string(), "the sample is not finite at timestep 999");

    let zero = from_fn(|x_t: &Tensor, _: &Tensor| Ok(x_t.zeros_like()?));
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 4).unwrap();
    let start = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
    let z = |t| Ok((start.ones_like()? * if t == 666.0 { f64::NAN } else { 1.0 })?);
    let mut steps = sampler.steps_from(&zero, start.clone(), z).unwrap();
    assert!(steps.next().unwrap().is_ok());
    let error = steps.next().unwrap().unwrap_err().to_string();
    assert_eq!(error, "the sample is not finite at timestep 666");

    let start = (&start * f64::NAN).unwrap();
    let error = sampler.steps_from(&zero, start, |_| unreachable!()).unwrap_err().to_string();
    assert_eq!(error, "the start is not finite at timestep 999");
}

#[test]
fn what_does_not_fit_the_start_is_refused() {
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), 4).unwrap();
    let half = from_fn(|x_t: &Tensor, _: &Tensor| Ok((x_t * 0.5)?));
    let start = Tensor::zeros((4, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
    for (start, expected) in [
        (start.to_dtype(DType::U8), "dtype of the start is u8; it must be a floating-point dtype"),
        (
            start.to_dtype(DType::I64),
            "dtype of the start is i64; it must be a floating-point dtype",
        ),
        (start.sum_all(), "the start has shape []; it must be (batch, ...)"),
    ] {
        let steps = sampler.steps_from(&half, start.unwrap(), |_| unreachable!());
        let message = steps.map(drop).unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
    for (z, expected) in [
        (
            start.narrow(0, 0, 1),
            "z has shape [1, 1, 2, 2]; it must be [4, 1, 2, 2], that of the sample",
        ),
        (start.flatten_from(1), "z has shape [4, 4]; it must be [4, 1, 2, 2]"),
        (start.to_dtype(DType::I64), "dtype of z is i64; it must be a floating-point dtype"),
    ] {
        let z = z.unwrap();
        let mut steps = sampler.steps_from(&half, start.clone(), |_| Ok(z.clone())).unwrap();
        let message = steps.next().unwrap().unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
        assert!(steps.next().is_none());
    }
    let whole = from_fn(|x_t: &Tensor, _: &Tensor| Ok(x_t.to_dtype(DType::U8)?));
    let message = sampler.sample(&whole, (1, 1, 2, 2), 0, &Device::Cpu).unwrap_err().to_string();
    assert_eq!(message, "dtype of the denoiser's output is u8; it must be a floating-point dtype");
}

#[test]
fn wrong_settings_are_refused() {
    let diffusion = Diffusion::ddpm();
    let new = |solver, steps| Sampler::new(&diffusion, solver, steps).unwrap_err().to_string();
    let with = |timesteps: &[usize]| {
        let result = Sampler::with_timesteps(&diffusion, Solver::ddpm(), timesteps);
        result.unwrap_err().to_string()
    };
    for (message, expected) in [
        (new(Solver::ddpm(), 0), "sampling steps is 0; it must be from 1 to 1000"),
        (new(Solver::ddpm(), 1001), "sampling steps is 1001; it must be from 1 to 1000"),
        (new(Solver::Ddim { eta: -0.1 }, 10), "eta is -0.1; it must be from 0 to 1"),
        (new(Solver::Ddim { eta: f64::NAN }, 10), "eta is NaN; it must be from 0 to 1"),
        (
            Sampler::prior((usize::MAX, 2), 0, &Device::Cpu).unwrap_err().to_string(),
            "it must be small enough for the available memory",
        ),
        (with(&[]), "timesteps is []; it must be one or more"),
        (with(&[3, 3]), "timesteps is 3 at index 1; it must be strictly increasing"),
        (with(&[5, 1, 1000]), "timesteps is 1 at index 1; it must be strictly increasing"),
        (with(&[0, 7, 1000, 1001]), "timesteps is 1000 at index 2; it must be strictly increasing"),
        (with(&[usize::MAX, 0]), "at index 0; it must be strictly increasing, from 0 to 999"),
    ] {
        assert!(message.contains(expected), "{message}");
    }
}

/// Respaced timesteps are those of Nichol and Dhariwal's code.
#[test]
fn respacing_agrees_with_its_source() {
    let oracle = Diffusers::read("diffusers");
    for steps in [1, 2, 3, 7, 10, 20, 50, 100, 250, 1000] {
        let sampler = Sampler::new(&Diffusion::ddpm(), Solver::ddpm(), steps).unwrap();
        let mut ours: Vec<i64> = sampler.timesteps().map(|t| t as i64).collect();
        ours.reverse();
        let theirs: Vec<i64> = oracle.get(&format!("spacing.1000.{steps}")).to_vec1().unwrap();
        // For one step, their code takes the cleanest timestep. This crate takes the noisiest, to which x_T belongs.
        if steps > 1 {
            assert_eq!(ours, theirs, "{steps} steps");
        }
    }
}

#[test]
fn schedules_agree_with_diffusers() {
    let oracle = Diffusers::read("diffusers");
    for (name, schedule) in [
        ("linear", NoiseSchedule::linear(1000, 1e-4, 0.02)),
        ("cosine", NoiseSchedule::cosine(1000)),
    ] {
        let schedule = schedule.unwrap();
        for (table, ours) in [("betas", schedule.betas()), ("alpha_bars", schedule.alpha_bars())] {
            let theirs: Vec<f64> =
                oracle.get(&format!("schedule.{name}.{table}")).to_vec1().unwrap();
            for (t, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                assert!((ours - theirs).abs() < 1e-14, "{name} {table} at {t}: {ours} {theirs}");
            }
        }
    }
}

/// Compares every step of every trajectory that diffusers computed with a known network and known noise.
#[test]
fn trajectories_agree_with_diffusers() {
    let schedules = Diffusers::read("diffusers");
    assert_eq!(compare_trajectories(&schedules, &schedules), 21);
    assert_eq!(compare_trajectories(&Diffusers::read("heun"), &schedules), 5);
}

/// Compares the trajectories of a file. Returns their number.
fn compare_trajectories(oracle: &Diffusers, schedules: &Diffusers) -> usize {
    let cases: Vec<String> = serde_json::from_str(&oracle.metadata["cases"]).unwrap();
    let mut compared = 0;
    for name in cases {
        let case: serde_json::Value = serde_json::from_str(&oracle.metadata[&name]).unwrap();
        let schedule = format!("schedule.{}.betas", case["schedule"].as_str().unwrap());
        let betas = schedules.get(&schedule).to_vec1().unwrap();
        let prediction = match case["prediction_type"].as_str().unwrap() {
            "epsilon" => Prediction::Epsilon,
            "sample" => Prediction::Sample,
            "v_prediction" => Prediction::Velocity,
            other => panic!("{other}"),
        };
        let solver = match (case["variance_type"].as_str(), case["eta"].as_f64()) {
            (Some("fixed_small"), None) => Solver::Ddpm { variance: Variance::Posterior },
            (Some("fixed_large"), None) => Solver::Ddpm { variance: Variance::Beta },
            (None, Some(eta)) => Solver::Ddim { eta },
            (None, None) if case["sampler"] == "Heun" => Solver::Heun,
            other => panic!("{other:?}"),
        };
        let part = |part: &str| oracle.get(&format!("{name}.{part}"));
        let mut timesteps: Vec<i64> = part("timesteps").to_vec1().unwrap();
        timesteps.reverse();
        let timesteps: Vec<usize> = timesteps.into_iter().map(|t| t as usize).collect();

        let diffusion = Diffusion::new(NoiseSchedule::from_betas(betas).unwrap(), prediction);
        let mut sampler = Sampler::with_timesteps(&diffusion, solver, &timesteps)
            .unwrap()
            .clip_denoised(case["clip_sample"] == true);
        if case["thresholding"] == true {
            let [ratio, max] = ["dynamic_thresholding_ratio", "sample_max_value"]
                .map(|field| case[field].as_f64().unwrap());
            sampler = sampler.dynamic_threshold(DynamicThreshold { ratio, max }).unwrap();
        }
        let network = from_fn(|x: &Tensor, t: &Tensor| {
            let t = f64::from(t.to_vec1::<u32>()?[0]);
            Ok((x * 0.7)?.affine(1.0, 0.001 * t)?.tanh()?)
        });
        let (x, pred_x_0) = (part("x"), part("pred_x_0"));
        let order: HashMap<usize, usize> =
            timesteps.iter().rev().enumerate().map(|(i, &t)| (t, i)).collect();
        let steps = sampler
            .steps_from(&network, part("x_T").clone(), |t| Ok(part("z").get(order[&(t as usize)])?))
            .unwrap();
        let size = max_abs(x);
        for step in steps {
            let step = step.unwrap();
            for (what, ours, theirs) in [("x", &step.x, x), ("x_0", &step.x_0, pred_x_0)] {
                assert_eq!(ours.dtype(), DType::F64);
                let error = max_abs(&(ours - theirs.get(step.index).unwrap()).unwrap());
                assert!(
                    error < 1e-11 * size.max(1.0),
                    "{name}: {what} at t = {}: {error:e}",
                    step.t
                );
            }
        }
        compared += 1;
    }
    compared
}

/// A picture (1, 8, 32) whose pixels stand for all bytes, from 0 to 255.
fn all_bytes() -> Tensor {
    let values = (0..=255).map(ddpm::data::normalized).collect();
    Tensor::from_vec(values, (1, 8, 32), &Device::Cpu).unwrap()
}

/// Samples without a clamp.
fn drawn(sampler: &Sampler, denoiser: &impl Denoiser, count: usize, seed: u64) -> Tensor {
    let steps = sampler.steps(denoiser, (count, 1, 8, 32), seed, &Device::Cpu).unwrap();
    steps.map(|step| step.unwrap().x).last().unwrap()
}

#[test]
fn variations_have_the_mean_and_the_variance_of_the_closed_form() {
    let diffusion = Diffusion::ddpm();
    let (denoiser, schedule) = (gaussian(&diffusion, DATA), diffusion.schedule());
    let picture = Tensor::full(-0.9f32, (1, 8, 32), &Device::Cpu).unwrap();
    for solver in solvers() {
        // The largest of 50 timesteps that is at most 499, 99 and 999.
        for (strength, from) in [(0.5, 489), (0.1, 82), (1.0, 999)] {
            let sampler = Sampler::new(&diffusion, solver, 50).unwrap();
            let sampler = sampler.vary(&picture, strength).unwrap();
            let timesteps: Vec<usize> = sampler.timesteps().map(|t| t as usize).collect();
            assert_eq!(timesteps[0], from);
            let bar = schedule.alpha_bars()[from];
            let start = (-0.9 * bar.sqrt(), 1.0 - bar);
            let moments = expected_from(start, DATA, schedule, &timesteps, solver);
            let what = format!("{solver:?}, strength {strength}");
            assert_moments(&drawn(&sampler, &denoiser, 64, 2), moments, &what);
        }
    }
}

#[test]
fn a_variation_does_not_depend_on_the_batch_and_begins_at_any_time() {
    let diffusion = Diffusion::ddpm();
    let sampler = Sampler::new(&diffusion, Solver::DpmSolver { order: 3 }, 20).unwrap();
    let sampler = sampler.vary_from(&all_bytes(), 700.5).unwrap();
    assert_eq!(sampler.timesteps().next(), Some(684.0));
    let denoiser = gaussian(&diffusion, DATA);
    let three = drawn(&sampler, &denoiser, 3, 5);
    let last = drawn(&sampler.clone().first_image(2), &denoiser, 1, 5);
    assert_eq!(values(&three.narrow(0, 2, 1).unwrap()), values(&last));
    assert_ne!(values(&three.narrow(0, 0, 1).unwrap()), values(&last));
    assert_eq!(values(&three), values(&drawn(&sampler, &denoiser, 3, 5)));
}

/// With deterministic steps an image is `slope x_T + offset`.
#[test]
fn an_interpolated_image_is_that_of_spherically_interpolated_noise() {
    let diffusion = Diffusion::ddpm();
    let denoiser = gaussian(&diffusion, DATA);
    let weights = [0.0, 0.2, 0.5, 1.0];
    let image = |sampler: &Sampler, seed| values(&drawn(sampler, &denoiser, 1, seed));
    for solver in solvers() {
        let sampler = Sampler::new(&diffusion, solver, 10).unwrap();
        let path = sampler.clone().interpolate(Ends::Seeds([3, 7]), &weights).unwrap();
        let images = drawn(&path, &denoiser, weights.len(), 0);
        let at = |k: usize| values(&images.narrow(0, k, 1).unwrap());
        assert_eq!((at(0), at(3)), (image(&sampler, 3), image(&sampler, 7)), "{solver:?}");
        // A part of the path.
        let part = sampler.clone().interpolate(Ends::Seeds([3, 7]), &weights[2..3]).unwrap();
        assert_eq!(image(&part, 9), at(2), "{solver:?}");

        let timesteps: Vec<usize> = sampler.timesteps().map(|t| t as usize).collect();
        let moments = expected(DATA, diffusion.schedule(), &timesteps, solver);
        assert_eq!(
            sampler.is_deterministic(),
            matches!(solver, Solver::Ddim { eta: 0.0 } | Solver::Heun)
        );
        if !sampler.is_deterministic() {
            assert_moments(&images.narrow(0, 1, 2).unwrap(), moments, &format!("{solver:?}"));
            continue;
        }
        let x_t = |seed| values(&Sampler::prior((1, 1, 8, 32), seed, &Device::Cpu).unwrap());
        let (a, b) = (x_t(3), x_t(7));
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let angle = (dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()).acos();
        let (slope, offset) = timesteps.iter().enumerate().fold((1.0, 0.0), |(s, o), (i, &t)| {
            let bars = diffusion.schedule().alpha_bars();
            let prev = timesteps.get(i + 1).map_or(1.0, |&t| bars[t]);
            let (slope, offset, _) = step(DATA, bars[t], prev, solver);
            (slope * s, slope * o + offset)
        });
        for (k, weight) in weights.into_iter().enumerate() {
            let factor = |weight: f64| (weight * angle).sin() / angle.sin();
            for (found, (a, b)) in at(k).into_iter().zip(a.iter().zip(&b)) {
                let noise = factor(1.0 - weight) * f64::from(*a) + factor(weight) * f64::from(*b);
                let exact = slope * noise + offset;
                assert!((f64::from(found) - exact).abs() < 1e-5, "{solver:?}: {found}, {exact}");
            }
        }
    }
}

#[test]
fn an_interpolation_of_inverted_pictures_begins_and_ends_at_the_pictures() {
    let diffusion = Diffusion::ddpm();
    let denoiser = gaussian(&diffusion, DATA);
    let a = all_bytes();
    let pictures = Tensor::stack(&[&a, &(a.sqr().unwrap() * 0.5).unwrap()], 0).unwrap();
    let sampler = Sampler::new(&diffusion, Solver::ddim(), 500).unwrap();
    let noise = sampler.invert(&denoiser, pictures.clone()).unwrap();
    let path = sampler.clone().interpolate(Ends::Noise(noise), &[0.0, 0.3, 1.0]).unwrap();
    let images = drawn(&path, &denoiser, 3, 0);
    for (k, end) in [(0, 0), (2, 1)] {
        let error = (images.get(k).unwrap() - pictures.get(end).unwrap()).unwrap();
        let error = values(&error).into_iter().fold(0f32, |most, e| most.max(e.abs()));
        assert!(error < 0.01, "end {end}: {error}");
    }
}

#[test]
fn repaint_agrees_with_diffusers() {
    let oracle = Diffusers::read("repaint");
    let cases: serde_json::Value = serde_json::from_str(&oracle.metadata["cases"]).unwrap();
    let diffusion = Diffusion::ddpm();
    let denoiser = gaussian(&diffusion, DATA);
    assert_eq!([&oracle.metadata["mean"], &oracle.metadata["std"]], ["0.3", "0.5"]);
    let posterior = Solver::Ddpm { variance: Variance::Posterior };
    for (name, solver) in [
        ("ancestral", posterior),
        ("ancestral", Solver::Ddim { eta: 1.0 }),
        ("half", Solver::Ddim { eta: 0.5 }),
    ] {
        let part = |part: &str| oracle.get(&format!("{name}.{part}"));
        let setting = |name_of: &str| cases[name][name_of].as_u64().unwrap() as usize;
        let count = setting("count");
        let timesteps: Vec<usize> = (0..count).map(|i| i * (1000 / count)).collect();
        let resampling = Resampling { jump: setting("jump"), count: setting("resamplings") };
        let sampler = Sampler::with_timesteps(&diffusion, solver, &timesteps).unwrap();
        let sampler = sampler.inpaint(part("picture"), part("filled"), resampling).unwrap();
        let times: Vec<i64> = sampler.timesteps().map(|t| t as i64).collect();
        assert_eq!(times, part("times").to_vec1::<i64>().unwrap(), "{name}");

        let (mut asked, z) = (0, part("z"));
        let noise = |t: f64| {
            asked += 1;
            assert_eq!(t, times[asked - 1] as f64);
            Ok(z.get(asked - 1)?)
        };
        let steps = sampler.steps_from(&denoiser, part("x_T").clone(), noise).unwrap();
        let mut last = None;
        for step in steps {
            let step = step.unwrap();
            let exact = part("x").get(step.index).unwrap();
            let error = max_abs(&(&step.x - &exact).unwrap());
            assert!(error < 1e-12, "{name}, {solver:?}, step {}: {error:e}", step.index);
            last = Some(step.x);
        }
        // The step to the image needs no noise.
        assert_eq!(asked + 1, times.len());
        let (last, kept) = (last.unwrap(), (1.0 - part("filled")).unwrap());
        let of_image = |k: usize| (last.get(k).unwrap() * &kept).unwrap();
        let known = (part("picture") * &kept).unwrap();
        for k in [0, 1] {
            assert_eq!(max_abs(&(of_image(k) - &known).unwrap()), 0.0);
        }
    }
}

#[test]
fn known_pixels_are_those_of_the_picture_bit_for_bit() {
    let diffusion = Diffusion::ddpm();
    let denoiser = gaussian(&diffusion, DATA);
    let filled: Vec<u8> = (0..256).map(|i| u8::from(i % 3 == 0)).collect();
    let mask = Tensor::from_vec(filled.clone(), (1, 8, 32), &Device::Cpu).unwrap();
    let sampler = Sampler::new(&diffusion, Solver::ddpm(), 6).unwrap();
    let inpaint = |mask: &Tensor, count| {
        sampler.clone().inpaint(&all_bytes(), mask, Resampling { jump: 2, count }).unwrap()
    };
    let twice = inpaint(&mask, 2);
    assert_eq!((twice.timesteps().len(), twice.evaluations()), (6 + 2 * 3, 6 + 2 * 2));
    let images = twice.sample(&denoiser, (3, 1, 8, 32), 4, &Device::Cpu).unwrap();
    let picture = values(&all_bytes());
    for k in 0..3 {
        let image = values(&images.get(k).unwrap());
        let bytes = ddpm::eval::bytes(&images.get(k).unwrap()).unwrap();
        for i in 0..256 {
            assert!(filled[i] == 1 || image[i].to_bits() == picture[i].to_bits(), "pixel {i}");
            assert!(filled[i] == 1 || usize::from(bytes[i]) == i, "pixel {i}");
        }
        assert!((0..256).any(|i| filled[i] == 1 && image[i] != picture[i]));
    }
    let last = twice.clone().first_image(2);
    let last = last.sample(&denoiser, (1, 1, 8, 32), 4, &Device::Cpu).unwrap();
    assert_eq!(values(&last), values(&images.narrow(0, 2, 1).unwrap()));

    // Without a known pixel and without resampling, samples are those of the sampler alone.
    let all = Tensor::ones((1, 1, 1), DType::U8, &Device::Cpu).unwrap();
    let free = drawn(&inpaint(&all, 1), &denoiser, 2, 4);
    assert_eq!(values(&free), values(&drawn(&sampler, &denoiser, 2, 4)));
    let once = drawn(&inpaint(&mask, 1), &denoiser, 3, 4);
    assert_ne!(values(&once), values(&drawn(&twice, &denoiser, 3, 4)));
}

/// The known pixels are noised, whatever the solver.
#[test]
fn filling_asks_for_noise_by_time_in_every_step_but_the_last() {
    let denoiser = gaussian(&Diffusion::ddpm(), DATA);
    let sampler = Sampler::with_timesteps(&Diffusion::ddpm(), Solver::ddim(), &[9, 500, 999]);
    let all = Tensor::ones((1, 1, 1), DType::U8, &Device::Cpu).unwrap();
    let resampling = Resampling { jump: 1, count: 2 };
    let sampler = sampler.unwrap().inpaint(&all_bytes(), &all, resampling).unwrap();
    let start = Sampler::prior((1, 1, 8, 32), 0, &Device::Cpu).unwrap();
    let (mut times, z) = (vec![], start.clone());
    let noise = |t: f64| {
        times.push(t);
        Ok(z.clone())
    };
    assert_eq!(sampler.steps_from(&denoiser, start, noise).unwrap().count(), 7);
    assert_eq!(times, [999.0, 999.0, 999.0, 500.0, 500.0, 500.0]);
}

/// If a repeated step had the noise of the first one, the variance would be larger.
#[test]
fn every_resampling_has_new_noise() {
    let diffusion = Diffusion::ddpm();
    let (denoiser, bars) = (gaussian(&diffusion, DATA), diffusion.schedule().alpha_bars());
    let all = Tensor::ones((1, 1, 1), DType::U8, &Device::Cpu).unwrap();
    let sampler = Sampler::new(&diffusion, Solver::ddpm(), 4).unwrap();
    let resampling = Resampling { jump: 1, count: 4 };
    let sampler = sampler.inpaint(&all_bytes(), &all, resampling).unwrap();
    let (mut mean, mut variance) = (0.0, 1.0);
    for levels in [[999, 666], [666, 333], [333, 0]] {
        let [bar, prev] = levels.map(|t: usize| bars[t]);
        let (slope, offset, sigma2) = step(DATA, bar, prev, Solver::ddpm());
        for repetition in 0..4 {
            if repetition > 0 {
                let alpha: f64 = bar / prev;
                (mean, variance) = (alpha.sqrt() * mean, alpha * variance + 1.0 - alpha);
            }
            (mean, variance) = (slope * mean + offset, slope * slope * variance + sigma2);
        }
    }
    let (slope, offset, _) = step(DATA, bars[0], 1.0, Solver::ddpm());
    let moments = (slope * mean + offset, slope * slope * variance);
    assert_moments(&drawn(&sampler, &denoiser, 64, 1), moments, "resampled");
}

#[test]
fn edits_that_do_not_fit_are_refused() {
    let diffusion = Diffusion::ddpm();
    let denoiser = gaussian(&diffusion, DATA);
    let sampler = |solver| Sampler::new(&diffusion, solver, 6).unwrap();
    let full = |value: f64, shape: &[usize]| {
        Tensor::full(value as f32, shape.to_vec(), &Device::Cpu).unwrap()
    };
    let (picture, mask) = (all_bytes(), full(1.0, &[1, 8, 32]));
    let fails = |result: ddpm::Result<Sampler>, expected: &str| {
        let sampled =
            result.and_then(|sampler| sampler.sample(&denoiser, (2, 1, 8, 32), 0, &Device::Cpu));
        let found = sampled.unwrap_err().to_string();
        assert!(found.starts_with(expected), "{found}");
    };
    for strength in [0.0, -0.1, 1.1, f64::NAN] {
        let expected = format!("strength is {strength}; it must be above 0 and at most 1");
        fails(sampler(Solver::Heun).vary(&picture, strength), &expected);
    }
    let late = Sampler::with_timesteps(&diffusion, Solver::ddim(), &[10, 500]).unwrap();
    for t in [9.0, 999.5, 1e9, f64::NAN] {
        let expected = format!(
            "timestep of the start is {t}; it must be at least 10, the smallest timestep of the \
             sampler, and at most 999"
        );
        fails(late.clone().vary_from(&picture, t), &expected);
    }
    let varied = || sampler(Solver::Heun).vary(&picture, 0.5).unwrap();
    let path = || sampler(Solver::Heun).interpolate(Ends::Seeds([0, 1]), &[0.0, 1.0]).unwrap();
    let second = "start is a picture; it must be noise to set another";
    fails(varied().interpolate(Ends::Seeds([0, 1]), &[0.0, 1.0]), second);
    fails(varied().vary(&picture, 1.0), second);
    let second = "start is an interpolation; it must be noise to set another";
    fails(path().vary(&picture, 0.5), second);
    fails(path().interpolate(Ends::Seeds([0, 1]), &[0.0, 1.0]), second);
    let wrong = full(0.0, &[1, 32, 8]);
    let shape = "the picture has shape [1, 32, 8]; it must be [1, 8, 32], that of an image";
    fails(sampler(Solver::Heun).vary(&wrong, 0.5), shape);
    let ddpm = || sampler(Solver::ddpm());
    let once = Resampling { jump: 1, count: 1 };
    fails(ddpm().inpaint(&wrong, &full(1.0, &[1, 1, 1]), once), shape);
    let solver = "solver is Heun; it must be DDPM or DDIM";
    fails(sampler(Solver::Heun).inpaint(&picture, &mask, once), solver);
    let size = "the mask has shape [1, 8, 31]; it must be [1, 8, 32], that of the picture";
    fails(ddpm().inpaint(&picture, &full(1.0, &[1, 8, 31]), once), size);
    let grey = "the mask is 0.5; it must be 0 (known) or 1 (filled)";
    fails(ddpm().inpaint(&picture, &full(0.5, &[1, 8, 32]), once), grey);
    for (jump, count, expected) in [
        (0, 1, "jump is 0; it must be at least 1"),
        (1, 0, "count is 0; it must be at least 1"),
        (1, usize::MAX, "count is 18446744073709551615; it must be small enough for at most"),
        // 5 jumps of 2 steps, 131,072 times.
        (1, 131_073, "count is 131073; it must be small enough for at most 1048576 sampling"),
    ] {
        fails(ddpm().inpaint(&picture, &mask, Resampling { jump, count }), expected);
    }
    let between = |ends, weights: &[f64]| ddpm().interpolate(ends, weights);
    let seeds = || Ends::Seeds([0, 1]);
    fails(between(seeds(), &[0.5, 1.5]), "weight is 1.5; it must be from 0 to 1");
    fails(
        between(seeds(), &[0.5]),
        "sample has shape [2, 1, 8, 32]; it must be [1, 1, 8, 32]: one",
    );
    let noise = |a: f64, b: f64| {
        Ends::Noise(Tensor::cat(&[full(a, &[1, 1, 8, 32]), full(b, &[1, 1, 8, 32])], 0).unwrap())
    };
    let weights = [0.0, 0.5];
    fails(between(noise(1.0, -1.0), &weights), "angle of the noise of the ends is 3.14159");
    fails(between(noise(0.0, 1.0), &weights), "length of the noise of an end is 0; it must be");
    fails(between(Ends::Noise(picture.clone()), &weights), "the noise of the ends has shape [1, 8");
    let same = between(noise(1.0, 1.0), &weights).unwrap();
    assert_eq!(values(&drawn(&same, &denoiser, 2, 0)).len(), 512);
}

/// A file of `tests/data` with results of diffusers; see `tests/data/README.md`.
struct Diffusers {
    metadata: HashMap<String, String>,
    tensors: HashMap<String, Tensor>,
}

impl Diffusers {
    fn read(name: &str) -> Self {
        let path = format!("{}/tests/data/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
        Self { metadata, tensors }
    }

    fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no {name}"))
    }
}

fn max_abs(x: &Tensor) -> f64 {
    x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}
