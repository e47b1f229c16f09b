//! The optimiser, clipping and averaging, compared with PyTorch step by step.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use ddpm::TrainConfig;
use ddpm::train::{
    AdamConfig, AdamW, Ema, EmaConfig, LearningRate, LearningRateSchedule, Muon, MuonConfig,
    WeightDecay, clip_grad_norm,
};
use serde::Deserialize;

/// A case, as described in `tests/data/README.md`.
#[derive(Deserialize)]
struct Case {
    optimizer: String,
    lr: f64,
    warmup: u64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    clip_norm: Option<f64>,
    ema_decay: Option<f64>,
    steps: u64,
}

#[test]
fn every_case_agrees_with_pytorch() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/optimizers.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    let cases: Vec<String> = serde_json::from_str(&metadata["cases"]).unwrap();
    assert!(cases.len() >= 6, "{cases:?}");
    for name in cases {
        let case: Case = serde_json::from_str(&metadata[&name]).unwrap();
        // In f64 the formula must be the same. In f32 the rounding may differ.
        compare(&name, &case, &tensors, DType::F64, "64", 1e-12);
        compare(&name, &case, &tensors, DType::F32, "", 3e-6);
    }
}

fn compare(
    name: &str,
    case: &Case,
    tensors: &HashMap<String, Tensor>,
    dtype: DType,
    suffix: &str,
    limit: f64,
) {
    let get = |kind: &str, key: &str| {
        let key = format!("{name}.{kind}.{key}");
        tensors.get(&key).unwrap_or_else(|| panic!("no {key}")).to_dtype(dtype).unwrap()
    };
    let close = |what: &str, ours: &Tensor, theirs: &Tensor| {
        let difference = (ours - theirs).unwrap().abs().unwrap().flatten_all().unwrap();
        let most =
            difference.max(0).unwrap().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
        let size = theirs.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        let size = size.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
        assert!(most <= limit * size.max(1.0), "{name}, {dtype:?}: {what} is off by {most:e}");
    };
    let count = (0..).take_while(|i| tensors.contains_key(&format!("{name}.param.{i}"))).count();
    let vars: BTreeMap<String, Var> = (0..count)
        .map(|i| (i.to_string(), Var::from_tensor(&get("param", &i.to_string())).unwrap()))
        .collect();

    let optimizer = AdamConfig {
        learning_rate: case.lr,
        beta1: case.betas[0],
        beta2: case.betas[1],
        eps: case.eps,
        weight_decay: match (case.optimizer.as_str(), case.weight_decay) {
            ("Adam", 0.0) => WeightDecay::None,
            ("Adam", decay) => WeightDecay::L2(decay),
            ("AdamW", decay) => WeightDecay::Decoupled(decay),
            other => panic!("{other:?}"),
        },
    };
    let config = TrainConfig { optimizer, warmup_steps: case.warmup, ..TrainConfig::mnist() };
    let mut adam = AdamW::new(config.optimizer, &vars).unwrap();
    let mut ema =
        case.ema_decay.map(|decay| Ema::new(EmaConfig { decay, warmup: false }, &vars).unwrap());
    for step in 1..=case.steps {
        let mut gradients: BTreeMap<String, Tensor> =
            vars.keys().map(|i| (i.clone(), get("grad", &format!("{step}.{i}")))).collect();
        if let Some(max_norm) = case.clip_norm {
            let norm = clip_grad_norm(&mut gradients, max_norm).unwrap();
            close("norm", &norm, &get(&format!("norm{suffix}"), &step.to_string()));
        }
        adam.step(&gradients, config.learning_rate(step - 1)).unwrap();
        for (i, var) in &vars {
            let key = format!("{step}.{i}");
            close(&format!("weight {key}"), var.as_tensor(), &get(&format!("after{suffix}"), &key));
        }
        if let Some(ema) = &mut ema {
            ema.update(&vars).unwrap();
            for (i, average) in ema.averages() {
                let key = format!("{step}.{i}");
                close(&format!("average {key}"), average, &get(&format!("ema{suffix}"), &key));
            }
        }
    }
    let state = adam.state().unwrap();
    for i in vars.keys() {
        for moment in ["exp_avg", "exp_avg_sq"] {
            let theirs = get(&format!("{moment}{suffix}"), i);
            close(&format!("{moment} {i}"), &state[&format!("{moment}.{i}")], &theirs);
        }
    }
}

