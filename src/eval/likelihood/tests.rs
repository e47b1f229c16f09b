//! Bits per dimension, compared with PyTorch, with closed forms for normal data, and with the exact density of normals.

use std::collections::HashMap;
use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use super::{Bound, Evaluated, Integrator, Likelihood, ProbabilityFlow, Trace, VariationalBound};
use crate::data::{Batch, Images};
use crate::denoiser::{Condition, Denoiser, Output, from_fn};
use crate::engine::Model;
use crate::error::Result;
use crate::model::{Architecture, Parameters, UNet, UNetConfig};
use crate::process::{Diffusion, NoiseSchedule, Prediction};
use crate::sample::Variance;

const PREDICTIONS: [(&str, Prediction); 3] = [
    ("epsilon", Prediction::Epsilon),
    ("sample", Prediction::Sample),
    ("velocity", Prediction::Velocity),
];

/// The seed of the fixture.
const SEED: u64 = 5;

fn data(file: &str) -> HashMap<String, Tensor> {
    let path = format!("{}/tests/data/{file}.safetensors", env!("CARGO_MANIFEST_DIR"));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn images(values: Vec<f64>, shape: (usize, usize, usize, usize)) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn continued(_: Evaluated) -> Result<ControlFlow<()>> {
    Ok(ControlFlow::Continue(()))
}

fn bounds(of: &VariationalBound, denoiser: &impl Denoiser, batch: impl Into<Batch>) -> Vec<Bound> {
    of.evaluate(denoiser, batch, continued).unwrap().unwrap()
}

fn likelihoods(
    of: &ProbabilityFlow,
    denoiser: &impl Denoiser,
    batch: impl Into<Batch>,
) -> Vec<Likelihood> {
    of.evaluate(denoiser, batch, continued).unwrap().unwrap()
}

/// The difference relative to the largest expected value.
fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(1e-30f64, |size, x| size.max(x.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * size, "{what}: {found}, not {expected}");
    }
}

fn compare(name: &str, found: &[Bound], fixture: &HashMap<String, Tensor>, tolerance: f64) {
    let terms = |of: fn(&super::Term) -> f64| -> Vec<f64> {
        found.iter().flat_map(|bound| bound.terms.iter().map(of)).collect()
    };
    for (key, found) in [
        ("total", found.iter().map(|bound| bound.total).collect()),
        ("prior", found.iter().map(|bound| bound.prior).collect()),
        ("terms", terms(|term| term.bits)),
        ("x_0_mse", terms(|term| term.x_0_mse)),
        ("noise_mse", terms(|term| term.noise_mse)),
    ] {
        let key = format!("{name}.{key}");
        close(&key, &found, &values(&fixture[&key]), tolerance);
    }
    let decoders: Vec<f64> = found.iter().map(|bound| bound.terms[0].bits).collect();
    assert_eq!(decoders, found.iter().map(Bound::decoder).collect::<Vec<_>>());
}

/// The schedule of the fixture.
fn schedule(fixture: &HashMap<String, Tensor>) -> NoiseSchedule {
    let schedule = NoiseSchedule::linear(20, 1e-3, 0.4).unwrap();
    close("betas", schedule.betas(), &values(&fixture["betas"]), 1e-14);
    schedule
}

/// A network with a known prediction and variance.
struct Known;

impl Denoiser for Known {
    fn denoise(&self, x: &Tensor, _: &Tensor, _: &Condition) -> Result<Output> {
        Ok(Output::new((x * 0.7)?.tanh()?).with_variance((x * 3.0)?.sin()?))
    }
}

#[test]
fn every_term_of_the_bound_is_that_of_torch() {
    let fixture = data("likelihood");
    for (name, prediction) in PREDICTIONS {
        let diffusion = Diffusion::new(schedule(&fixture), prediction);
        for (of_variance, variance) in [
            ("beta", Variance::Beta),
            ("posterior", Variance::Posterior),
            ("learned", Variance::Learned),
        ] {
            for (clipped, clip) in [("plain", false), ("clipped", true)] {
                let bound = VariationalBound::new(&diffusion, variance, SEED).unwrap();
                let bound = bound.clip_denoised(clip);
                let found = bounds(&bound, &Known, &fixture["known.images"]);
                // The normals of both are rounded to f32.
                compare(&format!("known.{name}.{of_variance}.{clipped}"), &found, &fixture, 1e-6);
            }
        }
    }
}

