//! The trainer: settings that must not change the result, settings that must, and errors.

use std::ops::ControlFlow;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, Module, VarBuilder};
use ddpm::data::Dataset;
use ddpm::data::ImageShape;
use ddpm::nn::Architecture;
use ddpm::nn::{Condition, Output, Trainable};
use ddpm::train::{AdamConfig, EmaConfig, Metrics, Noised, Objective, Observer, Run, on_metrics};
use ddpm::{Denoiser, Diffusion, Error, Result, TrainConfig, Trainer, UNetConfig};
use serde::{Deserialize, Serialize};

mod small;
use small::Scale;

/// A small network. The images of the data sets differ.
fn network() -> UNetConfig {
    UNetConfig {
        image_size: 8.into(),
        hidden_dims: vec![16, 16],
        time_dim: 16,
        ..UNetConfig::mnist()
    }
}

fn config() -> TrainConfig {
    TrainConfig { steps: 6, batch_size: 4, ..TrainConfig::mnist() }
}

struct Ramps(usize);

impl Dataset for Ramps {
    fn len(&self) -> usize {
        self.0
    }

    fn shape(&self) -> ImageShape {
        (1, 8, 8).into()
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        for (i, pixel) in pixels.iter_mut().enumerate() {
            *pixel = ((index + 1) * (i + 1) % 17 * 15) as u8;
        }
        Ok(None)
    }
}

fn trainer(config: TrainConfig) -> Trainer<UNetConfig> {
    Trainer::new(network(), config, Diffusion::ddpm(), &Device::Cpu).unwrap()
}

fn fitted(config: TrainConfig) -> Trainer<UNetConfig> {
    let mut trainer = trainer(config);
    trainer.fit(&Ramps(10), &mut ()).unwrap();
    trainer
}

/// Returns all weights, concatenated.
fn weights<N: Architecture>(trainer: &Trainer<N>) -> Vec<f32> {
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    trainer.vars().values().flat_map(|var| values(var)).collect()
}

fn averages<N: Architecture>(trainer: &Trainer<N>) -> Vec<f32> {
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    trainer.ema().unwrap().averages().values().flat_map(values).collect()
}

fn most(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn same_seed_same_bits_and_another_seed_others() {
    let [a, b] = [0, 0].map(|_| fitted(config()));
    assert_eq!((weights(&a), averages(&a)), (weights(&b), averages(&b)));
    assert_ne!(weights(&a), weights(&fitted(TrainConfig { seed: 1, ..config() })));
}

/// The environment variable of the child processes of the test below.
const SAVE_TO: &str = "DDPM_TEST_TRAINS_AND_SAVES_TO";
#[cfg(feature = "f16")]
const IN_HALF: &str = "DDPM_TEST_TRAINS_IN_HALF";

/// Runs a short training of a network with every kind of layer, large enough to be divided among threads.
/// Runs only as a child process, because the number of threads is a property of the process.
#[test]
fn trains_and_saves() {
    let Some(path) = std::env::var_os(SAVE_TO) else { return };
    let network = UNetConfig { attention_levels: vec![1], dropout: 0.1, ..UNetConfig::mnist() };
    let config = TrainConfig { clip_norm: Some(1.0), accumulation: 2, batch_size: 10, ..config() };
    #[cfg(feature = "f16")]
    let config = match std::env::var_os(IN_HALF) {
        Some(_) => TrainConfig { precision: ddpm::Precision::BF16, ..config },
        None => config,
    };
    let mut trainer = Trainer::new(network, config, Diffusion::ddpm(), &Device::Cpu).unwrap();
    let images = Tensor::arange(0f32, 7840.0, &Device::Cpu).unwrap().sin().unwrap();
    let images = images.reshape((10, 1, 28, 28)).unwrap();
    for _ in 0..3 {
        trainer.step(&images).unwrap();
    }
    trainer.save(path).unwrap();
}

#[test]
fn any_number_of_threads_same_bits() {
    any_number_of_threads(&[]);
}

#[test]
#[cfg(feature = "f16")]
fn any_number_of_threads_same_bits_in_half() {
    any_number_of_threads(&[(IN_HALF, "1")]);
}

fn any_number_of_threads(environment: &[(&str, &str)]) {
    let dir = tempfile::tempdir().unwrap();
    let run = |threads: &str| {
        let path = dir.path().join(threads);
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "trains_and_saves", "--test-threads=1"])
            .envs([("RAYON_NUM_THREADS", threads.as_ref()), (SAVE_TO, path.as_os_str())])
            .envs(environment.iter().copied())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{threads} threads: {status}");
        ["model.safetensors", "ema.safetensors", "optimizer.safetensors"]
            .map(|file| std::fs::read(path.join(file)).unwrap())
    };
    let one = run("1");
    for threads in ["2", "3"] {
        // `assert_eq` would print megabytes.
        assert!(run(threads) == one, "{threads} threads give other bits than one");
    }
}

