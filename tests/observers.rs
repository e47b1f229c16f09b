//! Observers: how they compose, and the results of each observer of the library.

use std::fs;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use ddpm::data::{Dataset, ImageShape, Images};
use ddpm::eval::{Extractor, ExtractorIdentity, Features, Generator, SlicedDistance, Statistics};
use ddpm::nn::{Condition, Output};
use ddpm::observe::{
    Best, GradientNorms, HeldOutLoss, Judge, LossCurve, MetricsFile, SampleGrid, SaveBest,
    SaveEvery,
};
use ddpm::process::Prediction;
use ddpm::train::{
    AdamConfig, EmaConfig, Frontend, Metrics, Noised, Objective, ObjectiveConfig, Observer,
    Outcome, Published, Run, TimestepSampling, Value, on_metrics,
};
use ddpm::{
    Checkpoint, Denoiser, Diffusion, Error, NoiseSchedule, Result, Sampler, Solver, TrainConfig,
    Trainer,
};
use tempfile::TempDir;

mod small;
use small::Scale;

fn config(steps: u64) -> TrainConfig {
    TrainConfig { steps, batch_size: 2, log_every: 2, ..TrainConfig::mnist() }
}

fn trainer(steps: u64) -> Trainer<Scale> {
    Trainer::new(Scale, config(steps), Diffusion::ddpm(), &Device::Cpu).unwrap()
}

fn images() -> Images {
    Images::new((0..160).map(|i| (i * 7 % 251) as u8).collect(), (1, 4, 4)).unwrap()
}

type Log = Arc<Mutex<Vec<String>>>;

/// Records its calls. Its front end records its messages, and stops the run on request.
#[derive(Clone, Default)]
struct Recorder {
    name: &'static str,
    log: Log,
    break_at: Option<u64>,
    fail_at: Option<u64>,
    fail_at_end: bool,
    frontend: Option<Arc<Screen>>,
}

#[derive(Default)]
struct Screen {
    log: Log,
    stop: AtomicBool,
}

impl Frontend for Screen {
    fn working(&self, on: &str) {
        self.log.lock().unwrap().push(format!("working: {on}"));
    }

    fn warn(&self, warning: &str) {
        self.log.lock().unwrap().push(format!("warning: {warning}"));
    }

    fn wants_stop(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn finish(&self) {
        self.log.lock().unwrap().push("finished".into());
    }
}

impl Recorder {
    fn new(name: &'static str, log: &Log) -> Self {
        Self { name, log: Arc::clone(log), ..Self::default() }
    }

    fn write(&self, text: &str) {
        self.log.lock().unwrap().push(format!("{}: {text}", self.name));
    }
}

impl Observer for Recorder {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        self.write(&format!("start {}", run.step()));
        Ok(())
    }

