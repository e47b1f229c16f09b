//! Few-step solvers, spacings, thresholding and inversion, compared with diffusers, with the papers' algorithms in
//! another language, and with their orders of accuracy. The data is a mixture of normals, whose best denoiser is known.
//!
//! The environment variable `DDPM_SOLVERS` names a further folder of files made by
//! `tests/data/generate/solver_fixtures.py`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use ddpm::nn::from_fn;
use ddpm::process::Prediction;
use ddpm::sample::{BFunction, Churn, DynamicThreshold, SamplerConfig, Spacing};
use ddpm::{Denoiser, Diffusion, NoiseSchedule, Sampler, Solver};
use serde_json::Value;

/// Data whose pixels are independent, each from a mixture of normals.
#[derive(Debug, Clone)]
struct Mixture {
    weights: Vec<f64>,
    means: Vec<f64>,
    stds: Vec<f64>,
}

impl Mixture {
    fn fixed() -> Self {
        Self { weights: vec![0.4, 0.6], means: vec![-0.7, 0.5], stds: vec![0.3, 0.5] }
    }

    /// The posterior mean of the pixel of which `y = x_0 + sigma noise` is known.
    fn denoised(&self, y: f64, sigma: f64) -> f64 {
        let parts = self.weights.iter().zip(&self.means).zip(&self.stds);
        let part = |((weight, mean), std): ((&f64, &f64), &f64)| {
            let variance = std * std + sigma * sigma;
            let log = weight.ln() - 0.5 * variance.ln() - 0.5 * (y - mean).powi(2) / variance;
            (log, mean + std * std / variance * (y - mean))
        };
        let parts: Vec<(f64, f64)> = parts.map(part).collect();
        let top = parts.iter().map(|(log, _)| *log).fold(f64::NEG_INFINITY, f64::max);
        let shares: Vec<f64> = parts.iter().map(|(log, _)| (log - top).exp()).collect();
        let sum: f64 = shares.iter().sum();
        shares.iter().zip(&parts).map(|(share, (_, mean))| share * mean).sum::<f64>() / sum
    }

    /// The best network that predicts the noise.
    fn network(&self, schedule: &NoiseSchedule) -> impl Denoiser + use<> {
        let (mixture, schedule) = (self.clone(), schedule.clone());
        from_fn(move |x: &Tensor, t: &Tensor| {
            let t = t.to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
            let bar = schedule.alpha_bar_at(t)?;
            let sigma = ((1.0 - bar) / bar).sqrt();
            let values = x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            let noise = |x: f64| {
                let y = x / bar.sqrt();
                (y - mixture.denoised(y, sigma)) / sigma
            };
            let values = values.into_iter().map(noise).collect();
            Ok(Tensor::from_vec(values, x.shape(), &Device::Cpu)?.to_dtype(x.dtype())?)
        })
    }
}

/// A file of `tests/data/generate/solver_fixtures.py`.
struct Fixture {
    path: PathBuf,
    cases: BTreeMap<String, Value>,
    tensors: HashMap<String, Tensor>,
}

