//! Objectives, timesteps, noise and schedules, compared with torch, diffusers and closed forms.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use ddpm::nn::{Output, Parameters, Trainable, from_fn};
use ddpm::process::Prediction;
use ddpm::sample::{BFunction, Churn, Spacing, Variance};
use ddpm::train::{
    AdamConfig, Loss, Metrics, NoiseConfig, Noised, Objective, ObjectiveConfig, TimestepSampling,
    Update, Weighting, on_metrics,
};
use ddpm::{
    Denoiser, Diffusion, NoiseSchedule, Result, Sampler, Solver, TrainConfig, Trainer, UNetConfig,
};

mod runs;
mod small;

const PREDICTIONS: [(&str, Prediction); 3] = [
    ("epsilon", Prediction::Epsilon),
    ("sample", Prediction::Sample),
    ("velocity", Prediction::Velocity),
];

/// The timesteps of the fixture.
const T: [u32; 6] = [0, 0, 1, 10, 400, 999];

fn fixture(file: &str) -> HashMap<String, Tensor> {
    let path = format!("{}/tests/data/{file}.safetensors", env!("CARGO_MANIFEST_DIR"));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(1e-30f64, |size, x| size.max(x.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * size, "{what}: {found}, not {expected}");
    }
}

/// A batch of another dtype, or other images, than those of the step in which an objective is evaluated.
#[derive(Debug, Clone)]
struct Case {
    x_0: Tensor,
    eps: Tensor,
    t: Vec<u32>,
    output: Output,
}

impl Case {
    fn of(fixture: &HashMap<String, Tensor>, prediction: &str, dtype: DType) -> Self {
        let get = |name: &str| fixture[name].to_dtype(dtype).unwrap();
        let output = Output::new(get(&format!("{prediction}.output")));
        Self { x_0: get("x_0"), eps: get("eps"), t: T.to_vec(), output }
    }

    fn with_variance(mut self, variance: &Tensor) -> Self {
        let variance = variance.to_dtype(self.x_0.dtype()).unwrap();
        self.output = self.output.with_variance(variance);
        self
    }
}

/// The result of an objective, once it was evaluated.
type Found = Option<Result<(Tensor, Output)>>;

/// Evaluates an objective for a case, in a step of another network.
#[derive(Debug)]
struct Probe {
    config: ObjectiveConfig,
    case: Case,
    found: Arc<Mutex<Found>>,
}

impl Objective for Probe {
    fn loss(&self, batch: &Noised<'_>, output: &Output) -> Result<(Tensor, Output)> {
        let (mut other, case) = (batch.clone(), &self.case);
        other.t = Tensor::new(&*case.t, &Device::Cpu)?;
        (other.x_0, other.eps) = (case.x_0.clone(), case.eps.clone());
        other.x_t = batch.diffusion.q_sample(&other.x_0, &other.t, &other.eps)?;
        *self.found.lock().unwrap() = Some(self.config.loss(&other, &case.output));
        let zeros = output.prediction.zeros_like()?;
        Ok((zeros.sum_all()?, Output::new(zeros)))
    }
}

fn evaluate(config: ObjectiveConfig, prediction: Prediction, case: &Case) -> Result<(f64, Output)> {
    let found = Arc::default();
    let probe = Probe { config, case: case.clone(), found: Arc::clone(&found) };
    let diffusion = Diffusion::new(Diffusion::ddpm().schedule().clone(), prediction);
    let train = TrainConfig { batch_size: 1, ..TrainConfig::mnist() };
    let builder = Trainer::builder(small::Scale).config(train).diffusion(diffusion);
    let mut trainer = builder.objective(probe).build()?;
    trainer.step(Tensor::zeros((1, 1, 1, 1), DType::F32, &Device::Cpu)?)?;
    let (loss, gradient) = found.lock().unwrap().take().unwrap()?;
    Ok((values(&loss)[0], gradient))
}

const MIN_SNR: Weighting = Weighting::MinSnr { gamma: 5.0 };

fn objectives() -> Vec<(&'static str, ObjectiveConfig)> {
    let config = |loss, weighting| ObjectiveConfig { loss, weighting, variational_bound: None };
    let huber = Loss::Huber { delta: 0.3 };
    vec![
        ("mse.uniform", config(Loss::Mse, Weighting::Uniform)),
        ("mse.min_snr", config(Loss::Mse, MIN_SNR)),
        ("mse.p2", config(Loss::Mse, Weighting::P2 { k: 1.0, gamma: 0.5 })),
        ("mse.edm", config(Loss::Mse, Weighting::Edm { sigma_data: 0.5 })),
        ("l1.uniform", config(Loss::L1, Weighting::Uniform)),
        ("huber.uniform", config(huber, Weighting::Uniform)),
        ("huber.min_snr", config(huber, MIN_SNR)),
    ]
}

const HYBRID: ObjectiveConfig = ObjectiveConfig {
    loss: Loss::Mse,
    weighting: Weighting::Uniform,
    variational_bound: Some(0.001),
};

#[test]
fn losses_and_their_gradients_are_those_of_torch() {
    let fixture = fixture("objectives");
    for (name, prediction) in PREDICTIONS {
        // The kernels round to f32; the reference computes in f64.
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
            let case = Case::of(&fixture, name, dtype);
            for (objective, config) in objectives() {
                let expected = |what: &str| values(&fixture[&format!("{name}.{objective}.{what}")]);
                let (loss, gradient) = evaluate(config, prediction, &case).unwrap();
                close(&format!("{name} {objective}"), &[loss], &expected("loss"), tolerance);
                let gradient = values(&gradient.prediction);
                close(&format!("{name} {objective}"), &gradient, &expected("gradient"), tolerance);
            }
        }
    }
}