    fn on_metrics(&mut self, run: &Run<'_>, metrics: &Metrics) -> Result<()> {
        assert_eq!(run.step(), metrics.step);
        self.write(&format!("metrics {}", metrics.step));
        Ok(())
    }

    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        let step = Some(run.step());
        self.write(&format!("step {}", run.step()));
        if self.fail_at == step {
            return Err(Error::external(format!("{} failed", self.name)));
        }
        Ok(if self.break_at == step { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    fn on_end(&mut self, run: &Run<'_>, outcome: Outcome<'_>) -> Result<()> {
        self.write(&format!("end {} {outcome:?}", run.step()));
        match self.fail_at_end {
            true => Err(Error::external(format!("{} failed at the end", self.name))),
            false => Ok(()),
        }
    }

    fn frontends(&self) -> Vec<Arc<dyn Frontend>> {
        self.frontend.iter().map(|screen| Arc::clone(screen) as Arc<dyn Frontend>).collect()
    }
}

#[test]
fn the_parts_of_a_tuple_are_called_in_their_order() {
    let log = Log::default();
    let (a, mut b) = (Recorder::new("a", &log), Recorder::new("b", &log));
    trainer(2).fit(&images(), (a, &mut b)).unwrap();
    let calls = ["start 0", "step 1", "metrics 2", "step 2", "end 2 Complete"];
    let expected: Vec<_> =
        calls.iter().flat_map(|c| [format!("a: {c}"), format!("b: {c}")]).collect();
    assert_eq!(*log.lock().unwrap(), expected);
}

/// Observers are called in the same way in every container.
#[test]
fn boxes_vectors_options_and_nested_tuples_are_observers() {
    let calls = |observe: &dyn Fn(Recorder) -> Box<dyn Observer>| {
        let log = Log::default();
        trainer(3).fit(&images(), observe(Recorder::new("a", &log))).unwrap();
        log.lock().unwrap().clone()
    };
    let alone = calls(&|a| Box::new(a));
    assert_eq!(alone.len(), 7);
    assert_eq!(calls(&|a| Box::new((a,))), alone);
    assert_eq!(calls(&|a| Box::new(Some(a))), alone);
    assert_eq!(calls(&|a| Box::new(((), (None::<Recorder>, a), on_metrics(|_| Ok(()))))), alone);
    assert_eq!(calls(&|a| Box::new(vec![Box::new(()) as Box<dyn Observer>, Box::new(a)])), alone);
    assert_eq!(calls(&|a| Box::new(((), (), (), (), (), (), (), a))), alone);
    assert!(calls(&|_| Box::new(None::<Recorder>)).is_empty());
}

#[test]
fn a_break_ends_the_run_after_all_observers_saw_the_step() {
    let log = Log::default();
    let a = Recorder { break_at: Some(3), ..Recorder::new("a", &log) };
    let mut trainer = trainer(9);
    trainer.fit(&images(), (a, Recorder::new("b", &log))).unwrap();
    assert_eq!(trainer.steps(), 3);
    let log = log.lock().unwrap();
    assert_eq!(
        log[log.len() - 4..],
        ["a: step 3", "b: step 3", "a: end 3 Stopped", "b: end 3 Stopped"]
    );
}

#[test]
fn after_an_error_on_end_of_every_observer_is_called() {
    let log = Log::default();
    let a = Recorder { fail_at: Some(1), ..Recorder::new("a", &log) };
    let error = trainer(2).fit(&images(), (a, Recorder::new("b", &log))).unwrap_err();
    assert_eq!(error.to_string(), "a failed");
    let ends = [
        "a: start 0",
        "b: start 0",
        "a: step 1",
        "a: end 1 Failed(a failed)",
        "b: end 1 Failed(a failed)",
    ];
    assert_eq!(*log.lock().unwrap(), ends);

    // The first error of `on_end` is returned, and the other observers are still called.
    let log = Log::default();
    let failing = |name| Recorder { fail_at_end: true, ..Recorder::new(name, &log) };
    let error = trainer(1).fit(&images(), (failing("a"), failing("b"))).unwrap_err();
    assert_eq!(error.to_string(), "a failed at the end");
    assert_eq!(log.lock().unwrap().last().unwrap(), "b: end 1 Complete");
}

#[test]
fn a_front_end_stops_the_run_and_sees_what_the_others_do() {
    let temp = TempDir::new().unwrap();
    let screen = Arc::new(Screen::default());
    let a = Recorder { frontend: Some(Arc::clone(&screen)), ..Recorder::default() };
    let stop = Arc::clone(&screen);
    let stop_at_four = on_metrics(move |metrics| {
        stop.stop.store(metrics.step == 4, Ordering::SeqCst);
        Ok(())
    });
    let save = SaveEvery::steps(2, temp.path().join("checkpoint"));
    let mut trainer = trainer(9);
    trainer.fit(&images(), (save, a, stop_at_four)).unwrap();
    // Step 4 is also due, but the end of the run saves it.
    assert_eq!(trainer.steps(), 4);
    let expected = ["working: saving", "working: ", "working: saving", "working: ", "finished"];
    assert_eq!(*screen.log.lock().unwrap(), expected);
    assert_eq!(Checkpoint::open(temp.path().join("checkpoint")).unwrap().step(), 4);
}

fn saved(temp: &TempDir, name: &str) -> Option<u64> {
    Checkpoint::open(temp.path().join(name)).ok().map(|checkpoint| checkpoint.step())
}

#[test]
fn a_run_is_saved_whatever_ends_it() {
    let temp = TempDir::new().unwrap();
    let dir = |name: &str| temp.path().join(name);
    let mut save = SaveEvery::steps(0, dir("complete"));
    trainer(3).fit(&images(), &mut save).unwrap();
    assert_eq!((saved(&temp, "complete"), save.saved_step()), (Some(3), 3));

    let stop = Recorder { break_at: Some(2), ..Recorder::default() };
    trainer(3).fit(&images(), (SaveEvery::steps(0, dir("stopped")), stop)).unwrap();
    assert_eq!(saved(&temp, "stopped"), Some(2));

    // The run fails between two saves.
    let fail = Recorder { fail_at: Some(3), ..Recorder::default() };
    trainer(5).fit(&images(), (SaveEvery::steps(2, dir("failed")), fail)).unwrap_err();
    assert_eq!(saved(&temp, "failed"), Some(3));

    // There is nothing to save.
    let fail =
        on_metrics(|_| Err(Error::NonFinite { what: "loss".into(), value: f32::NAN, step: 2 }));
    trainer(5).fit(&images(), (SaveEvery::steps(0, dir("useless")), fail)).unwrap_err();
    assert_eq!(saved(&temp, "useless"), None);
    let mut complete = trainer(1);
    complete.fit(&images(), ()).unwrap();
    complete.fit(&images(), SaveEvery::steps(1, dir("nothing"))).unwrap();
    assert_eq!(saved(&temp, "nothing"), None);

    // A file blocks the path during the run.
    let file = dir("file");
    let blocking = on_metrics(move |_| fs::write(&file, "").map_err(Error::external));
    let fail = Recorder { name: "a", fail_at: Some(2), ..Recorder::default() };
    let save = SaveEvery::steps(0, dir("file"));
    let error = trainer(4).fit(&images(), (blocking, fail, save)).unwrap_err();
    let both = error.to_string();
    assert!(both.starts_with("a failed; saving the run at step 2 failed, too: "), "{both}");
    assert!(both.contains("no checkpoint can be saved here"), "{both}");
}

#[test]
fn the_file_of_metrics_continues_with_a_run_and_not_with_another_one() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("metrics.jsonl");
    let steps = || -> Vec<u64> {
        let text = fs::read_to_string(&path).unwrap();
        let step =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64();
        text.lines().filter_map(step).collect()
    };
    let mut run = trainer(8);
    let stop = Recorder { break_at: Some(4), ..Recorder::default() };
    run.fit(&images(), (MetricsFile::new(&path), stop)).unwrap();
    assert_eq!(steps(), [2, 4]);
    // The line of a later step, which the run will repeat, and an incomplete line.
    let later = fs::read_to_string(&path).unwrap() + "{\"step\":6,\"loss\":9.0}\n{\"step\":";
    fs::write(&path, later).unwrap();
    run.fit(&images(), MetricsFile::new(&path)).unwrap();
    assert_eq!(steps(), [2, 4, 6, 8]);

    let before = fs::read(&path).unwrap();
    trainer(2).fit(&images(), MetricsFile::new(&path)).unwrap();
    assert_eq!(steps(), [2]);
    assert_eq!(fs::read(temp.path().join("metrics-old.jsonl")).unwrap(), before);
}

/// Images that take 10 ms each.
struct SlowImages;

impl Dataset for SlowImages {
    fn len(&self) -> usize {
        images().len()
    }

    fn shape(&self) -> ImageShape {
        images().shape()
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<Option<u32>> {
        sleep(Duration::from_millis(10));
        images().read(index, pixels)
    }
}

/// A loss that takes 40 ms: twice as long as a batch of `SlowImages`.
#[derive(Debug)]
struct SlowLoss;

impl Objective for SlowLoss {
    fn loss(&self, batch: &Noised<'_>, output: &Output) -> Result<(Tensor, Output)> {
        sleep(Duration::from_millis(40));
        ObjectiveConfig::default().loss(batch, output)
    }
}

#[test]
fn metrics_have_the_share_of_time_in_which_training_waited_for_images() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("metrics.jsonl");
    let waiting = |dataset: &dyn Dataset, slow: bool| -> f64 {
        let builder = Trainer::builder(Scale).config(config(8));
        let builder = if slow { builder.objective(SlowLoss) } else { builder };
        let mut found = Vec::new();
        let collect = on_metrics(|metrics| {
            found.push(metrics.waiting);
            Ok(())
        });
        builder.build().unwrap().fit(dataset, (collect, MetricsFile::new(&path))).unwrap();
        let last = fs::read_to_string(&path).unwrap().lines().last().map(String::from).unwrap();
        let written = serde_json::from_str::<serde_json::Value>(&last).unwrap();
        assert_eq!(written["waiting"].as_f64(), found.last().copied());
        assert!(found.iter().all(|share| (0.0..=1.0).contains(share)), "{found:?}");
        // The least share: another program can delay a thread, and the first batch of a run is always waited for.
        found.into_iter().skip(1).fold(1.0, f64::min)
    };
    assert!(waiting(&SlowImages, false) > 0.5);
    assert!(waiting(&SlowImages, true) < 0.3);
    assert!(waiting(&images(), true) < 0.3);
}

#[test]
fn files_of_metrics_without_the_later_fields_can_be_read() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("metrics.jsonl");
    let line = r#"{"step":2,"loss":0.5,"lr":0.1,"grad_norm":1.0,"images_per_second":3.0}"#;
    fs::write(&path, format!("{line}\n")).unwrap();
    assert_eq!(MetricsFile::losses(&path).unwrap(), [(2, 0.5)]);
}