/// The U-Net in f32 that PyTorch computes in f64.
fn unet() -> Model<UNet> {
    let weights = data("pytorch/attention_everywhere").into_iter();
    let weights = weights
        .filter_map(|(name, weight)| Some((name.strip_prefix("weights.")?.to_string(), weight)));
    let config = UNetConfig {
        image_size: 8.into(),
        channels: 3,
        hidden_dims: vec![16, 16, 16],
        time_dim: 16,
        attention_levels: vec![0, 1],
        dropout: 0.0,
        ..UNetConfig::mnist()
    };
    config.build(VarBuilder::from_tensors(weights.collect(), DType::F32, &Device::Cpu)).unwrap()
}

#[test]
fn bits_of_a_unet_are_those_of_torch() {
    let fixture = data("likelihood");
    let diffusion = Diffusion::new(schedule(&fixture), Prediction::Epsilon);
    let images = fixture["unet.images"].to_dtype(DType::F32).unwrap();
    let bound = VariationalBound::new(&diffusion, Variance::Posterior, SEED).unwrap();
    let found = bounds(&bound.clip_denoised(true), &unet(), &images);
    compare("unet", &found, &fixture, 1e-4);

    let flow = ProbabilityFlow::new(&diffusion, 200, SEED).unwrap();
    let flow = flow.trace(Trace::Rademacher(2)).unwrap();
    for (k, found) in likelihoods(&flow, &unet(), &images).into_iter().enumerate() {
        let [bits, density] =
            ["bits", "log_density"].map(|name| values(&fixture[&format!("unet.flow.{name}")])[k]);
        assert!((found.bits - bits).abs() < 1e-4, "{} bits, not {bits}", found.bits);
        // An error of 1e-4 bits for each of 192 values.
        let error = (found.log_density - density).abs();
        assert!(error < 0.0133, "{}, not {density}", found.log_density);
    }
}

/// Predicts this image.
fn oracle(image: Tensor) -> impl Denoiser {
    from_fn(move |x: &Tensor, _: &Tensor| Ok(image.broadcast_as(x.shape())?.contiguous()?))
}

/// Without an error of the mean, a term is the divergence of two variances, and the decoder term is the probability of
/// an interval around the mean.
#[test]
fn terms_without_error_follow_from_the_variances_alone() {
    let linear = NoiseSchedule::linear(12, 0.01, 0.3).unwrap();
    for schedule in [linear.clone(), linear.zero_terminal_snr().unwrap()] {
        let diffusion = Diffusion::new(schedule.clone(), Prediction::Sample);
        let x = 0.5;
        let image = images(vec![x], (1, 1, 1, 1));
        for variance in [Variance::Posterior, Variance::Beta] {
            let bound = VariationalBound::new(&diffusion, variance, 0).unwrap();
            let found = &bounds(&bound, &oracle(image.clone()), &image)[0];
            let bars = schedule.alpha_bars();
            let ratio = |t: usize| (1.0 - bars[t]) / (1.0 - bars[t - 1]);
            let mut total = 0.0;
            for (t, term) in found.terms.iter().enumerate().skip(1) {
                let r = if variance == Variance::Beta { ratio(t) } else { 1.0 };
                let expected = 0.5 * (r.ln() - 1.0 + 1.0 / r) / 2f64.ln();
                assert!((term.bits - expected).abs() < 1e-12, "{t}: {} {expected}", term.bits);
                assert_eq!((term.t, term.x_0_mse, term.noise_mse), (t, 0.0, 0.0));
                total += expected;
            }
            let std = (schedule.betas()[1] / ratio(1)).sqrt();
            let decoder = -libm::erf(1.0 / 255.0 / std / 2f64.sqrt()).log2();
            assert!((found.decoder() - decoder).abs() < 1e-12, "{} {decoder}", found.decoder());
            let last = bars[bars.len() - 1];
            let prior = 0.5 * (last * x * x - last - (1.0 - last).ln()) / 2f64.ln();
            assert!((found.prior - prior).abs() < 1e-12, "{} {prior}", found.prior);
            let total = total + decoder + prior;
            assert!((found.total - total).abs() < 1e-11, "{} {total}", found.total);
        }
    }
}