#[test]
fn the_hybrid_loss_adds_the_bound_of_torch_and_stops_the_gradient_of_the_mean() {
    let fixture = fixture("objectives");
    for (name, prediction) in PREDICTIONS {
        for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
            let case = Case::of(&fixture, name, dtype);
            let simple = ObjectiveConfig { variational_bound: None, ..HYBRID };
            let (simple, d_simple) = evaluate(simple, prediction, &case).unwrap();
            let case = case.with_variance(&fixture["variance"]);
            let (loss, gradient) = evaluate(HYBRID, prediction, &case).unwrap();
            let bound = values(&fixture[&format!("{name}.bound.loss")])[0];
            close(name, &[loss], &[simple + 0.001 * bound], tolerance);
            assert_eq!(values(&gradient.prediction), values(&d_simple.prediction));
            let expected: Vec<f64> = values(&fixture[&format!("{name}.bound.gradient")])
                .into_iter()
                .map(|x| 0.001 * x)
                .collect();
            close(name, &values(&gradient.variance.unwrap()), &expected, tolerance);
        }
    }
}

/// The loss, as a function of one value of a tensor, has the derivative that the objective returns.
#[test]
fn gradients_are_those_of_finite_differences() {
    let fixture = fixture("objectives");
    let nudged = |x: &Tensor, i: usize, by: f64| {
        let mut all = values(x);
        all[i] += by;
        Tensor::from_vec(all, x.dims(), &Device::Cpu).unwrap()
    };
    let step = 1e-6;
    for (name, prediction) in PREDICTIONS {
        let case = Case::of(&fixture, name, DType::F64);
        for i in [0, 1, 13, 30, 40, 55, 71] {
            for (objective, config) in objectives() {
                let [(high, gradient), (low, _)] = [step, -step].map(|by| {
                    let output = Output::new(nudged(&case.output.prediction, i, by));
                    evaluate(config, prediction, &Case { output, ..case.clone() }).unwrap()
                });
                let (found, slope) = (values(&gradient.prediction)[i], (high - low) / (2.0 * step));
                let off = (found - slope).abs();
                assert!(off < 1e-4 * found.abs().max(1e-3), "{name} {objective}: {found}, {slope}");
            }
            let [(high, _), (low, _), (_, gradient)] = [step, -step, 0.0].map(|by| {
                let case = case.clone().with_variance(&nudged(&fixture["variance"], i, by));
                evaluate(HYBRID, prediction, &case).unwrap()
            });
            let found = values(&gradient.variance.unwrap())[i];
            let slope = (high - low) / (2.0 * step);
            // The loss is up to 1e3, so its difference loses nine digits.
            assert!(
                (found - slope).abs() < 1e-4 * found.abs().max(0.01),
                "{name}: {found}, {slope}"
            );
        }
    }
}

/// Min-SNR at a gamma that no SNR exceeds is the error of `x_0`, in every prediction.
#[test]
fn a_weighting_means_the_same_for_every_prediction() {
    for snr in [1e-4, 0.3, 1.0, 7.0, 2e3f64] {
        let (signal, noise) = ((snr / (1.0 + snr)).sqrt(), (1.0 / (1.0 + snr)).sqrt());
        // A change of x_0 by 1 at the same x_t.
        let changes = [signal / noise, 1.0, 1.0 / noise];
        let weightings =
            [MIN_SNR, Weighting::P2 { k: 1.0, gamma: 1.0 }, Weighting::Edm { sigma_data: 0.5 }];
        for weighting in weightings {
            let errors: Vec<f64> = PREDICTIONS
                .iter()
                .zip(changes)
                .map(|((_, prediction), change)| {
                    weighting.weight(snr, *prediction) * change * change
                })
                .collect();
            close("weight", &errors, &[errors[1]; 3], 1e-12);
        }
        assert_eq!(Weighting::Uniform.weight(snr, Prediction::Velocity), 1.0);
    }
    assert_eq!(MIN_SNR.weight(0.0, Prediction::Velocity), 0.0);
}

#[test]
fn schedules_are_those_of_diffusers_and_of_their_papers() {
    let diffusers = fixture("diffusers");
    let linear = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
    for (name, schedule) in [
        ("scaled_linear", NoiseSchedule::quadratic(1000, 1e-4, 0.02).unwrap()),
        ("linear_zero_snr", linear.zero_terminal_snr().unwrap()),
    ] {
        let expected = values(&diffusers[&format!("schedule.{name}.betas")]);
        close(name, schedule.betas(), &expected, 1e-12);
    }
    let own = fixture("objectives");
    for (start, end, tau) in [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7)] {
        let schedule = NoiseSchedule::sigmoid(100, start, end, tau).unwrap();
        let expected = values(&own[&format!("sigmoid.{}", if tau == 1.0 { "1.0" } else { "0.7" })]);
        close("sigmoid", schedule.alpha_bars(), &expected, 1e-12);
    }
    let cosine = NoiseSchedule::cosine(1000).unwrap();
    let shift = 2.0 * (64.0f64 / 256.0).ln();
    let shifted = cosine.shifted(shift).unwrap();
    for t in 0..1000 {
        let [before, after] = [&cosine, &shifted].map(|s| s.log_snr(t as f64).unwrap());
        assert!((after - before - shift).abs() < 1e-9, "{t}: {before}, {after}");
    }
    for schedule in [shifted, linear.zero_terminal_snr().unwrap()] {
        let product = schedule.betas().iter().scan(1.0, |product, beta| {
            *product *= 1.0 - beta;
            Some(*product)
        });
        close("product", schedule.alpha_bars(), &product.collect::<Vec<_>>(), 1e-12);
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<NoiseSchedule>(&json).unwrap(), schedule);
    }
}