#[test]
fn a_removed_file_of_metrics_is_created_again_with_a_warning() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("run/metrics.jsonl");
    fs::create_dir(temp.path().join("run")).unwrap();
    let screen = Arc::new(Screen::default());
    let shows = Recorder { frontend: Some(Arc::clone(&screen)), ..Recorder::default() };
    let dir = temp.path().join("run");
    let remove = on_metrics(|metrics| {
        if metrics.step == 2 {
            fs::remove_dir_all(&dir).map_err(Error::external)?;
        }
        Ok(())
    });
    trainer(4).fit(&images(), (MetricsFile::new(&path), remove, shows)).unwrap();
    let lost = format!(
        "warning: {} was removed during the run; its lines are lost, up to step 3",
        path.display()
    );
    assert_eq!(*screen.log.lock().unwrap(), [lost.as_str(), "finished"]);
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
}

#[test]
fn grids_are_drawn_at_intervals_and_at_the_end_of_a_complete_run() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("samples");
    let names = || {
        let names =
            fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let grid = || SampleGrid::steps(2, &dir).count(3);
    let mut run = trainer(5);
    let stop = Recorder { break_at: Some(3), ..Recorder::default() };
    run.fit(&images(), (grid(), stop)).unwrap();
    assert_eq!(names(), ["step-000002.png"]);
    // A grid of another run.
    fs::write(dir.join("step-000005.png"), "an old grid").unwrap();
    run.fit(&images(), grid()).unwrap();
    assert_eq!(names(), ["step-000002.png", "step-000004.png", "step-000005.png"]);
    let last = image::open(dir.join("step-000005.png")).unwrap();
    // Two columns of 4 pixels, eight times their size, and gaps of 2.
    assert_eq!((last.width(), last.height()), (70, 70));

    // The seed and the number of samples change the picture.
    let drawn = |grid: SampleGrid| {
        let _ = fs::remove_file(grid.path(5));
        // Nothing is left to train.
        let mut run = trainer(5);
        run.fit(&images(), grid.clone()).unwrap();
        fs::read(grid.path(5)).unwrap()
    };
    let first = drawn(grid());
    assert_eq!(drawn(grid()), first);
    assert_ne!(drawn(grid().seed(1)), first);
    assert_ne!(drawn(grid().count(4)), first);
}

#[test]
fn a_picture_that_cannot_be_written_is_a_warning_until_the_end() {
    let temp = TempDir::new().unwrap();
    let (metrics, curve) = (temp.path().join("metrics.jsonl"), temp.path().join("loss.png"));
    fs::create_dir(&curve).unwrap();
    let screen = Arc::new(Screen::default());
    let shows = Recorder { frontend: Some(Arc::clone(&screen)), ..Recorder::default() };
    let observers = (MetricsFile::new(&metrics), LossCurve::steps(2, &metrics, &curve), shows);
    let error = trainer(4).fit(&images(), observers).unwrap_err().to_string();
    assert!(error.contains("loss.png: "), "{error}");
    let log = screen.log.lock().unwrap();
    let warnings: Vec<_> = log.iter().filter(|line| line.starts_with("warning: ")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("loss.png: "), "{log:?}");

    fs::remove_dir(&curve).unwrap();
    let observers = (MetricsFile::new(&metrics), LossCurve::steps(0, &metrics, &curve));
    trainer(4).fit(&images(), observers).unwrap();
    assert_eq!(image::open(&curve).unwrap().width(), 960);
}

#[test]
fn a_directory_that_cannot_be_saved_to_is_an_error_before_the_first_update() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("run");
    let mut later = trainer(4);
    later.fit(&images(), SaveEvery::steps(0, &dir)).unwrap();
    let mut again = trainer(4);
    let message = again.fit(&images(), SaveEvery::steps(1, &dir)).unwrap_err().to_string();
    assert!(message.starts_with("step is 0; it must be at least 4"), "{message}");
    assert_eq!(again.steps(), 0);
}

#[test]
fn a_failed_save_is_reported_once() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("run");
    let block = dir.clone();
    let blocking =
        on_metrics(move |_| fs::write(&block, "not a directory").map_err(Error::external));
    let mut trainer = trainer(4);
    let error = trainer.fit(&images(), (blocking, SaveEvery::steps(2, &dir))).unwrap_err();
    let text = format!("{error:?}");
    assert_eq!(text.matches("run").count(), text.matches("/run").count(), "{text}");
    assert!(!text.contains("failed, too"), "{text}");
}

/// Predicts images as bright as their classes.
struct Classes;

impl Denoiser for Classes {
    fn denoise(&self, x_t: &Tensor, _: &Tensor, condition: &Condition) -> Result<Output> {
        let Condition::Classes(classes) = condition else {
            return Err(Error::external(std::io::Error::other("no classes")));
        };
        let grey = (classes.to_dtype(x_t.dtype())? / 32.0)?.reshape(((), 1, 1, 1))?;
        Ok(Output::new(x_t.zeros_like()?.broadcast_add(&grey)?))
    }
}

#[test]
fn images_drawn_in_parts_have_their_own_conditions() {
    let diffusion = Diffusion::new(NoiseSchedule::cosine(10).unwrap(), Prediction::Sample);
    let sampler = Sampler::new(&diffusion, Solver::ddim(), 2).unwrap();
    let classes = Tensor::arange(0u32, 23, &Device::Cpu).unwrap();
    let sampler = sampler.condition(Condition::Classes(classes));
    let generator = Generator::new(&sampler, (1, 1, 1), 0, &Device::Cpu);
    let draw = |count| generator.draw(&Classes, count, |_| Ok(ControlFlow::Continue(())));
    let images = draw(23).unwrap().unwrap();
    let expected: Vec<u8> =
        (0..23).map(|k| (f64::from(k) / 32.0 * 127.5 + 127.5).round() as u8).collect();
    assert_eq!(images.pixels(), expected);
    assert!(draw(24).is_err());
    let message = sampler.sample(&Classes, (2, 1, 1, 1), 0, &Device::Cpu).unwrap_err().to_string();
    assert_eq!(message, "the list of classes has shape [23]; it must be [2], one per image");
}