/// The mean over noise of each term, for normal data and its best network.
#[test]
fn mean_terms_of_normal_data_have_their_closed_form() {
    let (mean, variance, x, count) = (0.2, 0.25, 0.7, 20_000);
    let schedule = NoiseSchedule::linear(10, 0.01, 0.5).unwrap();
    let bars = schedule.alpha_bars().to_vec();
    let slope = move |bar: f64| bar.sqrt() * variance / (bar * variance + 1.0 - bar);
    let network = {
        let bars = bars.clone();
        from_fn(move |x: &Tensor, t: &Tensor| {
            let bar = bars[t.to_vec1::<u32>()?[0] as usize];
            Ok(x.affine(slope(bar), mean - slope(bar) * bar.sqrt() * mean)?)
        })
    };
    let diffusion = Diffusion::new(schedule.clone(), Prediction::Sample);
    let bound = VariationalBound::new(&diffusion, Variance::Beta, 3).unwrap();
    let found = &bounds(&bound, &network, images(vec![x; count], (1, 1, 1, count)))[0];
    for (t, term) in found.terms.iter().enumerate() {
        let (bar, k) = (bars[t], slope(bars[t]));
        // The error of x_0 is normal with this mean and variance.
        let (offset, noise) = ((x - mean) * (1.0 - bar.sqrt() * k), k * k * (1.0 - bar));
        let expected = offset * offset + noise;
        let deviation =
            ((4.0 * offset * offset * noise + 2.0 * noise * noise) / count as f64).sqrt();
        assert!((term.x_0_mse - expected).abs() < 5.0 * deviation, "{t}: {term:?} {expected}");
        assert!((term.noise_mse - bar / (1.0 - bar) * term.x_0_mse).abs() < 1e-12);
        if t == 0 {
            continue;
        }
        let (before, beta) = (bars[t - 1], schedule.betas()[t]);
        let posterior = beta * (1.0 - before) / (1.0 - bar);
        let weight = before * beta / (1.0 - bar).powi(2);
        let spread = 0.5 * ((beta / posterior).ln() - 1.0 + posterior / beta);
        let expected = (spread + 0.5 * weight * expected) / 2f64.ln();
        let deviation = 0.5 * weight * deviation / 2f64.ln();
        assert!((term.bits - expected).abs() < 5.0 * deviation, "{t}: {term:?} {expected}");
    }
}

/// The shorter process has the betas of its own timesteps.
#[test]
fn chosen_timesteps_are_a_process_of_their_own() {
    let fixture = data("likelihood");
    let long = schedule(&fixture);
    let chosen = [2, 5, 6, 13, 19];
    let mut before = 1.0;
    let betas = chosen.map(|t| {
        let bar = long.alpha_bars()[t];
        1.0 - bar / std::mem::replace(&mut before, bar)
    });
    let short = NoiseSchedule::from_betas(betas.to_vec()).unwrap();
    let image = images(vec![0.3, -1.0, 1.0, 0.0], (1, 1, 2, 2));
    let oracle = oracle((&image * 0.9).unwrap());
    let of = |schedule: NoiseSchedule| {
        let diffusion = Diffusion::new(schedule, Prediction::Sample);
        VariationalBound::new(&diffusion, Variance::Beta, 1).unwrap()
    };
    let found = bounds(&of(long).timesteps(&chosen).unwrap(), &oracle, &image);
    let expected = bounds(&of(short), &oracle, &image);
    assert!((found[0].total / expected[0].total - 1.0).abs() < 1e-9, "{found:?} {expected:?}");
    assert_eq!(found[0].terms.iter().map(|term| term.t).collect::<Vec<_>>(), chosen);
}