fn zero_terminal() -> NoiseSchedule {
    NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap().zero_terminal_snr().unwrap()
}

#[test]
fn a_schedule_without_signal_at_its_end_has_times_before_it() {
    let schedule = zero_terminal();
    assert_eq!((schedule.terminal_snr(), schedule.betas()[999]), (0.0, 1.0));
    assert_eq!(schedule.log_snr(999.0).unwrap(), f64::NEG_INFINITY);
    assert_eq!(schedule.time_of(f64::NEG_INFINITY).unwrap(), 999.0);
    for share in [0.0, 0.25, 0.75, 0.999] {
        let t = 998.0 + share;
        let log_snr = schedule.log_snr(t).unwrap();
        let expected = schedule.snr(998).unwrap() * (1.0 - share);
        // Near 999, the fraction of a time has 13 digits.
        assert!((log_snr.exp() / expected - 1.0).abs() < 1e-9);
        assert!((schedule.time_of(log_snr).unwrap() - t).abs() < 1e-9);
    }
    let one = NoiseSchedule::linear(1, 0.1, 0.1).unwrap().zero_terminal_snr().unwrap_err();
    assert!(one.to_string().starts_with("schedule steps is 1; it must be at least 2"), "{one}");
}

/// For a single image as data, the best network predicts it everywhere, and every solver must return it.
#[test]
fn every_solver_begins_without_signal() {
    let image = 0.4;
    let solvers = [
        Solver::ddpm(),
        Solver::Ddpm { variance: Variance::Posterior },
        Solver::ddim(),
        Solver::Ddim { eta: 1.0 },
        Solver::Heun,
        Solver::Edm(Churn::default()),
        Solver::DpmSolver { order: 2 },
        Solver::DpmSolver { order: 3 },
        Solver::DpmSolverSde,
        Solver::UniPc { order: 1, b: BFunction::Bh2 },
        Solver::UniPc { order: 3, b: BFunction::Bh1 },
    ];
    for prediction in [Prediction::Sample, Prediction::Velocity] {
        let diffusion = Diffusion::new(zero_terminal(), prediction);
        let schedule = diffusion.schedule().clone();
        let denoiser = from_fn(move |x_t: &Tensor, t: &Tensor| {
            // Churn evaluates the network between two timesteps.
            let t = t.to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
            let bar = 1.0 / (1.0 + (-schedule.log_snr(t)?).exp());
            let x_0 = (x_t.zeros_like()? + image)?;
            if prediction == Prediction::Sample {
                return Ok(x_0);
            }
            // v = (√ᾱ x_t - x_0) / √(1 - ᾱ)
            Ok((((x_t * bar.sqrt())? - x_0)? / (1.0 - bar).sqrt())?)
        });
        for solver in solvers {
            for steps in [1, 2, 10] {
                let sampler = Sampler::new(&diffusion, solver, steps).unwrap();
                let found = sampler.sample(&denoiser, (2, 1, 2, 2), 0, &Device::Cpu).unwrap();
                close(&format!("{solver}"), &values(&found), &[image; 8], 1e-5);
            }
        }
        // These spacings divide the range of the log-SNR, which is infinite.
        for spacing in [Spacing::LogSnr, Spacing::Karras { rho: 7.0 }] {
            let error = Sampler::with_spacing(&diffusion, Solver::ddim(), spacing, 10).unwrap_err();
            assert!(error.to_string().starts_with("spacing is "), "{error}");
        }
    }
}