/// Publishes a value of its list after each update, beginning with the first. Collects everything that is published.
#[derive(Default)]
struct Scripted {
    values: Vec<f64>,
    seen: Vec<Published>,
}

impl Scripted {
    fn numbers(&self, name: &str) -> Vec<(u64, f64)> {
        let of_name = self.seen.iter().filter(|published| published.name == name);
        of_name.filter_map(|published| Some((published.step, published.scalar()?))).collect()
    }
}

impl Observer for Scripted {
    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        if let Some(&value) = self.values.get(run.step() as usize - 1) {
            run.publish("a/metric", value);
        }
        Ok(ControlFlow::Continue(()))
    }

    fn on_published(&mut self, _: &Run<'_>, published: &[Published]) -> Result<()> {
        self.seen.extend_from_slice(published);
        Ok(())
    }
}

/// Publishes at the beginning and at the end, and an answer to each value of another name.
struct Answers;

impl Observer for Answers {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        run.publish("a/start", 0.0);
        Ok(())
    }

    fn on_published(&mut self, run: &Run<'_>, published: &[Published]) -> Result<()> {
        for value in published.iter().filter(|value| value.name != "a/answer") {
            run.publish("a/answer", value.scalar().unwrap() + 1.0);
        }
        Ok(())
    }

    fn on_end(&mut self, run: &Run<'_>, _: Outcome<'_>) -> Result<()> {
        run.publish("a/end", 5.0);
        Ok(())
    }
}

#[test]
fn every_observer_receives_what_is_published_whatever_their_order() {
    let (mut first, mut last) = (Scripted::default(), Scripted::default());
    let source = Scripted { values: vec![3.0], ..Scripted::default() };
    trainer(2).fit(&images(), (&mut first, (source, Answers), vec![&mut last])).unwrap();
    let expected = [
        (0, "a/start", 0.0),
        (0, "a/answer", 1.0),
        (1, "a/metric", 3.0),
        (1, "a/answer", 4.0),
        (2, "a/end", 5.0),
        (2, "a/answer", 6.0),
    ];
    for observer in [&first, &last] {
        let seen = observer.seen.iter().map(|p| (p.step, p.name.as_str(), p.scalar().unwrap()));
        assert_eq!(seen.collect::<Vec<_>>(), expected);
    }
}

/// Publishes a number of this name after each update.
struct Named(&'static str);

impl Observer for Named {
    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        run.publish(self.0, 1.0);
        Ok(ControlFlow::Continue(()))
    }
}

#[test]
fn a_number_cannot_have_the_name_of_a_field_of_a_report() {
    for name in ["loss", "step", "metric"] {
        let error = trainer(2).fit(&images(), Named(name)).unwrap_err().to_string();
        assert!(error.starts_with(&format!("name of a published number is {name}; ")), "{error}");
    }
    trainer(2).fit(&images(), Named("my/loss")).unwrap();
}

/// Records the step of the checkpoint `run` when values arrive.
struct Looks<'a>(&'a TempDir, Vec<(u64, Option<u64>)>);

impl Observer for Looks<'_> {
    fn on_published(&mut self, run: &Run<'_>, _: &[Published]) -> Result<()> {
        self.1.push((run.step(), saved(self.0, "run")));
        Ok(())
    }
}

/// Otherwise a run that is killed before would lose the values: it would not repeat the step.
#[test]
fn a_step_is_saved_after_its_values_reached_all_observers() {
    let temp = TempDir::new().unwrap();
    let save = SaveEvery::steps(1, temp.path().join("run"));
    let mut looks = Looks(&temp, Vec::new());
    trainer(3).fit(&images(), (save, Named("a/metric"), &mut looks)).unwrap();
    assert_eq!(looks.1, [(1, None), (2, Some(1)), (3, Some(2))]);
    assert_eq!(saved(&temp, "run"), Some(3));
}

#[test]
fn a_held_out_loss_that_a_stop_prevents_is_published_by_the_resumed_run() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("metrics.jsonl");
    let (images, mut run, mut seen) = (images(), trainer(4), Scripted::default());
    let mut fit = |stop| {
        let screen = Arc::new(Screen::default());
        let shows = Recorder { frontend: Some(Arc::clone(&screen)), ..Recorder::default() };
        let stop_at = on_metrics(|metrics| {
            screen.stop.store(metrics.step == stop, Ordering::SeqCst);
            Ok(())
        });
        let loss = HeldOutLoss::steps(2, &images);
        run.fit(&images, (loss, &mut seen, shows, stop_at, MetricsFile::new(&path))).unwrap();
        seen.numbers(HeldOutLoss::NAME).into_iter().map(|(step, _)| step).collect::<Vec<_>>()
    };
    assert_eq!(fit(2), [0; 0]);
    assert_eq!(fit(4), [2]);
    assert_eq!(fit(0), [2, 4]);
    // The observer does not know that the loss was published, but the file does.
    assert_eq!(fit(0), [2, 4, 4]);
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<_> = text.lines().filter(|line| line.contains("held_out/loss\"")).collect();
    assert!(lines.len() == 2 && lines[1].contains("\"step\":4"), "{lines:?}");
}

#[test]
fn published_numbers_have_their_own_lines_in_the_file_of_metrics() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("metrics.jsonl");
    let mut run = trainer(4);
    let source = |values| Scripted { values, ..Scripted::default() };
    let stop = Recorder { break_at: Some(3), ..Recorder::default() };
    run.fit(&images(), (MetricsFile::new(&path), source(vec![0.5, 0.25, 1.0]), stop)).unwrap();
    let later = fs::read_to_string(&path).unwrap() + "{\"a/metric\":9.0,\"step\":4}\n";
    fs::write(&path, later).unwrap();
    run.fit(&images(), (source(vec![0.0, 0.0, 0.0, 2.0]), MetricsFile::new(&path))).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let numbers: Vec<&str> = text.lines().filter(|line| line.contains("a/metric")).collect();
    let expected = [(0.5, 1), (0.25, 2), (1.0, 3), (2.0, 4)];
    assert_eq!(
        numbers,
        expected.map(|(m, step)| format!("{{\"a/metric\":{m:?},\"step\":{step}}}"))
    );
    // The other lines are those of the reports, and the only ones with a loss.
    let losses = MetricsFile::losses(&path).unwrap();
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [2, 4]);
    assert_eq!(text.lines().count(), 6);
}