#[test]
fn every_option_changes_the_result() {
    let base = weights(&fitted(config()));
    let adam = config().optimizer;
    for (what, changed) in [
        ("batch_size", TrainConfig { batch_size: 5, ..config() }),
        ("learning_rate", TrainConfig { optimizer: AdamConfig::adam(2e-4), ..config() }),
        ("weight_decay", TrainConfig { optimizer: AdamConfig::adamw(1e-4, 0.1), ..config() }),
        ("beta1", TrainConfig { optimizer: AdamConfig { beta1: 0.5, ..adam }, ..config() }),
        ("beta2", TrainConfig { optimizer: AdamConfig { beta2: 0.9, ..adam }, ..config() }),
        ("eps", TrainConfig { optimizer: AdamConfig { eps: 1e-3, ..adam }, ..config() }),
        ("warmup_steps", TrainConfig { warmup_steps: 10, ..config() }),
        ("cooldown", TrainConfig { cooldown: 0.5, ..config() }),
        // Adam is independent of the scale of the gradient, except for eps.
        ("clip_norm", TrainConfig { clip_norm: Some(1e-6), ..config() }),
        ("horizontal_flip", TrainConfig { horizontal_flip: true, ..config() }),
    ] {
        assert_ne!(base, weights(&fitted(changed)), "{what}");
    }
    let dropout = UNetConfig { dropout: 0.5, ..network() };
    let mut other = Trainer::new(dropout, config(), Diffusion::ddpm(), &Device::Cpu).unwrap();
    other.fit(&Ramps(10), &mut ()).unwrap();
    assert_ne!(base, weights(&other), "dropout");
    let ema = |decay, warmup| TrainConfig { ema: Some(EmaConfig { decay, warmup }), ..config() };
    let slow = averages(&fitted(ema(0.999, false)));
    assert_ne!(slow, averages(&fitted(ema(0.999, true))), "ema.warmup");
    assert_ne!(slow, averages(&fitted(ema(0.9, false))), "ema.decay");
}

#[test]
fn accumulation_gives_what_the_whole_batch_gives() {
    let dropout = UNetConfig { dropout: 0.3, ..network() };
    let run = |accumulation| {
        let config = TrainConfig {
            accumulation,
            clip_norm: Some(0.5),
            // With a small eps, Adam would magnify the rounding of a gradient near 0 to full steps.
            optimizer: AdamConfig { eps: 1e-3, ..AdamConfig::adam(1e-3) },
            ..config()
        };
        let mut trainer =
            Trainer::new(dropout.clone(), config, Diffusion::ddpm(), &Device::Cpu).unwrap();
        trainer.fit(&Ramps(10), &mut ()).unwrap();
        weights(&trainer)
    };
    let whole = run(1);
    for parts in [2, 4] {
        assert!(most(&whole, &run(parts)) < 1e-6, "{parts} parts: {}", most(&whole, &run(parts)));
    }
}

#[test]
fn an_epoch_shows_every_image_once_and_flips_half() {
    let mut trainer = trainer(TrainConfig { batch_size: 5, horizontal_flip: true, ..config() });
    let images = Ramps(10);
    let original = |index| {
        let mut bytes = [0; 64];
        images.read(index, &mut bytes).unwrap();
        bytes.map(|byte| f32::from(byte) / 127.5 - 1.0).to_vec()
    };
    let originals: Vec<Vec<f32>> = (0..10).map(original).collect();
    let mut orders = Vec::new();
    let mut flips = 0;
    for _ in 0..20 {
        let mut order = Vec::new();
        for _ in 0..2 {
            let batch = trainer.next_batch(&images).unwrap();
            assert_eq!(batch.images.dims(), [5, 1, 8, 8]);
            for image in batch.images.flatten_from(1).unwrap().to_vec2::<f32>().unwrap() {
                let mirrored: Vec<f32> =
                    image.chunks(8).flat_map(|row| row.iter().rev().copied()).collect();
                let straight = originals.iter().position(|original| *original == image);
                flips += usize::from(straight.is_none());
                order.push(
                    straight.or_else(|| originals.iter().position(|o| *o == mirrored)).unwrap(),
                );
            }
            trainer.step(&batch).unwrap();
        }
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        orders.push(order);
    }
    assert!(orders.windows(2).all(|w| w[0] != w[1]));
    // 200 coin tosses: five standard deviations.
    assert!((65..=135).contains(&flips), "{flips} of 200 flipped");
}

#[derive(Debug, Default)]
struct Recorder {
    metrics: Vec<Metrics>,
    steps: Vec<u64>,
    stop_at: Option<u64>,
}