impl Fixture {
    fn all() -> Vec<Self> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/solvers");
        let folders = [Some(own), std::env::var_os("DDPM_SOLVERS").map(PathBuf::from)];
        let files = folders.into_iter().flatten().flat_map(|folder| {
            let entries = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
            let files: Vec<_> =
                entries.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
            assert!(!files.is_empty(), "no file in {}", folder.display());
            files
        });
        files.map(Self::read).collect()
    }

    fn read(path: PathBuf) -> Self {
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let cases = serde_json::from_str(&header.metadata().as_ref().unwrap()["cases"]).unwrap();
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
        Self { path, cases, tensors }
    }

    fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no {name} in {}", self.path.display()))
    }

    fn values(&self, name: &str) -> Vec<f64> {
        self.get(name).to_vec1().unwrap()
    }

    fn mixture(&self) -> Mixture {
        let [weights, means, stds] =
            ["weights", "means", "stds"].map(|key| self.values(&format!("mixture.{key}")));
        Mixture { weights, means, stds }
    }

    fn diffusion(&self) -> Diffusion {
        let schedule = NoiseSchedule::from_betas(self.values("betas")).unwrap();
        Diffusion::new(schedule, Prediction::Epsilon)
    }

    /// The sampler of a case, as its settings in JSON.
    fn sampler(&self, case: &Value) -> Sampler {
        let mut config = serde_json::json!({
            "solver": case["solver"], "steps": self.values(case["times"].as_str().unwrap()).len(),
            "clip_denoised": false, "spacing": case["spacing"],
        });
        if !case["threshold"].is_null() {
            config["dynamic_threshold"] = case["threshold"].clone();
        }
        let config: SamplerConfig = serde_json::from_value(config).unwrap();
        config.sampler(&self.diffusion()).unwrap()
    }

    /// The largest difference of any step of a case, as a share of the largest value, and whether the case has times
    /// between two timesteps.
    fn deviation(&self, name: &str, case: &Value) -> (f64, bool) {
        let sampler = self.sampler(case);
        let times: Vec<f64> = sampler.timesteps().collect();
        let index = |t: f64| times.iter().position(|&time| time == t).unwrap();
        let network = self.mixture().network(self.diffusion().schedule());
        let start = self.get("x_T");
        let steps = if case["inversion"] == true {
            sampler.invert_steps(&network, (start * 0.8).unwrap()).unwrap()
        } else {
            let z = |t| Ok(self.get("z").get(index(t))?);
            sampler.steps_from(&network, start.clone(), z).unwrap()
        };
        let ours: Vec<Tensor> = steps.map(|step| step.unwrap().x).collect();
        let theirs = self.get(name);
        let difference = max_abs(&(Tensor::stack(&ours, 0).unwrap() - theirs).unwrap());
        let between = name.starts_with("edm") || times.iter().any(|t| t.fract() != 0.0);
        (difference / max_abs(theirs).max(1.0), between)
    }
}

fn max_abs(x: &Tensor) -> f64 {
    x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Every step of every case agrees to rounding. Between two timesteps the network receives the time in f32, so that
/// its sigma differs by up to 1e-5.
#[test]
fn trajectories_agree_with_diffusers_and_the_papers() {
    for fixture in Fixture::all() {
        let mut worst = BTreeMap::<String, f64>::new();
        for (name, case) in &fixture.cases {
            let (deviation, between) = fixture.deviation(name, case);
            let limit = if between { 1e-5 } else { 1e-10 };
            let kind = name.rsplit_once('.').unwrap().0;
            let entry = worst.entry(format!("{kind}, {}", if between { "between" } else { "whole" }));
            let entry = entry.or_default();
            *entry = entry.max(deviation);
            if deviation >= limit { println!("{}: {name}: {deviation:e}", fixture.path.display()); }
        }
        println!("{}: {} cases: {worst:?}", fixture.path.display(), fixture.cases.len());
    }
}

#[test]
fn spacings_agree_with_diffusers_and_the_papers() {
    for fixture in Fixture::all() {
        let mut compared = std::collections::BTreeSet::new();
        for case in fixture.cases.values() {
            let name = case["times"].as_str().unwrap();
            let ours: Vec<f64> = fixture.sampler(case).timesteps().collect();
            let mut theirs = fixture.values(name);
            theirs.reverse();
            assert_eq!(ours.len(), theirs.len());
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert!((ours - theirs).abs() < 1e-8, "{name}: {ours} {theirs}");
                // Whole timesteps are exact, so that the network receives integers.
                assert!(theirs.fract() != 0.0 || ours == theirs, "{name}: {ours} {theirs}");
            }
            compared.insert(name);
        }
        assert_eq!(compared.len(), 6);
    }
}

