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
use ddpm::sample::{BFunction, Churn, DynamicThreshold, SamplerConfig, Spacing, Variance};
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
    /// Whether the file is in the repository.
    own: bool,
    cases: BTreeMap<String, Value>,
    tensors: HashMap<String, Tensor>,
}

impl Fixture {
    fn all() -> Vec<Self> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/solvers");
        let folders = [Some(own), std::env::var_os("DDPM_SOLVERS").map(PathBuf::from)];
        let files = folders.into_iter().flatten().flat_map(|folder| {
            let entries = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
            let files: Vec<_> = entries
                .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
                .collect();
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
        let own = path.starts_with(env!("CARGO_MANIFEST_DIR"));
        Self { path, own, cases, tensors }
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

/// Every step of every case agrees to rounding. Between two timesteps the network receives the time in f32. This
/// changes its sigma by up to 1e-4, in the last interval of the cosine schedule, and the samples by up to 2e-6. The
/// first step of Heun's method multiplies rounding by half of the ratio of its sigmas.
#[test]
fn trajectories_agree_with_diffusers_and_the_papers() {
    for fixture in Fixture::all() {
        let mut worst = [0f64; 2];
        for (name, case) in &fixture.cases {
            let (deviation, between) = fixture.deviation(name, case);
            let limit = match between {
                true if fixture.own => 1e-5,
                true => 1e-4,
                false => 1e-9,
            };
            assert!(deviation < limit, "{}: {name}: {deviation:e}", fixture.path.display());
            let worst = &mut worst[usize::from(between)];
            *worst = worst.max(deviation);
        }
        let (path, count, [whole, between]) = (fixture.path.display(), fixture.cases.len(), worst);
        println!("{path}: {count} cases, {whole:.1e} at timesteps, {between:.1e} between them");
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
        (Solver::DpmSolver { order: 2 }, 2.0),
        (Solver::DpmSolver { order: 3 }, 3.0),
        (unipc(1, BFunction::Bh1), 2.0),
        (unipc(1, BFunction::Bh2), 2.0),
        (unipc(2, BFunction::Bh1), 3.0),
        (unipc(2, BFunction::Bh2), 3.0),
        (unipc(3, BFunction::Bh1), 4.0),
        (unipc(3, BFunction::Bh2), 4.0),
    ] {
        let errors = [20, 10, 5].map(|gap| error(solver, gap));
        let slopes = [0, 1].map(|i| (errors[i] / errors[i + 1]).log2());
        println!("{solver}: errors {errors:?}, slopes {slopes:.3?}");
        // The first steps of a multistep solver have lower orders, so the greater errors fall faster.
        let [_, slope] = slopes;
        assert!((slope - order).abs() < 0.2, "{solver}: {slopes:?}, {errors:?}");
    }
}

/// Normal data, for which every step is linear in the start and the noise.
const DATA: [f64; 2] = [0.3, 0.5];

fn normal() -> Mixture {
    Mixture { weights: vec![1.0], means: vec![DATA[0]], stds: vec![DATA[1]] }
}

/// Returns the mean of the samples, and their variances from the start and from the noise. The images of one batch are
/// the sample without either, with 1 as the start, and with 1 as the noise of each step.
fn moments(sampler: &Sampler, network: &impl Denoiser) -> [f64; 3] {
    let times: Vec<f64> = sampler.timesteps().collect();
    let unit = |k: usize| {
        let values = (0..times.len() + 2).map(|i| f64::from(u8::from(i == k))).collect();
        Tensor::from_vec(values, times.len() + 2, &Device::Cpu).unwrap()
    };
    let z = |t| Ok(unit(2 + times.iter().position(|&time| time == t).unwrap()));
    let steps = sampler.steps_from(network, unit(1), z).unwrap();
    let x = steps.map(|step| step.unwrap().x).last().unwrap().to_vec1::<f64>().unwrap();
    let noise = x[2..].iter().map(|share| (share - x[0]).powi(2)).sum();
    [x[0], (x[1] - x[0]).powi(2), noise]
}

#[test]
fn every_solver_with_every_spacing_reproduces_normal_data() {
    let diffusion = Diffusion::ddpm();
    let network = normal().network(diffusion.schedule());
    let mut solvers = Solver::NAMES.map(|(_, solver)| solver).to_vec();
    // Other noise than 1 is not that of the process.
    solvers.retain(|solver| !matches!(solver, Solver::Edm(_)));
    solvers.extend([
        Solver::Edm(Churn { noise: 1.0, ..Churn::default() }),
        Solver::Ddim { eta: 0.5 },
        Solver::Ddpm { variance: Variance::Posterior },
    ]);
    for solver in solvers {
        for (name, spacing) in Spacing::NAMES.into_iter().filter(|(name, _)| *name != "exponential")
        {
            let sampler = Sampler::with_spacing(&diffusion, solver, spacing, 200).unwrap();
            let [mean, start, noise] = moments(&sampler, &network);
            let [mean, std] = [mean - DATA[0], (start + noise).sqrt() - DATA[1]];
            let what =
                format!("{solver}, {name}: mean {mean:.1e}, std {std:.1e}, noise {noise:.1e}");
            // The last timestep still has a share of 0.006 of the image, which deterministic solvers miss.
            assert!(mean.abs() < 1.2e-3, "{what}");
            // The errors of each order of accuracy with this many steps.
            let limit = match solver {
                Solver::Ddpm { .. } | Solver::Ddim { .. } | Solver::DdimUnclippedNoise { .. } => {
                    2e-2
                }
                Solver::DpmSolverSde => 7e-3,
                _ => 2.5e-3,
            };
            assert!(std.abs() < limit, "{what}");
            let adds = !matches!(
                solver,
                Solver::Ddim { eta: 0.0 }
                    | Solver::DdimUnclippedNoise { eta: 0.0 }
                    | Solver::Heun
                    | Solver::UniPc { .. }
                    | Solver::DpmSolver { .. }
            );
            assert_eq!(noise > 0.1, adds, "{what}");
        }
    }
}

/// A solver names what it does not know in the same words as every other setting.
#[test]
fn wrong_settings_are_refused() {
    let diffusion = Diffusion::ddpm();
    let solver = |solver| Sampler::new(&diffusion, solver, 10).map(drop);
    let edm = |set: fn(&mut Churn)| {
        let mut churn = Churn::default();
        set(&mut churn);
        solver(Solver::Edm(churn))
    };
    let spacing = |spacing, steps| {
        Sampler::with_spacing(&diffusion, Solver::ddim(), spacing, steps).map(drop)
    };
    let times = |times: &[f64]| Sampler::with_times(&diffusion, Solver::ddim(), times).map(drop);
    let threshold = |ratio, max| {
        let sampler = Sampler::new(&diffusion, Solver::ddim(), 10).unwrap();
        sampler.dynamic_threshold(DynamicThreshold { ratio, max }).map(drop)
    };
    let unipc = |order| solver(Solver::UniPc { order, b: BFunction::Bh2 });
    let mut cases = vec![
        (solver(Solver::DpmSolver { order: 1 }), "order of DPM-Solver++ is 1; it must be 2 or 3"),
        (solver(Solver::DpmSolver { order: 4 }), "order of DPM-Solver++ is 4; it must be 2 or 3"),
        (unipc(0), "order of UniPC is 0; it must be from 1 to 3"),
        (unipc(4), "order of UniPC is 4; it must be from 1 to 3"),
        (solver(Solver::euler_ancestral(1.5)), "eta is 1.5; it must be from 0 to 1"),
        (edm(|c| c.amount = -1.0), "churn amount is -1; it must be finite and at least 0"),
        (edm(|c| c.min = f64::NAN), "churn min is NaN; it must be finite and at least 0"),
        (edm(|c| c.max = 0.01), "churn max is 0.01; it must be finite and at least the minimum"),
        (edm(|c| c.max = f64::INFINITY), "churn max is inf; it must be finite and at least"),
        (edm(|c| c.noise = -0.5), "churn noise is -0.5; it must be finite and at least 0"),
        (spacing(Spacing::Karras { rho: 0.5 }, 10), "rho is 0.5; it must be from 1 to 100"),
        (spacing(Spacing::Karras { rho: f64::NAN }, 10), "rho is NaN; it must be from 1 to 100"),
        (times(&[]), "timesteps is []; it must be one or more"),
        (times(&[0.5, 999.5]), "999.5 at index 1; it must be strictly increasing, from 0 to 999"),
        (times(&[-0.5, 3.0]), "-0.5 at index 0; it must be strictly increasing, from 0 to 999"),
        (times(&[0.5, 0.5]), "0.5 at index 1; it must be strictly increasing, from 0 to 999"),
        (times(&[f64::NAN]), "NaN at index 0; it must be strictly increasing, from 0 to 999"),
        (threshold(0.0, 1.0), "ratio of the threshold is 0; it must be above 0, up to 1"),
        (threshold(1.1, 1.0), "ratio of the threshold is 1.1; it must be above 0, up to 1"),
        (threshold(0.9, 0.9), "max of the threshold is 0.9; it must be finite and at least 1"),
        ("dpm".parse::<Solver>().map(drop), "solver is dpm; it must be one of ddpm, ddim,"),
        (
            "karas".parse::<Spacing>().map(drop),
            "spacing is karas; it must be one of even, leading,",
        ),
    ];
    for (_, kind) in Spacing::NAMES {
        for (steps, expected) in [(0, "sampling steps is 0;"), (1001, "sampling steps is 1001;")] {
            cases.push((spacing(kind, steps), expected));
        }
    }
    // Times so close that alpha_bar is the same.
    let close = [0.0, 1e-300, 2e-300, 200.0];
    let close = Sampler::with_times(&diffusion, Solver::DpmSolver { order: 2 }, &close);
    cases.push((close.map(drop), "it must be far enough from its neighbours"));
    for (result, expected) in cases {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

/// The expected samples are those of `DDIMScheduler(num_train_timesteps=100)` of diffusers 0.42.1 in float64, with
/// `alphas_cumprod` computed in float64, in 5 steps with the noise `0.6 * x + 0.1`. Ten predictions are clipped.
#[test]
fn ddim_with_unclipped_noise_is_that_of_diffusers() {
    let expected = [
        [-1.276430855643342, -0.22603209589009757, 0.37876917760997575, 1.5561828768276795],
        [-1.1816351276967314, -0.24253442503760292, 0.346087961729761, 1.3268426948364174],
        [-1.1049304940011688, -0.24853457079338226, 0.3032295875991511, 1.1647492330341078],
        [-1.0055795817139441, -0.24412625449256656, 0.25278355448535617, 1.0079384941481417],
        [-1.0, -0.24367368095426623, 0.250279367439681, 1.0],
    ];
    let schedule = NoiseSchedule::linear(100, 1e-4, 0.02).unwrap();
    let diffusion = Diffusion::new(schedule, Prediction::Epsilon);
    let network = from_fn(|x: &Tensor, _: &Tensor| Ok(x.affine(0.6, 0.1)?));
    let start = Tensor::new(&[[-1.5f64, -0.2, 0.4, 2.0]], &Device::Cpu).unwrap();
    let samples = |solver, clip| -> Vec<Vec<f64>> {
        let config = SamplerConfig::new(solver, 5).spacing(Spacing::Leading).clip_denoised(clip);
        let sampler = config.sampler(&diffusion).unwrap();
        let steps = sampler.steps_from(&network, start.clone(), |_| unreachable!("no noise"));
        let x = |step: ddpm::Result<ddpm::sample::Step>| step.unwrap().x.flatten_all().unwrap();
        steps.unwrap().map(|step| x(step).to_vec1().unwrap()).collect()
    };
    let apart = |a: &[Vec<f64>], b: &[Vec<f64>]| {
        let pairs = a.iter().flatten().zip(b.iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    let kept = Solver::DdimUnclippedNoise { eta: 0.0 };
    let (found, expected) = (samples(kept, true), expected.map(|x| x.to_vec()));
    assert!(apart(&found, &expected) < 1e-12, "{found:?}");
    assert!(apart(&samples(Solver::ddim(), true), &expected) > 0.01);
    assert!(apart(&samples(Solver::ddim(), false), &samples(kept, false)) < 1e-12);
}

#[test]
fn names_settings_and_texts_belong_to_the_same_solver() {
    for (name, solver) in Solver::NAMES {
        assert_eq!(name.parse::<Solver>().unwrap(), solver);
        let canonical = match name {
            "euler" | "euler-ancestral" => "ddim",
            name => name,
        };
        assert_eq!(solver.name(), Some(canonical));
        let json = serde_json::to_string(&solver).unwrap();
        assert_eq!(serde_json::from_str::<Solver>(&json).unwrap(), solver);
    }
    for (name, spacing) in Spacing::NAMES {
        assert_eq!(name.parse::<Spacing>().unwrap(), spacing);
    }
    assert_eq!(Solver::UniPc { order: 3, b: BFunction::Bh1 }.name(), Some("unipc-3"));
    assert_eq!(Solver::Ddim { eta: 0.3 }.name(), Some("ddim"));
    assert_eq!(Solver::DpmSolver { order: 4 }.name(), None);
    // The format in the file of a checkpoint, and the text.
    for (solver, json, text) in [
        (Solver::euler(), r#"{"ddim":{"eta":0.0}}"#, "DDIM with eta 0"),
        (
            Solver::DdimUnclippedNoise { eta: 0.5 },
            r#"{"ddim_unclipped_noise":{"eta":0.5}}"#,
            "DDIM with eta 0.5 and unclipped noise",
        ),
        (Solver::DpmSolver { order: 3 }, r#"{"dpm_solver":{"order":3}}"#, "DPM-Solver++(3M)"),
        (Solver::DpmSolverSde, r#""dpm_solver_sde""#, "SDE-DPM-Solver++(2M)"),
        (
            Solver::UniPc { order: 2, b: BFunction::Bh1 },
            r#"{"unipc":{"order":2,"b":"bh1"}}"#,
            "UniPC-2 with B1",
        ),
        (
            Solver::Edm(Churn::default()),
            r#"{"edm":{"amount":40.0,"min":0.05,"max":50.0,"noise":1.003}}"#,
            "EDM with churn 40 from 0.05 to 50 and noise 1.003",
        ),
    ] {
        assert_eq!(serde_json::to_string(&solver).unwrap(), json);
        assert_eq!(serde_json::from_str::<Solver>(json).unwrap(), solver);
        assert_eq!(solver.to_string(), text);
    }
    let texts = Spacing::NAMES.map(|(_, spacing)| spacing.to_string());
    let expected = ["even", "leading", "trailing", "quadratic", "Karras with rho 7"];
    assert_eq!(texts[..5], expected);
}

#[test]
fn settings_of_earlier_checkpoints_keep_their_meaning_and_their_text() {
    let old = r#"{"solver":{"ddim":{"eta":1.0}},"steps":7,"clip_denoised":true}"#;
    let config: SamplerConfig = serde_json::from_str(old).unwrap();
    let expected = SamplerConfig::new(Solver::Ddim { eta: 1.0 }, 7).clip_denoised(true);
    assert_eq!(config, expected);
    assert_eq!(config.spacing, Spacing::Even);
    assert_eq!(serde_json::to_string(&config).unwrap(), old);
    let new = config
        .spacing(Spacing::Karras { rho: 5.0 })
        .dynamic_threshold(DynamicThreshold { ratio: 0.995, max: 2.0 });
    let json = serde_json::to_string(&new).unwrap();
    let tail =
        r#","spacing":{"karras":{"rho":5.0}},"dynamic_threshold":{"ratio":0.995,"max":2.0}}"#;
    assert!(json.ends_with(tail), "{json}");
    assert_eq!(serde_json::from_str::<SamplerConfig>(&json).unwrap(), new);
}

/// Pixels of which the quantile is known.
#[test]
fn thresholding_divides_each_image_by_its_own_quantile() {
    let images = [[0.1f64, -3.0, 0.5, 2.0], [0.2, 0.9, -0.4, 0.6], [9.0, -9.0, 9.0, 1.0]];
    let diffusion = Diffusion::new(Diffusion::ddpm().schedule().clone(), Prediction::Sample);
    let run = |images: &[[f64; 4]], dtype, ratio| {
        let x_0 = Tensor::from_slice(images.as_flattened(), (images.len(), 4), &Device::Cpu)
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        let network = from_fn(|_: &Tensor, _: &Tensor| Ok(x_0.clone()));
        let sampler = Sampler::with_timesteps(&diffusion, Solver::ddim(), &[5]).unwrap();
        let sampler = sampler.dynamic_threshold(DynamicThreshold { ratio, max: 4.0 }).unwrap();
        let steps = sampler.steps_from(&network, x_0.zeros_like().unwrap(), |_| unreachable!());
        let x_0 = steps.unwrap().last().unwrap().unwrap().x_0;
        assert_eq!(x_0.dtype(), dtype);
        x_0.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap()
    };
    // The middle of three gaps: halfway between 0.5 and 2. The other images have s = 1 and s = 4.
    let found = run(&images, DType::F64, 0.5);
    let expected =
        [[0.1 / 1.25, -1.0, 0.5 / 1.25, 1.0], [0.2, 0.9, -0.4, 0.6], [1.0, -1.0, 1.0, 0.25]];
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        assert!((found - expected).abs() < 1e-15, "{found} {expected}");
    }
    // The greatest value, which no pixel exceeds.
    let largest = run(&images, DType::F64, 1.0);
    assert!((largest[0][3] - 2.0 / 3.0).abs() < 1e-15, "{largest:?}");
    let all = run(&images, DType::F32, 0.5);
    for k in 0..3 {
        assert_eq!(all[k..=k], run(&images[k..=k], DType::F32, 0.5));
    }
}

#[test]
fn a_sample_does_not_depend_on_the_batch() {
    let diffusion = Diffusion::ddpm();
    let network = Mixture::fixed().network(diffusion.schedule());
    let threshold = DynamicThreshold { ratio: 0.7, max: 1.5 };
    for (_, solver) in Solver::NAMES {
        for spacing in [Spacing::Trailing, Spacing::Karras { rho: 7.0 }] {
            let sampler = Sampler::with_spacing(&diffusion, solver, spacing, 12).unwrap();
            let sampler = sampler.dynamic_threshold(threshold).unwrap();
            let draw = |batch, first| {
                let sampler = sampler.clone().first_image(first);
                let x = sampler.sample(&network, (batch, 1, 3, 3), 7, &Device::Cpu).unwrap();
                x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let four = draw(4, 0);
            for k in 0..4 {
                assert_eq!(four[9 * k..9 * (k + 1)], draw(1, k as u32), "{solver}, {spacing}, {k}");
            }
            assert_ne!(four[..9], four[9..18]);
        }
    }
}

/// The noise of a step depends on its time, also between two timesteps.
#[test]
fn different_times_have_different_noise() {
    let noise = |t| {
        let z = Sampler::noise(t, (2, 8), 3, &Device::Cpu).unwrap();
        z.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let tiny = 2f64.powi(-36);
    let times = [5.0, 5.0 + tiny, 5.5, 5.5 + tiny, 6.0, 5.0 + 2f64.powi(-16), 1048575.0];
    for (i, &t) in times.iter().enumerate() {
        assert_eq!(noise(t), noise(t));
        assert!(times[..i].iter().all(|&other| noise(other) != noise(t)), "{t}");
    }
    let sampler =
        Sampler::with_spacing(&Diffusion::ddpm(), Solver::DpmSolverSde, Spacing::LogSnr, 300);
    let drawn: Vec<Vec<f32>> = sampler.unwrap().timesteps().map(noise).collect();
    for (i, z) in drawn.iter().enumerate() {
        assert!(drawn[..i].iter().all(|other| other != z), "{i}");
    }
}

/// Whole timesteps reach the network as integers, and times between them in f32.
#[test]
fn the_network_receives_integers_at_timesteps() {
    let diffusion = Diffusion::ddpm();
    for (name, spacing) in Spacing::NAMES {
        let seen = std::cell::RefCell::new(vec![]);
        let network = from_fn(|x: &Tensor, t: &Tensor| {
            let time = t.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            assert!(time.len() == 2 && time[0] == time[1]);
            seen.borrow_mut().push((t.dtype(), time[0]));
            Ok((x * 0.1)?)
        });
        let solver = Solver::DpmSolver { order: 2 };
        let sampler = Sampler::with_spacing(&diffusion, solver, spacing, 9).unwrap();
        sampler.sample(&network, (2, 1, 2, 2), 0, &Device::Cpu).unwrap();
        let expected: Vec<(DType, f64)> = sampler
            .timesteps()
            .map(|t| match t.fract() == 0.0 {
                true => (DType::U32, t),
                false => (DType::F32, f64::from(t as f32)),
            })
            .collect();
        assert_eq!(*seen.borrow(), expected);
        let between = expected.iter().filter(|(dtype, _)| *dtype == DType::F32).count();
        let fractional = matches!(spacing, Spacing::Karras { .. } | Spacing::LogSnr);
        assert_eq!(between, if fractional { 7 } else { 0 }, "{name}");
    }
}

/// For normal data, the noise of an image is known: the ODE keeps the position within the distribution.
#[test]
fn inversion_leads_to_the_noise_of_an_image_and_sampling_leads_back() {
    let images = Tensor::new(&[[0.9f64, -0.4], [0.2, 0.5]], &Device::Cpu).unwrap();
    for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity] {
        let diffusion = Diffusion::new(NoiseSchedule::cosine(1000).unwrap(), prediction);
        let schedule = diffusion.schedule().clone();
        let noise = normal().network(&schedule);
        let network = from_fn(move |x: &Tensor, t: &Tensor| {
            let bar = schedule.alpha_bar(t.to_vec1::<u32>()?[0] as usize)?;
            let eps = noise.forward(x, t)?;
            let x_0 = ((x - (&eps * (1.0 - bar).sqrt())?)? / bar.sqrt())?;
            Ok(match prediction {
                Prediction::Epsilon => eps,
                Prediction::Sample => x_0,
                _ => ((eps * bar.sqrt())? - (x_0 * (1.0 - bar).sqrt())?)?,
            })
        });
        let expected = images.affine(1.0 / DATA[1], -DATA[0] / DATA[1]).unwrap();
        let errors = [50, 100, 200].map(|steps| {
            // The inversion is the same for every solver.
            let sampler = Sampler::new(&diffusion, Solver::ddpm(), steps).unwrap();
            let inverted = sampler.invert(&network, images.clone()).unwrap();
            let sampler = Sampler::new(&diffusion, Solver::ddim(), steps).unwrap();
            let back = sampler.steps_from(&network, inverted.clone(), |_| unreachable!()).unwrap();
            let back = back.last().unwrap().unwrap().x;
            [max_abs(&(inverted - &expected).unwrap()), max_abs(&(back - &images).unwrap())]
        });
        println!("{prediction:?}: {errors:?}");
        for pair in errors.windows(2) {
            for (coarse, fine) in pair[0].iter().zip(pair[1]) {
                assert!((0.4..0.6).contains(&(fine / coarse)), "{prediction:?}: {errors:?}");
            }
        }
        assert!(errors[2].iter().all(|&error| error < 0.05), "{prediction:?}: {errors:?}");
    }
}

#[test]
fn an_inversion_counts_its_steps_from_the_image() {
    let sampler = Sampler::new(&Diffusion::ddpm(), Solver::Heun, 4).unwrap();
    let network = from_fn(|x: &Tensor, _: &Tensor| Ok((x * 0.1)?));
    let image = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
    let steps = sampler.invert_steps(&network, image.clone()).unwrap();
    assert_eq!(steps.map(|step| step.unwrap().t).collect::<Vec<_>>(), [0.0, 333.0, 666.0, 999.0]);
    let scalar = sampler.invert(&network, image.sum_all().unwrap());
    assert!(scalar.unwrap_err().to_string().contains("the start has shape []"));
}