#[test]
fn predicted_noise_is_refused_without_signal() {
    let diffusion = Diffusion::new(zero_terminal(), Prediction::Epsilon);
    let sampler = Sampler::new(&diffusion, Solver::ddim(), 10).unwrap_err();
    let trainer = Trainer::new(small::Scale, TrainConfig::mnist(), diffusion, &Device::Cpu);
    for error in [sampler, trainer.map(drop).unwrap_err()] {
        let expected = "prediction is epsilon; it must be sample or velocity";
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

/// The timesteps, images and noise of a batch.
type Seen = (Vec<u32>, Tensor, Tensor);

/// Records each part of a batch.
#[derive(Debug, Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Seen>>>);

impl Objective for Recorder {
    fn loss(&self, batch: &Noised<'_>, output: &Output) -> Result<(Tensor, Output)> {
        let seen = (batch.t.to_vec1()?, batch.x_0.clone(), batch.eps.clone());
        self.0.lock().unwrap().push(seen);
        let zeros = output.prediction.zeros_like()?;
        Ok((zeros.sum_all()?, Output::new(zeros)))
    }
}

/// Returns the timesteps, images and noise of each step.
fn recorded(config: TrainConfig, diffusion: Diffusion, steps: usize) -> Vec<Seen> {
    let recorder = Recorder::default();
    let builder = Trainer::builder(small::Scale).config(config.clone()).diffusion(diffusion);
    let mut trainer = builder.objective(recorder.clone()).build().unwrap();
    let images = Tensor::arange(0f32, (config.batch_size * 12) as f32, &Device::Cpu).unwrap();
    let images = (images * 0.7).unwrap().sin().unwrap().reshape(((), 3, 2, 2)).unwrap();
    for _ in 0..steps {
        trainer.step(&images).unwrap();
    }
    let seen = recorder.0.lock().unwrap();
    let joined = |parts: &[Seen]| {
        let t = parts.iter().flat_map(|(t, _, _)| t.clone()).collect();
        let cat = |of: fn(&Seen) -> Tensor| {
            Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0).unwrap()
        };
        (t, cat(|part| part.1.clone()), cat(|part| part.2.clone()))
    };
    seen.chunks(config.accumulation).map(joined).collect()
}

fn batches_of(batch_size: usize) -> TrainConfig {
    TrainConfig { batch_size, ..TrainConfig::mnist() }
}

#[test]
fn stratified_timesteps_take_each_part_of_the_schedule_once_per_batch() {
    let config = TrainConfig { timesteps: TimestepSampling::Stratified, ..batches_of(8) };
    let mut first = Vec::new();
    for (mut t, ..) in recorded(config.clone(), Diffusion::ddpm(), 300) {
        first.push(t[0]);
        t.sort_unstable();
        // Strata of 125 timesteps, displaced by one offset.
        assert!(t.windows(2).all(|pair| (125..=126).contains(&(pair[1] - pair[0]))), "{t:?}");
    }
    // Each position of the batch has uniform timesteps: mean 499.5, standard deviation 289 / √300 = 16.7.
    let mean = first.iter().map(|&t| f64::from(t)).sum::<f64>() / 300.0;
    assert!((mean - 499.5).abs() < 60.0, "{mean}");
    assert!(first.iter().any(|&t| t < 50) && first.iter().any(|&t| t > 950));
    // A part of the batch has the timesteps of its position.
    let parts = TrainConfig { accumulation: 4, ..config.clone() };
    let [whole, parts] = [config, parts].map(|config| recorded(config, Diffusion::ddpm(), 3));
    assert!(whole.iter().zip(&parts).all(|(a, b)| a.0 == b.0));
}

/// Trains [`small::Scale`] on random images with a recorder around an objective, and returns the parts that the
/// objective saw, the updates and the reports.
fn trained(
    config: TrainConfig,
    objective: ObjectiveConfig,
    diffusion: Diffusion,
) -> (Vec<Part>, Vec<Update>, Vec<Metrics>) {
    let recorder = PartRecorder { objective, parts: Arc::default() };
    let builder = Trainer::builder(small::Scale).config(config.clone()).diffusion(diffusion);
    let mut trainer = builder.objective(recorder.clone()).build().unwrap();
    let (mut updates, mut reports) = (Vec::new(), Vec::new());
    for _ in 0..config.steps {
        let batch = trainer.next_batch(&runs::Waves(11)).unwrap();
        updates.push(trainer.step(&batch).unwrap());
    }
    // A second run of the same steps, for its reports.
    let mut again = Trainer::builder(small::Scale)
        .config(config)
        .diffusion(trainer.diffusion().clone())
        .objective(objective)
        .build()
        .unwrap();
    again
        .fit(
            &runs::Waves(11),
            on_metrics(|metrics| {
                reports.push(metrics.clone());
                Ok(())
            }),
        )
        .unwrap();
    let parts = recorder.parts.lock().unwrap().clone();
    (parts, updates, reports)
}

/// The images of one evaluation of an objective: their timesteps, the network's input, and the target.
type Part = (Vec<u32>, Tensor, Tensor);

#[derive(Debug, Clone)]
struct PartRecorder {
    objective: ObjectiveConfig,
    parts: Arc<Mutex<Vec<Part>>>,
}

impl Objective for PartRecorder {
    fn loss(&self, batch: &Noised<'_>, output: &Output) -> Result<(Tensor, Output)> {
        let part = (batch.t.to_vec1()?, batch.x_t.clone(), batch.target()?);
        self.parts.lock().unwrap().push(part);
        self.objective.loss(batch, output)
    }
}

/// The mean squared error of `scale x_t`, and its derivative by the scale.
fn error_of_scale(scale: f64, (_, x_t, target): &Part) -> (f64, f64) {
    let (x, y) = (values(x_t), values(target));
    let errors = x.iter().zip(&y).map(|(x, y)| (scale * x - y, x));
    let [loss, slope] = errors
        .map(|(error, x)| [error * error, 2.0 * error * x])
        .fold([0.0; 2], |sum, now| [sum[0] + now[0], sum[1] + now[1]]);
    (loss / x.len() as f64, slope / x.len() as f64)
}

/// A process of few timesteps, whose losses differ much.
fn few_timesteps(count: usize) -> Diffusion {
    Diffusion::new(NoiseSchedule::cosine(count).unwrap(), Prediction::Velocity)
}

#[test]
fn losses_are_divided_by_the_importance_of_their_timesteps() {
    const T: usize = 4;
    for accumulation in [1, 2] {
        let config = TrainConfig {
            timesteps: TimestepSampling::Importance,
            accumulation,
            steps: 40,
            optimizer: AdamConfig::adam(1e-9),
            ..batches_of(8)
        };
        let objective = ObjectiveConfig::default();
        let (parts, updates, _) = trained(config.clone(), objective, few_timesteps(T));
        // Until each timestep has its losses, the run is that of uniform timesteps.
        let uniform = TrainConfig { timesteps: TimestepSampling::Uniform, ..config };
        let (as_uniform, ..) = trained(uniform, objective, few_timesteps(T));
        let as_uniform: Vec<u32> = as_uniform.into_iter().flat_map(|(t, ..)| t).collect();
        let mut last: [Vec<f64>; T] = Default::default();
        let (mut weighted, mut drawn) = (0, [0.0; T]);
        for (step, (images, update)) in parts.chunks(8).zip(&updates).enumerate() {
            let warm = last.iter().all(|losses| losses.len() == 10);
            let roots: Vec<f64> = last
                .iter()
                .map(|losses| (losses.iter().map(|loss| loss * loss).sum::<f64>() / 10.0).sqrt())
                .collect();
            let (mut loss, mut slope) = (0.0, 0.0);
            for (k, image) in images.iter().enumerate() {
                let t = image.0[0] as usize;
                let weight = if warm {
                    let p = 0.999 * roots[t] / roots.iter().sum::<f64>() + 0.001 / T as f64;
                    drawn[t] += 1.0;
                    1.0 / (T as f64 * p)
                } else {
                    assert_eq!(image.0, [as_uniform[8 * step + k]]);
                    1.0
                };
                let (of_image, slope_of_image) = error_of_scale(0.5, image);
                loss += weight * of_image / 8.0;
                slope += weight * slope_of_image / 8.0;
            }
            for image in images {
                let losses = &mut last[image.0[0] as usize];
                losses.push(error_of_scale(0.5, image).0);
                losses.drain(..losses.len().saturating_sub(10));
            }
            weighted += usize::from(warm);
            close("loss", &values(&update.loss), &[loss], 1e-5);
            close("slope", &values(&update.grad_norm), &[slope.abs()], 1e-4);
        }
        assert!((10..35).contains(&weighted), "{weighted}");
        // The counts of the draws are those of the probabilities within four standard deviations.
        let roots = last.map(|losses| {
            (losses.iter().map(|loss| loss * loss).sum::<f64>() / losses.len() as f64).sqrt()
        });
        let draws = 8.0 * weighted as f64;
        for (drawn, root) in drawn.iter().zip(&roots) {
            let p = root / roots.iter().sum::<f64>();
            let deviation = (draws * p * (1.0 - p)).sqrt();
            assert!((drawn - draws * p).abs() < 4.0 * deviation, "{drawn}, not {}", draws * p);
        }
    }
}

#[test]
fn reports_have_the_mean_losses_of_the_quartiles() {
    let config = TrainConfig {
        loss_quartiles: true,
        steps: 6,
        log_every: 3,
        optimizer: AdamConfig::adam(1e-9),
        ..batches_of(2)
    };
    let objective = ObjectiveConfig::default();
    // Of nine timesteps, the first quartile has three.
    let (mut parts, updates, reports) = trained(config.clone(), objective, few_timesteps(9));
    // The others are evaluations of the whole batch.
    parts.retain(|(t, ..)| t.len() == 1);
    assert_eq!((parts.len(), reports.len()), (12, 2));
    let mut absent = 0;
    for (images, report) in parts.chunks(6).zip(&reports) {
        let json = serde_json::to_value(report).unwrap();
        for quartile in 0..4 {
            let of_quartile = images
                .iter()
                .filter(|image| [0..3, 3..5, 5..7, 7..9][quartile].contains(&image.0[0]));
            let losses: Vec<f64> = of_quartile.map(|image| error_of_scale(0.5, image).0).collect();
            let name = format!("loss_q{quartile}");
            match report.loss_quartiles[quartile] {
                Some(found) => {
                    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
                    close(&name, &[f64::from(found)], &[mean], 1e-5);
                    assert!((json[&name].as_f64().unwrap() - mean).abs() < 1e-5);
                }
                None => {
                    absent += 1;
                    assert!(losses.is_empty() && json.get(&name).is_none());
                }
            }
        }
    }
    assert!(absent > 0 && absent < 8, "{absent}");
    // The losses are those of a run without quartiles.
    let without = TrainConfig { loss_quartiles: false, ..config };
    let (_, expected, reports) = trained(without, objective, few_timesteps(9));
    for (found, expected) in updates.iter().zip(&expected) {
        assert_eq!(values(&found.loss), values(&expected.loss));
        assert_eq!(values(&found.grad_norm), values(&expected.grad_norm));
    }
    assert!(reports.iter().all(|report| report.loss_quartiles == [None; 4]));
    let json = serde_json::to_string(&reports[0]).unwrap();
    assert!(json.starts_with(r#"{"step":3,"loss":"#) && !json.contains("loss_q"), "{json}");
}

/// The weighted hybrid loss of a divided batch, with both gradients.
#[test]
fn image_by_image_the_update_is_that_of_the_batch() {
    // The first timesteps by importance are uniform.
    let by_batch = TimestepSampling::Uniform;
    let by_image = TimestepSampling::Importance;
    let update = |accumulation, timesteps, bound| {
        let objective =
            ObjectiveConfig { variational_bound: Some(bound), ..everything().objective };
        let config = TrainConfig { objective, accumulation, timesteps, ..everything() };
        let mut trainer = trainer(config);
        let batch = trainer.next_batch(&runs::Waves(10)).unwrap();
        let update = trainer.step(&batch).unwrap();
        [update.loss, update.grad_norm].map(|x| values(&x)[0])
    };
    for accumulation in [1, 2] {
        let whole = update(accumulation, by_batch, 1.0);
        for (found, expected) in update(accumulation, by_image, 1.0).into_iter().zip(whole) {
            close("loss or norm", &[found], &[expected], 1e-5);
        }
        // The tolerance is less than the effect of the variance's gradient on the norm.
        let twice = update(accumulation, by_batch, 2.0);
        assert!((twice[1] / whole[1] - 1.0).abs() > 5e-5, "{twice:?}, {whole:?}");
    }
}

/// The setting may change in a resumed run. In the sums of six images, the order of roundings matters.
#[test]
fn reporting_quartiles_does_not_change_a_bit_of_the_run() {
    let end = |loss_quartiles, accumulation| {
        let config =
            TrainConfig { loss_quartiles, accumulation, batch_size: 6, steps: 3, ..everything() };
        let mut trainer = trainer(config);
        let mut reports = Vec::new();
        let report = on_metrics(|metrics| {
            assert_eq!(metrics.loss_quartiles.iter().any(Option::is_some), loss_quartiles);
            reports.push((metrics.loss.to_bits(), metrics.grad_norm.to_bits()));
            Ok(())
        });
        trainer.fit(&runs::Waves(10), report).unwrap();
        (reports, weights(&trainer))
    };
    for accumulation in [1, 2] {
        assert_eq!(end(true, accumulation), end(false, accumulation), "{accumulation}");
    }
}

/// With timesteps by importance, the mean of a quartile is weighted as if they were uniform.
#[test]
fn quartiles_are_those_of_uniform_timesteps() {
    let config = TrainConfig {
        timesteps: TimestepSampling::Importance,
        steps: 400,
        log_every: 400,
        optimizer: AdamConfig::adam(1e-9),
        ..batches_of(16)
    };
    let uniform = TrainConfig {
        timesteps: TimestepSampling::Uniform,
        loss_quartiles: true,
        ..config.clone()
    };
    let [found, expected] = [config, uniform].map(|config| {
        let (.., reports) = trained(config, ObjectiveConfig::default(), few_timesteps(16));
        reports[0].loss_quartiles.map(|loss| f64::from(loss.unwrap()))
    });
    for (found, expected) in found.iter().zip(&expected) {
        // The standard error of 1,600 losses whose deviation is less than their mean.
        assert!((found / expected - 1.0).abs() < 0.1, "{found}, not {expected}");
    }
}

#[test]
fn log_normal_timesteps_have_its_mean_and_deviation() {
    let timesteps = TimestepSampling::LogNormal { mean: -0.5, std: 0.7 };
    let config = TrainConfig { timesteps, ..batches_of(50) };
    let diffusion = Diffusion::ddpm();
    let mut all = Vec::new();
    for (t, ..) in recorded(config, diffusion.clone(), 80) {
        let log_sigma = |&t: &u32| -0.5 * diffusion.schedule().log_snr(f64::from(t)).unwrap();
        all.extend(t.iter().map(log_sigma));
    }
    let n = all.len() as f64;
    let mean = all.iter().sum::<f64>() / n;
    let std = (all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
    // Four standard errors of 4,000 numbers.
    assert!(
        (mean + 0.5).abs() < 4.0 * 0.7 / n.sqrt() && (std - 0.7).abs() < 0.032,
        "{mean}, {std}"
    );
    // Values beyond the ends become the ends, also where the schedule has no signal.
    let far = TimestepSampling::LogNormal { mean: 50.0, std: 1.0 };
    let far = TrainConfig { timesteps: far, ..batches_of(4) };
    let zero = Diffusion::new(zero_terminal(), Prediction::Velocity);
    for diffusion in [diffusion, zero] {
        assert_eq!(recorded(far.clone(), diffusion, 1)[0].0, [999; 4]);
    }
}

#[test]
fn immiscible_noise_is_the_nearest_of_all_orders() {
    fn orders(n: usize) -> Vec<Vec<usize>> {
        if n == 0 {
            return vec![vec![]];
        }
        let insert = |order: Vec<usize>| {
            (0..n).map(move |at| {
                let mut order = order.clone();
                order.insert(at, n - 1);
                order
            })
        };
        orders(n - 1).into_iter().flat_map(insert).collect()
    }
    let plain = batches_of(6);
    let paired = TrainConfig {
        noise: NoiseConfig { immiscible: true, ..NoiseConfig::default() },
        ..plain.clone()
    };
    let [plain, paired] = [plain, paired].map(|config| recorded(config, Diffusion::ddpm(), 20));
    let mut moved = 0;
    for ((_, x_0, eps), (_, _, paired)) in plain.iter().zip(&paired) {
        let rows =
            |x: &Tensor| -> Vec<Vec<f64>> { values(x).chunks(12).map(<[f64]>::to_vec).collect() };
        let (x_0, eps, paired) = (rows(x_0), rows(eps), rows(paired));
        let distance =
            |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        let total =
            |of: &dyn Fn(usize) -> Vec<f64>| (0..6).map(|k| distance(&x_0[k], &of(k))).sum::<f64>();
        let best = orders(6).into_iter().map(|order| total(&|k| eps[order[k]].clone()));
        let best = best.fold(f64::INFINITY, f64::min);
        let found = total(&|k| paired[k].clone());
        assert!((found - best).abs() < 1e-5 * best, "{found}, {best}");
        assert!(paired.iter().all(|row| eps.contains(row)));
        moved += usize::from(eps != paired);
    }
    assert!(moved > 15, "{moved}");
}

#[test]
fn offset_noise_adds_one_number_per_channel() {
    let plain = batches_of(40);
    let noise = NoiseConfig { offset: 0.25, ..NoiseConfig::default() };
    let offset = TrainConfig { noise, ..plain.clone() };
    let [plain, offset] = [plain, offset].map(|config| recorded(config, Diffusion::ddpm(), 10));
    let mut offsets = Vec::new();
    for ((_, _, plain), (_, _, offset)) in plain.iter().zip(&offset) {
        for channel in values(&(offset - plain).unwrap()).chunks(4) {
            assert!(channel.iter().all(|x| (x - channel[0]).abs() < 1e-6), "{channel:?}");
            offsets.push(channel[0]);
        }
    }
    let n = offsets.len() as f64;
    let std = (offsets.iter().map(|x| x * x).sum::<f64>() / n).sqrt();
    assert!((std / 0.25 - 1.0).abs() < 0.1, "{std}");
}

fn learned() -> UNetConfig {
    UNetConfig { learned_variance: true, ..runs::network() }
}

/// The kernels and candle's autograd agree on both parts of the output, and on the gradients of both.
#[test]
fn a_network_learns_the_variance_by_kernels_as_by_autograd() {
    let [exact, fast] = [DType::F64, DType::F32].map(|dtype| {
        let parameters = Parameters::new(3, dtype, &Device::Cpu);
        let network = UNetConfig { dropout: 0.0, ..learned() };
        (parameters.build(&network).unwrap(), parameters.vars())
    });
    let x_t = Tensor::arange(0f64, 128.0, &Device::Cpu).unwrap().sin().unwrap();
    let x_t = x_t.reshape((2, 1, 8, 8)).unwrap();
    let t = Tensor::new(&[3u32, 700], &Device::Cpu).unwrap();
    let found = [(exact, DType::F64), (fast, DType::F32)].map(|((model, vars), dtype)| {
        let x_t = x_t.to_dtype(dtype).unwrap();
        let (none, dropout) = (Default::default(), ddpm::nn::Dropout::new(0, 0));
        let mut outputs = Vec::new();
        let gradients = model
            .gradients(&x_t, &t, &none, &dropout, &mut |output| {
                let variance = output.variance.clone().expect("a variance");
                assert_eq!(variance.dims(), x_t.dims());
                outputs = [values(&output.prediction), values(&variance)].concat();
                Ok(Output::new(output.prediction.cos()?).with_variance(variance.affine(2.0, 0.5)?))
            })
            .unwrap();
        let of = |var: &candle_core::Var| values(gradients.get(var).expect("a gradient"));
        (outputs, vars.values().map(of).collect::<Vec<_>>())
    });
    let [(exact, gradients), (fast, fast_gradients)] = found;
    close("outputs", &fast, &exact, 1e-4);
    for (fast, exact) in fast_gradients.iter().zip(&gradients) {
        // Some gradients are 0 except for rounding.
        let size = exact.iter().fold(1e-2f64, |size, x| size.max(x.abs()));
        assert!(fast.iter().zip(exact).all(|(a, b)| (a - b).abs() < 1e-3 * size));
    }
}

/// A network with a known prediction and variance.
struct Known;

impl Denoiser for Known {
    fn denoise(&self, x: &Tensor, _: &Tensor, _: &ddpm::nn::Condition) -> Result<Output> {
        Ok(Output::new((x * 0.7)?.tanh()?).with_variance((x * 3.0)?.sin()?))
    }
}

#[test]
fn samples_with_a_learned_variance_are_those_of_diffusers() {
    let fixture = fixture("objectives");
    let solver = Solver::Ddpm { variance: Variance::Learned };
    let timesteps = [0, 20, 300, 600, 999];
    let sampler = Sampler::with_timesteps(&Diffusion::ddpm(), solver, &timesteps).unwrap();
    let z = |t: f64| Ok(fixture[&format!("samples.z.{t}")].clone());
    let start = fixture["samples.start"].clone();
    let last = sampler.steps_from(&Known, start.clone(), z).unwrap().last().unwrap().unwrap();
    close("image", &values(&last.x), &values(&fixture["samples.image"]), 1e-10);
    let without = from_fn(|x: &Tensor, _: &Tensor| Ok(x.clone()));
    let error = sampler.steps_from(&without, start, z).unwrap().next().unwrap().unwrap_err();
    assert!(error.to_string().starts_with("variance is learned; it must be beta or"), "{error}");
}

fn everything() -> TrainConfig {
    TrainConfig {
        objective: ObjectiveConfig { weighting: MIN_SNR, ..HYBRID },
        timesteps: TimestepSampling::Stratified,
        noise: NoiseConfig { offset: 0.1, immiscible: true },
        ..runs::config(10)
    }
}

fn trainer(config: TrainConfig) -> Trainer<UNetConfig> {
    Trainer::new(learned(), config, Diffusion::ddpm(), &Device::Cpu).unwrap()
}

fn weights(trainer: &Trainer<UNetConfig>) -> Vec<f64> {
    trainer.vars().values().flat_map(|var| values(var)).collect()
}

#[test]
fn a_resumed_run_is_the_unbroken_one_at_every_step() {
    let dir = tempfile::tempdir().unwrap();
    let images = runs::Waves(10);
    let mut unbroken = trainer(everything());
    unbroken.fit(&images, ()).unwrap();
    let mut broken = trainer(TrainConfig { steps: 1, ..everything() });
    for step in 1..=10 {
        broken.fit(&images, ()).unwrap();
        assert_eq!(broken.steps(), step);
        let dir = dir.path().join(step.to_string());
        broken.save(&dir).unwrap();
        let config = TrainConfig { steps: step + 1, ..everything() };
        if step < 10 {
            broken =
                Trainer::resume(dir, learned(), config, Diffusion::ddpm(), &Device::Cpu).unwrap();
        }
    }
    assert_eq!(weights(&broken), weights(&unbroken));
}

#[test]
fn every_setting_changes_the_run_and_a_checkpoint_refuses_another() {
    let dir = tempfile::tempdir().unwrap();
    let images = runs::Waves(10);
    let fitted = |config: TrainConfig| {
        let mut trainer = trainer(config);
        trainer.fit(&images, ()).unwrap();
        trainer
    };
    let config = TrainConfig { steps: 2, ..everything() };
    let base = fitted(config.clone());
    base.save(dir.path().join("run")).unwrap();
    let objective = |objective| TrainConfig { objective, ..config.clone() };
    let noise = |offset, immiscible| TrainConfig {
        noise: NoiseConfig { offset, immiscible },
        ..config.clone()
    };
    for (field, other) in [
        ("train.objective.loss", objective(ObjectiveConfig { loss: Loss::L1, ..config.objective })),
        ("train.objective.weighting", objective(HYBRID)),
        (
            "train.objective.variational_bound",
            objective(ObjectiveConfig { variational_bound: Some(0.1), ..config.objective }),
        ),
        ("train.timesteps", TrainConfig { timesteps: TimestepSampling::Uniform, ..config.clone() }),
        ("train.noise.offset", noise(0.2, true)),
        ("train.noise.immiscible", noise(0.1, false)),
    ] {
        assert_ne!(weights(&fitted(other.clone())), weights(&base), "{field}");
        let (dir, device) = (dir.path().join("run"), &Device::Cpu);
        let resumed = Trainer::resume(dir, learned(), other, Diffusion::ddpm(), device);
        let message = resumed.map(drop).unwrap_err().to_string();
        assert!(message.starts_with(field), "{message}");
    }
}

/// Checkpoints of earlier versions have none of these fields.
#[test]
fn configurations_without_the_settings_have_their_defaults() {
    let mut json = serde_json::to_value(TrainConfig::mnist()).unwrap();
    for field in ["objective", "timesteps", "noise"] {
        json.as_object_mut().unwrap().remove(field).unwrap();
    }
    let read: TrainConfig = serde_json::from_value(json).unwrap();
    assert_eq!(read, TrainConfig::mnist());
    assert_eq!(read.objective, ObjectiveConfig::default());
    // The configuration of a network is compared as text.
    let json = serde_json::to_string(&UNetConfig::mnist()).unwrap();
    assert!(!json.contains("learned_variance"), "{json}");
    let json = serde_json::to_string(&everything()).unwrap();
    assert_eq!(serde_json::from_str::<TrainConfig>(&json).unwrap(), everything());
}

#[test]
fn wrong_settings_are_refused_by_name() {
    let weighting = |weighting| ObjectiveConfig { weighting, ..ObjectiveConfig::default() };
    let loss = |loss| ObjectiveConfig { loss, ..ObjectiveConfig::default() };
    let objective = |objective| TrainConfig { objective, ..TrainConfig::mnist() };
    let log_normal = |mean, std| TrainConfig {
        timesteps: TimestepSampling::LogNormal { mean, std },
        ..TrainConfig::mnist()
    };
    let bound = ObjectiveConfig { variational_bound: Some(f64::INFINITY), ..HYBRID };
    let offset = NoiseConfig { offset: -0.1, ..NoiseConfig::default() };
    for (config, expected) in [
        (
            objective(loss(Loss::Huber { delta: 0.0 })),
            "objective.loss.huber.delta is 0; it must be",
        ),
        (
            objective(weighting(Weighting::MinSnr { gamma: -1.0 })),
            "objective.weighting.min_snr.gamma is -1",
        ),
        (
            objective(weighting(Weighting::P2 { k: 0.0, gamma: 1.0 })),
            "objective.weighting.p2.k is 0",
        ),
        (
            objective(weighting(Weighting::P2 { k: 1.0, gamma: f64::NAN })),
            "objective.weighting.p2.gamma is NaN",
        ),
        (
            objective(weighting(Weighting::Edm { sigma_data: 0.0 })),
            "objective.weighting.edm.sigma_data is 0",
        ),
        (objective(bound), "objective.variational_bound is inf"),
        (log_normal(f64::NAN, 1.0), "timesteps.log_normal.mean is NaN"),
        (log_normal(0.0, 0.0), "timesteps.log_normal.std is 0; it must be positive"),
        (TrainConfig { noise: offset, ..TrainConfig::mnist() }, "noise.offset is -0.1; it must be"),
    ] {
        let message = config.validate().unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
    for (result, expected) in [
        (NoiseSchedule::quadratic(10, 0.0, 0.1), "beta_start is 0"),
        (
            NoiseSchedule::sigmoid(10, 3.0, -3.0, 1.0),
            "start is 3; it must be finite and less than end",
        ),
        (NoiseSchedule::sigmoid(10, -3.0, 3.0, 0.0), "tau is 0; it must be positive"),
        (NoiseSchedule::sigmoid(0, -3.0, 3.0, 1.0), "schedule steps is 0"),
        (NoiseSchedule::cosine(10).unwrap().shifted(f64::NAN), "log_snr_shift is NaN"),
        (
            NoiseSchedule::cosine(10).unwrap().shifted(-80.0),
            "betas is a table of 10 whose alpha_bar ends",
        ),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
    let hybrid = TrainConfig { objective: HYBRID, ..runs::config(1) };
    for (network, config, expected) in [
        (runs::network(), hybrid, "objective.variational_bound is 0.001; it must be none"),
        (learned(), runs::config(1), "objective.variational_bound is none; it must be a factor"),
    ] {
        let mut trainer = Trainer::new(network, config, Diffusion::ddpm(), &Device::Cpu).unwrap();
        let message = trainer.fit(&runs::Waves(4), ()).unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
}
