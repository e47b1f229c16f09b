//! The loop runs solvers that the crate does not have. Their plans are written here by hand, and their results are
//! compared with loops that were written for one solver each.

use candle_core::{DType, Device, Tensor};

use super::plan::{Level, Plan, PlannedStep, Stage};
use super::{BFunction, Sampler, Solver, Spacing, Step, Variance};
use crate::denoiser::from_fn;
use crate::error::Result;
use crate::process::{Diffusion, NoiseSchedule, Prediction};

/// A prediction of the image that is not linear in `x_t`.
fn network(x: f64, t: f64) -> f64 {
    (1.3 * x + 0.001 * t).tanh() + 0.2 * x.sin()
}

/// One level of a trajectory in the notation of the papers: `x_t = scale (x_0 + sigma noise)`.
#[derive(Clone, Copy)]
struct Sigma {
    t: f64,
    scale: f64,
    sigma: f64,
}

impl Sigma {
    /// The prediction from a sample without the factor `scale`.
    fn predict(self, x: f64) -> f64 {
        network(self.scale * x, self.t)
    }

    fn log(self) -> f64 {
        self.sigma.ln()
    }
}

impl From<Level> for Sigma {
    fn from(Level { t, alpha_bar }: Level) -> Self {
        Self { t, scale: alpha_bar.sqrt(), sigma: ((1.0 - alpha_bar) / alpha_bar).sqrt() }
    }
}

fn diffusion() -> Diffusion {
    Diffusion::new(NoiseSchedule::cosine(1000).unwrap(), Prediction::Sample)
}

fn levels() -> Vec<Level> {
    let times = [950, 800, 600, 450, 300, 120, 0].map(f64::from).into_iter();
    let level = |t| Level::new(diffusion().schedule(), t).unwrap();
    times.map(level).chain([Level::IMAGE]).collect()
}

fn sigmas() -> Vec<Sigma> {
    levels().into_iter().map(Sigma::from).collect()
}

/// Runs a plan from these starts with this noise in every step. Returns the samples and the predictions of each step.
fn run(plan: Plan, starts: &[f64], noise: &[f64]) -> Vec<[Vec<f64>; 2]> {
    let tensor = |x: &[f64]| Tensor::new(x, &Device::Cpu).unwrap();
    let denoiser = from_fn(|x: &Tensor, t: &Tensor| {
        let t = t.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let x = x.to_vec1::<f64>()?;
        let values = x.iter().zip(t).map(|(&x, t)| network(x, t)).collect();
        Ok(Tensor::from_vec(values, x.len(), &Device::Cpu)?)
    });
    let mut sampler = Sampler::new(&diffusion(), Solver::ddim(), 1).unwrap();
    sampler.plan = plan;
    let steps = sampler.steps_from(&denoiser, tensor(starts), |_| Ok(tensor(noise))).unwrap();
    let values = |step: Result<Step>| {
        let step = step.unwrap();
        [step.x, step.x_0].map(|x| x.to_vec1::<f64>().unwrap())
    };
    steps.map(values).collect()
}

fn assert_close(found: &[f64], expected: impl Iterator<Item = f64>) {
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-14 * expected.abs().max(1.0), "{found} {expected}");
    }
}

const STARTS: [f64; 6] = [-2.1, -0.9, -0.1, 0.4, 1.0, 1.8];
const NOISE: [f64; 6] = [0.3, -1.2, 0.8, 0.1, -0.5, 1.6];

/// DPM-Solver++(2M), Lu et al. 2022, algorithm 2, in the form of k-diffusion's `sample_dpmpp_2m`.
fn dpm_solver_2m(sigmas: &[Sigma], start: f64) -> f64 {
    let (mut x, mut old) = (start, None);
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (from, to) = (pair[0], pair[1]);
        let denoised = from.predict(x);
        let h = from.log() - to.log();
        let direction = match old {
            Some(old) if to.sigma > 0.0 => {
                let r = (sigmas[i - 1].log() - from.log()) / h;
                (1.0 + 1.0 / (2.0 * r)) * denoised - 1.0 / (2.0 * r) * old
            }
            _ => denoised,
        };
        x = to.sigma / from.sigma * x - (-h).exp_m1() * direction;
        old = Some(denoised);
    }
    x
}