#[test]
fn sampled_terms_are_an_estimate_without_bias() {
    let diffusion =
        Diffusion::new(NoiseSchedule::linear(12, 0.01, 0.3).unwrap(), Prediction::Sample);
    let count = 4_000;
    let image = images(vec![0.5; count], (count, 1, 1, 1));
    let bound = VariationalBound::new(&diffusion, Variance::Beta, 1).unwrap();
    let all = &bounds(&bound, &oracle(image.clone()), &image)[0];
    // 11 terms in 1, 3 or 11 parts.
    for terms in [1, 3, 11] {
        let sampled = bound.clone().sampled(terms).unwrap();
        assert_eq!(sampled.evaluations(), terms + 1);
        let found = bounds(&sampled, &oracle(image.clone()), &image);
        let totals: Vec<f64> = found.iter().map(|bound| bound.total).collect();
        let mean = totals.iter().sum::<f64>() / count as f64;
        let variance = totals.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count as f64;
        let deviation = (variance / count as f64).sqrt();
        assert!((mean - all.total).abs() <= 5.0 * deviation + 1e-12, "{terms}: {mean}");
        assert_eq!(deviation > 1e-6, terms < 11, "{terms}: {deviation}");
        for term in found.iter().flat_map(|bound| &bound.terms) {
            assert_eq!(*term, all.terms[term.t]);
        }
        // The mean has the mean of each timestep.
        let together = Bound::mean(&found).unwrap();
        assert!((together.total - mean).abs() < 1e-12 && together.terms.len() == 12);
        close(
            "terms",
            &together.terms.iter().map(|term| term.bits).collect::<Vec<_>>(),
            &all.terms.iter().map(|term| term.bits).collect::<Vec<_>>(),
            1e-12,
        );
    }
}

/// Normal data of two values that depend on each other, and the best network for it.
struct Normals {
    mean: [f64; 2],
    /// The variances along two directions, turned by this angle.
    variances: [f64; 2],
    angle: f64,
}

const NORMALS: Normals = Normals { mean: [0.3, -0.4], variances: [0.5, 0.02], angle: 0.6 };

impl Normals {
    fn turn(&self) -> [[f64; 2]; 2] {
        let (sin, cos) = self.angle.sin_cos();
        [[cos, sin], [-sin, cos]]
    }

    /// The offsets of `x_t` from its mean along the two directions.
    fn offsets(&self, x: &[f64], bar: f64) -> [f64; 2] {
        let [a, b] = [0, 1].map(|i| x[i] - bar.sqrt() * self.mean[i]);
        self.turn().map(|[p, q]| p * a + q * b)
    }

    /// The logarithm of the density of `x_t`.
    fn log_density(&self, x: &[f64], bar: f64) -> f64 {
        let parts =
            self.offsets(x, bar).into_iter().zip(self.variances).map(|(offset, variance)| {
                let variance = bar * variance + 1.0 - bar;
                -0.5 * (offset * offset / variance + (std::f64::consts::TAU * variance).ln())
            });
        parts.sum()
    }

    /// The logarithm of the density of the model, whose ODE begins at standard normals: the exact solution of the ODE
    /// keeps the offsets in units of their standard deviations.
    fn model_log_density(&self, x: &[f64], schedule: &NoiseSchedule) -> f64 {
        let bars = schedule.alpha_bars();
        let (bar, last) = (bars[0], bars[bars.len() - 1]);
        let mut log = 0.0;
        let turn = self.turn();
        for (i, offset) in self.offsets(x, bar).into_iter().enumerate() {
            let [before, after] = [bar, last].map(|bar| bar * self.variances[i] + 1.0 - bar);
            let ratio = (after / before).sqrt();
            let [p, q] = turn[i];
            let end = offset * ratio + last.sqrt() * (p * self.mean[0] + q * self.mean[1]);
            log += ratio.ln() - 0.5 * (end * end + std::f64::consts::TAU.ln());
        }
        log
    }

    /// The best network for this process, composed of operations that candle differentiates.
    fn network(self, diffusion: &Diffusion) -> impl Denoiser + use<> {
        let (schedule, prediction) = (diffusion.schedule().clone(), diffusion.prediction());
        from_fn(move |x: &Tensor, t: &Tensor| {
            let bar = schedule.alpha_bar_at(t.to_dtype(DType::F64)?.to_vec1::<f64>()?[0])?;
            let (signal, noise) = (bar.sqrt(), (1.0 - bar).sqrt());
            let turn = self.turn();
            let slopes = self.variances.map(|v| signal * v / (bar * v + 1.0 - bar));
            let matrix: Vec<f64> = [(0, 0), (0, 1), (1, 0), (1, 1)]
                .map(|(i, j)| (0..2).map(|k| turn[k][i] * slopes[k] * turn[k][j]).sum())
                .to_vec();
            let matrix = Tensor::from_vec(matrix, (2, 2), &Device::Cpu)?.to_dtype(x.dtype())?;
            let mean = Tensor::new(&self.mean, &Device::Cpu)?.to_dtype(x.dtype())?;
            let flat = x.flatten_from(1)?;
            let offset = flat.broadcast_sub(&(&mean * signal)?)?;
            let x_0 = offset.matmul(&matrix)?.broadcast_add(&mean)?;
            let eps = ((&flat - (&x_0 * signal)?)? / noise)?;
            let output = match prediction {
                Prediction::Epsilon => eps,
                Prediction::Sample => x_0,
                Prediction::Velocity => ((eps * signal)? - (x_0 * noise)?)?,
            };
            Ok(output.reshape(x.shape())?)
        })
    }
}