impl Observer for Recorder {
    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        self.steps.push(run.step());
        let stop = self.stop_at == Some(run.step());
        Ok(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    fn on_metrics(&mut self, _: &Run<'_>, metrics: &Metrics) -> Result<()> {
        self.metrics.push(metrics.clone());
        Ok(())
    }
}

#[test]
fn observers_see_every_step_and_the_mean_loss_between_reports() {
    let run = |log_every| {
        let mut recorder = Recorder::default();
        let config = TrainConfig { steps: 7, log_every, warmup_steps: 4, ..config() };
        trainer(config).fit(&Ramps(10), &mut recorder).unwrap();
        assert_eq!(recorder.steps, [1, 2, 3, 4, 5, 6, 7]);
        recorder.metrics
    };
    let (every, third) = (run(1), run(3));
    assert_eq!(every.iter().map(|m| m.step).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(third.iter().map(|m| m.step).collect::<Vec<_>>(), [3, 6, 7]);
    for (mean, losses) in third.iter().zip(every.chunks(3)) {
        let expected = losses.iter().map(|m| m.loss).sum::<f32>() / losses.len() as f32;
        assert!((mean.loss - expected).abs() < 1e-6);
        assert_eq!(mean.grad_norm, losses.last().unwrap().grad_norm);
        assert!(mean.images_per_second > 0.0);
    }
    let late = TrainConfig { warmup_steps: 4, ..config() }.learning_rate(u64::MAX);
    assert_eq!(late, 1e-4);
    let rates: Vec<f64> = every.iter().map(|m| m.lr).collect();
    for (rate, expected) in rates.iter().zip([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4, 1e-4]) {
        assert!((rate - expected).abs() < 1e-18, "{rates:?}");
    }
}

#[test]
fn a_closure_observes_every_report_and_its_error_ends_training() {
    let mut lines = Vec::new();
    trainer(config())
        .fit(
            &Ramps(10),
            &mut on_metrics(|metrics| {
                lines.push(metrics.to_string());
                Ok(())
            }),
        )
        .unwrap();
    assert_eq!(lines.len(), 6);
    assert!(
        lines[1].starts_with("step 2: loss 1.") && lines[1].contains(", lr 1.0e-4, "),
        "{lines:?}"
    );

    let mut trainer = trainer(config());
    let mut full = on_metrics(|metrics| match metrics.step {
        3 => Err(Error::external("the disk is full")),
        _ => Ok(()),
    });
    let error = trainer.fit(&Ramps(10), &mut full).unwrap_err();
    assert_eq!((error.to_string().as_str(), trainer.steps()), ("the disk is full", 3));
}

/// The rate rises during the first updates, falls during the last, and is never negative.
#[test]
fn the_learning_rate_rises_and_falls_linearly() {
    let optimizer = AdamConfig::adam(1.0);
    let base = TrainConfig { steps: 8, optimizer, ..config() };
    let up = TrainConfig { warmup_steps: 4, ..base.clone() };
    let down = TrainConfig { cooldown: 0.5, ..base.clone() };
    let both = TrainConfig { warmup_steps: 4, cooldown: 1.0, ..base };
    for (config, expected) in [
        (up, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (down, [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (both, [0.25, 0.5, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]),
    ] {
        let rates: Vec<f64> = (0..9).map(|step| config.learning_rate(step)).collect();
        assert_eq!(rates, expected, "{config:?}");
    }
}

/// The images of `Ramps(10)`, read at no more than 200 per second.
struct Slow;

impl Dataset for Slow {
    fn len(&self) -> usize {
        10
    }

    fn shape(&self) -> ImageShape {
        (1, 8, 8).into()
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        std::thread::sleep(std::time::Duration::from_millis(5));
        Ramps(10).read(index, pixels)
    }
}

#[test]
fn a_report_is_of_the_updates_of_its_own_fit() {
    let mut every = Recorder::default();
    trainer(TrainConfig { steps: 11, ..config() }).fit(&Ramps(10), &mut every).unwrap();
    let mut trainer = trainer(TrainConfig { steps: 11, log_every: 4, ..config() });
    for _ in 0..5 {
        let batch = trainer.next_batch(&Ramps(10)).unwrap();
        trainer.step(&batch).unwrap();
    }
    // Includes a stop between two reports.
    for (stop_at, reports) in [(Some(6), vec![]), (None, vec![(8, 6..8), (11, 8..11)])] {
        let mut recorder = Recorder { stop_at, ..Recorder::default() };
        trainer.fit(&Ramps(10), &mut recorder).unwrap();
        assert_eq!(recorder.metrics.len(), reports.len());
        for (metrics, (step, updates)) in recorder.metrics.iter().zip(reports) {
            let losses: Vec<f32> = every.metrics[updates].iter().map(|m| m.loss).collect();
            let expected = losses.iter().sum::<f32>() / losses.len() as f32;
            assert_eq!(metrics.step, step);
            assert!((metrics.loss - expected).abs() < 1e-6, "{metrics:?}, not {expected}");
        }
    }
}

#[test]
fn images_per_second_counts_what_was_timed() {
    let mut trainer = trainer(TrainConfig { steps: 52, log_every: 2, ..config() });
    let batch = trainer.next_batch(&Ramps(10)).unwrap().images;
    let batch = Tensor::cat(&[&batch, &batch], 0).unwrap();
    for _ in 0..49 {
        trainer.step(&batch).unwrap();
    }
    let mut recorder = Recorder::default();
    trainer.fit(&Slow, &mut recorder).unwrap();
    assert_eq!(recorder.metrics.iter().map(|m| m.step).collect::<Vec<_>>(), [50, 52]);
    let rates: Vec<f64> = recorder.metrics.iter().map(|m| m.images_per_second).collect();
    // The first of the two batches of the second report is read ahead, while the first report is made.
    assert!(rates[0] <= 200.0 && rates[1] <= 400.0, "{rates:?}");
}

#[test]
fn a_report_holds_more_updates_than_may_go_unread() {
    const STEPS: u64 = 10_100;
    let run = |log_every| {
        let config = TrainConfig { steps: STEPS, log_every, batch_size: 1, ema: None, ..config() };
        let mut trainer = Trainer::new(Scale, config, Diffusion::ddpm(), &Device::Cpu).unwrap();
        let mut recorder = Recorder::default();
        trainer.fit(&Ramps(10), &mut recorder).unwrap();
        recorder.metrics
    };
    let (every, once) = (run(1), run(STEPS));
    let mean = every.iter().map(|m| f64::from(m.loss)).sum::<f64>() / STEPS as f64;
    assert_eq!(once.len(), 1);
    assert!((f64::from(once[0].loss) - mean).abs() < 1e-6, "{} and not {mean}", once[0].loss);
    assert_eq!(once[0].grad_norm, every.last().unwrap().grad_norm);
}

#[test]
fn an_observer_can_stop_and_training_goes_on_later() {
    let mut trainer = trainer(config());
    let mut recorder = Recorder { stop_at: Some(2), ..Recorder::default() };
    trainer.fit(&Ramps(10), &mut recorder).unwrap();
    assert_eq!(trainer.steps(), 2);
    trainer.fit(&Ramps(10), &mut ()).unwrap();
    assert_eq!(weights(&trainer), weights(&fitted(config())));
}

/// The images of `Ramps(10)` with classes. Counts reads, and fails at one of them.
#[derive(Default)]
struct Watched {
    reads: AtomicUsize,
    fails_at: Option<usize>,
    panics: bool,
}

impl Dataset for Watched {
    fn len(&self) -> usize {
        10
    }

    fn shape(&self) -> ImageShape {
        (1, 8, 8).into()
    }

    fn classes(&self) -> usize {
        10
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        if Some(self.reads.load(Ordering::SeqCst)) == self.fails_at {
            assert!(!self.panics, "the source panics");
            return Err(Error::external(std::io::Error::other(format!("image {index} is lost"))));
        }
        Ramps(10).read(index, pixels)?;
        self.reads.fetch_add(1, Ordering::SeqCst);
        Ok(Some(index as u32))
    }
}

/// Waits in each step until the next batch has been read.
struct Waits<'a>(&'a Watched);

impl Observer for Waits<'_> {
    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        let next = (run.step() + 1).min(run.config().steps) as usize * 4;
        let start = Instant::now();
        while self.0.reads.load(Ordering::SeqCst) < next {
            assert!(start.elapsed().as_secs() < 60, "the next batch is not read ahead");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(ControlFlow::Continue(()))
    }
}

#[test]
fn the_next_batch_is_read_while_a_step_is_made_and_none_after_the_last() {
    let source = Watched::default();
    let mut trainer = trainer(config());
    trainer.fit(&source, &mut Waits(&source)).unwrap();
    assert_eq!(source.reads.into_inner(), 6 * 4);
    assert_eq!(weights(&trainer), weights(&fitted(config())));
}

#[test]
fn an_error_of_the_source_ends_training_at_its_step_and_the_trainer_goes_on() {
    // The failure is in the third batch, which is read during the second step.
    let source = Watched { fails_at: Some(9), ..Watched::default() };
    let mut trainer = trainer(config());
    let message = trainer.fit(&source, &mut ()).unwrap_err().to_string();
    assert!(message.starts_with("image ") && message.contains(" is lost"), "{message}");
    assert_eq!((trainer.steps(), trainer.images_seen()), (2, 8));
    trainer.fit(&Ramps(10), &mut ()).unwrap();
    assert_eq!(weights(&trainer), weights(&fitted(config())));
}

#[test]
fn a_panic_of_the_source_is_one_of_fit() {
    let source = Watched { fails_at: Some(9), panics: true, ..Watched::default() };
    let mut trainer = trainer(config());
    let fit = std::panic::AssertUnwindSafe(|| trainer.fit(&source, &mut ()));
    let panic = std::panic::catch_unwind(fit).unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"the source panics"));
    assert_eq!(trainer.steps(), 2);
}

#[test]
fn a_batch_read_ahead_of_a_stop_is_read_again() {
    let mut trainer = trainer(config());
    let mut recorder = Recorder { stop_at: Some(3), ..Recorder::default() };
    trainer.fit(&Ramps(10), &mut recorder).unwrap();
    assert_eq!((trainer.steps(), trainer.images_seen()), (3, 12));
    let mut unbroken = self::trainer(config());
    for _ in 0..3 {
        let batch = unbroken.next_batch(&Ramps(10)).unwrap();
        unbroken.step(&batch).unwrap();
    }
    let [found, expected] = [&mut trainer, &mut unbroken].map(|trainer| {
        let batch = trainer.next_batch(&Ramps(10)).unwrap();
        batch.images.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    });
    assert_eq!(found, expected);
}

/// The mean squared error as a composition, optionally weighted by each image's signal-to-noise ratio (Hang
/// et al. 2023).
#[derive(Debug)]
struct Composed {
    most: f64,
}

impl Objective for Composed {
    fn loss(&self, batch: &Noised<'_>, output: &Output) -> Result<(Tensor, Output)> {
        let output = &output.prediction;
        assert_eq!(batch.classes.as_ref().expect("classes").dims(), batch.t.dims());
        let mut weights = Vec::new();
        for t in batch.t.to_vec1::<u32>()? {
            weights.push((self.most / batch.diffusion.schedule().snr(t as usize)?).min(1.0) as f32);
        }
        let weights = Tensor::from_vec(weights, (output.dim(0)?, 1, 1, 1), &Device::Cpu)?;
        let error = (output - batch.target()?)?;
        let loss = error.sqr()?.broadcast_mul(&weights)?.mean_all()?;
        let gradient =
            error.broadcast_mul(&weights)?.affine(2.0 / error.elem_count() as f64, 0.0)?;
        let (loss, gradient) = batch.weighted(&loss, &gradient)?;
        Ok((loss, Output::new(gradient)))
    }
}

#[test]
fn a_custom_objective_trains_in_parts_as_in_the_whole() {
    let config = |accumulation| {
        let optimizer = AdamConfig { eps: 1e-3, ..AdamConfig::adam(1e-3) };
        TrainConfig { accumulation, optimizer, ..config() }
    };
    let run = |accumulation, most| {
        let objective = Composed { most };
        let trainer = Trainer::builder(network()).config(config(accumulation));
        let mut trainer = trainer.objective(objective).build().unwrap();
        trainer.fit(&Watched::default(), &mut ()).unwrap();
        weights(&trainer)
    };
    let plain = weights(&fitted(config(1)));
    for accumulation in [1, 2] {
        let off = most(&plain, &run(accumulation, f64::INFINITY));
        assert!(off < 1e-6, "{accumulation} parts: {off}");
        assert!(most(&plain, &run(accumulation, 5.0)) > 1e-5, "no weight has an effect");
    }
    assert!(most(&run(1, 5.0), &run(2, 5.0)) < 1e-6);
}

#[test]
fn classes_come_with_their_images() {
    let mut trainer = trainer(config());
    let batch = trainer.next_batch(&Watched::default()).unwrap();
    let images = batch.images.flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
    let classes = batch.classes.as_ref().unwrap().to_vec1::<u32>().unwrap();
    for (image, class) in images.into_iter().zip(classes) {
        let mut bytes = [0; 64];
        Ramps(10).read(class as usize, &mut bytes).unwrap();
        assert_eq!(image, bytes.map(|byte| f32::from(byte) / 127.5 - 1.0));
    }
    trainer.step(&batch).unwrap();
}

/// With this learning rate, weights have size 1e25 after one update, so the second loss is not finite.
fn diverging() -> TrainConfig {
    let optimizer = AdamConfig::adam(1e25);
    TrainConfig { steps: 5, log_every: 1000, optimizer, ..config() }
}

#[test]
fn a_loss_that_is_not_finite_names_its_step_and_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("checkpoint");
    // The loss is read only at the end, but the error names the first step with a wrong value.
    let error = trainer(diverging()).fit(&Ramps(10), &mut ()).unwrap_err();
    assert!(matches!(error, Error::NonFinite { step: 2, .. }), "{error}");
    assert!(error.to_string().starts_with("loss is "), "{error}");