#[test]
fn a_plan_holds_a_multistep_solver() {
    let plan = Plan::new(&levels(), |levels, i| {
        let (from, to) = (Sigma::from(levels[i]), Sigma::from(levels[i + 1]));
        let h = from.log() - to.log();
        let k = -(-h).exp_m1() * to.scale;
        let x_0 = if i == 0 || to.sigma == 0.0 {
            vec![k]
        } else {
            let r = (Sigma::from(levels[i - 1]).log() - from.log()) / h;
            vec![k * (1.0 + 1.0 / (2.0 * r)), -k / (2.0 * r)]
        };
        let x = to.sigma / from.sigma * to.scale / from.scale;
        Ok(vec![Stage { evaluate: Some(levels[i]), x_0, x, z: 0.0, learned: None }])
    });
    let plan = plan.unwrap();
    assert_eq!((plan.evaluations(), plan.predictions), (7, 2));
    let sigmas = sigmas();
    let steps = run(plan, &STARTS, &[]);
    let scale = sigmas[0].scale;
    assert_close(&steps[6][0], STARTS.iter().map(|x| dpm_solver_2m(&sigmas, x / scale)));
    // The first step uses one prediction, and a trajectory of one step is that prediction.
    assert_close(&steps[0][1], STARTS.iter().map(|&x| network(x, 950.0)));
}

/// The factors of UniPC-2, variant `B_2` of Zhao et al. 2023, as diffusers computes them: for the step from `i` to
/// `i + 1`, those of the predictor and those of the corrector, each for the sample and the predictions, newest first.
fn unipc_factors(levels: &[Level], i: usize) -> [(f64, Vec<f64>); 2] {
    let alpha = |i: usize| levels[i].alpha_bar.sqrt();
    let noise = |i: usize| (1.0 - levels[i].alpha_bar).sqrt();
    let lambda = |i: usize| alpha(i).ln() - noise(i).ln();
    let h = lambda(i + 1) - lambda(i);
    let (x, a) = (noise(i + 1) / noise(i), alpha(i + 1) * (-h).exp_m1());
    if i == 0 {
        return [(x, vec![-a]), (x, vec![-a * 0.5, -a * 0.5])];
    }
    let r = (lambda(i - 1) - lambda(i)) / h;
    let phi_2 = (-h).exp_m1() / -h - 1.0;
    let (b_1, b_2) = (phi_2 / (-h).exp_m1(), (phi_2 / -h - 0.5) * 2.0 / (-h).exp_m1());
    let c_0 = (b_1 - b_2) / (1.0 - r);
    let c_1 = b_1 - c_0;
    [
        (x, vec![-a * (1.0 - 0.5 / r), -a * 0.5 / r]),
        (x, vec![-a * c_1, -a * (1.0 - c_0 / r - c_1), -a * c_0 / r]),
    ]
}

/// The corrector evaluates the network at the predicted sample and improves that sample. The next step begins without
/// an evaluation.
#[test]
fn a_plan_holds_a_corrector() {
    let last = levels().len() - 2;
    let plan = Plan::new(&levels(), |levels, i| {
        let evaluate = (i == 0).then_some(levels[0]);
        if i == last {
            return Ok(vec![Stage { evaluate, x_0: vec![1.0], x: 0.0, z: 0.0, learned: None }]);
        }
        let [predictor, corrector] = unipc_factors(levels, i);
        let stage = |evaluate, (x, x_0)| Stage { evaluate, x_0, x, z: 0.0, learned: None };
        Ok(vec![stage(evaluate, predictor), stage(Some(levels[i + 1]), corrector)])
    });
    let plan = plan.unwrap();
    assert_eq!((plan.evaluations(), plan.predictions), (7, 3));
    let steps = run(plan, &STARTS, &[]);

    let levels = levels();
    for (k, &start) in STARTS.iter().enumerate() {
        let mut x = start;
        let mut predictions = vec![network(start, levels[0].t)];
        for i in 0..last {
            let sum = |x, (a, factors): &(f64, Vec<f64>), predictions: &[f64]| {
                a * x + factors.iter().zip(predictions).map(|(a, x)| a * x).sum::<f64>()
            };
            // The step's `x_0` is the prediction at its beginning, which the previous step's corrector made.
            assert_close(&steps[i][1][k..=k], [predictions[0]].into_iter());
            let [predictor, corrector] = unipc_factors(&levels, i);
            let predicted = sum(x, &predictor, &predictions);
            predictions.insert(0, network(predicted, levels[i + 1].t));
            x = sum(x, &corrector, &predictions);
            assert_close(&steps[i][0][k..=k], [x].into_iter());
        }
        assert_close(&steps[last][0][k..=k], [predictions[0]].into_iter());
    }
}

/// The time to which a step of [`edm`] returns by adding noise, and the noise there.
fn churned(from: Level, previous: f64) -> Level {
    Level { t: from.t + 0.5, alpha_bar: 0.5 * (from.alpha_bar + previous) }
}

