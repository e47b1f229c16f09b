//! Observers: how they compose, and the results of each observer of the library.

use std::fs;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use candle_core::{Device, Tensor};
use ddpm::data::{Dataset, ImageShape, Images};
use ddpm::eval::Generator;
use ddpm::nn::{Condition, Output};
use ddpm::observe::{LossCurve, MetricsFile, SampleGrid, SaveEvery};
use ddpm::process::Prediction;
use ddpm::train::{
    Frontend, Metrics, Noised, Objective, ObjectiveConfig, Observer, Outcome, Run, on_metrics,
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