#[test]
fn a_limit_that_is_not_positive_is_refused() {
    let ones = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
    let mut gradients = BTreeMap::from([("w".to_string(), ones)]);
    for limit in [f64::NAN, f64::NEG_INFINITY, -1.0, 0.0] {
        let message = clip_grad_norm(&mut gradients, limit).unwrap_err().to_string();
        assert!(
            message.contains(&format!("max_norm is {limit}; it must be positive")),
            "{message}"
        );
    }
    let norm = clip_grad_norm(&mut gradients, f64::INFINITY).unwrap();
    assert_eq!(norm.to_scalar::<f32>().unwrap(), 2.0);
    assert_eq!(gradients["w"].to_vec1::<f32>().unwrap(), [1.0; 4]);
}

#[test]
fn weights_and_gradients_of_no_floating_dtype_are_refused() {
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let ones = Tensor::ones(2, dtype, &Device::Cpu).unwrap();
        let vars = BTreeMap::from([("a.b".to_string(), Var::from_tensor(&ones).unwrap())]);
        let mut gradients = BTreeMap::from([("a.b".to_string(), ones)]);
        let (ema, name) = (EmaConfig { decay: 0.9, warmup: true }, dtype.as_str());
        for (result, what) in [
            (AdamW::new(AdamConfig::adam(0.1), &vars).map(drop), "weight"),
            (Ema::new(ema, &vars).map(drop), "weight"),
            (clip_grad_norm(&mut gradients, 1.0).map(drop), "gradient"),
        ] {
            let message = result.unwrap_err().to_string();
            let expected =
                format!("{what} is a.b of dtype {name}; it must be of a floating-point dtype");
            assert_eq!(message, expected);
        }
    }
}

#[test]
fn a_learning_rate_that_makes_no_step_is_refused() {
    for dtype in [DType::F32, DType::F64] {
        let var = Var::ones(2, dtype, &Device::Cpu).unwrap();
        let vars = BTreeMap::from([("w".to_string(), var.clone())]);
        let mut adam = AdamW::new(AdamConfig::adamw(0.1, 0.1), &vars).unwrap();
        let gradients =
            BTreeMap::from([("w".to_string(), var.as_detached_tensor().copy().unwrap())]);
        for rate in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, -1e-300, 1e39] {
            let message = adam.step(&gradients, rate).unwrap_err().to_string();
            let expected =
                format!("learning_rate is {rate}; it must be at least 0 and finite in f32");
            assert_eq!(message, expected);
        }
        let values = || var.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        assert_eq!((values(), adam.steps()), (vec![1.0; 2], 0));
        // A learning rate of 0, as at the end of a cool-down.
        adam.step(&gradients, 0.0).unwrap();
        assert_eq!((values(), adam.steps()), (vec![1.0; 2], 1));
    }
}

#[test]
fn gradients_that_do_not_fit_change_nothing() {
    let tensor = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
    let vars: BTreeMap<String, Var> = ["a", "b"]
        .map(|name| (name.to_string(), Var::from_tensor(&tensor(&[3], DType::F32)).unwrap()))
        .into();
    let mut adam = AdamW::new(AdamConfig::adamw(0.1, 0.1), &vars).unwrap();
    for (second, expected) in [
        (tensor(&[2], DType::F32), "gradient is (F32, [2], Cpu) for b; it must be (F32, [3], Cpu)"),
        (tensor(&[1], DType::F32), "gradient is (F32, [1], Cpu) for b"),
        (tensor(&[3], DType::F64), "gradient is (F64, [3], Cpu) for b; it must be (F32, [3], Cpu)"),
    ] {
        let first = tensor(&[3], DType::F32);
        let gradients = BTreeMap::from([("a".to_string(), first), ("b".to_string(), second)]);
        let message = adam.step(&gradients, 0.1).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert_eq!(adam.steps(), 0);
        let values = |t: &Tensor| t.to_vec1::<f32>().unwrap();
        assert!(vars.values().all(|var| values(var) == [1.0; 3]));
        assert!(adam.state().unwrap().values().all(|moment| values(moment) == [0.0; 3]));
    }
}