/// Values near and far from the mean.
const POINTS: [f64; 6] = [0.31, -0.42, 1.0, 0.2, -0.6, -0.9];

#[test]
fn the_density_of_normals_is_exact() {
    for (name, prediction) in PREDICTIONS {
        let diffusion = Diffusion::new(NoiseSchedule::cosine(1000).unwrap(), prediction);
        let flow = ProbabilityFlow::new(&diffusion, 100, 0).unwrap();
        let flow = flow.trace(Trace::Exact).unwrap().dequantised(false);
        let points = images(POINTS.to_vec(), (3, 1, 1, 2));
        let found = likelihoods(&flow, &NORMALS.network(&diffusion), &points);
        for (point, found) in POINTS.chunks(2).zip(found) {
            let bar = diffusion.schedule().alpha_bars()[0];
            // Bits of intervals of width 2 / 255.
            let bits = -NORMALS.log_density(point, bar) / 2.0 / 2f64.ln() + 127.5f64.log2();
            assert!((found.bits - bits).abs() < 1e-4, "{name}: {found:?}, not {bits}");
            let model = NORMALS.model_log_density(point, diffusion.schedule());
            assert!((found.log_density - model).abs() < 1e-4, "{name}: {found:?}, not {model}");
        }
    }
}

#[test]
fn integrators_have_their_orders() {
    let diffusion =
        Diffusion::new(NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap(), Prediction::Epsilon);
    let error = |integrator, steps| {
        let flow = ProbabilityFlow::new(&diffusion, steps, 0).unwrap().integrator(integrator);
        let flow = flow.trace(Trace::Exact).unwrap().dequantised(false);
        let points = images(POINTS.to_vec(), (3, 1, 1, 2));
        let found = likelihoods(&flow, &NORMALS.network(&diffusion), &points);
        let errors = POINTS.chunks(2).zip(found).map(|(point, found)| {
            (found.log_density - NORMALS.model_log_density(point, diffusion.schedule())).abs()
        });
        errors.fold(0.0, f64::max)
    };
    for (integrator, order, steps) in
        [(Integrator::Heun, 2.0, [64, 128, 256]), (Integrator::RungeKutta, 4.0, [16, 32, 64])]
    {
        let errors = steps.map(|steps| error(integrator, steps));
        for pair in errors.windows(2) {
            let found = (pair[0] / pair[1]).log2();
            assert!((found - order).abs() < 0.35, "{integrator:?}: {errors:?}, order {found}");
        }
    }
}

#[test]
fn random_traces_have_the_exact_mean() {
    let diffusion = Diffusion::new(NoiseSchedule::cosine(100).unwrap(), Prediction::Velocity);
    let (count, network) = (3_000, NORMALS.network(&diffusion));
    let flow = ProbabilityFlow::new(&diffusion, 8, 1).unwrap().dequantised(false);
    let densities = |trace, count: usize| -> Vec<f64> {
        let points = images(POINTS[..2].repeat(count), (count, 1, 1, 2));
        let found = likelihoods(&flow.clone().trace(trace).unwrap(), &network, points);
        found.iter().map(|found| found.log_density).collect()
    };
    let exact = densities(Trace::Exact, 1)[0];
    let mut deviations = Vec::new();
    for trace in [Trace::Rademacher(1), Trace::Rademacher(4), Trace::Normal(1), Trace::Normal(4)] {
        let found = densities(trace, count);
        let mean = found.iter().sum::<f64>() / count as f64;
        let variance = found.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count as f64;
        let error = (mean - exact).abs();
        assert!(error < 5.0 * (variance / count as f64).sqrt(), "{trace:?}: {mean}, not {exact}");
        deviations.push(variance.sqrt());
    }
    // Four vectors halve the deviation, and signs deviate less than normals.
    for pair in deviations.chunks(2) {
        assert!((pair[0] / pair[1] - 2.0).abs() < 0.2, "{deviations:?}");
    }
    assert!(deviations[0] < deviations[2], "{deviations:?}");
}