/// Karras et al. 2022, algorithm 2, with `S_noise = 1`.
fn edm(levels: &[Level], start: f64, noise: f64) -> f64 {
    let mut x = start / levels[0].alpha_bar.sqrt();
    for (i, pair) in levels.windows(2).enumerate() {
        let (from, to) = (Sigma::from(pair[0]), Sigma::from(pair[1]));
        let hat = match i {
            0 => from,
            _ => Sigma::from(churned(pair[0], levels[i - 1].alpha_bar)),
        };
        let x_hat = x + (hat.sigma * hat.sigma - from.sigma * from.sigma).sqrt() * noise;
        let d = (x_hat - hat.predict(x_hat)) / hat.sigma;
        x = x_hat + (to.sigma - hat.sigma) * d;
        if to.sigma != 0.0 {
            let d_2 = (x - to.predict(x)) / to.sigma;
            x = x_hat + (to.sigma - hat.sigma) * (0.5 * d + 0.5 * d_2);
        }
    }
    x
}

/// A stage that only adds noise, an evaluation between two timesteps, and noise that three stages share.
#[test]
fn a_plan_holds_churn_at_times_between_timesteps() {
    let plan = Plan::new(&levels(), |levels, i| {
        let (from, to) = (Sigma::from(levels[i]), Sigma::from(levels[i + 1]));
        let level = if i == 0 { levels[0] } else { churned(levels[i], levels[i - 1].alpha_bar) };
        let hat = Sigma::from(level);
        let z = (hat.sigma * hat.sigma - from.sigma * from.sigma).sqrt();
        let r = to.sigma / hat.sigma;
        let stage = |evaluate, x_0: Vec<f64>, scale: f64| {
            let x_0 = x_0.into_iter().map(|a| a * to.scale * (1.0 - r)).collect();
            Stage { evaluate, x_0, x: scale / from.scale, z: scale * z, learned: None }
        };
        let mut stages = vec![stage(Some(level), vec![1.0], to.scale * r)];
        if i > 0 {
            stages.insert(0, stage(None, vec![], hat.scale));
        }
        if to.sigma != 0.0 {
            let w = 0.5 / r;
            stages.push(stage(Some(levels[i + 1]), vec![w, 1.0 - w], to.scale * r));
        }
        Ok(stages)
    });
    let plan = plan.unwrap();
    assert_eq!(plan.evaluations(), 13);
    let steps = run(plan, &STARTS, &NOISE);
    let levels = levels();
    let expected = STARTS.iter().zip(NOISE).map(|(&x, noise)| edm(&levels, x, noise));
    assert_close(&steps[6][0], expected);
}

/// The loop neither lacks a prediction nor evaluates the network at the image.
#[test]
fn every_stage_of_every_solver_can_be_computed() {
    let mut solvers = Solver::NAMES.map(|(_, solver)| solver).to_vec();
    solvers.extend([
        Solver::Ddpm { variance: Variance::Posterior },
        Solver::Ddim { eta: 0.5 },
        Solver::UniPc { order: 3, b: BFunction::Bh1 },
    ]);
    let diffusion = Diffusion::ddpm();
    for (solver, (_, spacing)) in solvers.iter().flat_map(|s| Spacing::NAMES.map(|n| (*s, n))) {
        for steps in [1, 2, 3, 10, 1000] {
            let sampler = Sampler::with_spacing(&diffusion, solver, spacing, steps).unwrap();
            let added = if sampler.plan.unclipped { 2 } else { 1 };
            let mut predictions = 0;
            for PlannedStep { at, stages, .. } in sampler.plan.steps.iter() {
                for stage in stages {
                    predictions += usize::from(stage.evaluate.is_some());
                    // Churn raises the noise, but not above that of the last timestep.
                    let highest = if matches!(solver, Solver::Edm(_)) { 999.0 } else { at.t };
                    assert!(stage.evaluate.is_none_or(|level| (0.0..=highest).contains(&level.t)));
                    assert!(stage.x_0.len() <= added * predictions, "{solver:?}: {stage:?}");
                    let factors = stage.x_0.iter().chain([&stage.x, &stage.z]);
                    assert!(factors.into_iter().all(|factor| factor.is_finite()));
                }
                assert!(stages.iter().any(|stage| !stage.x_0.is_empty()), "{solver:?} at {at:?}");
            }
            assert_eq!(sampler.evaluations(), predictions);
            assert_eq!(sampler.timesteps().len(), steps);
            let two = matches!(solver, Solver::Heun | Solver::Edm(_));
            assert_eq!(predictions, if two { 2 * steps - 1 } else { steps }, "{solver}");
        }
    }
}