#[test]
fn a_grid_is_published_as_the_picture_in_its_file() {
    let temp = TempDir::new().unwrap();
    let grid = SampleGrid::steps(2, temp.path()).count(3);
    let mut seen = Scripted::default();
    trainer(3).fit(&images(), (&mut seen, grid.clone())).unwrap();
    assert_eq!(seen.seen.iter().map(|p| p.step).collect::<Vec<_>>(), [2, 3]);
    for published in seen.seen {
        let Value::Picture(picture) = published.value else { panic!("not a picture") };
        assert_eq!(picture.png, fs::read(grid.path(published.step)).unwrap());
        assert_eq!((picture.width, picture.height, picture.channels), (70, 70, 1));
    }
}

/// The noised images of a call of an objective, and the factor by which the network multiplied them.
#[derive(Debug, Clone, PartialEq)]
struct Call {
    x_0: Vec<Vec<f32>>,
    x_t: Vec<f32>,
    eps: Vec<f32>,
    t: Vec<u32>,
    classes: Option<Vec<u32>>,
    factor: f32,
}

/// Records its calls. The loss is the mean timestep or the usual loss.
#[derive(Debug, Clone, Default)]
struct Spy {
    calls: Arc<Mutex<Vec<Call>>>,
    times: bool,
}

impl Objective for Spy {
    fn loss(&self, batch: &Noised<'_>, output: &Output) -> Result<(Tensor, Output)> {
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (x_t, t) = (flat(&batch.x_t), batch.t.to_vec1::<u32>()?);
        let factor = flat(&output.prediction)[0] / x_t[0];
        let (x_0, eps) = (batch.x_0.flatten_from(1)?.to_vec2()?, flat(&batch.eps));
        let classes = batch.classes.as_ref().map(Tensor::to_vec1).transpose()?;
        let mean = t.iter().map(|&t| t as f32).sum::<f32>() / t.len() as f32;
        self.calls.lock().unwrap().push(Call { x_0, x_t, eps, t, classes, factor });
        let (loss, gradient) = ObjectiveConfig::default().loss(batch, output)?;
        Ok((if self.times { Tensor::new(mean, &Device::Cpu)? } else { loss }, gradient))
    }
}

#[test]
fn the_held_out_loss_is_at_even_timesteps_and_the_same_noise_each_time() {
    let spy = Spy { times: true, ..Spy::default() };
    let config = TrainConfig {
        optimizer: AdamConfig::adam(0.1),
        ema: Some(EmaConfig { decay: 0.9, warmup: false }),
        ..config(2)
    };
    let builder = Trainer::builder(Scale).config(config).objective(spy.clone());
    let mut trainer = builder.build().unwrap();
    let images = images().with_labels((0..10).collect()).unwrap();
    let mut seen = Scripted::default();
    trainer.fit(&images, (HeldOutLoss::steps(1, &images), &mut seen)).unwrap();

    // 70 pairs in batches of 2, and one of 1 if the number of pairs of a quartile is odd.
    let calls = spy.calls.lock().unwrap();
    let half = calls.len() / 2;
    let (first, second) = (&calls[1..half], &calls[half + 1..]);
    for (a, b) in first.iter().zip(second) {
        assert_eq!((&a.x_t, &a.eps, &a.t), (&b.x_t, &b.eps, &b.t));
    }
    // The weights are the averaged ones.
    let average = trainer.ema().unwrap().averages()["scale"].to_vec1::<f32>().unwrap()[0];
    let weight = trainer.vars()["scale"].to_vec1::<f32>().unwrap()[0];
    assert!((average - weight).abs() > 0.01, "{average}, {weight}");
    assert!(second.iter().all(|call| (call.factor - average).abs() < 1e-5), "{average}");
    assert!(first.iter().all(|call| (call.factor - average).abs() > 1e-3), "{average}");

    let times: Vec<u32> = second.iter().flat_map(|call| call.t.clone()).collect();
    assert!(times.len() == 70 && times[0] <= 14 && times[69] >= 985, "{times:?}");
    // 1000 / 70 is 14.3.
    assert!(times.windows(2).all(|pair| (14..=15).contains(&(pair[1] - pair[0]))), "{times:?}");
    let mean = |times: &[u32]| f64::from(times.iter().sum::<u32>()) / times.len() as f64;
    let close = |name: &str, times: &[u32]| {
        for (step, value) in seen.numbers(name) {
            assert!((value - mean(times)).abs() < 1e-4, "{name} at step {step}: {value}");
        }
        assert_eq!(seen.numbers(name).len(), 2, "{name}");
    };
    close("held_out/loss", &times);
    for quartile in 0..4 {
        let range = quartile * 250..(quartile + 1) * 250;
        let times: Vec<u32> = times.iter().copied().filter(|t| range.contains(t)).collect();
        close(&format!("held_out/loss_q{quartile}"), &times);
    }

    // Every image appears with its class seven times, each time with other noise.
    let mut count = [0; 10];
    for (x_0, class) in
        second.iter().flat_map(|call| call.x_0.iter().zip(call.classes.as_ref().unwrap()))
    {
        assert_eq!(x_0[0], (class * 16 * 7 % 251) as f32 / 127.5 - 1.0);
        count[*class as usize] += 1;
    }
    assert_eq!(count, [7; 10]);
    let eps: Vec<f64> = second.iter().flat_map(|c| c.eps.iter().map(|&e| f64::from(e))).collect();
    let distinct: std::collections::BTreeSet<u64> = eps.iter().map(|e| e.to_bits()).collect();
    assert_eq!((eps.len(), distinct.len()), (70 * 16, 70 * 16));
    let moment = |power| eps.iter().map(|e: &f64| e.powi(power)).sum::<f64>() / eps.len() as f64;
    // Four standard errors of 1120 normal numbers.
    assert!(moment(1).abs() < 0.12 && (moment(2) - 1.0).abs() < 0.17, "{}", moment(2));
}

#[test]
fn held_out_images_of_another_shape_are_refused_before_training() {
    let other = Images::new(vec![0; 18], (1, 3, 3)).unwrap();
    let mut trainer = trainer(1);
    let error = trainer.fit(&images(), HeldOutLoss::steps(1, &other)).unwrap_err().to_string();
    assert!(error.contains("shape of the held-out images is") && error.contains("as in training"));
    assert_eq!(trainer.steps(), 0);
}