/// A schedule whose log-SNR is linear in time, so that evenly spaced timesteps are what an exponential integrator calls
/// equal steps.
fn even_in_log_snr(total: usize, high: f64, low: f64) -> NoiseSchedule {
    let bar = |t: usize| {
        let log_snr = high + (low - high) * t as f64 / (total - 1) as f64;
        1.0 / (1.0 + (-log_snr).exp())
    };
    let beta = |t| if t == 0 { 1.0 - bar(0) } else { 1.0 - bar(t) / bar(t - 1) };
    NoiseSchedule::from_betas((0..total).map(beta).collect()).unwrap()
}

/// The probability-flow ODE by Runge and Kutta's method of order 4, in steps so small that its error is below 1e-12.
fn solved(mixture: &Mixture, mut y: f64, from: f64, to: f64) -> f64 {
    let steps = 20_000;
    let h = (to / from).ln() / f64::from(steps);
    // With s = ln(sigma), dy/ds = y - x_0.
    let slope = |y: f64, s: f64| y - mixture.denoised(y, s.exp());
    for k in 0..steps {
        let s = from.ln() + f64::from(k) * h;
        let a = slope(y, s);
        let b = slope(y + 0.5 * h * a, s + 0.5 * h);
        let c = slope(y + 0.5 * h * b, s + 0.5 * h);
        let d = slope(y + h * c, s + h);
        y += h / 6.0 * (a + 2.0 * b + 2.0 * c + d);
    }
    y
}

#[test]
fn halving_the_steps_shows_the_order_of_each_solver() {
    let total = 1921;
    let schedule = even_in_log_snr(total, 4.0, -8.0);
    let mixture = Mixture::fixed();
    let bars = schedule.alpha_bars().to_vec();
    let sigma = |t: usize| ((1.0 - bars[t]) / bars[t]).sqrt();
    let starts = [-1.7, -0.6, 0.1, 0.9, 1.4];
    let exact = starts.map(|x: f64| {
        let y = x / bars[total - 1].sqrt();
        solved(&mixture, y, sigma(total - 1), sigma(0)) * bars[0].sqrt()
    });
    let diffusion = Diffusion::new(schedule.clone(), Prediction::Epsilon);
    let network = mixture.network(&schedule);
    let error = |solver, gap| {
        let timesteps: Vec<usize> = (0..total).step_by(gap).collect();
        let sampler = Sampler::with_timesteps(&diffusion, solver, &timesteps).unwrap();
        let start = Tensor::new(&starts, &Device::Cpu).unwrap();
        let steps = sampler.steps_from(&network, start, |_| unreachable!()).unwrap();
        // The sample at timestep 0. The step from there to the image is the same for every solver.
        let x = steps.map(|step| step.unwrap().x).nth(timesteps.len() - 2).unwrap();
        let x = x.to_vec1::<f64>().unwrap();
        x.iter().zip(exact).map(|(x, exact)| (x - exact).abs()).fold(0.0, f64::max)
    };
    let unipc = |order, b| Solver::UniPc { order, b };
    for (solver, order) in [
        (Solver::ddim(), 1.0),
        (Solver::euler(), 1.0),
        (Solver::Heun, 2.0),
        (Solver::Edm(Churn { amount: 0.0, ..Churn::default() }), 2.0),
        (Solver::DpmSolver { order: 1 }, 1.0),
        (Solver::DpmSolver { order: 2 }, 2.0),
        (Solver::DpmSolver { order: 3 }, 3.0),
        (unipc(1, BFunction::Bh1), 2.0),
        (unipc(1, BFunction::Bh2), 2.0),
        (unipc(2, BFunction::Bh1), 3.0),
        (unipc(2, BFunction::Bh2), 3.0),
        (unipc(3, BFunction::Bh1), 4.0),
        (unipc(3, BFunction::Bh2), 4.0),
    ] {
        let errors = [60, 30, 15, 10, 5].map(|gap| (gap, error(solver, gap)));
        let slopes: Vec<f64> = errors
            .windows(2)
            .map(|pair| (pair[0].1 / pair[1].1).ln() / (pair[0].0 as f64 / pair[1].0 as f64).ln())
            .collect();
        println!("{solver}: order {order}, errors {errors:?}, slopes {slopes:.2?}");
    }
}