#[test]
fn a_warm_average_forgets_where_it_began() {
    let var = Var::new(&[1f32], &Device::Cpu).unwrap();
    let vars = BTreeMap::from([("w".to_string(), var.clone())]);
    let mut warm = Ema::new(EmaConfig { decay: 0.999, warmup: true }, &vars).unwrap();
    let mut cold = Ema::new(EmaConfig { decay: 0.999, warmup: false }, &vars).unwrap();
    var.set(&Tensor::new(&[0f32], &Device::Cpu).unwrap()).unwrap();
    // The remaining fraction of the initial average: the product of min(decay, (1 + n) / (10 + n)).
    let (mut left, mut all) = (1.0, 1.0);
    for n in 0..50 {
        warm.update(&vars).unwrap();
        cold.update(&vars).unwrap();
        left *= f64::min(0.999, (1.0 + n as f64) / (10.0 + n as f64));
        all *= 0.999;
    }
    let value = |ema: &Ema| f64::from(ema.averages()["w"].to_vec1::<f32>().unwrap()[0]);
    assert!((value(&warm) - left).abs() < 1e-9, "{} {left}", value(&warm));
    assert!((value(&cold) - all).abs() < 1e-6);
    assert_eq!((warm.updates(), vars["w"].to_vec1::<f32>().unwrap()[0]), (50, 0.0));
}

#[test]
fn a_state_in_another_order_of_memory_is_restored() {
    let var = Var::from_tensor(&Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap()).unwrap();
    let var = Var::from_tensor(&var.reshape((2, 3)).unwrap()).unwrap();
    let vars = BTreeMap::from([("w".to_string(), var.clone())]);
    let mut adam = AdamW::new(AdamConfig::adam(0.1), &vars).unwrap();
    let moment = Tensor::arange(1f32, 7.0, &Device::Cpu).unwrap().reshape((3, 2)).unwrap();
    let state = ["exp_avg.w", "exp_avg_sq.w"].map(|key| (key.to_string(), moment.t().unwrap()));
    adam.restore(1, &BTreeMap::from(state)).unwrap();
    let gradient = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    adam.step(&BTreeMap::from([("w".to_string(), gradient)]), 0.1).unwrap();
    let state = adam.state().unwrap()["exp_avg.w"].to_vec2::<f32>().unwrap();
    assert_eq!(state[0].iter().map(|v| (v / 0.9).round()).collect::<Vec<_>>(), [1.0, 3.0, 5.0]);
}

/// A case of `muon.safetensors`.
#[derive(Deserialize)]
struct MuonCase {
    lr: f64,
    weight_decay: f64,
    momentum: f64,
    nesterov: bool,
}

#[test]
fn muon_agrees_with_pytorch() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/muon.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    let cases: Vec<String> = serde_json::from_str(&metadata["cases"]).unwrap();
    assert_eq!(cases.len(), 3);
    for name in cases {
        let case: MuonCase = serde_json::from_str(&metadata[&name]).unwrap();
        // In f32 the iterations round small singular values by up to 2e-3 of a matrix of norm 1. A step multiplies it
        // by lr 0.2 sqrt(27) = 0.02, so four steps differ by less than 1e-4.
        for (dtype, limit) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
            let get = |key: String| tensors[&key].to_dtype(dtype).unwrap();
            let vars: BTreeMap<String, Var> = (0..5)
                .map(|i| (i.to_string(), Var::from_tensor(&get(format!("param.{i}"))).unwrap()))
                .collect();
            let MuonCase { momentum, nesterov, weight_decay, .. } = case;
            let config = MuonConfig { momentum, nesterov, weight_decay, ..MuonConfig::default() };
            let mut muon = Muon::new(config, &vars).unwrap();
            let close = |what: &str, ours: &Tensor, key: String, limit: f64| {
                let off = (ours - get(key)).unwrap().abs().unwrap().flatten_all().unwrap();
                let off = off.max(0).unwrap().to_dtype(DType::F64).unwrap();
                let off = off.to_scalar::<f64>().unwrap();
                assert!(off <= limit, "{name}, {dtype:?}: {what} is off by {off:e}");
            };
            for step in 1..=4 {
                let gradients =
                    vars.keys().map(|i| (i.clone(), get(format!("grad.{step}.{i}")))).collect();
                muon.step(&gradients, case.lr).unwrap();
                for (i, var) in &vars {
                    close(
                        &format!("weight {i} after {step}"),
                        var,
                        format!("{name}.after.{step}.{i}"),
                        limit,
                    );
                }
            }
            for (key, momentum) in muon.state() {
                close(
                    &key,
                    &momentum,
                    format!("{name}.{key}"),
                    if dtype == DType::F64 { 1e-12 } else { 1e-5 },
                );
            }
        }
    }
}