#[test]
fn the_norm_of_a_layer_is_that_of_the_gradient_of_the_next_update() {
    let spy = Spy::default();
    let builder = Trainer::builder(Scale).config(config(1)).objective(spy.clone());
    let mut trainer = builder.build().unwrap();
    let batch = trainer.next_batch(&images()).unwrap();
    let norms = trainer.gradient_norms(&batch).unwrap();
    let update = trainer.step(&batch).unwrap().grad_norm.to_scalar::<f32>().unwrap();
    let calls = spy.calls.lock().unwrap();
    assert_eq!(calls[0], calls[1]);
    // The derivative of mean (w x_t - eps)² with respect to w = 0.5.
    let Call { x_t, eps, .. } = &calls[0];
    let terms = x_t.iter().zip(eps).map(|(&x, &e)| 2.0 * f64::from((0.5 * x - e) * x));
    let expected = (terms.sum::<f64>() / x_t.len() as f64).abs();
    let found = norms["scale"];
    assert_eq!(norms.len(), 1);
    assert!((found / expected - 1.0).abs() < 1e-5, "{found}, {expected}");
    assert!((found / f64::from(update) - 1.0).abs() < 1e-6, "{found}, {update}");
}

fn small(log_every: u64) -> (Trainer<small::SmallConfig>, Images) {
    let config = TrainConfig {
        accumulation: 2,
        batch_size: 4,
        log_every,
        horizontal_flip: true,
        ema: Some(EmaConfig { decay: 0.9, warmup: false }),
        ..config(3)
    };
    let images = Images::new((0..6 * 192).map(|i| (i * 7 % 251) as u8).collect(), (3, 8, 8));
    let trainer = Trainer::new(small::CONFIG, config, Diffusion::ddpm(), &Device::Cpu);
    (trainer.unwrap(), images.unwrap())
}

#[test]
fn the_norms_of_all_layers_are_published_and_make_up_the_whole_norm() {
    let (mut trainer, images) = small(1);
    let (mut seen, mut whole) = (Scripted::default(), Vec::new());
    let collect = on_metrics(|metrics| {
        whole.push((metrics.step, f64::from(metrics.grad_norm)));
        Ok(())
    });
    trainer.fit(&images, (&mut seen, collect, GradientNorms::steps(2))).unwrap();
    let norms: Vec<_> = seen.seen.iter().map(|p| (p.name.clone(), p.scalar().unwrap())).collect();
    assert!(seen.seen.iter().all(|published| published.step == 2));
    let names: Vec<&str> = norms.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"grad_norm/input") && names.contains(&"grad_norm/attention.norm"));
    // Each layer once, although most have a weight and a bias.
    assert!(names.is_sorted() && names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    let sum = norms.iter().map(|(_, norm)| norm * norm).sum::<f64>().sqrt();
    assert!((sum / whole[1].1 - 1.0).abs() < 1e-5, "{sum}, {whole:?}");
}