/// Five images with classes.
fn five() -> Images {
    let pixels = (0..5 * 64).map(|i| (i * i % 251) as u8).collect();
    Images::new(pixels, (1, 8, 8)).unwrap().with_labels(vec![0, 1, 2, 0, 1]).unwrap()
}

fn small(classes: Option<usize>) -> Model<UNet> {
    let config = UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![8, 16],
        time_dim: 16,
        classes,
        ..UNetConfig::mnist()
    };
    Parameters::new(1, DType::F32, &Device::Cpu).build(&config).unwrap()
}

#[test]
fn a_result_does_not_depend_on_the_batch() {
    let unet = small(Some(3));
    let diffusion = Diffusion::new(NoiseSchedule::cosine(40).unwrap(), Prediction::Velocity);
    let bound = VariationalBound::new(&diffusion, Variance::Beta, 4).unwrap().sampled(3).unwrap();
    let flow = ProbabilityFlow::new(&diffusion, 2, 4).unwrap();
    let read = |range| Batch::read(&five(), range, &Device::Cpu).unwrap();
    let all = bounds(&bound, &unet, read(0..5));
    let densities = likelihoods(&flow, &unet, read(0..5));
    for (first, end) in [(0, 2), (2, 3), (3, 5)] {
        assert_eq!(bounds(&bound, &unet, read(first..end)), all[first..end]);
        let found = likelihoods(&flow, &unet, read(first..end));
        assert_eq!(found, densities[first..end]);
    }
    // The seed and the classes have an effect.
    let mut batch = read(0..5);
    batch.classes = Some(Tensor::new(&[1u32, 1, 2, 0, 1], &Device::Cpu).unwrap());
    let found = bounds(&bound, &unet, &batch);
    assert!(found[0] != all[0] && found[1..] == all[1..]);
    let other = VariationalBound::new(&diffusion, Variance::Beta, 5).unwrap().sampled(3).unwrap();
    assert_ne!(bounds(&other, &unet, read(0..1))[0].terms[0], all[0].terms[0]);
    let other = ProbabilityFlow::new(&diffusion, 2, 5).unwrap();
    assert_ne!(likelihoods(&other, &unet, read(0..1))[0], densities[0]);
}