    let mut trainer = trainer(diverging());
    let batch = trainer.next_batch(&Ramps(10)).unwrap();
    trainer.step(&batch).unwrap();
    trainer.save(&checkpoint).unwrap();
    let saved = std::fs::read(checkpoint.join("model.safetensors")).unwrap();
    trainer.step(&batch).unwrap();
    assert!(matches!(trainer.save(&checkpoint), Err(Error::NonFinite { step: 2, .. })));
    assert_eq!(std::fs::read(checkpoint.join("model.safetensors")).unwrap(), saved);
}

#[test]
fn the_number_of_images_may_change_until_the_first_update() {
    let mut trainer = trainer(config());
    trainer.next_batch(&Ramps(10)).unwrap();
    let batch = trainer.next_batch(&Ramps(9)).unwrap();
    trainer.step(&batch).unwrap();
    let message = trainer.next_batch(&Ramps(10)).unwrap_err().to_string();
    let expected = "number of images is 10; it must be 9, as earlier in this run";
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn images_that_do_not_fit_are_refused() {
    struct Empty;
    impl Dataset for Empty {
        fn len(&self) -> usize {
            0
        }
        fn shape(&self) -> ImageShape {
            (1, 8, 8).into()
        }
        fn read(&self, _: usize, _: &mut [u8]) -> Result<Option<u32>> {
            Ok(None)
        }
    }
    struct Endless;
    impl Dataset for Endless {
        fn len(&self) -> usize {
            usize::MAX
        }
        fn shape(&self) -> ImageShape {
            (1, 8, 8).into()
        }
        fn read(&self, _: usize, _: &mut [u8]) -> Result<Option<u32>> {
            Ok(None)
        }
    }
    let message = trainer(config()).fit(&Endless, &mut ()).unwrap_err().to_string();
    assert!(message.contains("1 to 2^32 - 1 images"), "{message}");
    let message = trainer(config()).fit(&Empty, &mut ()).unwrap_err().to_string();
    assert!(message.contains("data set is 0 images"), "{message}");

    let colour = UNetConfig { channels: 3, ..network() };
    let mut trainer = Trainer::new(colour, config(), Diffusion::ddpm(), &Device::Cpu).unwrap();
    let message = trainer.fit(&Ramps(10), &mut ()).unwrap_err().to_string();
    assert!(message.contains("it must be (batch, 3, 8, 8)"), "{message}");
    let batch = Tensor::zeros((4, 3, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let t = Tensor::new(&[0u32, 1, 2, 1000], &Device::Cpu).unwrap();
    let message = trainer.step_with(&batch, &t, &batch).unwrap_err().to_string();
    assert!(message.contains("t is 1000; it must be from 0 to 999"), "{message}");
    let (t, eps) = (t.zeros_like().unwrap(), batch.narrow(0, 0, 1).unwrap());
    let message = trainer.step_with(&batch, &t, &eps).unwrap_err().to_string();
    assert!(message.contains("eps has shape [1, 3, 8, 8]"), "{message}");
}

/// A network with a candle operation that has no gradient, and a weight that it does not use.
#[derive(Clone, Serialize, Deserialize)]
struct Normed {
    frozen: bool,
}

struct NormedModel {
    first: Tensor,
    norm: candle_nn::LayerNorm,
    last: Tensor,
    frozen: bool,
}

impl Architecture for Normed {
    const KIND: &'static str = "normed";
    type Model = NormedModel;

    fn build(&self, vb: VarBuilder) -> Result<NormedModel> {
        Ok(NormedModel {
            first: vb.get_with_hints(8, "first", Init::Const(0.5))?,
            norm: candle_nn::layer_norm(8, 1e-5, vb.pp("norm"))?,
            last: vb.get_with_hints(8, "last", Init::Const(0.5))?,
            frozen: self.frozen,
        })
    }
}

impl Denoiser for NormedModel {
    fn denoise(&self, x_t: &Tensor, _: &Tensor, _: &Condition) -> Result<Output> {
        let x = self.norm.forward(&x_t.broadcast_mul(&self.first)?.contiguous()?)?;
        Ok(Output::new(x.broadcast_mul(&self.last)?))
    }
}

impl Trainable for NormedModel {
    fn may_lack_gradient(&self, name: &str) -> bool {
        self.frozen && name != "last"
    }
}

#[test]
fn a_weight_without_a_gradient_is_named_unless_the_network_allows_it() {
    let trainer = |frozen| {
        Trainer::new(Normed { frozen }, config(), Diffusion::ddpm(), &Device::Cpu).unwrap()
    };
    let mut refused = trainer(false);
    let error = refused.fit(&Ramps(10), &mut ()).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::NoGradient { .. }), "{message}");
    assert!(message.starts_with(
        "weight first has no gradient in the first update (3 of 4 weights have none)"
    ));
    assert!(!message.contains('\n'), "{message}");
    assert_eq!(refused.steps(), 0);

    let mut allowed = trainer(true);
    allowed.fit(&Ramps(10), &mut ()).unwrap();
    assert_eq!(allowed.steps(), 6);
}

#[test]
fn a_batch_that_does_not_fit_is_reported_as_the_caller_passed_it() {
    let batch = Tensor::zeros((4, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
    for dtype in [DType::F64, DType::F16, DType::BF16, DType::U8] {
        let message =
            trainer(config()).step(batch.to_dtype(dtype).unwrap()).unwrap_err().to_string();
        assert_eq!(message, format!("dtype of x_0 is {}; it must be f32", dtype.as_str()));
    }
    for accumulation in [1, 2, 4] {
        let mut trainer = trainer(TrainConfig { accumulation, ..config() });
        let wide = Tensor::zeros((4, 1, 8, 12), DType::F32, &Device::Cpu).unwrap();
        let message = trainer.step(&wide).unwrap_err().to_string();
        assert_eq!(message, "x_0 has shape [4, 1, 8, 12]; it must be (batch, 1, 8, 8)");
    }
}

/// A network whose output does not have the shape of its input.
#[derive(Serialize, Deserialize)]
struct Flattening;

struct FlatModel(Tensor);

impl Architecture for Flattening {
    const KIND: &'static str = "flattening";
    type Model = FlatModel;

    fn build(&self, vb: VarBuilder) -> Result<FlatModel> {
        Ok(FlatModel(vb.get(1, "w")?))
    }
}

impl Denoiser for FlatModel {
    fn denoise(&self, x_t: &Tensor, _: &Tensor, _: &Condition) -> Result<Output> {
        Ok(Output::new(x_t.flatten_from(1)?.broadcast_mul(&self.0)?))
    }
}

impl Trainable for FlatModel {}

#[test]
fn an_output_of_another_shape_is_called_the_networks() {
    let mut trainer = Trainer::new(Flattening, config(), Diffusion::ddpm(), &Device::Cpu).unwrap();
    let message = trainer.fit(&Ramps(10), &mut ()).unwrap_err().to_string();
    let expected =
        "the network's output has shape [4, 64]; it must be [4, 1, 8, 8], that of its input";
    assert_eq!(message, expected);
}

#[test]
fn wrong_configurations_are_refused() {
    let adam = config().optimizer;
    let optimizer = |optimizer| TrainConfig { optimizer, ..config() };
    for (config, expected) in [
        (TrainConfig { batch_size: 0, ..config() }, "batch_size is 0; it must be at least 1"),
        (TrainConfig { accumulation: 0, ..config() }, "accumulation is 0"),
        (
            TrainConfig { accumulation: 3, ..config() },
            "accumulation is 3; it must be a divisor of batch_size, which is 4",
        ),
        (TrainConfig { steps: 0, ..config() }, "steps is 0; it must be at least 1"),
        (TrainConfig { log_every: 0, ..config() }, "log_every is 0"),
        (TrainConfig { keep_checkpoints: 0, ..config() }, "keep_checkpoints is 0"),
        (TrainConfig { clip_norm: Some(0.0), ..config() }, "clip_norm is 0; it must be positive"),
        (TrainConfig { clip_norm: Some(f64::NAN), ..config() }, "clip_norm is NaN"),
        (TrainConfig { cooldown: 1.1, ..config() }, "cooldown is 1.1; it must be from 0 to 1"),
        (TrainConfig { cooldown: f64::NAN, ..config() }, "cooldown is NaN"),
        (
            TrainConfig { ema: Some(EmaConfig { decay: 1.0, warmup: true }), ..config() },
            "ema.decay is 1",
        ),
        (optimizer(AdamConfig { learning_rate: -1.0, ..adam }), "learning_rate is -1"),
        (optimizer(AdamConfig::adam(f64::NAN)), "learning_rate is NaN"),
        (optimizer(AdamConfig::adam(1e39)), "it must be positive and finite in f32"),
        (optimizer(AdamConfig::adamw(1e-4, 1e39)), "it must be at least 0 and finite in f32"),
        (
            optimizer(AdamConfig { beta1: 1.0, ..adam }),
            "beta1 is 1; it must be at least 0 and less",
        ),
        (optimizer(AdamConfig { beta2: -0.1, ..adam }), "beta2 is -0.1"),
        (optimizer(AdamConfig { eps: 0.0, ..adam }), "eps is 0"),
        (
            optimizer(AdamConfig { eps: f64::MIN_POSITIVE, ..adam }),
            "it must be positive and finite in f32",
        ),
        (optimizer(AdamConfig { eps: 1e39, ..adam }), "it must be positive and finite in f32"),
        (optimizer(AdamConfig::adamw(1e-4, f64::INFINITY)), "weight_decay is inf"),
    ] {
        let message = Trainer::new(network(), config, Diffusion::ddpm(), &Device::Cpu)
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(message.contains(expected), "{message}");
    }
    let unet = UNetConfig::mnist;
    for (config, expected) in [
        (UNetConfig { channels: 0, ..unet() }, "channels is 0; it must be from 1"),
        (
            UNetConfig { image_size: 30.into(), ..unet() },
            "image_size is 30; it must be a multiple of 4",
        ),
        (UNetConfig { image_size: 0.into(), ..unet() }, "image_size is 0"),
        (UNetConfig { image_size: (1 << 40).into(), ..unet() }, "image_size is"),
        (UNetConfig { hidden_dims: vec![], ..unet() }, "hidden_dims is []; it must be 2 to 16"),
        (UNetConfig { hidden_dims: vec![32], ..unet() }, "hidden_dims is [32]"),
        (
            UNetConfig { hidden_dims: vec![32, 60], ..unet() },
            "hidden_dims is [32, 60]; it must be multiples of 8",
        ),
        (UNetConfig { hidden_dims: vec![8, 0], ..unet() }, "multiples of 8"),
        (UNetConfig { hidden_dims: vec![8; 99], ..unet() }, "2 to 16 numbers"),
        (UNetConfig { time_dim: 7, ..unet() }, "time_dim is 7; it must be even"),
        (UNetConfig { time_dim: 2, ..unet() }, "time_dim is 2; it must be"),
        (
            UNetConfig { attention_levels: vec![2], ..unet() },
            "attention_levels is [2]; it must be levels from 0 to 1, each at most once, of 28, 14 \
             pixels; the bottleneck, of 7 pixels, always has attention",
        ),
        (
            UNetConfig { attention_levels: vec![1, 0, 1], ..unet() },
            "attention_levels is [1, 0, 1]; it must be levels from 0 to 1, each at most once",
        ),
        (
            UNetConfig { dropout: 1.0, ..unet() },
            "dropout is 1; it must be at least 0 and less than 1",
        ),
        (UNetConfig { dropout: f64::NAN, ..unet() }, "dropout is NaN"),
    ] {
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    for json in [
        r#"{"image_size": 28}"#,
        r#"{"image_size": 28, "channels": 1, "hidden_dims": [8, 16], "time_dim": 8, "attention_levels": [], "dropout": 0, "heads": 4}"#,
        r#"{"image_size": -28, "channels": 1, "hidden_dims": [8, 16], "time_dim": 8, "attention_levels": [], "dropout": 0}"#,
    ] {
        assert!(serde_json::from_str::<UNetConfig>(json).is_err(), "{json}");
    }
}

/// Reads images in a pool of one thread, which may be the thread that trains.
struct Pooled(rayon::ThreadPool);

impl Dataset for Pooled {
    fn len(&self) -> usize {
        10
    }

    fn shape(&self) -> ImageShape {
        Ramps(10).shape()
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        self.0.install(|| Ramps(10).read(index, pixels))
    }
}

#[test]
fn a_thread_of_a_pool_trains_on_images_that_the_pool_reads() {
    let dataset = Pooled(rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap());
    let mut trainer = trainer(config());
    dataset.0.install(|| trainer.fit(&dataset, ())).unwrap();
    assert_eq!(trainer.steps(), 6);
}

#[test]
fn a_batch_has_one_class_per_image() {
    let mut trainer = trainer(config());
    let mut batch = trainer.next_batch(&Ramps(10)).unwrap();
    batch.classes = Some(Tensor::new(&[1u32, 2], &Device::Cpu).unwrap());
    let message = trainer.step(&batch).unwrap_err().to_string();
    assert_eq!(message, "the list of classes has shape [2]; it must be [4], one per image");
    batch.classes = Some(Tensor::new(&[1f32, 2.0, 3.0, 4.0], &Device::Cpu).unwrap());
    let message = trainer.step(&batch).unwrap_err().to_string();
    assert_eq!(message, "dtype of the classes is f32; it must be u32");
    (batch.classes, batch.first) = (None, u64::MAX);
    assert!(
        trainer.step(&batch).unwrap_err().to_string().starts_with("first is 18446744073709551615")
    );
    batch.first = 0;
    trainer.step(&batch).unwrap();
}