#[test]
fn muon_refuses_what_is_no_matrix() {
    let bias = Var::ones(3, DType::F32, &Device::Cpu).unwrap();
    let vars = BTreeMap::from([("bias".to_string(), bias)]);
    let message = Muon::new(MuonConfig::default(), &vars).map(drop).unwrap_err().to_string();
    assert_eq!(message, "weight is bias of shape [3]; it must be a matrix (output, ...) with Muon");
}

#[test]
fn schedules_are_those_of_pytorch() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/schedules.json");
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let peak = file["lr"].as_f64().unwrap();
    let cosine = |end| LearningRateSchedule::Cosine { end };
    for (name, schedule, steps, warmup_steps) in [
        ("linear", LearningRateSchedule::Linear { end: 0.25 }, 8, 0),
        ("cosine", cosine(0.1), 8, 0),
        ("cosine_after_warmup", cosine(0.0), 12, 4),
    ] {
        let rate = LearningRate { peak, warmup_steps, schedule, steps, ..Default::default() };
        let expected: Vec<f64> = serde_json::from_value(file[name].clone()).unwrap();
        assert!(expected.len() >= 9);
        for (step, expected) in (0..).zip(expected) {
            let found = rate.at(step);
            assert!(
                (found - expected).abs() < 1e-15,
                "{name}, step {step}: {found}, not {expected}"
            );
        }
    }
}

#[test]
fn the_inverse_root_holds_its_rate_and_then_falls_and_cools_down() {
    let schedule = LearningRateSchedule::InverseSqrt { reference_steps: 100 };
    let rate = LearningRate { peak: 2.0, schedule, warmup_steps: 10, cooldown: 0.1, steps: 10_000 };
    let close = |step, expected: f64| {
        let found = rate.at(step);
        assert!((found - expected).abs() < 1e-15, "step {step}: {found}, not {expected}");
    };
    // The rise, the constant part, the fall of the root, and the linear fall over the last 1,000 updates.
    close(4, 1.0);
    close(100, 2.0);
    close(400, 1.0);
    close(6400, 0.25);
    close(9500, 2.0 * (100f64 / 9500.0).sqrt() * 0.5);
    close(10_000, 0.0);
}

#[test]
fn schedules_that_do_not_exist_are_refused_by_name() {
    for (schedule, expected) in [
        (LearningRateSchedule::Linear { end: 1.5 }, "schedule.end is 1.5; it must be from 0 to 1"),
        (LearningRateSchedule::Cosine { end: f64::NAN }, "schedule.end is NaN; it must be"),
        (
            LearningRateSchedule::InverseSqrt { reference_steps: 0 },
            "schedule.reference_steps is 0; it must be at least 1",
        ),
    ] {
        let message = TrainConfig { schedule, ..TrainConfig::mnist() }.validate().unwrap_err();
        assert!(message.to_string().starts_with(expected), "{message}");
    }
    // The constant one is not written, so that configurations of earlier versions keep their bytes.
    let plain = serde_json::to_string(&TrainConfig::mnist()).unwrap();
    assert!(!plain.contains("schedule") && !plain.contains("muon"), "{plain}");
    let schedule = LearningRateSchedule::Cosine { end: 0.5 };
    let config = TrainConfig { schedule, ..TrainConfig::mnist() };
    let text = serde_json::to_string(&config).unwrap();
    assert!(text.contains(r#""schedule":{"cosine":{"end":0.5}}"#), "{text}");
    assert_eq!(serde_json::from_str::<TrainConfig>(&text).unwrap(), config);
}