/// The network has dropout. After ten losses of each of the four timesteps, these are drawn by importance.
#[test]
fn observers_that_compute_do_not_change_the_run() {
    let temp = TempDir::new().unwrap();
    let end = |observed: bool| {
        let (trainer, images) = small(2);
        let config = TrainConfig {
            steps: 24,
            timesteps: TimestepSampling::Importance,
            ..trainer.config().clone()
        };
        let process = Diffusion::new(NoiseSchedule::cosine(4).unwrap(), Prediction::Velocity);
        let mut trainer = Trainer::new(small::CONFIG, config, process, &Device::Cpu).unwrap();
        let best = SaveBest::lowest(HeldOutLoss::NAME, temp.path().join("best"));
        let (halves, mut seen) = (Halves::default(), Scripted::default());
        let judge = Judge::new(&halves, &images).count(3).share(1.0);
        let loss = HeldOutLoss::steps(5, &images);
        let all = (loss, GradientNorms::steps(3), best, judge, &mut seen);
        trainer.fit(&images, observed.then_some(all)).unwrap();
        assert_eq!(!seen.numbers(Judge::SLICED).is_empty(), observed);
        let bits = |tensor: &Tensor| -> Vec<u32> {
            let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        let weights = trainer.vars().values().map(|var| bits(var)).collect::<Vec<_>>();
        let averages = trainer.ema().unwrap().averages().values().map(bits).collect::<Vec<_>>();
        (weights, averages, trainer.images_seen())
    };
    assert_eq!(end(true), end(false));
}

#[test]
fn the_checkpoint_of_the_best_value_is_kept_whatever_the_order_of_observers() {
    let temp = TempDir::new().unwrap();
    let values = [0.5, f64::NAN, 0.25, 0.75, f64::NEG_INFINITY, 0.25];
    let dir = |name: &str| temp.path().join(name);
    let source = || Scripted { values: values.into(), ..Scripted::default() };
    let mut low = SaveBest::lowest("a/metric", dir("low"));
    let mut high = SaveBest::highest("a/metric", dir("high"));
    trainer(6).fit(&images(), (&mut low, source(), &mut high)).unwrap();
    for (observer, name, value, step) in [(&low, "low", 0.25, 3), (&high, "high", 0.75, 4)] {
        let best = observer.best().unwrap();
        assert_eq!((best.value, best.step, best.metric.as_str()), (value, step, "a/metric"));
        assert_eq!(Best::read(dir(name)).unwrap().as_ref(), Some(best));
        let json = fs::read_to_string(dir(name).join("best.json")).unwrap();
        assert!(json.contains(&format!("\"value\":{value},\"step\":{step},")), "{json}");
        assert_eq!(Checkpoint::open(observer.checkpoint()).unwrap().step(), step);
        // The checkpoints before are not kept, although the run keeps two.
        assert_eq!(fs::read_dir(dir(name)).unwrap().count(), 2);
    }
    // Another name is not the metric.
    let mut other = SaveBest::lowest("other", dir("other"));
    trainer(2).fit(&images(), (source(), &mut other)).unwrap();
    assert_eq!((other.best(), Best::read(dir("other")).unwrap()), (None, None));
}

#[test]
fn the_best_value_survives_a_resume_and_not_another_run() {
    let temp = TempDir::new().unwrap();
    let (dir, checkpoint) = (temp.path().join("best"), temp.path().join("checkpoint"));
    let source = |values: &[f64]| Scripted { values: values.into(), ..Scripted::default() };
    let stop = |step| Recorder { break_at: Some(step), ..Recorder::default() };
    let best = || SaveBest::lowest("a/metric", &dir);
    let resume =
        || Trainer::resume(&checkpoint, Scale, config(9), Diffusion::ddpm(), &Device::Cpu).unwrap();
    let read = || Best::read(&dir).unwrap().map(|best| (best.value, best.step));
    let mut run = trainer(9);
    run.fit(&images(), (source(&[0.5, 0.4, 0.9]), best(), stop(3))).unwrap();
    run.save(&checkpoint).unwrap();
    // The rest of the run is lost, except for its best checkpoint.
    run.fit(&images(), (source(&[0.0, 0.0, 0.0, 0.45, 0.3]), best(), stop(5))).unwrap();
    assert_eq!(read(), Some((0.3, 5)));

    // Nothing of the repeated steps is better than before.
    resume().fit(&images(), (best(), source(&[0., 0., 0., 0.45, 0.3]), stop(5))).unwrap();
    assert_eq!(read(), Some((0.3, 5)));
    assert!(!temp.path().join("best-old").exists());

    // The run changed: an earlier step is better, and its checkpoint cannot replace a later one.
    let screen = Arc::new(Screen::default());
    let shows = Recorder { frontend: Some(Arc::clone(&screen)), ..Recorder::default() };
    resume().fit(&images(), (best(), source(&[0., 0., 0., 0.2]), shows, stop(4))).unwrap();
    assert_eq!(read(), Some((0.2, 4)));
    assert_eq!(Best::read(temp.path().join("best-old")).unwrap().unwrap().step, 5);
    let warned = screen.log.lock().unwrap().clone();
    assert!(warned.iter().any(|line| line.ends_with("its checkpoint is of a later step")));

    // A new run, or one with another number, does not continue from the best value.
    trainer(1).fit(&images(), (best(), source(&[0.8]))).unwrap();
    assert_eq!(read(), Some((0.8, 1)));
    let other = SaveBest::highest("a/metric", &dir);
    resume().fit(&images(), (other, source(&[0., 0., 0., 0.1]), stop(4))).unwrap();
    assert_eq!(read(), Some((0.1, 4)));
    assert_eq!(Best::read(temp.path().join("best-old-3")).unwrap().unwrap().value, 0.8);
}

#[test]
fn the_best_value_of_an_abandoned_change_is_put_aside() {
    let temp = TempDir::new().unwrap();
    let (dir, checkpoint) = (temp.path().join("best"), temp.path().join("checkpoint"));
    let fit = |run: &mut Trainer<Scale>, values: &[f64], stop| {
        let screen = Arc::new(Screen::default());
        let shows = Recorder { frontend: Some(Arc::clone(&screen)), ..Recorder::default() };
        let source = Scripted { values: values.into(), ..Scripted::default() };
        let stop = Recorder { break_at: Some(stop), ..Recorder::default() };
        let best = SaveBest::lowest("a/metric", &dir);
        run.fit(&images(), (best, source, stop, shows)).unwrap();
        let best = Best::read(&dir).unwrap().map(|best| (best.value, best.step));
        let warned = screen.log.lock().unwrap().iter().any(|line| line.contains("learning_rate"));
        (best, warned)
    };
    let changed = |learning_rate| {
        let config = TrainConfig { optimizer: AdamConfig::adam(learning_rate), ..config(9) };
        Trainer::builder(Scale).config(config).resume_with_changes(&checkpoint).unwrap()
    };
    let initial = TrainConfig { optimizer: AdamConfig::adam(0.1), ..config(9) };
    let mut run = Trainer::builder(Scale).config(initial).build().unwrap();
    assert_eq!(fit(&mut run, &[0.9], 3), (Some((0.9, 1)), false));
    run.save(&checkpoint).unwrap();
    // The best value from before the change remains, until the changed run has a better one.
    let better = [0.0, 0.0, 0.0, 0.5];
    assert_eq!(fit(&mut changed(1e-3), &[], 4), (Some((0.9, 1)), false));
    assert_eq!(fit(&mut changed(1e-3), &better, 4), (Some((0.5, 4)), false));
    // The changed run was killed. Another change from the same step, whose better value comes later.
    let mut run = changed(2e-4);
    assert_eq!(fit(&mut run, &[0.0, 0.0, 0.0, f64::NAN, 0.6], 5), (Some((0.6, 5)), true));
    let aside = Best::read(temp.path().join("best-old")).unwrap().unwrap();
    assert_eq!((aside.value, aside.step), (0.5, 4));
    run.save(&checkpoint).unwrap();
    assert_eq!(fit(&mut changed(2e-4), &[], 6), (Some((0.6, 5)), false));
}

#[test]
fn a_damaged_record_of_the_best_value_does_not_end_the_run() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("best");
    let mut run = trainer(9);
    let mut fit = |stop| {
        let source = Scripted { values: vec![0.5; 9], ..Scripted::default() };
        let stop = Recorder { break_at: Some(stop), ..Recorder::default() };
        run.fit(&images(), (SaveBest::lowest("a/metric", &dir), source, stop)).unwrap();
        Best::read(&dir).unwrap().map(|best| best.step)
    };
    let damage = |file: &str| fs::write(dir.join(file), "damaged").unwrap();
    assert_eq!(fit(1), Some(1));
    // The weights are not read.
    damage("checkpoint/model.safetensors");
    assert_eq!(fit(2), Some(1));
    damage("best.json");
    assert_eq!(fit(3), Some(3));
    damage("checkpoint/checkpoint.json");
    assert_eq!(fit(4), Some(4));
    assert!(temp.path().join("best-old").is_dir() && temp.path().join("best-old-2").is_dir());
}

/// The means of the bytes of both halves of each image. Records the durations of its calls.
#[derive(Clone, Default)]
struct Halves {
    calls: Arc<Mutex<Vec<Duration>>>,
    sleep: Duration,
    /// Asks the run to stop in this call.
    stop: Option<(usize, Arc<Screen>)>,
    /// Fails in this call.
    fail: Option<usize>,
}

impl Extractor for Halves {
    fn size(&self) -> usize {
        2
    }

    fn identity(&self) -> ExtractorIdentity {
        ExtractorIdentity::new("halves")
    }

    fn extract(&self, images: &Images) -> Result<Features> {
        let start = Instant::now();
        sleep(self.sleep);
        let call = self.calls.lock().unwrap().len();
        if let Some((at, screen)) = &self.stop {
            screen.stop.store(call == *at, Ordering::SeqCst);
        }
        if self.fail == Some(call) {
            self.calls.lock().unwrap().push(start.elapsed());
            return Err(Error::external("no features"));
        }
        let mut features = Features::new(2);
        let mean =
            |half: &[u8]| half.iter().map(|&byte| f32::from(byte)).sum::<f32>() / half.len() as f32;
        for image in (0..images.len()).filter_map(|index| images.get(index)) {
            let (first, second) = image.split_at(image.len() / 2);
            features.add(&[mean(first), mean(second)])?;
        }
        self.calls.lock().unwrap().push(start.elapsed());
        Ok(features)
    }
}