#[test]
fn an_evaluation_reports_its_steps_and_can_stop() {
    let image = images(vec![0.1, 0.2], (1, 1, 1, 2));
    let diffusion = Diffusion::new(NoiseSchedule::cosine(6).unwrap(), Prediction::Sample);
    let network = from_fn(|x: &Tensor, _: &Tensor| Ok((x * 0.5)?));
    let bound = VariationalBound::new(&diffusion, Variance::Beta, 0).unwrap();
    let flow = ProbabilityFlow::new(&diffusion, 6, 0).unwrap();
    assert_eq!((bound.evaluations(), flow.evaluations()), (6, 24));
    for stop in [3, 7] {
        let (mut of_bound, mut of_flow) = (vec![], vec![]);
        let flow_of = |seen: &mut Vec<usize>, at: Evaluated| {
            assert_eq!(at.total, 6);
            seen.push(at.done);
            Ok(if at.done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        };
        let found = bound.evaluate(&network, &image, |at| flow_of(&mut of_bound, at)).unwrap();
        let density = flow.evaluate(&network, &image, |at| flow_of(&mut of_flow, at)).unwrap();
        let expected: Vec<usize> = (1..=stop.min(6)).collect();
        assert_eq!((found.is_some(), density.is_some()), (stop == 7, stop == 7));
        assert_eq!((&of_bound, &of_flow), (&expected, &expected));
    }
}

#[test]
fn wrong_settings_and_networks_are_refused_by_name() {
    let schedule = NoiseSchedule::cosine(6).unwrap();
    let of = |prediction| Diffusion::new(schedule.clone(), prediction);
    let diffusion = of(Prediction::Sample);
    let bound = || VariationalBound::new(&diffusion, Variance::Learned, 0).unwrap();
    let flow = |steps| ProbabilityFlow::new(&diffusion, steps, 0);
    let image = images(vec![0.1, 0.2], (1, 1, 1, 2));
    let network = from_fn(|x: &Tensor, _: &Tensor| Ok((x * 0.5)?));
    let host = from_fn(|x: &Tensor, _: &Tensor| Ok(x.detach()));
    let wide = from_fn(|x: &Tensor, _: &Tensor| Ok(Tensor::cat(&[x, x], 1)?));
    let nan = from_fn(|x: &Tensor, _: &Tensor| Ok((x * f64::NAN)?));
    let no_signal = schedule.zero_terminal_snr().unwrap();
    let ending = |prediction| Diffusion::new(no_signal.clone(), prediction);
    let read = |range| Batch::read(&five(), range, &Device::Cpu).map(|_| ());
    let by_bound = |network: &dyn Denoiser, image: &Tensor| {
        let bound = VariationalBound::new(&diffusion, Variance::Beta, 0).unwrap();
        bound.evaluate(network, image, continued).map(|_| ())
    };
    let by_flow = |network: &dyn Denoiser, image: &Tensor| {
        flow(2).unwrap().evaluate(network, image, continued).map(|_| ())
    };
    let bytes = image.to_dtype(DType::U8).unwrap();
    let empty = Tensor::zeros((0, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
    let cases = [
        (bound().sampled(0).map(|_| ()), "sampled terms is 0; it must be from 1 to 5"),
        (bound().sampled(6).map(|_| ()), "sampled terms is 6; it must be from 1 to 5"),
        (bound().timesteps(&[]).map(|_| ()), "timesteps is []; it must be one or more"),
        (bound().timesteps(&[1, 1]).map(|_| ()), "timesteps is [1, 1]; it must be one or more"),
        (bound().timesteps(&[6]).map(|_| ()), "t is 6; it must be from 0 to 5"),
        (
            bound().sampled(3).unwrap().timesteps(&[0, 5]).map(|_| ()),
            "sampled terms is 3; it must be from 1 to 1",
        ),
        (
            bound().evaluate(&network, &image, continued).map(|_| ()),
            "variance is learned; it must be beta or posterior",
        ),
        (
            VariationalBound::new(&ending(Prediction::Epsilon), Variance::Beta, 0).map(|_| ()),
            "prediction is epsilon",
        ),
        (flow(0).map(|_| ()), "integration steps is 0; it must be at least 1"),
        (
            ProbabilityFlow::new(&ending(Prediction::Sample), 1, 0).map(|_| ()),
            "terminal SNR is 0; it must be above 0",
        ),
        (
            flow(1).unwrap().trace(Trace::Normal(0)).map(|_| ()),
            "vectors of the trace is 0; it must be at least 1",
        ),
        (
            by_flow(&host, &image),
            "the denoiser's output is without a gradient with respect to x_t; it must be computed",
        ),
        (by_flow(&wide, &image), "the denoiser's output has shape [1, 2, 1, 2]"),
        (by_bound(&wide, &image), "the denoiser's output has shape [1, 2, 1, 2]"),
        (by_flow(&nan, &image), "the log-density is not finite"),
        (by_bound(&nan, &image), "the denoiser's output is not finite at timestep 0"),
        (by_bound(&network, &(&image / 0.0).unwrap()), "an image is not finite"),
        (by_bound(&network, &bytes), "dtype of the images is u8"),
        (by_flow(&network, &empty), "images has shape [0, 1, 2, 2]; it must be (batch, ...)"),
        (Bound::mean(&[]).map(|_| ()), "number of images is 0; it must be at least 1"),
        (read(3..6), "images is 3..6; it must be a range of at least one of the 5 images"),
        (read(2..2), "images is 2..2; it must be a range of at least one of the 5 images"),
    ];
    for (i, (found, expected)) in cases.into_iter().enumerate() {
        let message = found.expect_err(expected).to_string();
        assert!(message.starts_with(expected), "{i}: {message}");
    }
    // A network without classes does not receive those of the images.
    let batch = Batch::read(&five(), 0..2, &Device::Cpu).unwrap();
    let bound = VariationalBound::new(&diffusion, Variance::Beta, 0).unwrap();
    assert_eq!(bounds(&bound, &small(None), batch).len(), 2);
}