/// Stops the run after the step of the first published number.
struct UntilPublished(Arc<Screen>);

impl Observer for UntilPublished {
    fn on_published(&mut self, _: &Run<'_>, _: &[Published]) -> Result<()> {
        self.0.stop.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn frontends(&self) -> Vec<Arc<dyn Frontend>> {
        vec![Arc::clone(&self.0) as Arc<dyn Frontend>]
    }
}

#[test]
fn the_judged_distances_are_those_of_samples_from_training_images() {
    let (images, halves, mut seen) = (images(), Halves::default(), Scripted::default());
    let mut trainer = trainer(100_000);
    let sampling = ddpm::sample::SamplerConfig::new(Solver::ddim(), 3).clip_denoised(true);
    let judge = Judge::new(&halves, &images).count(7).share(1.0).seed(4).sampling(sampling);
    let stop = UntilPublished(Arc::default());
    trainer.fit(&images, (judge, &mut seen, stop)).unwrap();

    let sampler = sampling.sampler(trainer.diffusion()).unwrap();
    let generator = Generator::new(&sampler, (1, 4, 4), 4, &Device::Cpu);
    let model = trainer.ema_model().unwrap();
    let samples = generator.draw(&model, 7, |_| Ok(ControlFlow::Continue(()))).unwrap().unwrap();
    let [real, drawn] = [&images, &samples].map(|set| halves.extract(set).unwrap());
    let sliced = SlicedDistance::default().measure(&real, &drawn).unwrap();
    let [real, drawn] = [&real, &drawn].map(|features| Statistics::of(features).unwrap());
    let frechet = real.frechet_distance(&drawn).unwrap();
    let step = trainer.steps();
    assert_eq!(seen.numbers(Judge::SLICED), [(step, sliced)]);
    assert_eq!(seen.numbers(Judge::FRECHET), [(step, frechet)]);
}

/// Before a judgement, the time so far was within the share. This holds on a machine of any speed.
#[test]
fn samples_are_judged_within_a_share_of_the_time_and_once_per_step() {
    let images = images();
    let run = |share: f64| {
        let halves = Halves { sleep: Duration::from_millis(5), ..Halves::default() };
        let (mut seen, start) = (Scripted::default(), Instant::now());
        let slow = on_metrics(|_| {
            sleep(Duration::from_millis(4));
            Ok(())
        });
        let judge = Judge::new(&halves, &images).count(4).share(share);
        trainer(200).fit(&images, (judge, &mut seen, slow)).unwrap();
        let (total, calls) = (start.elapsed(), halves.calls.lock().unwrap().clone());
        let steps = |name| seen.numbers(name).into_iter().map(|(step, _)| step).collect::<Vec<_>>();
        let judged = steps(Judge::SLICED);
        assert!(judged.windows(2).all(|pair| pair[0] < pair[1]), "{judged:?}");
        assert_eq!(judged, steps(Judge::FRECHET));
        // The first call is that of the training images.
        assert_eq!(calls.len(), judged.len() + 1);
        let before_last: Duration = calls[..calls.len() - 1].iter().sum();
        if judged.len() > 1 {
            let allowed = total.as_secs_f64() * share;
            assert!(before_last.as_secs_f64() <= allowed, "{before_last:?}, {total:?}");
        }
        judged.len()
    };
    assert!(run(0.25) > 0);
    assert_eq!(run(1e-6), 0);
}

#[test]
fn a_judgement_that_a_stop_interrupts_is_not_published_and_the_resumed_run_judges() {
    let (images, mut run) = (images(), trainer(100_000));
    let fit = |run: &mut Trainer<Scale>, halves: Halves, screen: &Arc<Screen>| {
        let mut seen = Scripted::default();
        let judge = Judge::new(&halves, &images).count(3).share(1.0);
        let until = UntilPublished(Arc::clone(screen));
        run.fit(&images, (judge, &mut seen, until)).unwrap();
        seen.numbers(Judge::SLICED).into_iter().map(|(step, _)| step).collect::<Vec<_>>()
    };
    let screen = Arc::new(Screen::default());
    let halves = Halves { stop: Some((1, Arc::clone(&screen))), ..Halves::default() };
    assert_eq!(fit(&mut run, halves, &screen), [0; 0]);
    let stopped = run.steps();
    assert!((1..100_000).contains(&stopped));
    let judged = fit(&mut run, Halves::default(), &Arc::default());
    assert_eq!(judged, [run.steps()]);
    assert!(run.steps() > stopped);

    // A stop during the features of the training images.
    let (screen, mut run) = (Arc::new(Screen::default()), trainer(9));
    let halves = Halves { stop: Some((0, Arc::clone(&screen))), ..Halves::default() };
    assert_eq!(fit(&mut run, halves, &screen), [0; 0]);
    assert_eq!(run.steps(), 1);
}

#[test]
fn a_failure_to_judge_is_a_warning_and_wrong_settings_are_errors() {
    let images = images();
    let screen = Arc::new(Screen::default());
    let halves = Halves { fail: Some(1), ..Halves::default() };
    let judge = Judge::new(&halves, &images).count(3).share(1.0);
    let mut seen = Scripted::default();
    let until = UntilPublished(Arc::clone(&screen));
    trainer(100_000).fit(&images, (judge, &mut seen, until)).unwrap();
    let log = screen.log.lock().unwrap();
    let warnings: Vec<_> = log.iter().filter(|line| line.starts_with("warning")).collect();
    assert_eq!(warnings, ["warning: no features"]);
    assert!(!seen.numbers(Judge::SLICED).is_empty());

    let halves = Halves::default();
    let judge = || Judge::new(&halves, &images);
    for (judge, expected) in [
        (judge().count(1), "number of samples to judge is 1; it must be at least 2"),
        (judge().share(0.0), "share of the time is 0; it must be above 0, up to 1"),
        (judge().share(f64::NAN), "share of the time is NaN; it must be above 0, up to 1"),
    ] {
        let mut trainer = trainer(1);
        assert_eq!(trainer.fit(&images, judge).unwrap_err().to_string(), expected);
        assert_eq!(trainer.steps(), 0);
    }
}
